"""Searches for the scales of the K types: weights W become integer levels L and a few floats.

    name        model                   levels           used for
    affine      W = scale L + min       L in [0, N]      Q2_K, Q4_K, Q5_K; min <= 0
    symmetric   W = scale L             L in [-N, N-1]   Q6_K, Q3_K with an importance
    unsigned    W = scale L             L in [0, N]      scales of scales, with an importance
    descent     W = scale L             any              Q3_K, and the end of the unsigned search

Each search minimises a weighted error, sum of w (model - W)^2. With fixed levels, the best scale
and minimum solve linear equations. Therefore a search tries different roundings of W, solves for
the scale and the minimum, and keeps the best.

Layout: W is (n, S). A column holds the n = 16 or 32 weights of a sub-block, or the n = 8 or 16
scales of a block. Columns are independent: an operation treats all columns at once, and a
parameter of the columns is (S,).

A search repeats one step: `affine_candidate`, `symmetric_candidate` or `descent_move`. The steps
are arguments of the searches, because torch.compile fuses the 10 to 25 operations of a step into a
few loops. Compiling a step takes seconds; compiling a whole search, unrolled, would take minutes.

On the CPU, eager or fused, sums add in ggml's order, and the bytes are ggml's if S is a multiple of
32. On a GPU, sums have another order. About one block in a hundred differs, at equal errors. Blocks
of equal values differ more often, because many fits tie.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from minitune.gguf.quantization.columns import SMALLEST_PEAK, column_sums, signed_peak

IMPORTANCE_OFFSETS = (-0.9, 0.05, 37)  # of the trials of affine fits with an importance
SWEEPS = 5  # of a descent
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny  # a divisor in place of sums <= 0


class SubBlocks(NamedTuple):
    """Columns of weights, and the sums that no candidate changes."""

    values: Tensor  # W (n, S)
    weights: Tensor  # w (n, S), the weights of the errors
    weighted: Tensor  # w W (n, S)


class AffineFit(NamedTuple):
    """The best W = scale L + minimum so far, with L = round((W - base) inverse). All are (S,)."""

    scale: Tensor
    minimum: Tensor
    error: Tensor
    inverse: Tensor
    base: Tensor


class SymmetricFit(NamedTuple):
    """The best W = scale L so far, with L = round(W inverse). All are (S,)."""

    scale: Tensor
    score: Tensor  # reduction of the error against scale 0, infinite for columns of zeros
    inverse: Tensor


def inverse_scale(levels: int, peak: Tensor) -> Tensor:
    """Return levels / peak (S,), and 0 if the quotient is beyond float32.

    The quotient is rounded once: PyTorch would multiply a number by the reciprocal.
    """
    inverse = torch.full_like(peak, levels) / peak
    return inverse.masked_fill_(inverse.isinf(), 0.0)


def affine_levels(values: Tensor, inverse: Tensor, base: Tensor, levels: int) -> Tensor:
    """Return round((W - base) inverse), limited to [0, levels]."""
    return (values - base).mul_(inverse).round_().clamp_(0, levels)


def _affine_error(
    fitted: Tensor, blocks: SubBlocks, scale: Tensor, minimum: Tensor, absolute: bool
) -> Tensor:
    """Return the sums of w |scale L + min - W|, or of its square. Overwrites the levels."""
    difference = fitted.mul_(scale).add_(minimum).sub_(blocks.values)
    difference = difference.abs_() if absolute else difference.square_()
    return column_sums(difference.mul_(blocks.weights))


def affine_candidate(
    fit: AffineFit,
    blocks: SubBlocks,
    sums: tuple[Tensor, Tensor, Tensor],
    factor: Tensor,
    levels: int,
    absolute: bool,
) -> AffineFit:
    """Return the better of `fit` and the fit to the levels of one trial scale.

        L = round((W - min) factor / (highest - min)), with the minimum of the best fit so far
        D = sum(w) sum(w L^2) - sum(w L)^2
        scale = (sum(w) sum(w L W) - sum(w W) sum(w L)) / D
        min = (sum(w L^2) sum(w W) - sum(w L) sum(w L W)) / D

    A positive minimum becomes 0, and then scale = sum(w L W) / sum(w L^2).

    sums: highest value, sum of w, sum of w W of each column.
    factor: levels plus an offset; 0-dimensional.
    absolute: True to compare sums of w |error| instead of w error^2.
    """
    highest, sum_w, sum_wx = sums
    inverse = factor / (highest - fit.minimum)
    trial = affine_levels(blocks.values, inverse, fit.minimum, levels)
    weighted = blocks.weights * trial
    sum_wll = column_sums(weighted * trial)
    sum_wlx = column_sums(weighted * blocks.values)
    sum_wl = column_sums(weighted)
    determinant = sum_w * sum_wll - sum_wl * sum_wl
    scale = (sum_w * sum_wlx - sum_wx * sum_wl) / determinant
    minimum = (sum_wll * sum_wx - sum_wl * sum_wlx) / determinant
    positive = minimum > 0
    minimum = torch.where(positive, 0.0, minimum)
    scale = torch.where(positive, sum_wlx / sum_wll, scale)
    error = _affine_error(trial, blocks, scale, minimum, absolute)
    better = (determinant > 0) & (error < fit.error)
    found = AffineFit(scale, minimum, error, inverse, fit.minimum)
    return AffineFit(*(torch.where(better, new, old) for new, old in zip(found, fit, strict=True)))


def symmetric_levels(values: Tensor, inverse: Tensor, levels: int) -> Tensor:
    """Return round(W inverse), limited to [-levels, levels - 1]."""
    return (values * inverse).round_().clamp_(-levels, levels - 1)


def symmetric_candidate(
    fit: SymmetricFit, blocks: SubBlocks, peak: Tensor, factor: Tensor, levels: int
) -> SymmetricFit:
    """Return the better of `fit` and the fit to the levels of one trial scale.

        L = round(W -factor / peak)
        scale = sum(w L W) / sum(w L^2)
        error = sum(w W^2) - score, with score = sum(w L W)^2 / sum(w L^2)

    The largest score has the smallest error. The peak gets the level -levels, because the negative
    side has one level more.
    """
    inverse = -factor / peak
    trial = symmetric_levels(blocks.values, inverse, levels)
    sum_wll = column_sums((blocks.weights * trial).mul_(trial))
    sum_wlx = column_sums(trial.mul_(blocks.weighted))
    scale = sum_wlx / sum_wll
    better = (sum_wll > 0) & (sum_wlx * sum_wlx > fit.score * sum_wll)
    found = SymmetricFit(scale, scale * sum_wlx, inverse)
    return SymmetricFit(
        *(torch.where(better, new, old) for new, old in zip(found, fit, strict=True))
    )


def descent_move(
    level: Tensor,
    element: tuple[Tensor, Tensor, Tensor],
    sums: tuple[Tensor, Tensor],
    lowest: int,
    highest: int,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the better of a level and its best neighbour, and the sums with that level. All (S,).

    The other weights of the column have the scale s = sum(w L W) / sum(w L^2) over themselves. The
    neighbour is round(W / s). The score is sum(w L W)^2 / sum(w L^2) over all weights.

    element: W, w and w W of the weight that may move.
    sums: sum of w L W, sum of w L^2 of each column.

    Masks are floats, and `lerp` selects: PyTorch on the CPU does so four times as fast as with
    booleans and `where`.
    """
    value, weight, weighted = element
    sum_wlx, sum_wll = sums
    others_wlx = sum_wlx - weighted * level
    others_wll = sum_wll - (weight * level).mul_(level)
    nonzero = others_wlx.clamp(min=SMALLEST_NORMAL)
    new = (value * others_wll).div_(nonzero).round_().clamp_(lowest, highest)
    new_wlx = others_wlx + weighted * new
    new_wll = others_wll + (weight * new).mul_(new)
    accepted = (new_wlx * new_wlx).mul_(sum_wll).gt_((sum_wlx * sum_wlx).mul_(new_wll))
    accepted.mul_(torch.minimum(others_wlx, others_wll).gt_(0.0))
    accepted.mul_((new - level).ne_(0.0))
    sums = torch.lerp(sum_wlx, new_wlx, accepted), torch.lerp(sum_wll, new_wll, accepted)
    return torch.lerp(level, new, accepted), sums


class Steps(NamedTuple):
    """The steps of the searches, eager or fused."""

    affine: Callable = affine_candidate
    symmetric: Callable = symmetric_candidate
    move: Callable = descent_move


EAGER_STEPS = Steps()


@cache
def compiled_steps() -> Steps:
    """Return the steps, compiled by torch.compile at their first call. Needs a C++ compiler."""
    return Steps(*(torch.compile(step, dynamic=True) for step in EAGER_STEPS))


def fit_affine(
    blocks: SubBlocks,
    levels: int,
    offsets: tuple[float, float, int],
    absolute: bool,
    steps: Steps,
) -> AffineFit:
    """Return the best affine fit of each column; scale 0 for columns of one value <= 0.

    offsets: first offset, step and number of the offsets that are added to `levels`.
    absolute: see `affine_candidate`.

    The first fit spans the column: min = min(0, lowest), scale = (highest - min) / levels. Each
    trial starts at the minimum of the best fit so far, so the order of the trials matters.
    """
    values, weights, weighted = blocks
    highest, minimum = values.amax(0), values.amin(0).clamp_(max=0.0)
    inverse = inverse_scale(levels, highest - minimum)
    scale = inverse.reciprocal().masked_fill_(inverse == 0, 0.0)
    trial = affine_levels(values, inverse, minimum, levels)
    error = _affine_error(trial, blocks, scale, minimum, absolute)
    fit = AffineFit(scale, minimum, error, inverse, minimum.clone())  # no alias: one graph fewer
    sums = (highest, column_sums(weights.clone()), column_sums(weighted.clone()))
    first, step, count = offsets
    # ggml adds the offset before the levels; the sum of two float32 numbers rounds differently.
    factors = torch.arange(count, device=values.device) * step + first + levels
    for factor in factors.unbind():
        fit = steps.affine(fit, blocks, sums, factor, levels, absolute)
    return fit


def fit_symmetric(blocks: SubBlocks, levels: int, steps: Steps) -> SymmetricFit:
    """Return the best symmetric fit of each column over 19 trial scales; scale 0 for zeros."""
    values, weights, weighted = blocks
    peak = signed_peak(values)
    zero = peak.abs() < SMALLEST_PEAK
    inverse = inverse_scale(-levels, peak).masked_fill_(zero, 0.0)
    trial = symmetric_levels(values, inverse, levels)
    sum_wll = column_sums((weights * trial).mul_(trial))
    sum_wlx = column_sums(trial.mul_(weighted))
    scale = (sum_wlx / sum_wll).masked_fill_(sum_wll == 0, 0.0)
    fit = SymmetricFit(scale, (scale * sum_wlx).masked_fill_(zero, torch.inf), inverse)
    factors = torch.arange(-9, 10, device=values.device) * 0.1 + levels
    for index, factor in enumerate(factors.unbind()):
        if index != 9:  # the offset 0 came first
            fit = steps.symmetric(fit, blocks, peak, factor, levels)
    return fit


def descend(
    start: Tensor, blocks: SubBlocks, lowest: int, highest: int, steps: Steps
) -> tuple[Tensor, Tensor]:
    """Return (scale (S,), levels (n, S)) after up to five sweeps from the levels `start`."""
    sum_wlx = column_sums(blocks.weighted * start)
    sum_wll = column_sums((blocks.weights * start).mul_(start))
    rows, sums = [row.clone() for row in start], (sum_wlx, sum_wll)  # no views: one graph fewer
    elements = list(zip(*(tensor.unbind() for tensor in blocks), strict=True))
    for _ in range(SWEEPS):
        for row, element in enumerate(elements):
            rows[row], sums = steps.move(rows[row], element, sums, lowest, highest)
    return (sums[0] / sums[1]).masked_fill_(sums[1] <= 0, 0.0), torch.stack(rows)


def _unsigned_error(values: Tensor, weights: Tensor, inverse: Tensor, levels: float) -> Tensor:
    """Return sum(w (W - L / inverse)^2) with L = round(W inverse), at most `levels`."""
    trial = (values * inverse).round_().clamp_(max=levels)
    difference = values - trial.mul_(inverse.reciprocal())
    return column_sums((weights * difference).mul_(difference))


def fit_unsigned(
    values: Tensor, weights: Tensor, levels: int, steps: Steps
) -> tuple[Tensor, Tensor]:
    """Return (scale (S,), levels (n, S)) for columns of nonnegative values.

    Nine trial scales are compared as they are. The levels of the best are improved by a descent,
    and the scale is sum(w L W) / sum(w L^2).
    """
    peak = values.amax(0)
    zero = peak < SMALLEST_PEAK
    inverse = inverse_scale(levels, peak)
    error = _unsigned_error(values, weights, inverse, torch.inf)
    factors = torch.arange(-4, 5, device=values.device) * 0.1 + levels
    for index, factor in enumerate(factors.unbind()):
        if index != 4:  # the offset 0 came first
            trial = factor / peak
            trial_error = _unsigned_error(values, weights, trial, levels)
            better = trial_error < error
            error = torch.where(better, trial_error, error)
            inverse = torch.where(better, trial, inverse)
    start = (values * inverse.masked_fill_(zero, 0.0)).round_().clamp_(0, levels)
    blocks = SubBlocks(values, weights, weights * values)
    return descend(start, blocks, 0, levels, steps)
