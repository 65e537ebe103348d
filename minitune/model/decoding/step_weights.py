"""The weights of decode steps, in a form that is fast for few rows.

A training step multiplies thousands of rows, so it may dequantise a weight each time. A decode step
has a row for each sequence. Its weights are built once and stay while the model does not change.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from minitune.model.adapter_switch import Adapter
from minitune.model.decoding.cpu_weights import CpuWeights, cpu_weights_fit
from minitune.model.decoding.few_row_step import FewRowStep, few_row_step_fits
from minitune.model.linear import FusedLinear

MAX_FEW_ROWS = 64  # rows of a step; more rows take dequantised weights
BASE = -1  # in `adapter_of_row`, for rows without an adapter


class PassWeights(Protocol):
    """The weights of all fused linears, for passes over any layer."""

    def __getitem__(self, fused: FusedLinear) -> Any:
        """Return the weight of a fused linear, as FusedLinear.forward_ takes it."""
        ...


class StepWeights(PassWeights, Protocol):
    """The weights of all fused linears and of the head, with an adapter for each row."""

    def logits(self, h: Tensor, multiplier: float) -> Tensor:
        """Return multiplier * h W^T of the head in float32 (rows, V), from h (rows, D)."""
        ...

    def prefill_weights(self, adapter: Adapter) -> PassWeights | None:
        """Return weights for prompts with one adapter; None dequantises each layer."""
        ...

    def refresh_(self) -> None:
        """Read the values of the adapters again."""
        ...


def new_step_weights(
    model, adapters: Sequence[Adapter], adapter_of_row: Tensor, head: Tensor
) -> StepWeights | None:
    """Return the weights for steps of a model; None if each step dequantises each layer.

    adapters: the adapters that rows may use, none of them empty.
    adapter_of_row: int32 (slots,), the index of each row's adapter, or BASE; read at each step.
    head: the weight of the head in the compute dtype (V, D).
    """
    if few_row_step_fits(model):
        return FewRowStep(model, adapters, adapter_of_row, head)
    if cpu_weights_fit(model):
        return CpuWeights(model, adapters, adapter_of_row)
    return None
