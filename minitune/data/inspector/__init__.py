"""The samples and the numbers of a dataset, for people: text and HTML."""
