"""The model: NF4 linears with LoRA branches, the hand-written decoder layer, loss and generation.

May import: kernels, device.py, atomic_files.py, config.
"""
