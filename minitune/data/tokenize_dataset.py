"""From a dataset to samples: records are rendered, encoded, labelled and cut to length.

A token is trained on if it overlaps a span of characters that the record's structure marks
(record_formats.py, chat_template.py). The whole text is encoded once, and the tokenizer's offsets
give the characters of each token. A token across the border of an answer therefore belongs to the
answer, and no token string is ever searched for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitune.data.jsonl import load_dataset
from minitune.data.record_formats import render_record
from minitune.data.samples import LabelOptions, RenderedText, Sample, Span
from minitune.data.tokenizer import Encoding, Tokenizer
from minitune.kernels.cross_entropy import IGNORE_INDEX

CHUNK = 1000  # records encoded together: enough to occupy the tokenizer's threads


@dataclass(frozen=True)
class TokenizedDataset:
    """Samples that are ready to train on.

    samples: the samples that have a label, in the order of the records.
    skipped: number of records without a label.
    truncated: number of records that were cut to length.
    """

    samples: list[Sample]
    skipped: int
    truncated: int


def tokenize_dataset(
    source: str | Path | Sequence[Mapping],
    tokenizer: Tokenizer,
    max_length: int,
    progress: Callable[[int, int], None] | None = None,
    **labels: Any,
) -> TokenizedDataset:
    """Tokenize and label every record of a dataset.

    source: a JSONL file, or a sequence of records.
    max_length: tokens of a sample; longer samples lose their end.
    progress: called as progress(done, total) with numbers of records.
    labels: the fields of LabelOptions, as in SFTConfig.

    Raises: ValueError that begins with file and line if a record cannot be read or rendered, and
        ValueError if no sample has a label.
    """
    if max_length < 2:
        raise ValueError(
            f"max_length is {max_length}; expected at least 2: a token is predicted from another"
        )
    options = LabelOptions(**labels)
    records = load_dataset(source)
    samples: list[Sample] = []
    truncated = 0
    for start in range(0, len(records), CHUNK):
        for sample in _encode(records[start : start + CHUNK], tokenizer, options):
            truncated += len(sample.input_ids) > max_length
            sample = Sample(sample.input_ids[:max_length], sample.labels[:max_length])
            if sample.targets:
                samples.append(sample)
        if progress is not None:
            progress(min(start + CHUNK, len(records)), len(records))
    if not samples:
        name = source if isinstance(source, str | Path) else "dataset"
        message = f"{name}: none of its {len(records)} samples has a token to train on."
        if truncated:
            message += f" {truncated} of them were cut to max_length {max_length}: raise it."
        raise ValueError(message)
    return TokenizedDataset(samples, len(records) - len(samples), truncated)


def _encode(
    records: list[tuple[str, Mapping]], tokenizer: Tokenizer, options: LabelOptions
) -> list[Sample]:
    """Return the samples of some records at full length; their texts are encoded together."""
    rendered = [
        part for origin, record in records for part in _render(origin, record, tokenizer, options)
    ]
    texts = [item.text for item in rendered if isinstance(item, RenderedText)]
    encodings = iter(tokenizer.encode_batch_with_offsets(texts))
    return [_sample(item, encodings, tokenizer) for item in rendered]


def _render(
    origin: str, record: Mapping, tokenizer: Tokenizer, options: LabelOptions
) -> list[RenderedText | Sample]:
    try:
        parts = render_record(record, tokenizer, options).parts
        for part in parts:
            if isinstance(part, RenderedText):
                part.text.encode()  # JSON may hold half a surrogate pair, which is not text
        return parts
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None


def _sample(
    item: RenderedText | Sample, encodings: Iterator[Encoding], tokenizer: Tokenizer
) -> Sample:
    """Return the sample of a rendered record; a text takes the next one of `encodings`."""
    if isinstance(item, Sample):
        return item
    ids, offsets = next(encodings)
    labels = list(ids) if item.spans is None else _labels(ids, offsets, item.spans)
    if item.add_special_tokens:
        prefix, suffix = tokenizer.special_tokens_around(ids)
        ids = [*prefix, *ids, *suffix]
        ignored = [IGNORE_INDEX] * len(prefix)
        labels = [*(prefix if item.spans is None else ignored), *labels, *suffix]
    return Sample(ids, labels)


def _labels(ids: list[int], offsets: list[Span], spans: list[Span]) -> list[int]:
    """Return the ids of the tokens that overlap one of the spans, and -100 for all others.

    A token may have an empty offset: a dummy space, or all but the last byte of a character. Such
    a token counts if it lies in a span.

    spans: in the order of the text.
    """
    spans = [(begin, end) for begin, end in spans if begin < end]
    labels = [IGNORE_INDEX] * len(ids)
    current = 0  # the first span that does not end before the token
    for i, (begin, end) in enumerate(offsets):
        while current < len(spans) and spans[current][1] <= begin:
            current += 1
        if current == len(spans):
            break
        span_begin = spans[current][0]
        if end > span_begin or begin >= span_begin:
            labels[i] = ids[i]
    return labels
