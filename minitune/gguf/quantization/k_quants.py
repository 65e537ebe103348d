"""Quantisers of the K types: 256 weights a block, with scales of the sub-blocks' scales.

    type   bytes of a block                                                  value of level L
    Q2_K   16 bytes (4-bit scale s, 4-bit minimum m), 64 levels, d, dmin     d s L - dmin m
    Q3_K   32 high bits, 64 low bits, 12 bytes of 6-bit scales s, d          d (s - 32) (L - 4)
    Q4_K   d, dmin, 12 bytes of 6-bit scales s and minimums m, 128 levels    d s L - dmin m
    Q5_K   d, dmin, 12 bytes as Q4_K, 32 high bits, 128 low bits             d s L - dmin m
    Q6_K   128 low bits, 64 high bits, 16 signed bytes s, d                  d s (L - 32)

d and dmin are float16. Q4_K and Q5_K have 8 sub-blocks of 32 weights, the others 16 of 16.

A block is quantised in three stages:

1. A search finds a scale, or a scale and a minimum, for each sub-block (k_searches.py). It
   minimises a sum of w error^2. Without an importance, w favours large weights:

       Q2_K         w = |W|, and the sum is of w |error|
       Q4_K, Q5_K   w = sqrt(mean W^2 of the sub-block) + |W|
       Q3_K, Q6_K   w = W^2

   With an importance h, the mean square of a weight's input, h error^2 is the error of the layer's
   output. ggml takes w = h sqrt(k mean W^2 + W^2) with the mean of the block, k = 1 for Q2_K and
   k = 2 for Q3_K, Q4_K and Q5_K, and w = h for Q6_K.
2. The scales of a block become integers times d; the minimums become integers times dmin.
3. The levels are rounded again, with d and dmin as float16 holds them.

Sub-blocks whose integer scale is 0 keep the levels of the search, as in ggml. The levels do not
change the values, because the scale is 0.

On the CPU, chunks of 2^18 values are fastest, one thread a chunk: larger ones leave the cache, and
smaller ones wait for PyTorch's dispatch. On a GPU, operations on 2^23 or more values hide their
launches.
"""

from typing import NamedTuple

import torch
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

from minitune.gguf.quantization import k_packing as packing
from minitune.gguf.quantization.columns import (
    SMALLEST_PEAK,
    column_sums,
    columns,
    rounded_sqrt,
    signed_peak,
)
from minitune.gguf.quantization.k_searches import (
    EAGER_STEPS,
    IMPORTANCE_OFFSETS,
    Steps,
    SubBlocks,
    descend,
    fit_affine,
    fit_symmetric,
    fit_unsigned,
    inverse_scale,
    symmetric_levels,
)
from minitune.gguf.quantization.simple_blocks import BlockQuantizer, float16_bytes

BLOCK = 256  # weights


class AffineType(NamedTuple):
    """A type with a scale and a minimum for each sub-block."""

    size: int  # weights of a sub-block
    levels: int  # largest level
    scale_levels: int  # largest integer scale and minimum
    offsets: tuple[float, float, int]  # first, step and number of the trials without an importance


Q2_K = AffineType(16, 3, 15, (-0.5, 0.1, 16))
Q4_K = AffineType(32, 15, 63, (-1.0, 0.1, 21))
Q5_K = AffineType(32, 31, 63, (-0.5, 0.1, 16))


class AffineBlocks(NamedTuple):
    """Parts of quantised blocks: d and dmin (blocks, 1) float32, otherwise uint8."""

    scale: Tensor
    minimum: Tensor
    scales: Tensor  # (blocks, sub-blocks)
    minimums: Tensor  # (blocks, sub-blocks)
    levels: Tensor  # (blocks, 256)


def importance_weights(blocks: Tensor, importance: Tensor, factor: int) -> Tensor:
    """Return h sqrt(factor mean(W^2) + W^2), with the mean over the block, not over the row."""
    mean_square = column_sums(columns(blocks.square(), BLOCK)) * (factor / BLOCK)
    return importance * rounded_sqrt(mean_square[:, None] + blocks.square())


def round_to_float16(values: Tensor) -> Tensor:
    """Return float32 values that float16 holds."""
    return values.to(torch.float16).float()


def per_sub_block(values: Tensor) -> Tensor:
    """Return values (sub-blocks of a block, blocks) in the order of the columns (S,)."""
    return values.t().reshape(-1)


def block_levels(levels: Tensor) -> Tensor:
    """Return levels (n, S) of columns as bytes (blocks, 256)."""
    return levels.to(torch.uint8).t().reshape(-1, BLOCK)


def scale_bytes(integers: Tensor) -> Tensor:
    """Return integers (sub-blocks of a block, blocks) as bytes (blocks, sub-blocks)."""
    return integers.to(torch.int16).to(torch.uint8).t().contiguous()


def nearest_integers(values: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return (peak / levels, round(W levels / peak)) for columns of nonnegative values."""
    peak = values.amax(0).clamp_(min=0.0).add_(0.0)
    inverse = inverse_scale(levels, peak)
    return peak / torch.full_like(peak, levels), (values * inverse).round_().clamp_(0, levels)


def signed_integers(values: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return (d, L) with L = round(W / d) in [-levels, levels - 1]; the peak gets -levels.

    Both are zero for columns of zeros.
    """
    peak = signed_peak(values)
    zero = peak.abs() < SMALLEST_PEAK
    inverse = inverse_scale(-levels, peak).masked_fill_(zero, 0.0)
    return inverse.reciprocal().masked_fill_(zero, 0.0), symmetric_levels(values, inverse, levels)


def quantize_affine(
    blocks: Tensor, importance: Tensor | None, kind: AffineType, steps: Steps
) -> AffineBlocks:
    """Return the parts of Q2_K, Q4_K or Q5_K blocks."""
    values = columns(blocks, kind.size)
    narrow = kind.size == Q2_K.size
    offsets = kind.offsets
    if importance is not None:
        weights = columns(importance_weights(blocks, importance, 1 if narrow else 2), kind.size)
        offsets = IMPORTANCE_OFFSETS
    elif narrow:
        weights = values.abs()
    else:
        mean_square = column_sums(values.square()) / kind.size
        weights = rounded_sqrt(mean_square) + values.abs()
    sub_blocks = SubBlocks(values, weights, weights * values)
    absolute = narrow and importance is None
    fit = fit_affine(sub_blocks, kind.levels, offsets, absolute, steps)
    pair = torch.stack([fit.scale, -fit.minimum]).view(-1, BLOCK // kind.size)
    pair = pair.t().contiguous()  # the scales of all blocks, then the minimums of all blocks
    if importance is None:
        unit, integers = nearest_integers(pair, kind.scale_levels)
    else:
        totals = columns(column_sums(weights), BLOCK // kind.size)
        unit, integers = fit_unsigned(
            pair, torch.cat([totals, totals], 1), kind.scale_levels, steps
        )
    unit = round_to_float16(unit)
    scale, offset = per_sub_block(integers * unit).view(2, -1)
    zero = scale == 0
    values.add_(torch.where(zero, -fit.base, offset))
    values.div_(torch.where(zero, 1.0, scale)).mul_(torch.where(zero, fit.inverse, 1.0))
    levels = block_levels(values.round_().clamp_(0, kind.levels))
    return AffineBlocks(*unit.view(2, -1, 1).unbind(), *scale_bytes(integers).chunk(2), levels)


def quantize_q2_k(
    blocks: Tensor,
    importance: Tensor | None,
    row_mean_square: Tensor | None,
    steps: Steps = EAGER_STEPS,
) -> Tensor:
    """Return Q2_K blocks. The mean square of the row is not used: ggml takes the block's."""
    parts = quantize_affine(blocks, importance, Q2_K, steps)
    return torch.cat(
        [
            parts.scales | parts.minimums << 4,
            packing.pack_two_bits(parts.levels),
            float16_bytes(parts.scale),
            float16_bytes(parts.minimum),
        ],
        1,
    )


def quantize_q3_k(
    blocks: Tensor,
    importance: Tensor | None,
    row_mean_square: Tensor | None,
    steps: Steps = EAGER_STEPS,
) -> Tensor:
    """Return Q3_K blocks.

    Without an importance, w = W^2. A descent finds the levels, and the largest of the scales
    becomes -32 d. With an importance, the symmetric search finds the scales and d.
    """
    values = columns(blocks, 16)
    if importance is None:
        peak, weights = signed_peak(values), values.square()
        zero = peak.abs() < SMALLEST_PEAK
        start = symmetric_levels(values, inverse_scale(-4, peak).masked_fill_(zero, 0.0), 4)
        sub_blocks = SubBlocks(values, weights, weights * values)
        scale, found = descend(start, sub_blocks, -4, 3, steps)
        unit, integers = signed_integers(columns(scale.masked_fill_(zero, 0.0), 16), 32)
        integers.masked_fill_(unit == 0, -32)
    else:
        weights = columns(importance_weights(blocks, importance, 2), 16)
        fit = fit_symmetric(SubBlocks(values, weights, weights * values), 4, steps)
        zero, found = fit.score.isinf(), symmetric_levels(values, fit.inverse, 4)
        scales, totals = columns(fit.scale, 16), columns(column_sums(weights), 16)
        whole = fit_symmetric(SubBlocks(scales, totals, totals * scales), 32, steps)
        unit = whole.scale
        integers = symmetric_levels(scales, whole.inverse, 32)
        integers.masked_fill_(whole.score.isinf(), -32)
    unit = round_to_float16(unit)
    scale = per_sub_block(integers * unit)
    unscaled = scale == 0
    levels = values.div_(scale.masked_fill(unscaled, 1.0)).round_().clamp_(-4, 3)
    levels.lerp_(found, unscaled.float())
    levels.add_(torch.where(zero, 0.0, 4.0))
    high, low = packing.pack_three_bits(block_levels(levels))
    scales = packing.pack_scales(scale_bytes(integers + 32))
    return torch.cat([high, low, scales, float16_bytes(unit[:, None])], 1)


def quantize_q6_k(
    blocks: Tensor,
    importance: Tensor | None,
    row_mean_square: Tensor | None,
    steps: Steps = EAGER_STEPS,
) -> Tensor:
    """Return Q6_K blocks: w = W^2, or the importance as it is. The largest scale is -128 d.

    A block is zero if all its scales are below 1e-15. A sub-block of zeros has the levels 0.
    """
    values = columns(blocks, 16)
    weights = values.square() if importance is None else columns(importance, 16)
    fit = fit_symmetric(SubBlocks(values, weights, weights * values), 32, steps)
    unit, integers = signed_integers(columns(fit.scale, 16), 128)
    zero = fit.score.isinf() | per_sub_block((unit == 0).expand(16, -1))
    unit = round_to_float16(unit)
    scale = per_sub_block(integers * unit)
    unscaled = scale == 0
    inverse = fit.inverse.masked_fill(zero, 0.0)
    values.div_(torch.where(unscaled, 1.0, scale)).mul_(torch.where(unscaled, inverse, 1.0))
    levels = values.round_().clamp_(-32, 31).add_(torch.where(zero, 0.0, 32.0))
    low, high = packing.pack_six_bits(block_levels(levels))
    return torch.cat([low, high, scale_bytes(integers), float16_bytes(unit[:, None])], 1)


def quantize_q4_k(
    blocks: Tensor,
    importance: Tensor | None,
    row_mean_square: Tensor | None,
    steps: Steps = EAGER_STEPS,
) -> Tensor:
    """Return Q4_K blocks."""
    parts = quantize_affine(blocks, importance, Q4_K, steps)
    return torch.cat([*_affine_head(parts), packing.pack_four_bits(parts.levels)], 1)


def quantize_q5_k(
    blocks: Tensor,
    importance: Tensor | None,
    row_mean_square: Tensor | None,
    steps: Steps = EAGER_STEPS,
) -> Tensor:
    """Return Q5_K blocks."""
    parts = quantize_affine(blocks, importance, Q5_K, steps)
    return torch.cat([*_affine_head(parts), *packing.pack_five_bits(parts.levels)], 1)


def _affine_head(parts: AffineBlocks) -> tuple[Tensor, Tensor, Tensor]:
    """Return what stands before the levels in Q4_K and Q5_K: d, dmin, and their 6-bit factors."""
    return (
        float16_bytes(parts.scale),
        float16_bytes(parts.minimum),
        packing.pack_scales_and_minimums(parts.scales, parts.minimums),
    )


K_QUANTIZERS: dict[GGMLType, BlockQuantizer] = {
    GGMLType.Q2_K: quantize_q2_k,
    GGMLType.Q3_K: quantize_q3_k,
    GGMLType.Q4_K: quantize_q4_k,
    GGMLType.Q5_K: quantize_q5_k,
    GGMLType.Q6_K: quantize_q6_k,
}
