"""The model: quantised linears with LoRA branches, hand-written decoder layer, loss, generation.

May import: kernels, device.py, atomic_files.py, config.

Dimension letters, used in all of minitune/model:

    N  rows: the tokens of all samples, packed without padding     n  rows of one tile
    B  batch size                                                  T  tokens of a sample
    D  model width                                                 F  width of the MLP
    H  query heads        G  key/value heads                       K  width of a head
    V  vocabulary size
    r  LoRA rank          R  padded rank of a fused linear
    LoRA columns: R columns after those of x or dy; they hold scaling * x A^T or scaling * dy B
"""
