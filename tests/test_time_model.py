"""Tests of the time model: planned waits for copies to the host are those of a simulation."""

import pytest
from plan_cases import SHORT, STATIC

from minitune.memory.device_rates import DeviceRates
from minitune.memory.plan import Candidate
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
