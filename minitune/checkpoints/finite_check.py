"""The check that weights hold neither NaN nor infinite values, while they are loaded.

The largest magnitude of a tensor is NaN or infinite if one of its values is. It stays on the
device of the tensor, and all magnitudes are fetched at once, so a load waits for the GPU once. On
a CPU the pass reads 7 GB/s on one core. A tensor of few bits is judged by its scales alone.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minitune.model.nf4 import NF4

NOT_FINITE = "holds a value that is NaN or infinite"


class FiniteCheck:
    """The largest magnitudes of the tensors that were added, by name."""

    def __init__(self):
        self._magnitudes: dict[str, Tensor] = {}

    def add(self, name: str, *parts: Tensor) -> None:
        """Add a tensor, given as all parts that its values are computed from."""
        self._magnitudes[name] = torch.stack([magnitude(part) for part in parts]).sum()

    def add_nf4(self, name: str, weight: NF4) -> None:
        """Add a quantised weight.

        The bound on its values is that of code * (nested_code * nested_absmax + nested_offset).
        """
        scale = weight.absmax
        if weight.nested_absmax is not None:
            nested = magnitude(weight.nested_absmax) * magnitude(weight.nested_code)
            scale = nested + weight.nested_offset.abs()
        self._magnitudes[name] = magnitude(weight.code) * magnitude(scale)

    def not_finite(self) -> list[str]:
        """Return the names of the tensors that hold NaN or infinite values."""
        if not self._magnitudes:
            return []
        finite = torch.stack(list(self._magnitudes.values())).isfinite().tolist()
        return [name for name, holds in zip(self._magnitudes, finite, strict=True) if not holds]

    def require(self, error: Callable[[str, str], ValueError], remedy: str) -> None:
        """Raise the error of the first tensor that is not finite.

        error: returns an error from the name of a tensor and a text about it.
        remedy: the end of the text.
        """
        if wrong := self.not_finite():
            raise error(wrong[0], f"{NOT_FINITE} ({_count(wrong)}); {remedy}")


def magnitude(values: Tensor) -> Tensor:
    """Return the largest magnitude, float32 on the device: NaN or infinite if a value is."""
    lowest, highest = torch.aminmax(values)
    return torch.maximum(-lowest, highest).float()


def _count(names: Sequence[str]) -> str:
    return "1 such tensor" if len(names) == 1 else f"{len(names)} such tensors"
