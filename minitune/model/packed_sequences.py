"""TODO docstring."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedSequences:
    """Where each of N packed tokens stands: its position in its sample, and its sample's bounds; int32 (N,)."""

    positions: Tensor
    start: Tensor
    end: Tensor
    uniform_seqlen: int | None = (
        None  # of every sample, where the host knows that they all have the same
    )
    max_seqlen: int | None = (
        None  # rows of the longest sample or a bound on them, where the host knows one
    )

    @classmethod
    def from_positions(cls, positions: Tensor) -> "PackedSequences":
        """From positions (N,) that restart at 0 with each sample; everything follows from them, without a sync."""
        positions = positions.to(torch.int32)
        index = torch.arange(len(positions), dtype=torch.int32, device=positions.device)
        first = torch.where(
            positions == 0, index, len(positions)
        )  # a sample's first row; N elsewhere
        following = torch.cat([first[1:], first.new_full((min(1, len(first)),), len(first))])
        end = following.flip(0).cummin(0).values.flip(0)
        uniform_seqlen = max_seqlen = None
        if positions.device.type == "cpu" and len(positions):
            max_seqlen = int(positions.max()) + 1
            count = int((positions == 0).sum())
            expected = torch.arange(len(positions) // count, dtype=torch.int32).repeat(count)
            uniform_seqlen = len(positions) // count if torch.equal(expected, positions) else None
        return cls(positions, index - positions, end, uniform_seqlen, max_seqlen)

    def to(self, device: torch.device) -> "PackedSequences":
        tensors = (t.to(device, non_blocking=True) for t in (self.positions, self.start, self.end))
        return PackedSequences(*tensors, self.uniform_seqlen, self.max_seqlen)
