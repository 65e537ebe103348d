"""From a dataset to packed tokens: records are rendered, encoded and labelled; samples are packed without padding.

A token is trained on when it overlaps a span of characters that the record's structure marks (records.py, chat.py):
the whole text is encoded once, and the tokenizer's offsets say which characters each token stands for. So a token that
straddles the border of an answer belongs to the answer, and no token string is ever searched for.

Packing puts whole samples side by side in one row of tokens; positions restart at 0 at each sample, which is how the
model knows where attention ends. The first token of a sample is never a target: nothing precedes it.

    input_ids     a0 a1 a2 b0 b1        labels      -100 -100 a2 -100 b1
    position_ids   0  1  2  0  1        targets     2
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minitune.data.chat_template import Span
from minitune.data.record_formats import (
    LabelOptions,
    RenderedText,
    Sample,
    load_dataset,
    render_record,
)
from minitune.data.tokenizer import Tokenizer
from minitune.kernels.cross_entropy import IGNORE_INDEX

CHUNK = 1000  # records encoded at a time: enough to keep the tokenizer's threads busy


@dataclass(frozen=True)
class TokenizedDataset:
    """Samples ready to train on; how many were left out because no label was left, how many were cut to length."""

    samples: list[Sample]
    skipped: int
    truncated: int


def prepare(
    source: str | Path | Sequence[Mapping],
    tokenizer: Tokenizer,
    max_length: int,
    assistant_only_loss: bool | None = None,
    completion_only_loss: bool | None = None,
    dataset_text_field: str = "text",
    progress: Callable[[int, int], None] | None = None,
) -> TokenizedDataset:
    """Tokenize and label every record, in the order of the source, cut to the first `max_length` tokens.

    `progress(done, total)` is called as records are finished. Raises ValueError, beginning with file and line, for a
    record that cannot be read, and when no sample has a label left.
    """
    if max_length < 2:
        raise ValueError(
            f"max_length is {max_length}; a sample needs at least 2 tokens to have one to predict"
        )
    options = LabelOptions(assistant_only_loss, completion_only_loss, dataset_text_field)
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
        cut = (
            f" {truncated} of them were cut to max_length {max_length}: raise it."
            if truncated
            else ""
        )
        raise ValueError(
            f"{where}: none of its {len(records)} samples has a token to train on.{cut}"
        )
    return TokenizedDataset(samples, len(records) - len(samples), truncated)


def _encode(
    records: list[tuple[str, Mapping]], tokenizer: Tokenizer, options: LabelOptions
) -> list[Sample]:
    """The records' samples at their full length; the texts among them are encoded together."""
    rendered = []
    for origin, record in records:
        try:
            item = render_record(record, tokenizer, options)
            if isinstance(item, RenderedText):
                item.text.encode()  # half a surrogate pair is legal in JSON, but it is not text
            rendered.append(item)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None
    texts = [item.text for item in rendered if isinstance(item, RenderedText)]
    encodings = iter(tokenizer.encode_batch_with_offsets(texts))
    return [
        _label(item, *next(encodings), tokenizer) if isinstance(item, RenderedText) else item
        for item in rendered
    ]


def _label(item: RenderedText, ids: list[int], offsets: list[Span], tokenizer: Tokenizer) -> Sample:
    labels = list(ids) if item.spans is None else _labels(ids, offsets, item.spans)
    if item.plain:
        prefix, suffix = tokenizer.special_tokens_around(ids)
        labels = [
            *(prefix if item.spans is None else [IGNORE_INDEX] * len(prefix)),
            *labels,
            *suffix,
        ]
        ids = [*prefix, *ids, *suffix]
    return Sample(ids, labels)


def _labels(ids: list[int], offsets: list[Span], spans: list[Span]) -> list[int]:
    """The ids of the tokens that overlap one of the spans (in the order of the text), -100 for the others.

    A token may stand for no character of its own (all but one byte of a character, a dummy space): it belongs to
    where it is.
    """
    spans = [span for span in spans if span[0] < span[1]]
    labels, at = [IGNORE_INDEX] * len(ids), 0
    for i, (first, last) in enumerate(offsets):
        while at < len(spans) and spans[at][1] <= first:
            at += 1
        if at == len(spans):
            break
        if last > spans[at][0] or first >= spans[at][0]:
            labels[i] = ids[i]
    return labels
