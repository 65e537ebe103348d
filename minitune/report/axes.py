"""Axes with round numbers, linear or logarithmic, and the number formats of the report.

A linear axis has steps of 1, 2, 2.5 or 5 times a power of ten. An axis becomes logarithmic if its
highest value is far above the median: one spike would flatten the rest of the curve.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_INTERVALS = 5
MAX_LOG_TICKS = 7
LOG_RATIO = 12.0  # least ratio of the highest value to the median
ZERO_SHARE = 0.35  # an axis begins at 0 if the lowest value is below this share of the highest
ROUND = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Axis:
    """A range of values and the positions of its round numbers.

    low, high: the ends.
    ticks: round numbers in [low, high].
    is_logarithmic: True if equal ratios have equal distances.
    """

    low: float
    high: float
    ticks: Sequence[float]
    is_logarithmic: bool = False

    def place(self, values: np.ndarray | float) -> np.ndarray:
        """Return positions from 0 at `low` to 1 at `high`."""
        low, high, values = self.low, self.high, np.asarray(values, np.float64)
        if self.is_logarithmic:
            low, high, values = math.log(low), math.log(high), np.log(values)
        return (values - low) / (high - low)


def step_axis(first: float, last: float) -> Axis:
    """Return the axis of optimizer steps; its ends are those of the data, not round numbers."""
    low = 0.0 if first <= 0.1 * last else first
    if low == last:
        return Axis(low - 1, last + 1, [last])
    step = _round_step(last - low)
    step = max(1.0, step if step % 1 == 0 else 2 * step)  # no step has the number 2.5
    return Axis(low, last, _multiples(step, low, last))


def value_axis(values: np.ndarray, from_zero: bool) -> Axis:
    """Return the axis of a chart's values.

    values: of all curves, not empty.
    from_zero: begin at 0, unless the axis is logarithmic or a value is negative.
    """
    low, high = float(values.min()), float(values.max())
    if low > 0 and high > LOG_RATIO * float(np.median(values)):
        return _logarithmic(low, high)
    if low >= 0 and (from_zero or low < ZERO_SHARE * high):
        low = 0.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) / 2 or 1.0
        low, high = low - margin * (low != 0), low + margin
    step = _round_step(high - low)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [i * step for i in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], ticks)


def _round_step(length: float) -> float:
    """Return the smallest round number that covers a length in at most MAX_INTERVALS."""
    least = length / MAX_INTERVALS
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in ROUND if factor * power >= least * (1 - 1e-9))


def _multiples(step: float, low: float, high: float) -> list[float]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _logarithmic(low: float, high: float) -> Axis:
    """Return an axis of 1, 2 and 5 times powers of ten, or of powers alone if these are too many.

    Its ends are ticks.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = [10.0**power for power in range(first, last + 1)]
    fine = [factor * power for power in powers for factor in (1, 2, 5)]
    inner = fine[bisect_right(fine, low) - 1 : bisect_left(fine, high) + 1]
    if len(inner) <= MAX_LOG_TICKS:
        return Axis(inner[0], inner[-1], inner, True)
    stride = -(-(last - first) // MAX_INTERVALS)
    last = first + stride * -(-(last - first) // stride)
    ticks = [10.0**power for power in range(first, last + 1, stride)]
    return Axis(ticks[0], ticks[-1], ticks, True)


# ---- numbers


def loss_text(value: float) -> str:
    """Return a loss, such as "0.4312"."""
    return f"{value:.4f}" if abs(value) < 1000 else scientific(value)


def norm_text(value: float) -> str:
    """Return a gradient norm in three digits or more, such as "0.0123", "1.24" or "1,204"."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return scientific(value)
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3g}"


def rate_text(value: float) -> str:
    """Return a learning rate, such as "1.94e-4"."""
    return scientific(value) if value else "0"


def count_text(value: float) -> str:
    """Return a whole number, such as "15,749"."""
    return f"{value:,.0f}" if abs(value) < 1e12 else scientific(value)


def gib_number(value: float) -> str:
    """Return a number of GiB without the unit, such as "14.93" or "0.0271"."""
    return norm_text(value) if value < 10 else f"{value:,.2f}"


def scientific(value: float, decimals: int = 2) -> str:
    """Return a number with a short exponent, such as "1.94e-4" or "2e-4"."""
    digits, _, power = f"{value:.{decimals}e}".partition("e")
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return f"{digits}e{int(power)}"


def tick_texts(axis: Axis, has_exponents: bool = False) -> list[tuple[float, str]]:
    """Return (position, text) of each tick, such as "0.5", "15,000", "2 M" or "1e-4".

    has_exponents: write all numbers as "1e-4", not only very small and very large ones.
    """
    if axis.is_logarithmic:
        return [(float(axis.place(tick)), _power_text(tick)) for tick in axis.ticks]
    largest = max(map(abs, axis.ticks))
    step = axis.ticks[1] - axis.ticks[0] if len(axis.ticks) > 1 else largest or 1.0
    exponents = has_exponents or not 1e-3 <= largest < 1e10
    return [
        (float(axis.place(tick)), _tick_text(tick, step, largest, exponents)) for tick in axis.ticks
    ]


def _power_text(tick: float) -> str:
    return f"{tick:,.10g}" if 1e-3 <= tick < 1e6 else scientific(tick)


def _tick_text(tick: float, step: float, largest: float, exponents: bool) -> str:
    """Return a tick with as many digits as tell it from its neighbours.

    step: distance of two ticks, at least.
    largest: size of the largest tick.
    exponents: write the number as "1e-4".
    """
    if abs(tick) < step / 2:
        return "0"
    if exponents:
        return scientific(tick, _decimals(step / largest) + 1)
    unit, name = (1e6, " M") if largest >= 1e6 else (1.0, "")
    text = f"{tick / unit:,.{_decimals(step / unit)}f}"
    return text + name


def _decimals(step: float) -> int:
    """Return the decimals of a round number, such as 0 for 20 and 3 for 0.025."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return decimals + (abs(round(step, decimals) - step) > 1e-6 * step)
