"""From a dataset to samples: records are rendered, encoded, labelled and cut to length.

A token is trained on if it overlaps a span of characters that the record's structure marks
(records/record_formats.py, templates/chat_template.py). The whole text is encoded once, and the
tokenizer's offsets give the characters of each token. A token across the border of an answer
therefore belongs to the answer, and no token string is ever searched for.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from minitune.data.dataset_report import DatasetReport, Occurrences
from minitune.data.flat_samples import FlatSamples, SampleBuilder
from minitune.data.long_texts import PIECE, encode_to_length
from minitune.data.records.record_fields import unused_notes
from minitune.data.records.record_formats import TEXT_FIELD, render_record
from minitune.data.samples import LabelOptions, RenderedText, Sample, Span
from minitune.data.sources.sources import Dataset, Source, open_sources
from minitune.data.templates.template_budget import CostlyTemplateError
from minitune.data.token_cache import dataset_key, new_entry, read_entry
from minitune.data.tokenization.tokenizer import Encoding, Tokenizer
from minitune.kernels.cross_entropy import IGNORE_INDEX

# Limits of the texts that are encoded together. They occupy the tokenizer's threads, and bound the
# memory: encoding takes about 285 bytes a character.
CHUNK = 1000  # texts
CHUNK_CHARACTERS = 1 << 19  # characters that are encoded at once
HELD_CHARACTERS = 1 << 23  # characters in memory


@dataclass(frozen=True)
class TokenizedDataset:
    """Samples that are ready to train on.

    samples: the samples that have a token to train on, in the order of the records.
    report: counts of everything that happened to the records.
    key: the name of its entry in the cache, or None.
    is_cached: True if the samples were read from the cache.
    is_weighted: True if `samples` repeat or leave out samples of the report by data_weights.
    """

    samples: FlatSamples
    report: DatasetReport
    key: str | None = None
    is_cached: bool = False
    is_weighted: bool = False

    @property
    def skipped(self) -> int:
        """Return the number of samples without a token to train on."""
        return self.report.skipped.count

    @property
    def truncated(self) -> int:
        """Return the number of samples that were cut to length."""
        return self.report.truncated.count


def tokenize_dataset(
    source: Dataset,
    tokenizer: Tokenizer,
    max_length: int,
    progress: Callable[[int, int | None], None] | None = None,
    skip_bad: bool = False,
    cache: Path | None = None,
    **labels: Any,
) -> TokenizedDataset:
    """Tokenize and label every record of a dataset.

    source: a file, several files, or records in memory (sources/sources.py).
    max_length: tokens of a sample; longer samples lose their end.
    progress: called as progress(done, total) with numbers of records; the total may be unknown.
    skip_bad: leave out records that cannot be read or rendered; the report names them.
    cache: folder of tokenized datasets (token_cache.py); None keeps the samples in memory.
    labels: the fields of LabelOptions, as in SFTConfig.

    Raises: ValueError if records cannot be read or rendered, which lists the first 20 by file and
        line; at the first record for which the chat template asks for too much work; if no sample
        has a token to train on.
    """
    if max_length < 2:
        raise ValueError(
            f"max_length is {max_length}; expected at least 2: a token is predicted from another"
        )
    options = LabelOptions(**labels)
    sources = open_sources(source, options.dataset_text_field or TEXT_FIELD)
    formats = [item.format for item in sources]
    run = _Tokenization(tokenizer, max_length, options, skip_bad, progress)
    key = None
    if cache is not None:
        settings = {"max_length": max_length, "skip_bad": skip_bad, **vars(options)}
        key = dataset_key(sources, tokenizer, settings)
    if key is None:
        builder = SampleBuilder(formats)
        report = run.fill_(builder, sources)
        return TokenizedDataset(builder.build(), report)
    entry = read_entry(cache / key, key, tokenizer.id_count)
    if entry is not None:
        return TokenizedDataset(*entry, key, is_cached=True)
    with new_entry(cache, key, formats) as writer:
        writer.finish(run.fill_(writer.builder, sources))
    entry = read_entry(cache / key, key, tokenizer.id_count)
    if entry is None:
        raise ValueError(f"{cache / key}: was written, but cannot be read; check the disk")
    return TokenizedDataset(*entry, key)


@dataclass(frozen=True)
class _Tokenization:
    """The arguments of `tokenize_dataset` beside the dataset and the cache."""

    tokenizer: Tokenizer
    max_length: int
    options: LabelOptions
    skip_bad: bool
    progress: Callable[[int, int | None], None] | None

    def fill_(self, builder: SampleBuilder, sources: Sequence[Source]) -> DatasetReport:
        """Add the samples of all records to `builder` and return the report."""
        total, report = sources[0].size, DatasetReport()
        rendering = _rendered_parts(sources, self.tokenizer, self.options, report)
        while chunk := _next_chunk(rendering):
            if report.bad.count and not self.skip_bad:
                continue  # the other records are only checked
            samples = _encode(chunk, self.tokenizer, self.max_length)
            for part, sample in zip(chunk, samples, strict=True):
                _add_sample(builder, report, part, sample, self.max_length)
            if self.progress is not None:
                self.progress(report.records, total)
        name = ", ".join(item.format.name for item in sources)
        for note in unused_notes(self.options.ignore_fields, report.notes):
            report.notes[note] = Occurrences(report.records, [name])
        _check(builder, report, name, self.max_length, self.skip_bad)
        return report


def _check(
    builder: SampleBuilder, report: DatasetReport, name: str, max_length: int, skip_bad: bool
) -> None:
    """Raise ValueError if there are bad records that are not skipped, or no sample."""
    if report.bad.count and not skip_bad:
        raise report.bad_records_error(name)
    if len(builder):
        return
    if report.bad.count == report.records:
        raise ValueError(
            f"{name}: each of its {report.records:,} records is bad; the first is "
            f"{report.bad.origins[0]}"
        )
    message = f"{name}: none of its {report.skipped.count} samples has a token to train on."
    if truncated := report.truncated.count:
        message += f" {truncated} of them were cut to max_length {max_length}: raise it."
    for note, found in report.notes.items():
        message += f" {note[0].upper()}{note[1:]}: {found.count:,}, first {found.origins[0]}."
    raise ValueError(message)


class _Part(NamedTuple):
    """A rendered text or sample of a record.

    source, number: the entry of its source, and the record's number there.
    origin, shape: the place and the shape of the record.
    """

    item: RenderedText | Sample
    source: int
    number: int
    origin: str
    shape: str


def _rendered_parts(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    options: LabelOptions,
    report: DatasetReport,
) -> Iterator[_Part]:
    """Yield the parts of all records, and count records, shapes, notes and bad records."""
    for i, source in enumerate(sources):
        for number, record in source.records():
            origin = source.format.origin(number)
            report.records += 1
            try:
                if isinstance(record, ValueError):
                    raise record
                rendered = render_record(record, tokenizer, options)
                for item in rendered.parts:
                    if isinstance(item, RenderedText):
                        _require_whole_characters(item.text)
            except CostlyTemplateError as error:  # would cost as much for each further record
                raise ValueError(
                    f"{origin}: with the tokenizer {tokenizer.name_or_path}, {error}"
                ) from None
            except ValueError as error:
                report.bad.add(" ".join(f"{origin}: {error}".splitlines()))
                continue
            report.shapes[rendered.shape] += 1
            report.add_notes(rendered.notes, origin)
            for item in rendered.parts:
                yield _Part(item, i, number, origin, rendered.shape)


def _require_whole_characters(text: str) -> None:
    """Raise ValueError if a text holds half a surrogate pair, which JSON can name."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds {text[error.start]!r}, half a surrogate pair; save the text in valid "
            "UTF-8"
        ) from None


def _next_chunk(parts: Iterator[_Part]) -> list[_Part]:
    """Return the next parts that are encoded together, or an empty list at the end."""
    chunk: list[_Part] = []
    encoded = held = 0  # characters that are encoded at once, and characters in memory
    for part in parts:
        chunk.append(part)
        if isinstance(part.item, RenderedText):
            encoded += min(len(part.item.text), PIECE)
            held += len(part.item.text)
        if len(chunk) >= CHUNK or encoded >= CHUNK_CHARACTERS or held >= HELD_CHARACTERS:
            break
    return chunk


def _encode(chunk: list[_Part], tokenizer: Tokenizer, max_length: int) -> list[Sample]:
    """Return the samples of some parts; their texts are encoded together.

    A sample may be longer than `max_length`, but not all of its tokens are there.
    """
    items = [part.item for part in chunk]
    encodings: dict[bool, Iterator[Encoding]] = {}
    for has_spans in (False, True):
        texts = [
            item.text
            for item in items
            if isinstance(item, RenderedText) and (item.spans is not None) == has_spans
        ]
        # One token more than fits: it shows that a sample is cut.
        encodings[has_spans] = iter(encode_to_length(tokenizer, texts, max_length + 1, has_spans))
    return [
        item
        if isinstance(item, Sample)
        else _sample(item, next(encodings[item.spans is not None]), tokenizer)
        for item in items
    ]


def _add_sample(
    builder: SampleBuilder, report: DatasetReport, part: _Part, sample: Sample, max_length: int
) -> None:
    """Add a sample, cut to `max_length`, or count that no token of it is trained on."""
    if len(sample.input_ids) > max_length:
        report.truncated.add(part.origin)
        sample = Sample(sample.input_ids[:max_length], sample.labels[:max_length])
    if targets := sample.targets:
        builder.add(sample, targets, part.source, part.number, part.shape)
    else:
        report.skipped.add(part.origin)


def _sample(item: RenderedText, encoding: Encoding, tokenizer: Tokenizer) -> Sample:
    """Return the sample of a rendered text."""
    ids, spans = encoding
    labels = ids if item.spans is None else _labels(ids, spans, item.spans)
    if item.add_special_tokens:
        prefix, suffix = tokenizer.special_tokens_around(ids)
        if prefix or suffix:
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
