"""Forward and backward of the whole model: ways that must give the same loss and gradients.

packed        samples side by side, or one by one              rounding apart
micro-steps   an optimizer step in one pass, or in several     rounding apart
saved         activations saved, recomputed or offloaded       the same bits
graphs        launched, or captured and replayed               the same bits
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minitune.data.batching import Batch, collate, micro_steps
from minitune.doctor.report import Finding, failed, judged, skipped, within
from minitune.doctor.subject import Subject
from minitune.memory.memory_model import MemoryModel
from minitune.memory.model_shape import ModelShape
from minitune.memory.plan import Plan, Workload
from minitune.memory.planner import Planner
from minitune.model.activations import LayerPlan, SaveLevel
from minitune.training.cuda_graphs import bucket_size, capture_disabled_reason
from minitune.training.loss_scale import LossScale, run_micro_steps
from minitune.training.micro_step import MicroStep

# Error of the gradients, as a part of their norm, if the same sums are added in another order.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
ALIGNMENT_ROOM = 1 << 16  # bytes a layer beside its activations in the offloader's arena


class FixedPlanner(Planner):
    """A planner that has one plan for all passes."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan

    def plan_for(self, *_: object, **__: object) -> Plan:
        """Return the plan."""
        return self.plan


def loss_and_gradients(
    s: Subject, batches: Sequence[Batch], planner: Planner | None = None
) -> tuple[Tensor, Tensor]:
    """Return loss and gradients (P,) of an optimizer step, launched eagerly.

    batches: its micro-steps.
    planner: of the passes; None recomputes activations.
    """
    micro_step = MicroStep(s.model, planner or Planner(SaveLevel.INPUT), capture=False)
    try:
        return run_step(s, micro_step, batches)
    finally:
        micro_step.close()


def run_step(s: Subject, micro_step: MicroStep, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Return loss and gradients (P,) of an optimizer step's micro-steps."""
    parameters = [p for _, p in s.model.trainable_parameters()]
    for p in parameters:
        if p.grad is not None:
            p.grad.zero_()
    loss = run_micro_steps(micro_step, batches, LossScale.of_dtype(s.model.dtype))
    return loss, torch.cat([p.grad.flatten() for p in parameters])


def _close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """Return the larger relative distance, of the losses or of the gradients."""
    distances = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    return max(distances, key=lambda distance: (distance != distance, distance))


def _differences(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> int:
    """Return how many numbers of loss and gradients differ in bits; zero gradients all differ."""
    if not expected[1].any():
        return expected[1].numel()
    return sum(int((a != b).sum()) for a, b in zip(found, expected, strict=True))


def check_packing(s: Subject) -> Finding:
    """Compare the samples side by side with each sample on its own."""
    alone = loss_and_gradients(s, [collate([sample]) for sample in s.samples])
    packed = loss_and_gradients(s, [s.batch])
    return _rounding(s, packed, alone)


def check_micro_steps(s: Subject) -> Finding:
    """Compare an optimizer step in one pass with the same step in several micro-steps."""
    parts = micro_steps(s.samples, max(len(sample.input_ids) for sample in s.samples))
    if len(parts) < 2:
        return failed("the samples were not split into micro-steps")
    split = loss_and_gradients(s, [collate(part) for part in parts])
    finding = _rounding(s, split, loss_and_gradients(s, [s.batch]))
    return Finding(finding.status, f"{len(parts)} micro-steps: {finding.text}", finding.values)


def _rounding(s: Subject, found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> Finding:
    error = _close(found, expected)
    return within(error, ROUNDING[s.model.dtype], "of the gradients' norm")


def check_saved_activations(s: Subject) -> Finding:
    """Compare gradients from saved activations with those from recomputed ones."""
    recomputed = loss_and_gradients(s, [s.batch])
    levels = (SaveLevel.ATTENTION, SaveLevel.QKV, SaveLevel.ALL)
    found = [loss_and_gradients(s, [s.batch], Planner(level)) for level in levels]
    return _bits(
        [(level.name.lower(), result) for level, result in zip(levels, found, strict=True)],
        recomputed,
    )


def check_offloaded_activations(s: Subject) -> Finding:
    """Compare gradients from activations in host memory with those from recomputed ones."""
    recomputed = loss_and_gradients(s, [s.batch])
    results = []
    for level in (SaveLevel.INPUT, SaveLevel.ALL):
        found = loss_and_gradients(s, [s.batch], FixedPlanner(_offloading_plan(s, level)))
        results.append((f"offloaded {level.name.lower()}", found))
    return _bits(results, recomputed)


def _offloading_plan(s: Subject, level: SaveLevel) -> Plan:
    """Return the plan in which each layer saves `level` in host memory."""
    model, batch = s.model, s.batch
    longest = int(batch.position_ids.max()) + 1
    shape = ModelShape.of(
        model.config, model.lora, model.dtype.itemsize, model.max_seq_length, model.device.type
    )
    saved = MemoryModel(shape, Workload(len(batch.input_ids), longest)).saved_bytes(level)
    layers = model.config.num_hidden_layers
    plans = (LayerPlan(level, offloaded=True),) * layers
    return Plan(plans, host_bytes=layers * (saved + ALIGNMENT_ROOM))


def _bits(
    results: Sequence[tuple[str, tuple[Tensor, Tensor]]], expected: tuple[Tensor, Tensor]
) -> Finding:
    """Return a finding that passed if all results have the bits of the expected one.

    results: names and results.
    """
    different = {name: _differences(result, expected) for name, result in results}
    names = ", ".join(different)
    text = (
        f"{names}: {sum(different.values()):,} of {expected[1].numel():,} gradients differ in bits"
    )
    return judged(not any(different.values()), text, different=different)


def check_cuda_graphs(s: Subject) -> Finding:
    """Compare an eager pass with the capture and two replays of its CUDA graphs."""
    if s.model.device.type != "cuda":
        return skipped("there are CUDA graphs on a GPU only")
    batch = s.batch
    assert bucket_size(len(batch.input_ids)) == len(batch.input_ids), "the batch would be padded"
    eager = loss_and_gradients(s, [batch])
    micro_step = MicroStep(s.model, Planner(SaveLevel.INPUT))
    try:
        names = ("first call", "replay", "second replay")
        results = [(name, run_step(s, micro_step, [batch])) for name in names]
    finally:
        micro_step.close()
    if reason := capture_disabled_reason():
        return failed(f"nothing was captured: {reason}")
    return _bits(results, eager)
