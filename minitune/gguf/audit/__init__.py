"""The merge audit: how much of a fine-tune each way to ship it keeps."""
