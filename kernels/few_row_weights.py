"""The weights of few_row_linear.py: frozen weights and the adapters beside them."""

from dataclasses import dataclass

import torch

from .backend import cdiv
from .dequantize_nf4 import NF4Storage

BLOCKSIZE = 64  # elements that share a scale in NF4
TILE = 64  # rows of W a program; the tensor cores of an H100 take 64 at least
LONG_SPLIT = 1024  # elements of `in` that a program takes at least,
SHORT_SPLIT = 512  # or these, if there are fewer than MIN_PROGRAMS
MIN_PROGRAMS = 256


@dataclass(frozen=True)
class FewRowWeight:
    """Frozen weights of linears that share their input, one below the other.

    parts: each NF4 with blocks of 64, or a contiguous tensor (out, in).
    code: the values of NF4's 16 codes, on the host; () without NF4.
    """

    parts: tuple[NF4Storage | torch.Tensor, ...]
    code: tuple[float, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Return (out of all parts, in)."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def splits(self) -> int:
        """Return the number of ranges into which `in` is split. It depends on the shape alone."""
        out_features, in_features = self.shape
        tiles, splits = cdiv(out_features, TILE), 1
        while in_features >= 2 * splits * (
            SHORT_SPLIT if tiles * splits < MIN_PROGRAMS else LONG_SPLIT
        ):
            splits *= 2
        return splits


def fits_few_rows(part: NF4Storage | torch.Tensor) -> bool:
    """Return True if `few_row_linear` reads a weight as it is stored."""
    if isinstance(part, NF4Storage):
        return part.blocksize == BLOCKSIZE and part.shape[1] % BLOCKSIZE == 0
    return part.is_floating_point() and part.is_contiguous() and part.shape[1] % BLOCKSIZE == 0


@dataclass(frozen=True)
class FewRowAdapters:
    """The LoRA branches of linears that share their input, for several adapters.

    a: (adapters * linears * rank, in) in x's dtype; rows beyond an adapter's rank are zero.
    b: (adapters, out, rank) in x's dtype.
    scaling: float32 (adapters,).
    of_row: int32 (N or more,), the adapter of each row; negative for none.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: torch.Tensor
    of_row: torch.Tensor
