"""Tests of the time model: waits for copies to the host, and layers of several kinds."""

from dataclasses import replace

import pytest
from plan_cases import LONG, SHAPE, SHORT, STATIC, fastest

from minitune.config.layer_kinds import LayerKind
from minitune.memory.device_rates import DeviceRates
from minitune.memory.memory_model import MemoryModel
from minitune.memory.plan import Candidate, Workload
from minitune.memory.search import evaluate
from minitune.memory.time_model import TimeModel
from minitune.model.activations import LayerPlan, SaveLevel


@pytest.mark.parametrize("late_layers", [0, 1, 2, 5, 8, 16, 31])
@pytest.mark.parametrize("copy", [0.5, 1.0, 1.2, 3.0])
def test_forward_waits_for_copies_as_long_as_planned(late_layers, copy):
    """Simulate layers of one second each, with their copies of `copy` seconds beside them."""
    early = LayerPlan(SaveLevel.QKV, offloaded=True)
    rates = DeviceRates(to_host=SHORT.saved_bytes(SaveLevel.QKV) / copy)
    candidate = Candidate(SaveLevel.ALL, early, late_layers, None)
    plan = evaluate(SHORT, candidate, STATIC, rates)
    layer_bytes = plan.host_bytes / candidate.early_saving_layers(32)
    now, copied, in_flight = 0.0, 0.0, []
    for i, layer in enumerate(plan.layers):
        while len(in_flight) * layer_bytes > plan.in_flight_limit(i):
            now = max(now, in_flight.pop(0))
        now += 1.0
        if layer.offloaded:
            copied = max(copied, now) + copy
            in_flight.append(copied)
    waited = max(now, copied) - 32
    planned = TimeModel(SHORT, rates).offload_wait(candidate, forward=1.0)
    assert planned == pytest.approx(waited, abs=0.01)


FULL = LayerKind(window=None, rope=0)


def with_kinds(memory: MemoryModel, *kinds: LayerKind) -> MemoryModel:
    """Return the memory model of the same layers, which alternate between these kinds."""
    layers = memory.shape.layers
    shape = replace(memory.shape, kinds=kinds * (layers // len(kinds)))
    return replace(memory, shape=shape)


def test_attention_in_a_window_takes_the_time_of_the_rows_that_are_seen():
    """Count the pairs of rows one by one."""
    seqlen = 1000
    memory = MemoryModel(SHAPE, Workload(4 * seqlen, seqlen))
    rates = DeviceRates(matmul=1.0, attention=1.0)
    time_model = TimeModel(memory, rates)
    for window in (1, 100, 700, 1000, 5000):
        pairs = 4 * sum(min(i + 1, window) for i in range(seqlen))
        operations = 4 * pairs * SHAPE.HK
        planned = time_model.attention_seconds(FULL._replace(window=window), cudnn=True)
        assert planned == pytest.approx(operations, rel=0.01)


@pytest.mark.parametrize(("heads", "width", "ms"), [(32, 128, 3.35), (8, 256, 3.04)])
def test_attentions_backward_agrees_with_measurements_on_an_h200(heads, width, ms):
    shape = replace(SHAPE, H=heads, HK=heads * width)
    time_model = TimeModel(MemoryModel(shape, Workload(8192, 8192)), DeviceRates())
    planned = time_model.attention_backward_seconds(FULL, cudnn=False)
    assert 1e3 * planned == pytest.approx(ms, rel=0.15)


def test_only_layers_without_a_window_and_without_soft_caps_may_use_cudnn():
    windowed = FULL._replace(window=4096)
    seconds = {
        name: TimeModel(memory, DeviceRates()).seconds(
            Candidate(SaveLevel.INPUT, LayerPlan(SaveLevel.INPUT), 32, None, memory.cudnn)
        )
        for name, memory in {
            "full": with_kinds(LONG, FULL),
            "mixed": with_kinds(LONG, FULL, windowed),
            "windowed": with_kinds(LONG, windowed),
        }.items()
    }
    assert seconds["mixed"] == pytest.approx((seconds["full"] + seconds["windowed"]) / 2)
    assert with_kinds(LONG, FULL, windowed).cudnn
    assert not with_kinds(LONG, windowed).cudnn
    wide_heads = replace(LONG.shape, H=LONG.shape.H // 2)  # 256
    assert not replace(LONG, shape=wide_heads).cudnn
    assert not replace(LONG, shape=replace(LONG.shape, caps_scores=True)).cudnn
    without_cudnn = with_kinds(
        replace(LONG, workload=replace(LONG.workload, cudnn=False)), windowed
    )
    assert fastest(with_kinds(LONG, windowed), 11) == fastest(without_cudnn, 11)


def test_a_layer_is_dequantised_from_its_stored_bytes_and_a_quantised_head_once():
    rates = DeviceRates(copy=1.0)
    values = SHAPE.layer_parameters * SHAPE.itemsize
    head = SHAPE.V * SHAPE.D * SHAPE.itemsize
    nf4 = TimeModel(SHORT, rates)
    stored = replace(SHAPE.weights, linears=32 * 1000, head=2000, converts_head=True)
    other = TimeModel(replace(SHORT, shape=replace(SHAPE, weights=stored)), rates)
    assert nf4.dequantise_seconds == pytest.approx(values * (1 + 0.516 / 2), rel=1e-3)
    assert other.dequantise_seconds == values + 1000
    assert other.loss_seconds - nf4.loss_seconds == head + 2000
