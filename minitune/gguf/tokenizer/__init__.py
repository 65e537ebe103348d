"""Tokenizers in GGUF files: written, read back, and compared with llama.cpp's own rules."""
