"""The planner that a model asks which activations to save.

Planners know the memory of a GPU and live in minitune/memory, above this folder. The model names
only the methods that it calls.
"""

from typing import Protocol

from torch import nn

from minitune.model.activations import LayerPlan
from minitune.model.packed_sequences import PackedSequences


class StepPlanner(Protocol):
    """A planner of forward and backward passes, such as memory/planner.py's Planner."""

    def plan_for(self, model: nn.Module, packed: PackedSequences) -> "StepPlan": ...


class StepPlan(Protocol):
    """The plan of one forward and backward pass, such as memory/plan.py's Plan."""

    layers: tuple[LayerPlan, ...]
    tile_rows: int | None

    def select_attention(self, packed: PackedSequences) -> PackedSequences: ...
