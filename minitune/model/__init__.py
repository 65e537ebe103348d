"""The model: NF4 linears with LoRA branches, the hand-written decoder layer, loss and generation.

decoder_layer.py opens with the legend of the dimension letters (N, D, H ...).
May import: kernels, device.py, atomic_files.py, config.
"""
