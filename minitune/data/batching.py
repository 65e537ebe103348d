"""Packing: whole samples side by side without padding, in rows, micro-steps and batches.

Positions restart at 0 at each sample, which tells the model the bounds of attention. Nothing
precedes the first token of a sample, so it is never a target:

    input_ids     a0 a1 a2 b0 b1        labels      -100 -100 a2 -100 b1
    position_ids   0  1  2  0  1        targets     2
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minitune.data.samples import Sample


@dataclass(frozen=True)
class Batch:
    """Packed samples: int64 tensors of shape (N,), and the number of labels that are predicted."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    targets: int


def pack_rows(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Return the indices of the samples of each row: best fit decreasing, as TRL's packing=True.

    The longest sample comes first. Each sample joins the row in which it leaves the least room.

    lengths: tokens of each sample.
    max_length: tokens of a row.

    Raises: ValueError if a sample is longer than a row.
    """
    rows: list[list[int]] = []
    rows_with: dict[int, deque[int]] = {}  # room left -> rows, the oldest first
    rooms: list[int] = []  # the keys of rows_with, ascending
    for i in _longest_first(lengths):
        size = int(lengths[i])
        if size > max_length:
            raise ValueError(
                f"sample {i} has {size} tokens and does not fit into a row of {max_length}"
            )
        at = bisect_left(rooms, size)
        if at == len(rooms):
            row, room = len(rows), max_length
            rows.append([])
        else:
            room = rooms[at]
            row = rows_with[room].popleft()
            if not rows_with[room]:
                del rows_with[room], rooms[at]
        rows[row].append(i)
        left = room - size
        if left not in rows_with:
            rows_with[left] = deque()
            insort(rooms, left)
        rows_with[left].append(row)
    return rows


def micro_steps(samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    """Return the samples of an optimizer step in micro-steps: first fit decreasing.

    The samples of a micro-step stay in order. A sample longer than `max_tokens` is a micro-step of
    its own.

    max_tokens: tokens of a micro-step.
    """
    packs: list[list[int]] = []
    rooms: list[int] = []
    lengths = [len(sample.input_ids) for sample in samples]
    for i in _longest_first(lengths):
        size = lengths[i]
        pack = next((k for k, room in enumerate(rooms) if room >= size), len(packs))
        if pack == len(packs):
            packs.append([])
            rooms.append(max_tokens)
        packs[pack].append(i)
        rooms[pack] -= size
    return [[samples[i] for i in sorted(pack)] for pack in packs]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return np.argsort(-np.asarray(lengths), kind="stable").tolist()


def collate(samples: Sequence[Sample]) -> Batch:
    """Pack samples side by side, with positions that restart at each sample."""
    assert samples, "no samples to put side by side"
    return Batch(
        input_ids=_side_by_side([sample.input_ids for sample in samples]),
        labels=_side_by_side([sample.labels for sample in samples]),
        position_ids=_side_by_side([np.arange(len(sample.input_ids)) for sample in samples]),
        targets=sum(sample.targets for sample in samples),
    )


def _side_by_side(parts: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts, dtype=np.int64))
