"""The removal of a model's adapter for good, and its exchange for a while.

The extended weights of linear.py hold the adapters too: resident weights, weight buffers, and the
CUDA graphs that read them. None of these outlives an adapter that is removed for good. While an
adapter is off, the weights with its columns stay aside and come back with it.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from minitune.model.fixed_module import NamedLinear
from minitune.model.linear import Linear


class Branch(NamedTuple):
    """The LoRA branch of a linear: modules with the weights A (r, in) and B (out, r)."""

    lora_A: nn.Module
    lora_B: nn.Module
    scaling: float


Adapter = Mapping[Linear, Branch]  # the branches of all adapted linears; none for the base


def new_branch(A: Tensor, B: Tensor, scaling: float) -> Branch:
    """Return a frozen branch with the factors A (r, in) and B (out, r) in float32."""
    modules = []
    for factor in (A, B):
        module = NamedLinear(*reversed(factor.shape), bias=False, device="meta")
        module.weight = nn.Parameter(factor, requires_grad=False)
        modules.append(module)
    return Branch(*modules, scaling)


def own_adapter(model) -> Adapter:
    """Return the adapter that the model has now."""
    return {
        linear: Branch(lora_A, linear.lora_B, linear.scaling)
        for fused in model.fused_linears()
        for linear in fused.linears
        if (lora_A := linear.lora_A) is not None
    }


def remove_lora_(model) -> None:
    """Remove the adapter for good, with every buffer that holds a part of it."""
    model.free_generation_memory()
    _attach(model, {})
    for fused in model.fused_linears():
        fused.resident_weight = None
    model.layer_context.weight_buffers.clear()
    model.lora = model.lora_seed = None
    model.lora_dropout, model.lora_base = 0.0, None
    model.adapters_removed += 1


@contextlib.contextmanager
def without_lora(model) -> Iterator[None]:
    """Return a context in which the model is its base: `model.lora` is None and no branch runs.

    The same parameters come back at the end, with the values that they had.
    """
    lora = model.lora
    with switched_adapter(model, {}):
        try:
            model.lora = None
            yield
        finally:
            model.lora = lora


@contextlib.contextmanager
def switched_adapter(model, adapter: Adapter) -> Iterator[None]:
    """Return a context in which the linears of the model have the branches of `adapter`.

    Nothing changes if these are the model's own branches.
    """
    own = own_adapter(model)
    if adapter == own:
        yield
        return
    resident = [(fused, fused.resident_weight) for fused in model.fused_linears()]
    buffers = model.layer_context.weight_buffers
    with buffers.set_aside() if adapter else contextlib.nullcontext():
        try:
            _attach(model, adapter)
            for fused, _ in resident:
                fused.resident_weight = None
            yield
        finally:
            _attach(model, own)
            for fused, weight in resident:
                fused.resident_weight = weight


def _attach(model, adapter: Adapter) -> None:
    """Give each linear its branch of the adapter, or none."""
    for fused in model.fused_linears():
        for linear in fused.linears:
            branch = adapter.get(linear, Branch(None, None, 0.0))
            linear.lora_A, linear.lora_B, linear.scaling = branch
