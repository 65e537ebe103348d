"""The removal of a model's adapter, for good or for a while.

The extended weights of linear.py hold the adapters too: resident weights, weight buffers, and the
CUDA graphs that read them. None of these outlives an adapter that is removed for good. While an
adapter is off, the weights with its columns stay aside and come back with it.
"""

import contextlib
from collections.abc import Iterator

from minitune.model.causal_lm import CausalLM


def remove_lora_(model: CausalLM) -> None:
    """Remove the adapter for good, with every buffer that holds a part of it."""
    for _, linear in model.linears():
        linear.lora_A = linear.lora_B = None
        linear.scaling = 0.0
    for fused in model.fused_linears():
        fused.resident_weight = None
    model.layer_context.weight_buffers.clear()
    model.lora = model.lora_seed = None
    model.lora_dropout, model.lora_base = 0.0, None
    model.adapters_removed += 1


@contextlib.contextmanager
def without_lora(model: CausalLM) -> Iterator[None]:
    """Return a context in which the model is its base: `model.lora` is None and no branch runs.

    The same parameters come back at the end, with the values that they had.
    """
    adapted = [linear for _, linear in model.linears() if linear.lora_A is not None]
    branches = [(linear, linear.lora_A, linear.lora_B, linear.scaling) for linear in adapted]
    resident = [(fused, fused.resident_weight) for fused in model.fused_linears()]
    lora = model.lora
    try:
        for linear in adapted:
            linear.lora_A, linear.lora_B, linear.scaling = None, None, 0.0
        for fused, _ in resident:
            fused.resident_weight = None
        model.lora = None
        yield
    finally:
        for linear, lora_A, lora_B, scaling in branches:
            linear.lora_A, linear.lora_B, linear.scaling = lora_A, lora_B, scaling
        for fused, weight in resident:
            fused.resident_weight = weight
        model.lora = lora
