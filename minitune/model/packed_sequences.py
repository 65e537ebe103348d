"""Packed sequences: N tokens of any number of samples, one sample behind the other, no padding.

Row i sees the rows start[i] <= j <= i, and row j is seen by the rows j <= i < end[j]. An example
with samples of 3, 1 and 2 tokens:

    positions   0 1 2   0   0 1
    start       0 0 0   3   4 4
    end         3 3 3   4   6 6

The same samples with a sliding window of 2 tokens:

    start       0 0 1   3   4 4
    end         2 3 3   4   6 6
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedSequences:
    """The place of each of N packed tokens in its sample.

    positions: int32 (N,), the position of each token in its sample.
    start, end: int32 (N,), the first row that each row sees, and one past the last row that sees
        it. Without a window these are the bounds of its sample.
    uniform_seqlen: the length that all samples share; None if they differ, if it is unknown or if
        there is a window.
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

    def windowed(self, window: int) -> "PackedSequences":
        """Return the same samples if each row sees itself and at most window - 1 rows before it.

        The work does not depend on the lengths of the samples, so a CUDA graph can replay it.

        Raises: ValueError if the window is less than 1 token.
        """
        if window < 1:
            raise ValueError(f"a window of {window} tokens; expected at least 1")
        index = torch.arange(len(self.start), dtype=torch.int32, device=self.start.device)
        start = torch.maximum(self.start, index - (window - 1))
        end = torch.minimum(self.end, index + window)
        return replace(self, start=start, end=end, uniform_seqlen=None)

    def to(self, device: torch.device) -> "PackedSequences":
        """Return a copy on the device."""
        tensors = (t.to(device, non_blocking=True) for t in (self.positions, self.start, self.end))
        return PackedSequences(*tensors, self.uniform_seqlen, self.max_seqlen)
