"""From a dataset to samples: records are rendered, encoded, labelled and cut to length.

A token is trained on if it overlaps a span of characters that the record's structure marks
(record_formats.py, chat_template.py). The whole text is encoded once, and the tokenizer's offsets
give the characters of each token. A token across the border of an answer therefore belongs to the
answer, and no token string is ever searched for.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitune.data.dataset_report import DatasetReport
from minitune.data.flat_samples import FlatSamples, OriginFormat, SampleBuilder
from minitune.data.jsonl import load_dataset
from minitune.data.record_formats import render_record
from minitune.data.samples import LabelOptions, RenderedText, Sample, Span
from minitune.data.tokenizer import Encoding, Tokenizer
from minitune.kernels.cross_entropy import IGNORE_INDEX

CHUNK = 1000  # records encoded together: enough to occupy the tokenizer's threads


@dataclass(frozen=True)
class TokenizedDataset:
    """Samples that are ready to train on.

    samples: the samples that have a token to train on, in the order of the records.
    report: counts of everything that happened to the records.
    """

    samples: FlatSamples
    report: DatasetReport

    @property
    def skipped(self) -> int:
        """Return the number of samples without a token to train on."""
        return self.report.skipped.count

    @property
    def truncated(self) -> int:
        """Return the number of samples that were cut to length."""
        return self.report.truncated.count


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
    is_file = isinstance(source, str | Path)
    origins = OriginFormat(str(source) if is_file else "dataset", is_file)
    builder, report = SampleBuilder([origins]), DatasetReport(records=len(records))
    for start in range(0, len(records), CHUNK):
        for origin, sample in _encode(records[start : start + CHUNK], tokenizer, options, report):
            if len(sample.input_ids) > max_length:
                report.truncated.add(origin)
                sample = Sample(sample.input_ids[:max_length], sample.labels[:max_length])
            if targets := sample.targets:
                number = int(re.search(r"(\d+)\]?$", origin)[1])
                builder.add(sample, targets, 0, number)
            else:
                report.skipped.add(origin)
        if progress is not None:
            progress(min(start + CHUNK, len(records)), len(records))
    if not len(builder):
        message = f"{origins.name}: none of its {len(records)} samples has a token to train on."
        if truncated := report.truncated.count:
            message += f" {truncated} of them were cut to max_length {max_length}: raise it."
        raise ValueError(message)
    return TokenizedDataset(builder.build(), report)


def _encode(
    records: list[tuple[str, Mapping]],
    tokenizer: Tokenizer,
    options: LabelOptions,
    report: DatasetReport,
) -> list[tuple[str, Sample]]:
    """Return (origin, sample) of some records at full length; their texts are encoded together."""
    rendered = [
        (origin, part)
        for origin, record in records
        for part in _render(origin, record, tokenizer, options, report)
    ]
    texts = [item.text for _, item in rendered if isinstance(item, RenderedText)]
    encodings = iter(tokenizer.encode_batch_with_offsets(texts))
    return [(origin, _sample(item, encodings, tokenizer)) for origin, item in rendered]


def _render(
    origin: str,
    record: Mapping,
    tokenizer: Tokenizer,
    options: LabelOptions,
    report: DatasetReport,
) -> list[RenderedText | Sample]:
    try:
        rendered = render_record(record, tokenizer, options)
        for part in rendered.parts:
            if isinstance(part, RenderedText):
                part.text.encode()  # JSON may hold half a surrogate pair, which is not text
        report.shapes[rendered.shape] += 1
        report.add_notes(rendered.notes, origin)
        return rendered.parts
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
