"""The interface of frozen weights that are stored in few bits.

A pass over a layer dequantises its weights into buffers (weight_buffers.py). That is all that the
model asks of a format, so a new format is one more class here. NF4 (nf4.py) is what this project
quantises to; the types of GGUF files (ggml_weight.py) are read as they are stored.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class QuantizedWeight(ABC):
    """A frozen weight (out_features, in_features) in a format of few bits.

    shape: (out_features, in_features).
    """

    shape: tuple[int, int]

    @property
    @abstractmethod
    def format(self) -> str:
        """Return the name of the format, such as "NF4" or "Q4_K"."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Return the bytes that the weight takes."""

    @abstractmethod
    def empty_like(self, device: torch.device) -> "QuantizedWeight":
        """Return a weight of this format and shape on the device, with any values."""

    @classmethod
    @abstractmethod
    def dequantize_stacked(
        cls, weights: Sequence["QuantizedWeight"], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """Return weights of this class one below the other, (sum of out_features, in_features).

        out: destination, possibly a range of columns of wider rows; None makes a new tensor.
        """

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return the weight (out_features, in_features) in dtype, written into `out` if given."""
        return self.dequantize_stacked([self], dtype, out)


def set_frozen_weight(module: nn.Module, weight: Tensor | QuantizedWeight | None) -> None:
    """Give a module its frozen weight in one of both forms, `quantized` or `weight`."""
    is_quantized = isinstance(weight, QuantizedWeight)
    module.quantized = weight if is_quantized else None
    plain = None if is_quantized or weight is None else weight.detach()
    module.weight = None if plain is None else nn.Parameter(plain, requires_grad=False)


def share_frozen_weight(module: nn.Module, other: nn.Module) -> None:
    """Give a module the frozen weight of another one, without a copy."""
    module.quantized, module.weight = other.quantized, other.weight
