"""Curves of a run's records: (step, value) pairs, their moving mean, and few points of many.

A page cannot hold 100,000 points a curve. A curve is cut into bins of equal width in steps, and of
each bin the lowest and the highest value stay, so every spike is seen.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

BINS = 400  # of a thinned curve, which has at most 2 points a bin; a chart is about 1,000 px wide
MIN_SMOOTHED = 100  # records; a shorter curve is read as it is
WINDOW_SHARE = 1 / 20  # of the records in one mean
TINY = 1e-280  # a smaller value is drawn as 0: its axis would divide by numbers that are no floats
MIN_NOISE = 0.005  # mean distance from the moving mean, as a share of the curve's range


@dataclass(frozen=True)
class Curve:
    """The values of one metric.

    steps: optimizer steps in ascending order, (N,), float64.
    values: finite, (N,), float64.
    gaps: steps, ascending; the drawn line is broken between the points around each one.
    """

    steps: np.ndarray
    values: np.ndarray
    gaps: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.steps)


def curve(
    records: Iterable[Mapping[str, Any]], name: str, unit: float = 1.0, gaps: Iterable[int] = ()
) -> Curve:
    """Return the curve of a metric over the records that hold it.

    records: in the order of their steps.
    unit: the values are divided by it, such as 2**30 for GiB.
    gaps: steps without a finite value.
    """
    found = [record for record in records if name in record]
    steps = np.array([record["step"] for record in found], np.float64)
    values = np.array([record[name] for record in found], np.float64)
    known = np.isfinite(values)
    values = np.where(np.abs(values) < TINY, 0.0, values / unit)
    return Curve(steps[known], values[known], sorted(gaps))


def part_until(curve: Curve, step: float) -> Curve:
    """Return the points up to a step."""
    count = int(np.searchsorted(curve.steps, step, side="right"))
    return Curve(curve.steps[:count], curve.values[:count], curve.gaps)


def last_common_step(first: Curve, second: Curve) -> float | None:
    """Return the last step that both curves have, or None."""
    common = np.intersect1d(first.steps, second.steps)
    return float(common[-1]) if len(common) else None


def smoothed(curve: Curve) -> Curve:
    """Return the moving mean of a long and noisy curve, and any other curve as it is."""
    window = smoothing_window(curve)
    return moving_mean(curve, window) if window else curve


def smoothing_window(curve: Curve) -> int:
    """Return the number of values in a moving mean, or 0 if the curve is short or not noisy."""
    if len(curve) < MIN_SMOOTHED:
        return 0
    window = 4 * max(1, round(len(curve) * WINDOW_SHARE / 4)) + 1
    noise = np.abs(curve.values - moving_mean(curve, window).values).mean()
    return window if noise > MIN_NOISE * np.ptp(curve.values) else 0


def moving_mean(curve: Curve, window: int) -> Curve:
    """Return the weighted mean of the `window` values around each value; fewer at both ends.

    The weights fall linearly to both sides, as in a mean of means, so a spike leaves no plateau.

    window: 4 n + 1, values.
    """
    largest = np.abs(curve.values).max(initial=0) or 1.0  # sums of 1e300 would overflow
    means = curve.values / largest
    for _ in range(2):
        means = _mean_around(means, window // 4)
    # rounding must not move a mean out of the range of its values
    means = np.clip(means * largest, curve.values.min(), curve.values.max())
    return Curve(curve.steps, means, curve.gaps)


def _mean_around(values: np.ndarray, half: int) -> np.ndarray:
    """Return the mean of each value and up to `half` values on each side."""
    count = len(values)
    sums = np.append(0.0, np.cumsum(values))
    first = np.maximum(np.arange(count) - half, 0)
    last = np.minimum(np.arange(count) + half + 1, count)
    return (sums[last] - sums[first]) / (last - first)


def thinned(curve: Curve, bins: int = BINS) -> Curve:
    """Return the extremes of each bin, and both ends; a short curve as it is."""
    count = len(curve)
    if count <= 2 * bins:
        return curve
    edges = np.linspace(curve.steps[0], curve.steps[-1], bins + 1)[1:-1]
    bounds = [0, *np.searchsorted(curve.steps, edges), count]
    kept = {0, count - 1}
    for first, last in pairwise(bounds):
        if first < last:
            part = curve.values[first:last]
            kept |= {int(first + part.argmin()), int(first + part.argmax())}
    places = np.array(sorted(kept))
    return Curve(curve.steps[places], curve.values[places], curve.gaps)
