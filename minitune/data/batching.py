"""TODO docstring."""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minitune.data.record_formats import Sample


@dataclass(frozen=True)
class Batch:
    """Packed samples: LongTensors of shape (N,), and the number of labels that are predicted."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    targets: int


def pack_rows(samples: Sequence[Sample], max_length: int) -> list[list[int]]:
    """Indices of the samples of each row of at most `max_length` tokens, whole samples only: best fit decreasing.

    The longest sample first, each into the row where it leaves the least room: the rows of TRL's packing=True.
    """
    rows: list[list[int]] = []
    rows_with: dict[int, deque[int]] = {}  # room left -> rows, the oldest first
    rooms: list[int] = []  # the keys of rows_with, in order
    for i in sorted(range(len(samples)), key=lambda i: -len(samples[i].input_ids)):
        size = len(samples[i].input_ids)
        if size > max_length:
            raise ValueError(
                f"sample {i} has {size} tokens and does not fit into a row of {max_length}"
            )
        if (at := bisect_left(rooms, size)) == len(rooms):
            row, room = len(rows), max_length
            rows.append([])
        else:
            room = rooms[at]
            row = rows_with[room].popleft()
            if not rows_with[room]:
                del rows_with[room], rooms[at]
        rows[row].append(i)
        if (left := room - size) not in rows_with:
            rows_with[left] = deque()
            insort(rooms, left)
        rows_with[left].append(row)
    return rows


def micro_steps(samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    """The samples of one optimizer step in packs of at most `max_tokens` tokens: first fit decreasing.

    Within a pack they keep their order. A sample longer than `max_tokens` is a pack of its own.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(samples)), key=lambda i: -len(samples[i].input_ids)):
        size = len(samples[i].input_ids)
        pack = next((k for k, left in enumerate(room) if left >= size), len(packs))
        if pack == len(packs):
            packs.append([])
            room.append(max_tokens)
        packs[pack].append(i)
        room[pack] -= size
    return [[samples[i] for i in sorted(pack)] for pack in packs]


def collate(samples: Sequence[Sample]) -> Batch:
    """The samples side by side, positions restarting at each."""
    assert samples, "no samples to put side by side"
    labels = torch.tensor([label for sample in samples for label in sample.labels])
    position_ids = torch.cat([torch.arange(len(sample.input_ids)) for sample in samples])
    return Batch(
        input_ids=torch.tensor([token for sample in samples for token in sample.input_ids]),
        labels=labels,
        position_ids=position_ids,
        targets=sum(sample.targets for sample in samples),
    )
