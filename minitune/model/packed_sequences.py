"""Packed sequences: N tokens of any number of samples, one sample behind the other, no padding.

Row i sees the rows start[i] <= j <= i. An example with samples of 3, 1 and 2 tokens:

    positions   0 1 2   0   0 1
    start       0 0 0   3   4 4
    end         3 3 3   4   6 6
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedSequences:
    """The place of each of N packed tokens in its sample.

    positions: int32 (N,), the position of each token in its sample.
    start, end: int32 (N,), the first row of its sample, and one past the last row.
    uniform_seqlen: the length that all samples share; None if they differ or if it is unknown.
    max_seqlen: an upper bound on the length of every sample; None if no bound is known.
    """

    positions: Tensor
    start: Tensor
    end: Tensor
    uniform_seqlen: int | None = None
    max_seqlen: int | None = None

    @classmethod
    def from_positions(cls, positions: Tensor) -> "PackedSequences":
        """Return the samples of positions (N,) that restart at 0 in each sample.

        The lengths are set only if the positions are on the host, so no device is waited for.
        """
        positions = positions.to(torch.int32)
        N = len(positions)
        index = torch.arange(N, dtype=torch.int32, device=positions.device)
        first = torch.where(positions == 0, index, N)  # a sample's first row there, and N elsewhere
        first_from_next_row = torch.cat([first[1:], first.new_full((min(1, N),), N)])
        end = first_from_next_row.flip(0).cummin(0).values.flip(0)
        uniform_seqlen = max_seqlen = None
        if positions.device.type == "cpu" and N:
            max_seqlen = int(positions.max()) + 1
            count = int((positions == 0).sum())
            uniform = torch.arange(N // count, dtype=torch.int32).repeat(count)
            uniform_seqlen = N // count if torch.equal(uniform, positions) else None
        return cls(positions, index - positions, end, uniform_seqlen, max_seqlen)

    def to(self, device: torch.device) -> "PackedSequences":
        """Return a copy on the device."""
        tensors = (t.to(device, non_blocking=True) for t in (self.positions, self.start, self.end))
        return PackedSequences(*tensors, self.uniform_seqlen, self.max_seqlen)
