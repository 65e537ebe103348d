"""A GGUF file as the base model: its checks, its small files, and its weights in a model."""
