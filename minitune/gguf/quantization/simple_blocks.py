"""Quantisers of the types with one scale for 32 values: Q8_0.

    type   bytes of a block                        value of q
    Q8_0   float16 d, 32 signed bytes q            d q

All arithmetic is ggml's, in float32 and in ggml's order, so the bytes are ggml's. The quantised
values use the scale before its rounding to float16.
"""

from collections.abc import Callable

import torch
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

BELOW_HALF = 0.49999997  # the largest float32 below 0.5

# (blocks (N, width of a block) float32, importance (N, width of a block) float32 or None,
# mean square of the block's row (N, 1) float32 or None) -> bytes (N, bytes of a block) uint8
BlockQuantizer = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


def quantize_q8_0(
    blocks: Tensor, importance: Tensor | None, row_mean_square: Tensor | None
) -> Tensor:
    """Return Q8_0 blocks: d = max|x| / 127, q = round(x / d), halves away from zero."""
    scale = blocks.abs().amax(1, keepdim=True).div_(blocks.new_tensor(127.0))
    scaled = blocks * _inverse(scale)
    # Adding 0.5 would round the largest value below a half up, too.
    scaled += torch.copysign(blocks.new_tensor(BELOW_HALF), scaled)
    return torch.cat([float16_bytes(scale), scaled.to(torch.int8).view(torch.uint8)], 1)


def _inverse(scale: Tensor) -> Tensor:
    """Return 1 / scale, and zero for scales too small to have an inverse."""
    inverse = scale.reciprocal()
    return inverse.masked_fill_(inverse.isinf(), 0.0)


def float16_bytes(values: Tensor) -> Tensor:
    """Return the bytes (N, 2 C) of float32 values (N, C) as float16."""
    return values.to(torch.float16).view(torch.uint8)


BLOCK_QUANTIZERS: dict[GGMLType, BlockQuantizer] = {GGMLType.Q8_0: quantize_q8_0}
