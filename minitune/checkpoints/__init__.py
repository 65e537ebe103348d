"""Model folders, PEFT adapters and merged models, in safetensors.

May import: kernels, device.py, atomic_files.py, config, model, memory, data.
"""
