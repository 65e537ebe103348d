"""Quantisers of IQ4_NL and IQ4_XS: four-bit indices into a table of 16 unequal steps.

    type     values   bytes of a block                                         value of q
    IQ4_NL       32   float16 d, 16 bytes of q                                 d v[q]
    IQ4_XS      256   float16 d, 2 bytes of high bits of s, 4 of low bits,     d (s - 32) v[q]
                      128 bytes of q

v is the table IQ4_VALUES. s is a number of six bits for each 32 values; its bits lie in the order
of the sub-blocks, from the lowest bit up.

The scale of 32 values x with the weights w is the best of 16 candidates. A candidate 1/d gives each
x the nearest v, and then d = sum(w v x) / sum(w v v) has the error sum(w x x) - d sum(w v x).
Without an importance, w = x^2. With an importance h, w = h sqrt(2 mean(x^2) + x^2), with the mean
of the whole block.

The searches work on columns of 32 values (columns.py), and have no compiled steps.
"""

import functools

import torch
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

from minitune.gguf.quantization.columns import (
    SMALLEST_PEAK,
    column_sums,
    rounded_sqrt,
    signed_peak,
)
from minitune.gguf.quantization.k_searches import EAGER_STEPS, Steps
from minitune.gguf.quantization.simple_blocks import (
    BlockQuantizer,
    float16_bytes,
    inverse_or_zero,
    pack_levels,
)
from minitune.kernels.ggml_reference import IQ4_VALUES

SUB_BLOCK = 32  # values with one scale
TRIES = range(-7, 8)  # a try n maps the largest |x| to n - 127
HALF_STEPS = 255  # the table is constant between multiples of 1/2, from -127.5 to 127.5


def quantize_iq4_nl(
    blocks: Tensor,
    importance: Tensor | None,
    row_mean_square: Tensor | None,
    steps: Steps = EAGER_STEPS,
) -> Tensor:
    """Return IQ4_NL blocks."""
    values = blocks.t().contiguous()
    scales = _best_scales(values, _weights(values, importance, 1))
    levels = _look_up(1, values, inverse_or_zero(scales))
    return torch.cat([float16_bytes(scales[:, None]), *pack_levels(levels.t(), bits=4)], 1)


def quantize_iq4_xs(
    blocks: Tensor,
    importance: Tensor | None,
    row_mean_square: Tensor | None,
    steps: Steps = EAGER_STEPS,
) -> Tensor:
    """Return IQ4_XS blocks: the scale of largest magnitude becomes -32 d."""
    count = len(blocks)
    parts = blocks.shape[1] // SUB_BLOCK
    values = blocks.view(-1, SUB_BLOCK).t().contiguous()
    scales = _best_scales(values, _weights(values, importance, parts)).view(count, parts)
    unit = signed_peak(scales.t())[:, None] / scales.new_tensor(-32.0)
    steps = (scales * inverse_or_zero(unit)).round_().clamp_(-32, 31)
    levels = _look_up(1, values, inverse_or_zero(unit * steps).view(-1))
    nibbles = pack_levels(levels.t(), bits=4)[0].view(count, -1)
    return torch.cat([float16_bytes(unit), _packed_scales(steps), nibbles], 1)


def _packed_scales(steps: Tensor) -> Tensor:
    """Return the six bytes (N, 6) of eight scales (N, 8) from -32 to 31."""
    codes = steps.add(32).to(torch.uint8)
    pairs = (codes & 15).view(-1, 4, 2)
    high = (codes >> 4).view(-1, 2, 4)
    bits_of_four = high[..., 0] | (high[..., 1] << 2) | (high[..., 2] << 4) | (high[..., 3] << 6)
    return torch.cat([bits_of_four, pairs[..., 0] | (pairs[..., 1] << 4)], 1)


def _weights(values: Tensor, importance: Tensor | None, parts: int) -> Tensor:
    """Return the weights (32, N parts) of the errors of values (32, N parts).

    importance: (N, 32 parts), or None.
    parts: sub-blocks of a block.
    """
    squares = values.square()
    if importance is None:
        return squares
    in_order = squares.view(SUB_BLOCK, -1, parts).permute(2, 0, 1).reshape(parts * SUB_BLOCK, -1)
    spread = column_sums(in_order.clone()) * (2.0 / len(in_order))
    columns = importance.reshape(-1, SUB_BLOCK).t()
    return rounded_sqrt(squares.add_(spread.repeat_interleave(parts))).mul_(columns)


def _best_scales(values: Tensor, weights: Tensor) -> Tensor:
    """Return the best scale (S,) of each column of values (32, S), with weights (32, S)."""
    peak = signed_peak(values)
    empty = peak.abs() < SMALLEST_PEAK
    peak = peak.masked_fill(empty, 1.0)  # every inverse is finite
    lowest = float(IQ4_VALUES[0])
    sum_xv, sum_vv = _sums(values, weights, (peak / peak.new_tensor(-lowest)).reciprocal_())
    scale = (sum_xv / sum_vv).masked_fill_(sum_vv <= 0, 0.0)
    best = scale * sum_xv
    for step in TRIES:
        inverse = torch.full_like(peak, step + lowest).div_(peak)
        sum_xv, sum_vv = _sums(values, weights, inverse)
        better = (sum_vv > 0) & (sum_xv * sum_xv > best * sum_vv)
        scale = torch.where(better, sum_xv / sum_vv, scale)
        best = torch.where(better, scale * sum_xv, best)
    return scale.masked_fill_(empty, 0.0)


def _sums(values: Tensor, weights: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum(w v x) and sum(w v v) of the columns, with v nearest to x * inverse."""
    nearest = _look_up(0, values, inverse)
    weighted = weights * nearest
    return column_sums(weighted * values), column_sums(nearest.mul_(weighted))


def _look_up(table: int, values: Tensor, inverse: Tensor) -> Tensor:
    """Return the nearest value (table 0) or its index (table 1) of each of values * inverse."""
    doubled = (values * (2.0 * inverse)).floor_().clamp_(-HALF_STEPS, HALF_STEPS)
    places = doubled.add_(HALF_STEPS).to(torch.int32).view(-1)
    return _tables(values.device)[table].index_select(0, places).view(values.shape)


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the nearest of IQ4_VALUES to n / 2, and its index, for n from -255 to 255.

    The middle between two values is a multiple of 1/2 and belongs to the upper one, so all numbers
    from n / 2 up to (n + 1) / 2 share a value.
    """
    values = torch.tensor(IQ4_VALUES)
    doubled = torch.arange(-HALF_STEPS, HALF_STEPS + 1)
    indices = torch.bucketize(doubled, values[1:] + values[:-1], right=True)
    return values[indices].float().to(device), indices.to(torch.int8).to(device)


BLOCK_QUANTIZERS: dict[GGMLType, BlockQuantizer] = {
    GGMLType.IQ4_NL: quantize_iq4_nl,
    GGMLType.IQ4_XS: quantize_iq4_xs,
}
