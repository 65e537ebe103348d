"""Curves and axes of the report: few points of many, moving means, round numbers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitune.report.axes import (
    gib_number,
    loss_text,
    norm_text,
    rate_text,
    scientific,
    step_axis,
    tick_texts,
    value_axis,
)
from minitune.report.curves import BINS, Curve, curve, moving_mean, smoothing_window, thinned

VALUES = st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=30)


def curve_of(values):
    values = np.array(values, np.float64)
    return Curve(np.arange(1.0, len(values) + 1), values)


# ---- curves


def test_a_curve_holds_the_records_that_name_the_metric():
    records = [{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 3, "loss": 1}]
    found = curve(records, "loss", unit=2.0)
    assert found.steps.tolist() == [1, 3] and found.values.tolist() == [1.0, 0.5]
    assert len(curve(records, "grad_norm")) == 0


def test_a_curve_leaves_out_values_that_are_not_finite():
    records = [
        {"step": step, "loss": value} for step, value in enumerate([1.0, math.nan, math.inf])
    ]
    assert curve(records, "loss").values.tolist() == [1.0]


@given(st.integers(0, 5000), st.integers(0, 2**32 - 1))
def test_a_thinned_curve_keeps_its_ends_and_its_extremes(count, seed):
    full = curve_of(np.random.default_rng(seed).normal(size=count))
    few = thinned(full)
    assert len(few) == min(count, len(few)) and len(few) <= 2 * BINS + 2
    assert set(zip(few.steps, few.values, strict=True)) <= set(
        zip(full.steps, full.values, strict=True)
    )
    assert (np.diff(few.steps) > 0).all()
    if count:
        assert few.values.min() == full.values.min() and few.values.max() == full.values.max()
        assert few.steps[0] == 1 and few.steps[-1] == count


def test_every_spike_of_a_long_curve_is_seen():
    values = np.zeros(100_000)
    spikes = np.arange(37, 100_000, 1013)
    values[spikes] = 1.0
    few = thinned(curve_of(values))
    assert set(few.steps[few.values == 1.0]) == {*(spikes + 1.0)}


@given(VALUES, st.sampled_from([5, 9, 21]))
def test_a_moving_mean_is_a_mean_of_means_within_the_range(values, window):
    full = curve_of(values)
    found = moving_mean(full, window)
    assert full.values.min() <= found.values.min() and found.values.max() <= full.values.max()

    def mean(values):
        half = window // 4
        parts = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
        return [sum(part) / len(part) for part in parts]

    scale = max(map(abs, values)) or 1.0
    expected = mean(mean([value / scale for value in values]))
    np.testing.assert_allclose(found.values / scale, expected, atol=1e-12)


def test_only_long_and_noisy_curves_are_smoothed():
    noise = np.random.default_rng(0).normal(size=300)
    falling = np.linspace(3, 1, 300)
    assert smoothing_window(curve_of(falling + 0.1 * noise)) == 17
    assert smoothing_window(curve_of(falling)) == 0
    assert smoothing_window(curve_of(noise[:99])) == 0
    assert smoothing_window(curve_of(np.ones(300))) == 0


# ---- axes


def numbers_of(texts):
    """Return the numbers that the texts of an axis show."""
    values = []
    for text in texts:
        digits, million, _ = text.partition(" M")
        values.append(float(digits.replace(",", "")) * (1e6 if million else 1))
    return values


@given(VALUES, st.booleans())
def test_an_axis_holds_all_values_between_round_numbers_that_differ(values, from_zero):
    values = np.where(np.abs(values) < 1e-280, 0, values)
    axis = value_axis(values, from_zero)
    places = axis.place(values)
    assert (places >= -1e-9).all() and (places <= 1 + 1e-9).all()
    assert 2 <= len(axis.ticks) <= 8
    texts = [text for _, text in tick_texts(axis)]
    assert len(set(texts)) == len(texts)
    shown = numbers_of(texts)
    np.testing.assert_allclose(shown, axis.ticks, rtol=1e-9, atol=1e-6 * np.ptp(axis.ticks))


@pytest.mark.parametrize(
    ("values", "from_zero", "texts"),
    [
        ([0.3, 4.8, 3.0], False, "0 1 2 3 4 5"),
        ([0.31, 0.33], False, "0.310 0.315 0.320 0.325 0.330"),
        ([0.31, 0.33], True, "0 0.1 0.2 0.3 0.4"),
        ([0, 2e-4], True, "0 5e-5 1e-4 1.5e-4 2e-4"),
        ([15_000, 17_000], True, "0 5,000 10,000 15,000 20,000"),
        ([0, 2e6], True, "0 0.5 M 1.0 M 1.5 M 2.0 M"),
        ([2.0], False, "1.0 1.5 2.0 2.5 3.0"),
        ([2.0, 2.0 + 4e-16], False, "1.0 1.5 2.0 2.5 3.0"),  # rounding is no range
        ([0.0], False, "0 0.2 0.4 0.6 0.8 1.0"),
        ([-3, 5], True, "-4 -2 0 2 4 6"),
    ],
)
def test_axes_have_round_numbers(values, from_zero, texts):
    shown = " ".join(text for _, text in tick_texts(value_axis(np.array(values), from_zero)))
    assert shown == texts


def test_an_axis_becomes_logarithmic_if_one_value_would_flatten_the_others():
    axis = value_axis(np.array([0.4, 0.5, 0.5, 8.0]), True)
    assert axis.is_logarithmic
    assert [text for _, text in tick_texts(axis)] == ["0.2", "0.5", "1", "2", "5", "10"]
    np.testing.assert_allclose(axis.place(np.array([0.2, 2**0.5, 10])), [0, 0.5, 1])
    wide = value_axis(np.array([1e-5, 1e-5, 1e9]), False)
    assert [text for _, text in tick_texts(wide)] == ["1e-5", "0.01", "10", "10,000", "1e7", "1e10"]
    assert not value_axis(np.array([0.0, 0.5, 80.0]), False).is_logarithmic


@pytest.mark.parametrize(
    ("first", "last", "texts"),
    [
        (1, 40, "0 10 20 30 40"),
        (1, 12, "0 5 10"),
        (1, 3, "1 2 3"),
        (5, 100_000, "0 20,000 40,000 60,000 80,000 100,000"),
        (900, 1000, "900 920 940 960 980 1,000"),
        (7, 7, "7"),
        (0, 0, "0"),
    ],
)
def test_the_axis_of_steps_has_whole_numbers(first, last, texts):
    axis = step_axis(first, last)
    assert " ".join(text for _, text in tick_texts(axis)) == texts
    assert 0 <= axis.place(first) <= axis.place(last) <= 1


def test_numbers_have_as_many_digits_as_a_person_reads():
    assert [loss_text(value) for value in (0.43123, 12.5, 1e300)] == ["0.4312", "12.5000", "1e300"]
    assert [norm_text(v) for v in (0, 0.0123, 1.244, 1204.4)] == ["0", "0.0123", "1.24", "1,204"]
    assert [rate_text(value) for value in (1.944e-4, 2e-4, 0)] == ["1.94e-4", "2e-4", "0"]
    assert [gib_number(value) for value in (14.929, 0.0271, 1.5)] == ["14.93", "0.0271", "1.50"]
    assert scientific(1e10) == "1e10"
