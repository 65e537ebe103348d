"""The measured time and memory of a training step, against those of the plan."""

import statistics
import time

import torch

from minitune.data.batching import Batch
from minitune.device import free_memory, gib_text, memory_use
from minitune.doctor.report import Finding, judged, skipped
from minitune.doctor.subject import Subject
from minitune.memory.memory_model import Storage
from minitune.memory.plan import Plan, Workload
from minitune.memory.planner import Planner, plan_memory
from minitune.memory.search import MemoryBudget
from minitune.training.micro_step import MicroStep

# (samples, tokens of each) of the measured step
STEP = {"cpu": (2, 64), "cuda": (4, 1024)}
WARMUP, MEASURED = 2, 3  # steps; on a GPU the first one captures
# Of the plan. A host that launches slowly, or other work on the GPU, costs time but breaks nothing.
MAX_TIME, MAX_PEAK = 2.0, 1.05
PEAK_SLACK = 64 << 20  # bytes, of small models
START_SECONDS = 2e-3  # a step of a small model waits for the host, which is no part of a plan


def check_step(s: Subject) -> Finding:
    """Measure a training step, and compare it with the plan on a GPU."""
    samples, length = STEP[s.model.device.type]
    length = min(length, s.model.max_seq_length)
    ids = torch.cat([torch.tensor(x.input_ids) for x in s.random_samples((length,) * samples)])
    positions = torch.arange(length).repeat(samples)
    batch = Batch(ids, ids, positions, samples * (length - 1))
    micro_step = MicroStep(s.model, Planner(None))
    try:
        micro_step.prepare()
        seconds = _median_seconds(s, micro_step, batch)
        plan, peak = micro_step.planner.largest, memory_use(s.model.device).peak
    finally:
        micro_step.close()
    rate = len(ids) / seconds
    text = f"{s.layers_text}: {rate:,.0f} tokens/s, {1e3 * seconds:.1f} ms, peak {gib_text(peak)}"
    figures = {"tokens_per_second": rate, "step_seconds": seconds, "peak_bytes": peak}
    if s.model.device.type == "cpu":
        return skipped(f"plans are for GPUs; measured {text} of the process", **figures)
    is_good = is_as_planned(seconds, peak, plan)
    text += f"; planned {1e3 * plan.seconds:.1f} ms, {gib_text(plan.peak)}"
    planned = {"planned_seconds": plan.seconds, "planned_peak_bytes": plan.peak}
    return judged(is_good, text, **figures, **planned)


def is_as_planned(seconds: float, peak: int, plan: Plan) -> bool:
    """Return True if time and peak memory of a step are within the bounds of its plan."""
    is_fast = seconds <= MAX_TIME * plan.seconds + START_SECONDS
    return is_fast and peak <= MAX_PEAK * plan.peak + PEAK_SLACK


def _median_seconds(s: Subject, micro_step: MicroStep, batch: Batch) -> float:
    """Return the median time of a step, and leave the peak memory of all steps behind."""
    is_gpu, seconds = s.model.device.type == "cuda", []
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(s.model.device)
    for _ in range(WARMUP + MEASURED):
        if is_gpu:
            torch.cuda.synchronize(s.model.device)
        start = time.perf_counter()
        micro_step(batch, batch.targets)
        if is_gpu:
            torch.cuda.synchronize(s.model.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARMUP:])


def check_whole_model(s: Subject) -> Finding:
    """Plan a step of the whole model within the free memory of the GPU."""
    device = s.model.device
    if device.type == "cpu":
        return skipped("plans are for GPUs")
    length = s.model.max_seq_length
    # What the checked layers take is free again for the whole model.
    budget = free_memory(device) + torch.cuda.memory_allocated(device)
    plan = plan_memory(
        s.config,
        s.model.lora,
        Workload.of_samples(length, length),
        MemoryBudget(budget),
        weights=s.stored_weights,
        storage=Storage(False, False),
    )
    text = f"one sample of {length:,} tokens takes {gib_text(plan.peak)} of {gib_text(budget)}"
    return judged(plan.peak <= budget, text, planned_peak_bytes=plan.peak, free_bytes=budget)
