"""GGUF files: bytes, tensors and metadata, tokenizer keys.

May import: kernels, device.py, atomic_files.py, config, model, memory, data, checkpoints.
"""
