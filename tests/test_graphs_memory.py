"""The memory of CUDA graphs: as planned, given back, and too short for a capture."""

import gc

import pytest
import torch
from micro_step_checks import (
    BATCHES,
    GRAPH_SHAPE,
    assert_same_bits,
    gradients,
    load,
    load_wide,
    load_wide_gguf,
    random_samples,
    results,
)
from tiny import make_tiny_model

from minitune.data.batching import collate
from minitune.memory.planner import Planner
from minitune.model.activations import SaveLevel
from minitune.training.cuda_graphs import (
    MAX_SMALLER_PLANS,
    CUDAGraphCache,
    capture_disabled_reason,
    capture_reserve,
)
from minitune.training.forward_backward import ForwardBackward
from minitune.training.micro_step import MicroStep
from minitune.training.optimizer import FlatAdamW

ADVICE = "lower micro_step_tokens, or memory_budget if use_gradient_checkpointing is 'unsloth'"


@pytest.fixture
def model(tmp_path):
    """Return a model of three layers in bfloat16."""
    return load(make_tiny_model(tmp_path / "m", **GRAPH_SHAPE), dtype=torch.bfloat16)


@pytest.fixture
def micro_step(model):
    """Return a micro-step that captures graphs."""
    return MicroStep(model)


@pytest.fixture
def eager(model):
    """Return the results of eager micro-steps."""
    return results(MicroStep(model, capture=False), BATCHES)


# ---- as planned


@pytest.mark.gpu
def test_closing_gives_the_memory_back(micro_step, eager):
    results(micro_step, BATCHES)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    micro_step.close()
    assert torch.cuda.memory_reserved() < before
    assert_same_bits(results(micro_step, BATCHES), eager)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("lengths", "budgets"),
    [
        ([1024] * 8, ((2.0, 0), (1.0, 0), (0.8, 0), (0.8, 4), (1.4, 4))),
        ([65536], ((2.5, 0), (4.0, 0))),  # attention takes the most memory of a long sample
    ],
)
def test_peak_memory_is_as_planned(tmp_path, lengths, budgets):
    check_peak_memory(load_wide(tmp_path / "m", max(lengths)), lengths, budgets)


@pytest.mark.gpu
@pytest.mark.parametrize("tie", [True, False])
def test_peak_memory_is_as_planned_on_a_gguf_base(tmp_path, tie):
    """The head takes 128 MiB while it is dequantised, which is more than 5% of these peaks."""
    model = load_wide_gguf(tmp_path, 1024, vocab=65536, tie=tie)
    check_peak_memory(model, [1024] * 8, ((2.0, 0), (1.0, 0), (1.0, 4)))


def check_peak_memory(model, lengths, budgets):
    """Compare planned and measured memory of micro-steps within budgets (GPU, host), in GiB."""
    optimizer = FlatAdamW([p for _, p in model.trainable_parameters()])
    batch = collate(random_samples(lengths, vocab=4096))
    for budget, host in budgets:
        planner = Planner(None, int(budget * 2**30), host << 30)
        micro_step = MicroStep(model, planner)
        micro_step.prepare()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # of what earlier tests reserved
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            micro_step(batch, 8000)
        measured, planned = torch.cuda.max_memory_allocated(), planner.largest
        reserved = torch.cuda.max_memory_reserved()
        figures = ", ".join(f"{x / 2**30:.3f}" for x in (planned.peak, measured, reserved))
        print(f"budget {budget} GiB, host {host}: planned, measured, reserved {figures}; {planned}")
        micro_step.close()
        assert measured == pytest.approx(planned.peak, rel=0.05)
        assert reserved < 1.2 * planned.peak + (128 << 20)


@pytest.mark.gpu
def test_weights_stay_dequantised_if_memory_is_left(micro_step, model, eager):
    assert model.planner.level is None
    for order in ([3, 0, 2, 1], [0, 1, 2, 3]):
        found = results(micro_step, [BATCHES[i] for i in order])
        assert_same_bits(found, [eager[i] for i in order])
    assert micro_step.planner.largest.resident_layers == len(model.model.layers)
    assert all(fused.resident_weight is not None for fused in model.fused_linears())
    micro_step.close()
    assert all(fused.resident_weight is None for fused in model.fused_linears())
    model.planner.memory_budget = torch.cuda.memory_allocated() + (50 << 20)
    assert_same_bits(results(micro_step, BATCHES), eager)


@pytest.mark.gpu
def test_a_capture_takes_little_memory_beside_the_blocks_of_the_eager_pass(tmp_path, monkeypatch):
    model = load_wide(tmp_path / "m", 1024)
    capture, growths = CUDAGraphCache._capture, []

    def watched(cache, *arguments):
        pool_bytes = sum(segment["total_size"] for segment in cache._pool.snapshot())
        reserved, free = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]
        captured = capture(cache, *arguments)
        growth = torch.cuda.memory_reserved() - reserved
        growths.append((growth, pool_bytes))
        driver = free - torch.cuda.mem_get_info()[0] - growth
        figures = ", ".join(f"{x / 2**20:.1f}" for x in (pool_bytes, growth, driver))
        print(f"MiB of the pool, its growth in a capture, and the driver's part: {figures}")
        return captured

    monkeypatch.setattr(CUDAGraphCache, "_capture", watched)
    for budget in (None, 1 << 30):
        micro_step = MicroStep(model, Planner(None, budget))
        for lengths in ([1024] * 8, [700, 300, 900], [1000] * 6, [1024] * 12):
            micro_step(collate(random_samples(lengths, vocab=4096)), 8000)
        micro_step.close()
    assert len(growths) == 8
    assert all(growth < capture_reserve(pool_bytes) for growth, pool_bytes in growths)


# ---- too little memory for a capture


def test_a_capture_that_lacks_memory_lowers_the_plan_a_few_times_and_then_gives_up(tmp_path):
    planner = Planner(None, 1 << 30)
    cache = CUDAGraphCache(ForwardBackward(load(make_tiny_model(tmp_path / "m")), planner))
    for _ in range(MAX_SMALLER_PLANS):
        with pytest.warns(UserWarning, match="to capture .* of 640 tokens; planning with") as said:
            cache._make_room(640, 80 << 20)
        assert " lacks 80 MiB to " in str(said[0].message) and ADVICE in str(said[0].message)
        assert cache.disabled_reason is None
    expected = 1 << 30
    for _ in range(MAX_SMALLER_PLANS):
        expected -= (80 << 20) + expected // 16
    assert planner.memory_budget == expected
    cache._make_room(640, 80 << 20)
    assert "lacks 80 MiB" in cache.disabled_reason and ADVICE in cache.disabled_reason
    assert capture_disabled_reason() is None  # another micro-step may still capture


def test_without_room_for_a_capture_and_without_a_plan_to_lower_everything_runs_eagerly(tmp_path):
    model = load(make_tiny_model(tmp_path / "m"))
    planner = Planner(SaveLevel.INPUT)
    expected = results(MicroStep(model, planner, capture=False), BATCHES[:2])
    micro_step = MicroStep(model, planner)
    micro_step._graphs = CUDAGraphCache(micro_step._passes)
    micro_step._graphs._make_room(640, 80 << 20)
    assert planner.memory_budget is None
    with pytest.warns(UserWarning, match="without CUDA graphs from now on: .* lacks 80 MiB"):
        found = results(micro_step, BATCHES[:2])
    assert_same_bits(found, expected)


@pytest.mark.gpu
@pytest.mark.alone
def test_a_gpu_without_room_for_a_capture_gets_a_smaller_plan_and_keeps_graphs(
    tmp_path, monkeypatch
):
    model = load_wide(tmp_path / "m", 1024)
    batch = collate(random_samples([1024] * 8, vocab=4096))
    expected_loss, expected = results(MicroStep(model, capture=False), [batch])[0]
    planner = Planner(None)
    micro_step = MicroStep(model, planner)
    missing_memory = CUDAGraphCache._missing_memory

    def on_a_full_gpu(cache):
        if planner.memory_budget is None:
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            allowed = torch.cuda.memory_reserved() + (32 << 20)
            torch.cuda.set_per_process_memory_fraction(allowed / total)
        return missing_memory(cache)

    monkeypatch.setattr(CUDAGraphCache, "_missing_memory", on_a_full_gpu)
    with pytest.warns(UserWarning, match="lacks .* MiB to capture a micro-step of 8192 tokens"):
        first = results(micro_step, [batch])
    for _ in range(MAX_SMALLER_PLANS):
        budget = planner.memory_budget
        second = results(micro_step, [batch])
        if planner.memory_budget == budget:
            break
    assert planner.largest.peak <= budget and capture_disabled_reason() is None
    assert len(micro_step._graphs._captured) == 1
    assert_same_bits(results(micro_step, [batch]), second)
    for loss, grads in (*first, *second):
        assert (loss - expected_loss).abs() < 1e-3 * expected_loss
        assert (grads - expected).norm() <= 2e-2 * expected.norm()


# ---- a capture that fails


def fail():
    """Run out of memory."""
    raise torch.OutOfMemoryError("no memory is left")


def interrupt():
    """Press Ctrl-C."""
    raise KeyboardInterrupt


@pytest.fixture
def disturb(model, monkeypatch):
    """Return disturb(f): f runs in the middle of every backward pass that is being captured."""
    layer = model.model.layers[1]
    backward = type(layer).backward_

    def disturb(f):
        def disturbed(self, *args, **options):
            if self is layer and torch.cuda.is_current_stream_capturing():
                f()
            return backward(self, *args, **options)

        monkeypatch.setattr(type(layer), "backward_", disturbed)

    return disturb


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize(
    ("happens", "why"),
    [
        (fail, "no memory is left.*lower micro_step_tokens, or memory_budget"),
        (torch.cuda.synchronize, ""),  # no capture allows to wait for the device
    ],
)
def test_after_a_capture_that_fails_everything_runs_eagerly(
    micro_step, eager, disturb, happens, why
):
    assert_same_bits(results(micro_step, BATCHES[:1]), eager[:1])
    disturb(happens)
    message = f"without CUDA graphs from now on: .* of 640 tokens.*{why}"
    with pytest.warns(UserWarning, match=message):
        assert_same_bits(results(micro_step, BATCHES[1:2]), eager[1:2])
    assert_same_bits(results(micro_step, BATCHES), eager)


@pytest.mark.gpu
@pytest.mark.alone
def test_an_interrupt_during_a_capture_leaves_the_gpu_usable(
    micro_step, model, eager, disturb, monkeypatch
):
    disturb(interrupt)
    with pytest.raises(KeyboardInterrupt):
        micro_step(BATCHES[0], 50)
    monkeypatch.undo()
    gradients(model)
    message = "without CUDA graphs from now on: a capture was interrupted"
    with pytest.warns(UserWarning, match=message):
        assert_same_bits(results(micro_step, BATCHES[:1]), eager[:1])
    assert_same_bits(results(micro_step, BATCHES), eager)
    assert_same_bits(results(MicroStep(model), BATCHES), eager)
