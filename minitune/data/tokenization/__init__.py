"""The tokenizer of a model folder."""
