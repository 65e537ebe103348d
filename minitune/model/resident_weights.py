"""Weights that stay dequantised in memory, beside their quantised form."""

from collections.abc import Iterable

import torch

from minitune.model.linear import FusedLinear


class ResidentWeights:
    """Fused linears whose extended weight one owner keeps resident.

    Several owners may exist. Each one releases only the weights that it made resident itself.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self._dtype = dtype
        self._device = device
        self._owned: set[FusedLinear] = set()

    @property
    def nbytes(self) -> int:
        """Return the bytes of the resident weights of this owner."""
        return sum(fused.resident_weight.nbytes for fused in self._owned)

    def keep_only(self, wanted: Iterable[FusedLinear]) -> None:
        """Release all weights that are not `wanted`, then make the wanted weights resident.

        Weights that another owner made resident, and linears that need no buffer, stay as they are.
        """
        wanted = list(wanted)
        for fused in self._owned.difference(wanted):
            fused.resident_weight = None
        self._owned.intersection_update(wanted)
        for fused in wanted:
            if fused.resident_weight is None:
                fused.make_resident(self._dtype, self._device)
                if fused.resident_weight is not None:
                    self._owned.add(fused)
