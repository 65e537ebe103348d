"""Packed sequences: N tokens of any number of samples, one sample behind the other, no padding.

Row i sees the rows start[i] <= j <= i. An example with samples of 3, 1 and 2 tokens:

    positions   0 1 2   0   0 1
    start       0 0 0   3   4 4
    end         3 3 3   4   6 6

Under a sliding window of W tokens, row i sees the rows from i - W + 1 on at most, and row j is seen
up to row j + W - 1 at most. The same tensors say this, with W = 2:

    start       0 0 1   3   4 4
    end         2 3 3   4   6 6
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedSequences:
    """The place of each of N packed tokens in its sample.

    positions: int32 (N,), the position of each token in its sample.
    start: int32 (N,), the first row that each row sees.
    end: int32 (N,), one past the last row that sees each row.
    uniform_seqlen: the length that all samples share; None if they differ or if it is unknown.
    max_seqlen: an upper bound on the length of every sample; None if no bound is known.
    windows: the same samples under sliding windows, by the window in tokens.
    """

    positions: Tensor
    start: Tensor
    end: Tensor
    uniform_seqlen: int | None = None
    max_seqlen: int | None = None
    windows: dict[int, "PackedSequences"] = field(default_factory=dict)

    @classmethod
    def from_positions(cls, positions: Tensor, windows: Sequence[int] = ()) -> "PackedSequences":
        """Return the samples of positions (N,) that restart at 0 in each sample.

        The lengths are set only if the positions are on the host, so no device is waited for.

        windows: the sliding windows that the samples are needed under, in tokens.
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
        packed = cls(positions, index - positions, end, uniform_seqlen, max_seqlen)
        return replace(packed, windows={w: packed.windowed(w) for w in windows})

    def windowed(self, window: int) -> "PackedSequences":
        """Return the samples under a sliding window: a row sees `window` rows, itself included."""
        index = torch.arange(len(self.start), dtype=torch.int32, device=self.start.device)
        start = torch.maximum(self.start, index - (window - 1))
        end = torch.minimum(self.end, index + window)
        return PackedSequences(self.positions, start, end, max_seqlen=self.max_seqlen)

    def seen_through(self, window: int | None) -> "PackedSequences":
        """Return the samples under one of the sliding windows, or as they are for None."""
        return self if window is None else self.windows[window]

    def tensors(self) -> list[Tensor]:
        """Return positions, start, end, then start and end under each window; each int32 (N,)."""
        windows = [t for packed in self.windows.values() for t in (packed.start, packed.end)]
        return [self.positions, self.start, self.end, *windows]

    def of_tensors(self, tensors: Sequence[Tensor]) -> "PackedSequences":
        """Return a copy with other tensors, in the order of `tensors`."""
        positions, start, end, *bounds = tensors
        windows = {
            window: replace(packed, positions=positions, start=bounds[2 * i], end=bounds[2 * i + 1])
            for i, (window, packed) in enumerate(self.windows.items())
        }
        return replace(self, positions=positions, start=start, end=end, windows=windows)

    def to(self, device: torch.device) -> "PackedSequences":
        """Return a copy on the device."""
        return self.of_tensors([t.to(device, non_blocking=True) for t in self.tensors()])


def pack_batch(
    ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the packed ids (N,) of a batch, their positions (N,), and the mask of real tokens.

    The mask is True for real tokens and shaped like the ids. All three are on the host.

    ids: (B, T); or (N,) or (1, N) packed, with position_ids that restart at 0 in each sample.
    attention_mask: shaped like ids, 0 for padding; None for no padding.

    Raises: ValueError if shapes differ, or positions do not count up within a sample.
    """
    mask = torch.ones_like(ids, dtype=torch.bool)
    if attention_mask is not None:
        if attention_mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} and input_ids "
                f"{tuple(ids.shape)} differ in shape; each token has one mask value"
            )
        mask = attention_mask.cpu().bool()
    if position_ids is None:
        positions = (mask.cumsum(-1) - 1)[mask]
    else:
        positions = position_ids.cpu().expand(ids.shape)[mask]
        next_positions = torch.cat([positions.new_full((1,), -1), positions[:-1]]) + 1
        if not ((positions == 0) | (positions == next_positions)).all():
            raise ValueError(
                "position_ids must count up by one and restart at 0 in each packed sample"
            )
    return ids[mask], positions, mask
