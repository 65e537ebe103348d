"""Tests of plans: they stay within their budget, and more memory is never slower."""

from collections import Counter

import pytest
import torch
from plan_cases import CONFIG, GIB, LONG, LORA, SHAPE, SHORT, fastest

from minitune.config.training_config import GRADIENT_CHECKPOINTING
from minitune.memory.device_rates import DeviceRates
from minitune.memory.memory_model import MemoryModel, Storage
from minitune.memory.plan import Plan, Workload, plan_table
from minitune.memory.planner import (
    Planner,
    checkpointing_word,
    parse_gradient_checkpointing,
    plan_memory,
)
from minitune.memory.search import MARGIN, MemoryBudget
from minitune.model.activations import LayerPlan, SaveLevel

EIGHT_SHORT = MemoryModel(SHAPE, Workload(1000, max_seqlen=119))


@pytest.mark.parametrize(
    "memory", [SHORT, LONG, EIGHT_SHORT], ids=["2 x 2048", "1 x 8192", "8 short"]
)
@pytest.mark.parametrize("host", [0, 64], ids=["GPU alone", "with the host"])
def test_plans_stay_within_their_budget_and_more_memory_is_never_slower(memory, host):
    least = fastest(memory, 0, host)
    before = float("inf")
    for budget in (7.5, 8, 9, 10, 14, 24, 40):
        plan = fastest(memory, budget, host)
        assert plan.peak <= budget * GIB * (1 - MARGIN) or plan == least
        assert plan.host_bytes <= host * GIB
        assert plan.seconds <= before or plan == least
        before = plan.seconds
        assert len(plan.layers) == 32
        assert sum(size for _, size in plan.parts) == plan.peak


def test_everything_is_saved_if_it_fits_and_as_little_as_possible_if_nothing_fits():
    assert fastest(SHORT, 80, 64).layers == (LayerPlan(SaveLevel.ALL),) * 32
    least = fastest(SHORT, 0)
    assert all(layer.level <= SaveLevel.INPUT for layer in least.layers)
    assert least.tile_rows is not None
    assert fastest(SHORT, 0, 64).peak < least.peak


def test_weights_are_kept_dequantised_in_the_memory_that_is_left():
    some = fastest(SHORT, 22, allow_resident_weights=True)
    all_of_them = fastest(SHORT, 60, allow_resident_weights=True)
    assert 0 < some.resident_layers < all_of_them.resident_layers == 32
    assert some.peak <= 22 * GIB * (1 - MARGIN)
    without = fastest(SHORT, 22)
    assert some.layers == without.layers
    assert some.seconds < without.seconds
    assert "weights of 32 layers kept dequantised" in str(all_of_them)
    assert fastest(SHORT, 0, allow_resident_weights=True).resident_layers == 0


def test_activations_are_offloaded_if_that_saves_time_and_as_far_as_the_host_has_memory():
    alone, with_host = fastest(SHORT, 7.4), fastest(SHORT, 7.4, 16)
    assert with_host.seconds < alone.seconds
    assert with_host.host_bytes > 0
    slow = fastest(SHORT, 7.4, 16, DeviceRates(to_host=1e9, from_host=1e9))
    assert slow.host_bytes < with_host.host_bytes
    assert fastest(SHORT, 7.4, 1).host_bytes <= GIB


def test_copies_in_flight_may_use_the_memory_that_the_last_layers_will_fill():
    offloaded = (LayerPlan(SaveLevel.INPUT, offloaded=True),) * 4
    on_gpu = (LayerPlan(SaveLevel.ALL),)
    plan = Plan(offloaded + 3 * on_gpu, host_bytes=400, saved_bytes=900)
    assert [plan.in_flight_limit(i) for i in range(7)] == [600] * 5 + [300, 0]
    plan = Plan(offloaded + on_gpu, host_bytes=400, saved_bytes=300)
    # one offloaded layer, the one before
    assert [plan.in_flight_limit(i) for i in range(5)] == [0] + [100] * 4
    assert [Plan(offloaded, host_bytes=400).in_flight_limit(i) for i in range(4)] == [0] + [100] * 3
    spans = (offloaded[0], *(LayerPlan(SaveLevel.NOTHING),) * 3) * 2
    assert [Plan(spans, host_bytes=200).in_flight_limit(i) for i in range(8)] == [0] + [100] * 7


def test_long_samples_save_attention_first_and_short_ones_whole_layers():
    many_short = MemoryModel(SHAPE, Workload(4096, max_seqlen=119))
    long = Counter(layer.level for layer in fastest(LONG, 11).layers)
    short = Counter(layer.level for layer in fastest(many_short, 10).layers)
    assert long[SaveLevel.ATTENTION] > 8
    assert short[SaveLevel.ALL] > 0
    assert short[SaveLevel.ATTENTION] == 0


def test_inputs_that_fit_nowhere_are_recomputed_from_those_of_every_few_layers():
    memory = MemoryModel(SHAPE, Workload(100_000, max_seqlen=100_000, cudnn=True))
    roomy, narrow = fastest(memory, 24, 64), fastest(memory, 24, 8)
    nothing = LayerPlan(SaveLevel.NOTHING)
    assert nothing not in roomy.layers
    assert narrow.layers.count(nothing) >= 16
    assert narrow.layers[0].level == SaveLevel.INPUT
    assert roomy.host_bytes > 8 * GIB >= narrow.host_bytes
    assert narrow.seconds > roomy.seconds
    assert narrow.peak <= 24 * GIB


def test_a_plan_needs_no_model_and_no_gpu_and_says_what_it_needs():
    workload = Workload.of_samples(4096, 2048)
    plan = plan_memory(CONFIG, LORA, workload, MemoryBudget(24 * GIB))
    text = plan_table(plan, 4096, 24 * GIB)
    assert f"{plan.peak / GIB:8.2f} GiB" in text
    assert "32 layers save everything" in text
    assert "tokens/s" in text
    assert "more than" not in text
    small = plan_memory(CONFIG, LORA, workload, MemoryBudget(5 * GIB))
    assert "more than the budget of 5.00 GiB" in plan_table(small, 4096, 5 * GIB)
    budget, eight_bit = MemoryBudget(7 * GIB), Storage(eight_bit_moments=True)
    eight_bit_plan = plan_memory(CONFIG, LORA, workload, budget, storage=eight_bit)
    assert eight_bit_plan.peak < plan_memory(CONFIG, LORA, workload, budget).peak


def test_samples_longer_than_their_micro_step_are_refused():
    message = "samples of 5000 tokens in micro-steps of 4096: expected 1 to 4096"
    with pytest.raises(ValueError, match=message):
        Workload.of_samples(4096, 5000)


def test_gradient_checkpointing_fixes_the_level_or_leaves_it_to_the_planner():
    levels = {True: SaveLevel.INPUT, False: SaveLevel.ALL, "unsloth": None, "auto": None}
    assert {word: parse_gradient_checkpointing(word) for word in levels} == levels
    for wrong in ("false", "yes", None, 1):
        with pytest.raises(ValueError, match="choose True, False, 'unsloth' or 'auto'"):
            parse_gradient_checkpointing(wrong)


@pytest.mark.parametrize("argument", GRADIENT_CHECKPOINTING.values())
def test_the_word_of_a_level_stands_for_the_same_level_on_the_command_line(argument):
    level = parse_gradient_checkpointing(argument)
    word = checkpointing_word(level)
    assert parse_gradient_checkpointing(GRADIENT_CHECKPOINTING[word]) == level


def test_a_planner_with_less_memory_or_without_the_host_forgets_its_largest_plan(monkeypatch):
    planner = Planner(None, memory_budget=12 * GIB, host_budget=GIB)
    planner.largest = Plan(())
    monkeypatch.setattr("minitune.memory.planner.free_memory", lambda device: 6 * GIB)
    assert planner.plan_with_less(torch.device("cpu")) == (6 * GIB, 5 * GIB)
    assert planner.memory_budget == 5 * GIB
    assert planner.largest is None
    planner.largest = Plan(())
    planner.plan_without_host()
    assert planner.host_budget == 0
    assert planner.largest is None


def test_a_planner_measures_a_gpu_once_and_only_if_plans_depend_on_it(monkeypatch):
    measured = []
    monkeypatch.setattr(
        "minitune.memory.planner.machine_rates",
        lambda device: measured.append(device) or DeviceRates(copy=1e12),
    )
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    planner = Planner(None)
    planner.measure_rates(cpu)
    assert planner.rates is None
    for _ in range(2):
        planner.measure_rates(gpu)
        assert planner.rates == DeviceRates(copy=1e12)
    Planner(SaveLevel.INPUT).measure_rates(gpu)
    assert measured == [gpu]
