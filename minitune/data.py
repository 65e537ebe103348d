"""From a dataset to packed tokens: records are rendered, encoded and labelled; samples are packed without padding.

A token is trained on when it overlaps a span of characters that the record's structure marks (records.py, chat.py):
the whole text is encoded once, and the tokenizer's offsets say which characters each token stands for. So a token that
straddles the border of an answer belongs to the answer, and no token string is ever searched for.

Packing puts whole samples side by side in one row of tokens; positions restart at 0 at each sample, which is how the
model knows where attention ends. The first token of a sample is never a target: nothing precedes it.

    input_ids     a0 a1 a2 b0 b1        labels      -100 -100 a2 -100 b1
    position_ids   0  1  2  0  1        targets     2
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minitune.chat import Span
from minitune.kernels.cross_entropy import IGNORE
from minitune.records import Options, Rendered, Sample, load_dataset, render_record
from minitune.tokenizer import Tokenizer

__all__ = ["Batch", "Prepared", "Sample", "collate", "load_dataset", "micro_steps", "pack_rows", "prepare"]

CHUNK = 1000  # records encoded at a time: enough to keep the tokenizer's threads busy


@dataclass(frozen=True)
class Prepared:
    """Samples ready to train on; how many were left out because no label was left, how many were cut to length."""

    samples: list[Sample]
    skipped: int
    truncated: int


@dataclass(frozen=True)
class Batch:
    """Packed samples: LongTensors of shape (N,), and the number of labels that are predicted."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    targets: int


def prepare(
    source: str | Path | Sequence[Mapping],
    tokenizer: Tokenizer,
    max_length: int,
    assistant_only_loss: bool | None = None,
    completion_only_loss: bool | None = None,
    dataset_text_field: str = "text",
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Tokenize and label every record, in the order of the source, cut to the first `max_length` tokens.

    `progress(done, total)` is called as records are finished. Raises ValueError, beginning with file and line, for a
    record that cannot be read, and when no sample has a label left.
    """
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}; a sample needs at least 2 tokens to have one to predict")
    options = Options(assistant_only_loss, completion_only_loss, dataset_text_field)
    records = load_dataset(source)
    samples, truncated = [], 0
    for start in range(0, len(records), CHUNK):
        for sample in _encode(records[start : start + CHUNK], tokenizer, options):
            truncated += len(sample.input_ids) > max_length
            sample = Sample(sample.input_ids[:max_length], sample.labels[:max_length])
            if sample.targets:
                samples.append(sample)
        if progress is not None:
            progress(min(start + CHUNK, len(records)), len(records))
    if not samples:
        where = source if isinstance(source, str | Path) else "dataset"
        cut = f" {truncated} of them were cut to max_length {max_length}: raise it." if truncated else ""
        raise ValueError(f"{where}: none of its {len(records)} samples has a token to train on.{cut}")
    return Prepared(samples, len(records) - len(samples), truncated)


def _encode(records: list[tuple[str, Mapping]], tokenizer: Tokenizer, options: Options) -> list[Sample]:
    """The records' samples at their full length; the texts among them are encoded together."""
    rendered = []
    for origin, record in records:
        try:
            item = render_record(record, tokenizer, options)
            if isinstance(item, Rendered):
                item.text.encode()  # half a surrogate pair is legal in JSON, but it is not text
            rendered.append(item)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None
    texts = [item.text for item in rendered if isinstance(item, Rendered)]
    encodings = iter(tokenizer.encode_batch_with_offsets(texts))
    return [_label(item, *next(encodings), tokenizer) if isinstance(item, Rendered) else item for item in rendered]


def _label(item: Rendered, ids: list[int], offsets: list[Span], tokenizer: Tokenizer) -> Sample:
    labels = list(ids) if item.spans is None else _labels(ids, offsets, item.spans)
    if item.plain:
        prefix, suffix = tokenizer.special_tokens_around(ids)
        labels = [*(prefix if item.spans is None else [IGNORE] * len(prefix)), *labels, *suffix]
        ids = [*prefix, *ids, *suffix]
    return Sample(ids, labels)


def _labels(ids: list[int], offsets: list[Span], spans: list[Span]) -> list[int]:
    """The ids of the tokens that overlap one of the spans (in the order of the text), -100 for the others.

    A token may stand for no character of its own (all but one byte of a character, a dummy space): it belongs to
    where it is.
    """
    spans = [span for span in spans if span[0] < span[1]]
    labels, at = [IGNORE] * len(ids), 0
    for i, (first, last) in enumerate(offsets):
        while at < len(spans) and spans[at][1] <= first:
            at += 1
        if at == len(spans):
            break
        if last > spans[at][0] or first >= spans[at][0]:
            labels[i] = ids[i]
    return labels


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
            raise ValueError(f"sample {i} has {size} tokens and does not fit into a row of {max_length}")
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
