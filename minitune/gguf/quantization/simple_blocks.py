"""Quantisers of the types with one scale for 32 values.

    type   bytes of a block                                        value of q
    Q8_0   float16 d, 32 signed bytes q                            d q
    Q4_0   float16 d, 16 bytes of q                                d (q - 8)
    Q4_1   float16 d, float16 m, 16 bytes of q                     d q + m
    Q5_0   float16 d, 4 bytes of high bits, 16 bytes of low bits   d (q - 16)
    Q5_1   float16 d, float16 m, 4 bytes of high bits, 16 of low   d q + m

Byte j of the 16 holds the low four bits of value j and, above them, those of value j + 16. Bit j of
the high bits, as a little-endian number, is the fifth bit of value j.

All arithmetic is ggml's, in float32 and in ggml's order, so the bytes are ggml's. The quantised
values use the scale before its rounding to float16. A divisor is a tensor, because PyTorch on a GPU
multiplies by the reciprocal of a Python number.
"""

from collections.abc import Callable
from functools import partial

import torch
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

from minitune.gguf.quantization.columns import columns, rounded_sqrt
from minitune.gguf.quantization.k_searches import (
    EAGER_STEPS,
    IMPORTANCE_OFFSETS,
    Steps,
    SubBlocks,
    affine_levels,
    fit_affine,
    fit_symmetric,
    symmetric_levels,
)

BLOCK = 32  # values
BELOW_HALF = 0.49999997  # the largest float32 below 0.5
LOW_BITS = 0x0F0F0F0F0F0F0F0F  # of eight bytes
FIRST_BITS = 0x0101010101010101
GATHER_BITS = 0x0102040810204080  # moves bit 0 of byte j to bit 56 + j of the product

# (blocks (N, width of a block) float32, importance (N, width of a block) float32 or None,
# mean square of the block's row (N, 1) float32 or None, steps of the searches)
# -> bytes (N, bytes of a block) uint8
BlockQuantizer = Callable[[Tensor, Tensor | None, Tensor | None, Steps], Tensor]


def quantize_q8_0(
    blocks: Tensor,
    importance: Tensor | None,
    row_mean_square: Tensor | None,
    steps: Steps = EAGER_STEPS,
) -> Tensor:
    """Return Q8_0 blocks: d = max|x| / 127, q = round(x / d), halves away from zero.

    The importance changes nothing.
    """
    scale = blocks.abs().amax(1, keepdim=True).div_(blocks.new_tensor(127.0))
    scaled = blocks * inverse_or_zero(scale)
    # Adding 0.5 would round the largest value below a half up, too.
    scaled.add_(scaled.sign(), alpha=BELOW_HALF)
    return torch.cat([float16_bytes(scale), scaled.to(torch.int8).view(torch.uint8)], 1)


def quantize_symmetric(
    blocks: Tensor,
    importance: Tensor | None,
    row_mean_square: Tensor | None,
    steps: Steps = EAGER_STEPS,
    *,
    bits: int,
) -> Tensor:
    """Return Q4_0 or Q5_0 blocks.

    Without an importance, d = x / -2^(bits - 1) for the x with the largest magnitude.
    """
    if importance is None:
        scale, levels = _symmetric_by_peak(blocks, bits)
    else:
        weighted = _weighted_columns(blocks, importance, row_mean_square)
        scale, levels = _symmetric_by_search(weighted, bits, steps)
    return torch.cat([float16_bytes(scale), *pack_levels(levels, bits)], 1)


def quantize_with_minimum(
    blocks: Tensor,
    importance: Tensor | None,
    row_mean_square: Tensor | None,
    steps: Steps = EAGER_STEPS,
    *,
    bits: int,
) -> Tensor:
    """Return Q4_1 or Q5_1 blocks.

    Without an importance, m = min x and d = (max x - m) / (2^bits - 1).
    """
    if importance is None:
        ends, levels = _affine_by_ends(blocks, bits)
    else:
        weighted = _weighted_columns(blocks, importance, row_mean_square)
        ends, levels = _affine_by_search(weighted, bits, steps)
    return torch.cat([float16_bytes(ends), *pack_levels(levels, bits)], 1)


def _symmetric_by_peak(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return d (N, 1) and the levels (N, 32) with fractions."""
    half = 2.0 ** (bits - 1)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    peak = torch.where(high > -low, high, low)
    # The first of equal magnitudes decides. A block of zeros has the scale -0.
    _take_first_(peak, blocks, (high == -low) & (high > 0), lambda rows: rows.abs().argmax(1))
    peak.masked_fill_(peak == 0, 0.0)
    scale = peak / blocks.new_tensor(-half)
    inverse = inverse_or_zero(scale)
    # In ggml a scale whose inverse overflows makes every level zero.
    offset = torch.where((inverse == 0) & (scale != 0), 0.0, half + 0.5)
    return scale, (blocks * inverse).add_(offset).clamp_(max=2 * half - 1)


def _symmetric_by_search(blocks: SubBlocks, bits: int, steps: Steps) -> tuple[Tensor, Tensor]:
    """Return d (N, 1) and the levels (N, 32)."""
    half = 1 << (bits - 1)
    fit = fit_symmetric(blocks, half, steps)
    levels = symmetric_levels(blocks.values, fit.inverse, half).add_(half)
    levels.masked_fill_(fit.score.isinf(), 0.0)  # as ggml stores a block of zeros
    return fit.scale[:, None], levels.t()


def _affine_by_ends(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return d and m (N, 2), and the levels (N, 32) with fractions."""
    highest = 2.0**bits - 1
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    # The first of several zeros gives m its sign. The sign of d is positive.
    _take_first_(low, blocks, low == 0, lambda rows: rows.argmin(1))
    scale = (high - low).abs_().div_(blocks.new_tensor(highest))
    levels = (blocks - low).mul_(inverse_or_zero(scale)).add_(0.5).clamp_(max=highest)
    return torch.cat([scale, low], 1), levels


def _affine_by_search(blocks: SubBlocks, bits: int, steps: Steps) -> tuple[Tensor, Tensor]:
    """Return d and m (N, 2), and the levels (N, 32)."""
    highest = (1 << bits) - 1
    fit = fit_affine(blocks, highest, IMPORTANCE_OFFSETS, False, steps)
    levels = affine_levels(blocks.values, fit.inverse, fit.base, highest)
    return torch.stack([fit.scale, fit.minimum], 1), levels.t()


def _weighted_columns(blocks: Tensor, importance: Tensor, row_mean_square: Tensor) -> SubBlocks:
    """Return the columns of a search with the weights h sqrt(mean x^2 of the row + x^2)."""
    values = columns(blocks, BLOCK)
    weights = rounded_sqrt(values.square().add_(row_mean_square.t()))
    weights.mul_(columns(importance, BLOCK))
    return SubBlocks(values, weights, weights * values)


def _take_first_(
    found: Tensor, blocks: Tensor, tied: Tensor, position: Callable[[Tensor], Tensor]
) -> None:
    """Replace `found` (N, 1) in the blocks (N, 32) with `tied` (N, 1) by the value at a position.

    PyTorch finds positions much slower than values: 0.4 against 4 G values/s on a CPU core.
    """
    tied = tied.squeeze(1)
    if tied.any():
        rows = blocks[tied]
        found[tied] = rows.gather(1, position(rows)[:, None])


def inverse_or_zero(scale: Tensor) -> Tensor:
    """Return 1 / scale, and zero for scales too small to have an inverse."""
    inverse = scale.reciprocal()
    return inverse.masked_fill_(inverse.isinf(), 0.0)


def float16_bytes(values: Tensor) -> Tensor:
    """Return the bytes (N, 2 C) of float32 values (N, C) as float16."""
    return values.to(torch.float16).view(torch.uint8)


def pack_levels(levels: Tensor, bits: int) -> list[Tensor]:
    """Return the parts of a block that hold its levels, each (N, bytes) uint8.

    levels: numbers (N, 32) of at least 0 and below 2^bits. Fractions are dropped.
    bits: 4, or 5 for a part with the high bits before the part with the low bits.
    """
    words = levels.to(torch.int8).contiguous().view(torch.int64)  # eight levels a word
    low = words & LOW_BITS if bits == 5 else words
    nibbles = [(low[:, :2] | (low[:, 2:] << 4)).view(torch.uint8)]
    if bits == 4:
        return nibbles
    high = ((words >> 4) & FIRST_BITS) * GATHER_BITS
    return [(high >> 56).to(torch.uint8), *nibbles]


BLOCK_QUANTIZERS: dict[GGMLType, BlockQuantizer] = {
    GGMLType.Q8_0: quantize_q8_0,
    GGMLType.Q4_0: partial(quantize_symmetric, bits=4),
    GGMLType.Q4_1: partial(quantize_with_minimum, bits=4),
    GGMLType.Q5_0: partial(quantize_symmetric, bits=5),
    GGMLType.Q5_1: partial(quantize_with_minimum, bits=5),
}
