"""Plans: they stay within their budget, and more memory is never slower."""

import dataclasses
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny import make_tiny_model

from minitune import FastLanguageModel
from minitune.config.architectures import LORA_TARGETS
from minitune.config.model_config import ModelConfig
from minitune.config.training_config import LoraConfig
from minitune.memory import device_rates as rates
from minitune.memory.device_rates import DeviceRates
from minitune.memory.memory_model import MemoryModel, Workload, static_parts
from minitune.memory.plan import Candidate, Plan
from minitune.memory.planner import MARGIN, evaluate, fastest_plan, plan_memory, plan_table
from minitune.memory.time_model import _waits
from minitune.model.activations import LayerPlan, SaveLevel
from minitune.model.decoder_layer import new_residual
from minitune.model.packed_sequences import PackedSequences

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from benchmark.random_checkpoints import SHAPES

GIB = 2**30
CONFIG, LORA = ModelConfig.from_dict(SHAPES["8b"]), LoraConfig(r=16, target_modules=LORA_TARGETS)
B8 = MemoryModel.of(CONFIG, LORA, 2)
STATIC = static_parts(B8, CONFIG)
SHORT, LONG = Workload(4096, 4096 * 2048, 4096), Workload(8192, 8192 * 8192, 8192, cudnn=True)


@pytest.mark.parametrize(
    "load", [SHORT, LONG, Workload(1000, 119_000, 800)], ids=["2 x 2048", "1 x 8192", "8 short"]
)
@pytest.mark.parametrize("host", [0, 64], ids=["GPU alone", "with the host"])
def test_plans_stay_within_their_budget_and_more_memory_is_never_slower(load, host):
    before = float("inf")
    for budget in (7.5, 8, 9, 10, 14, 24, 40):
        plan = fastest_plan(B8, load, STATIC, int(budget * GIB), host * GIB)
        least = fastest_plan(B8, load, STATIC, 0, host * GIB)
        assert plan.peak <= budget * GIB * (1 - MARGIN) or plan == least
        assert plan.host_bytes <= host * GIB
        assert plan.seconds <= before or plan == least
        before = plan.seconds
        assert len(plan.layers) == 32 and sum(size for _, size in plan.parts) == plan.peak


def test_with_room_everything_is_kept_and_without_it_as_little_as_possible():
    assert (
        fastest_plan(B8, SHORT, STATIC, 80 * GIB, 64 * GIB).layers
        == (LayerPlan(SaveLevel.ALL),) * 32
    )
    least = fastest_plan(B8, SHORT, STATIC, 0)
    assert all(keep.level <= SaveLevel.INPUT for keep in least.layers) and least.tile_rows is not None
    assert fastest_plan(B8, SHORT, STATIC, 0, 64 * GIB).peak < least.peak


def test_weights_stay_dequantised_in_what_memory_is_left():
    some, all_of_them = (fastest_plan(B8, SHORT, STATIC, gib * GIB, dense=True) for gib in (22, 60))
    assert 0 < some.resident_layers < all_of_them.resident_layers == 32 and some.peak <= 22 * GIB * (1 - MARGIN)
    without = fastest_plan(B8, SHORT, STATIC, 22 * GIB)
    assert some.layers == without.layers and some.seconds < without.seconds
    assert "weights of 32 layers kept dequantised" in str(all_of_them)
    assert fastest_plan(B8, SHORT, STATIC, 0, dense=True).resident_layers == 0


def test_the_host_is_used_where_it_saves_time_and_only_as_far_as_it_has_memory():
    alone, with_host = (
        fastest_plan(B8, SHORT, STATIC, int(7.4 * GIB), host * GIB) for host in (0, 16)
    )
    assert with_host.seconds < alone.seconds and with_host.host_bytes > 0
    slow = fastest_plan(
        B8, SHORT, STATIC, int(7.4 * GIB), 16 * GIB, DeviceRates(to_host=1e9, from_host=1e9)
    )
    assert slow.host_bytes < with_host.host_bytes
    assert fastest_plan(B8, SHORT, STATIC, int(7.4 * GIB), GIB).host_bytes <= GIB


def test_what_attention_works_with_is_gone_when_the_mlp_runs():
    for level in (SaveLevel.INPUT, SaveLevel.QKV, SaveLevel.ALL):
        assert B8.forward(level, 8192, 8192, True) == B8.forward(
            level, 8192, 8192, False
        )  # all rows at once
        assert B8.backward(level, 8192, 8192, True) == B8.backward(level, 8192, 8192, False)
    assert B8.forward(SaveLevel.INPUT, 8192, 256, True) > B8.forward(
        SaveLevel.INPUT, 8192, 256, False
    )
    assert B8.backward(SaveLevel.INPUT, 8192, 256, True) > B8.backward(
        SaveLevel.INPUT, 8192, 256, False
    )


def test_copies_may_wait_in_what_the_last_layers_will_keep():
    layers = (LayerPlan(SaveLevel.INPUT, offloaded=True),) * 4
    plan = Plan(
        (*layers, *(LayerPlan(SaveLevel.ALL),) * 3), host_bytes=400, saved_bytes=900
    )
    assert [plan.in_flight_limit(i) for i in range(7)] == [600] * 5 + [300, 0]
    plan = Plan((*layers, LayerPlan(SaveLevel.ALL)), host_bytes=400, saved_bytes=300)
    assert [plan.in_flight_limit(i) for i in range(5)] == [0] + [
        100
    ] * 4  # the layer before, and no other
    assert [Plan(layers, host_bytes=400).in_flight_limit(i) for i in range(4)] == [0] + [100] * 3
    segments = (layers[0], *(LayerPlan(SaveLevel.NOTHING),) * 3) * 2
    assert [Plan(segments, host_bytes=200).in_flight_limit(i) for i in range(8)] == [0] + [100] * 7


@pytest.mark.parametrize("count", [0, 1, 2, 5, 8, 16, 31])
@pytest.mark.parametrize("copy", [0.5, 1.0, 1.2, 3.0])
def test_forward_waits_for_copies_as_long_as_was_planned(count, copy):
    """Layers one after the other, each in a second, with their copies beside them; a copy takes `copy` seconds."""
    far, r = (
        LayerPlan(SaveLevel.QKV, offloaded=True),
        DeviceRates(to_host=SHORT.tokens * B8.kept(SaveLevel.QKV) / copy),
    )
    choice = Candidate(SaveLevel.ALL, far, count, None)
    plan = evaluate(B8, SHORT, choice, STATIC, r)
    size, now, copied, leaving = plan.host_bytes / choice.early_saving_layers(32), 0.0, 0.0, []
    for i, keep in enumerate(plan.layers):
        while len(leaving) * size > plan.in_flight_limit(i):
            now = max(now, leaving.pop(0))
        now += 1.0
        if keep.offloaded:
            copied = max(copied, now) + copy
            leaving.append(copied)
    took = max(now, copied)
    assert _waits(B8, SHORT, choice, 1.0, r) == pytest.approx(took - 32, abs=0.01)


def test_long_samples_keep_attention_first_and_short_ones_whole_layers():
    long = Counter(keep.level for keep in fastest_plan(B8, LONG, STATIC, int(11 * GIB)).layers)
    short = Counter(
        keep.level
        for keep in fastest_plan(
            B8, dataclasses.replace(SHORT, squared_lengths=4096 * 119), STATIC, 10 * GIB
        ).layers
    )
    assert (
        long[SaveLevel.ATTENTION] > 8
        and short[SaveLevel.ALL] > 0
        and short[SaveLevel.ATTENTION] == 0
    )


@pytest.mark.parametrize(
    ("load", "level", "gib", "ms"),
    [(SHORT, SaveLevel.INPUT, 8.02, 316), (SHORT, SaveLevel.ALL, 18.42, 242)],
)
def test_what_was_measured_on_an_h200_was_planned(load, level, gib, ms):
    """scripts/bench.py on one H200, November 2026: peak within 5%, time within 15%."""
    plan = evaluate(B8, load, Candidate(level, LayerPlan(level), 32, None), STATIC, DeviceRates())
    assert plan.peak / GIB == pytest.approx(gib, rel=0.05)
    assert 1e3 * plan.seconds == pytest.approx(ms, rel=0.15)


def test_a_plan_needs_no_model_and_no_gpu_and_says_what_it_needs():
    plan = plan_memory(CONFIG, LORA, 24 * GIB, tokens=4096, longest=2048)
    text = plan_table(plan, 4096, 24 * GIB)
    assert f"{plan.peak / GIB:8.2f} GiB" in text and "32 layers save everything" in text
    assert "tokens/s" in text and "more than" not in text
    small = plan_memory(CONFIG, LORA, 5 * GIB, tokens=4096, longest=2048)
    assert "more than the 5.00 GiB there are" in plan_table(small, 4096, 5 * GIB)
    assert (
        plan_memory(CONFIG, LORA, 7 * GIB, eight_bit=True).peak
        < plan_memory(CONFIG, LORA, 7 * GIB).peak
    )
    with pytest.raises(
        ValueError, match="samples of 5000 tokens in micro-steps of 4096: expected 1 to 4096"
    ):
        plan_memory(CONFIG, LORA, 24 * GIB, longest=5000)


def test_inputs_that_fit_nowhere_are_computed_again_from_those_of_every_few_layers():
    load = Workload(100_000, 100_000**2, 100_000, cudnn=True)
    roomy, narrow = (fastest_plan(B8, load, STATIC, 24 * GIB, host * GIB) for host in (64, 8))
    assert LayerPlan(SaveLevel.NOTHING) not in roomy.layers
    assert (
        narrow.layers.count(LayerPlan(SaveLevel.NOTHING)) >= 16
        and narrow.layers[0].level == SaveLevel.INPUT
    )
    assert roomy.host_bytes > 8 * GIB >= narrow.host_bytes and narrow.seconds > roomy.seconds
    assert narrow.peak <= 24 * GIB


@pytest.mark.parametrize("targets", [LORA_TARGETS, LORA_TARGETS[:4], ("v_proj",)])
def test_sizes_without_a_model_are_those_of_a_model(tmp_path, targets):
    shape = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 160}
    model, _ = FastLanguageModel.from_pretrained(
        make_tiny_model(tmp_path / "m", **shape), dtype=torch.float32
    )
    FastLanguageModel.get_peft_model(model, r=8, target_modules=targets)
    sizes, layer = (
        MemoryModel.of(model.config, model.lora, 4, model.device.type),
        model.model.layers[0],
    )
    assert sizes.lora_columns == tuple(fused.lora_columns for fused in layer.fused_linears)
    assert sizes.buffers == 4 * sum(
        math.prod(fused.weight_shape) for fused in layer.fused_linears
    )
    assert sizes.adapter == sum(p.numel() for _, p in model.trainable_parameters())
    assert sizes.layers * sizes.of_layer == sum(
        n.in_features * n.out_features for _, n in model.linears()
    )
    s = new_residual(torch.randn(40, 64, device=model.device))
    packed = PackedSequences.from_positions(torch.arange(40)).to(model.device)
    for level in (SaveLevel.INPUT, SaveLevel.ATTENTION, SaveLevel.QKV, SaveLevel.ALL):
        kept = layer.forward_saving_(s, packed, model.layer_context, level)
        assert sum(t.nbytes for t in kept.tensors().values()) == 40 * sizes.kept(level)


def test_rates_are_measured_once_and_a_broken_cache_is_measured_again(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    found = {"matmul": 2e14, "copy": 1e12, "to_host": 2e10, "from_host": 3e10}
    monkeypatch.setattr(rates, "measure", lambda device: measured.append(device) or found)
    for content in (
        None,
        None,
        "not JSON",
        '{"A100, torch": 3}',
        f'{{"A100, torch {torch.__version__}": {{"copy": 1}}}}',
    ):
        if content:
            (tmp_path / "minitune" / "rates.json").write_text(content)
        rates.machine_rates.cache_clear()
        assert rates.machine_rates("cuda:0") == DeviceRates(**found)
    assert len(measured) == 4
    rates.machine_rates.cache_clear()


@pytest.mark.gpu
def test_rates_of_a_real_gpu_are_within_what_gpus_do():
    found = rates.measure(torch.device("cuda"))
    print(found)
    assert 1e13 < found["matmul"] < 5e15 and 1e11 < found["copy"] < 2e13
    assert 1e9 < found["to_host"] < 1e12 and 1e9 < found["from_host"] < 1e12
