"""The checks that tensors are what they were: backward's, and those of values kept between calls.

Backward recomputes activations from the weights and the adapters. If one of them changed since
forward, the gradient would be that of no function. PyTorch counts the changes in place of each
tensor, `_version`, and autograd refuses such a backward with a RuntimeError. The hand-written
passes do the same. PyTorch does not count a change through `.data`, so nobody can detect it.
"""

import weakref
from collections.abc import Sequence

from torch import Tensor, nn

REMEDY = "call backward() before the change, or compute the loss again after it"


class UnchangedTensors:
    """The tensors that a forward pass read, and the versions that they had."""

    def __init__(
        self, module: nn.Module, parameters: Sequence[Tensor], frozen: Sequence[Tensor] = ()
    ):
        """Note the versions of the tensors.

        module: the module of the tensors, which knows their names.
        parameters: tensors that may be replaced before backward.
        """
        self._module, self._parameters = module, list(map(id, parameters))
        self._tensors = [*parameters, *frozen]
        self._versions = versions(self._tensors)

    def check(self, parameters: Sequence[Tensor]) -> None:
        """Check the tensors that backward is about to read.

        parameters: those that may have been replaced since.

        Raises: RuntimeError, as autograd, if one is another tensor or was changed in place.
        """
        if list(map(id, parameters)) != self._parameters:
            raise RuntimeError(
                "the adapter or a weight was replaced, removed or switched off between forward "
                f"and backward; {REMEDY}"
            )
        now = versions(self._tensors)
        if now == self._versions:
            return
        changes = zip(self._tensors, now, self._versions, strict=True)
        tensor, found, expected = next(change for change in changes if change[1] != change[2])
        raise RuntimeError(
            f"{self._name_of(tensor)} was modified by an in-place operation between forward and "
            f"backward, such as optimizer.step(): it is at version {found}, expected version "
            f"{expected}; {REMEDY}"
        )

    def _name_of(self, tensor: Tensor) -> str:
        names = (name for name, p in self._module.named_parameters() if p is tensor)
        return next(names, "a quantised weight")


class KnownTensors:
    """Tensors as they were at one time, without keeping them alive.

    counts_changes: changes in place make others of them.
    """

    def __init__(self, tensors: Sequence[Tensor], counts_changes: bool = True):
        self._refs = list(map(weakref.ref, tensors))  # an id may belong to another tensor later
        self._counts_changes = counts_changes
        self._states = self._states_of(tensors)

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Return True if these are the same tensors, in the same memory, with the same changes."""
        return (
            len(self._refs) == len(tensors)
            and all(ref() is x for ref, x in zip(self._refs, tensors, strict=True))
            and self._states_of(tensors) == self._states
        )

    def _states_of(self, tensors: Sequence[Tensor]) -> list[list[int]]:
        """Return the addresses, and the changes if they count."""
        addresses = [tensor.data_ptr() for tensor in tensors]  # `x.data = y` counts no change
        return [addresses, versions(tensors)] if self._counts_changes else [addresses]


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """Return the changes in place of each tensor; 0 for an inference tensor, which counts none."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # an inference tensor; asking each one first would take longer
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def frozen_tensors(layer: nn.Module) -> list[Tensor]:
    """Return the frozen tensors that a pass over a decoder layer reads.

    Raises: ValueError if a frozen tensor requires a gradient, which no pass computes.
    """
    linears = [linear for fused in layer.fused_linears for linear in fused.linears]
    norms = [norm for norm in layer.norms if norm.is_norm]
    if layer.self_attn.qk_norm is not None:
        norms += [layer.self_attn.q_norm, layer.self_attn.k_norm]
    frozen = [tensor for linear in linears for tensor in linear.frozen_tensors()]
    frozen += [norm.weight for norm in norms]
    if any(tensor.requires_grad for tensor in frozen):
        raise ValueError(
            "a weight of the base requires a gradient, but the base is frozen and only the adapter "
            "is trained; call requires_grad_(False) on every parameter without '.lora_' in its name"
        )
    return frozen
