"""The check that backward reads the tensors that forward read.

Backward recomputes activations from the weights and the adapters. If one of them changed since
forward, the gradient would be that of no function. PyTorch counts the changes in place of each
tensor, `_version`, and autograd refuses such a backward with a RuntimeError. The hand-written
passes do the same. PyTorch does not count a change through `.data`, so nobody can detect it.
"""

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
