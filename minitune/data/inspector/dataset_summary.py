"""The numbers of a tokenized dataset that a person checks before training.

One pass over the tokens in blocks, in numpy. Beside the block, memory holds 8 bytes a sample for
each of lengths and hashes.

A stretch is a run of trained-on tokens: an answer, or a whole plain text.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from minitune.data.batching import pack_rows
from minitune.data.dataset_report import MAX_ORIGINS, DatasetReport, Occurrences
from minitune.data.flat_samples import FlatSamples
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.data.tokenize_dataset import TokenizedDataset
from minitune.kernels.cross_entropy import IGNORE_INDEX

BLOCK_TOKENS = 1 << 20
MAX_BARS = 12  # of the histogram
MAX_RATIO = 8  # of the longest sample to the shortest one, for bars of equal width


@dataclass(frozen=True)
class Bar:
    """The number of samples whose length is in [first, last]."""

    first: int
    last: int
    count: int


@dataclass
class DatasetSummary:
    """The numbers of a dataset. Lengths are in tokens.

    report: the facts about the records.
    max_length: limit of a sample, and the length of a row with packing.
    tokens, trained: all tokens, and those that the loss counts.
    duplicates: samples with the tokens of an earlier one. An origin reads "a.jsonl:9 = a.jsonl:2".
    stretches: number of trained-on stretches.
    stops: the stop tokens that end stretches, with the number of times. White space may follow.
    endless: stretches without a stop token at their end.
    doubled_bos: samples that begin with two BOS tokens.
    other_labels: samples with a label that is neither -100 nor the token at its place.
    rows: number of rows that packing fills, or 0 if they are not counted.
    """

    report: DatasetReport
    max_length: int
    samples: int
    tokens: int
    trained: int
    shortest: int
    median: float
    longest: int
    bars: list[Bar]
    rows: int = 0
    stretches: int = 0
    stops: Counter[str] = field(default_factory=Counter)
    endless: Occurrences = field(default_factory=Occurrences)
    doubled_bos: Occurrences = field(default_factory=Occurrences)
    other_labels: Occurrences = field(default_factory=Occurrences)
    duplicates: Occurrences = field(default_factory=Occurrences)

    @property
    def row_share(self) -> float:
        """Return the share of the rows' places that hold a token."""
        return self.tokens / (self.rows * self.max_length)


def summarize(
    dataset: TokenizedDataset, tokenizer: Tokenizer, max_length: int, count_rows: bool = True
) -> DatasetSummary:
    """Return the numbers of a dataset.

    max_length: tokens of a sample at most.
    count_rows: count the rows that packing fills, which takes 1 s for 500,000 samples.
    """
    samples = dataset.samples
    summary = summarize_lengths(dataset, max_length)
    if count_rows:
        summary.rows = len(pack_rows(samples.lengths, max_length))
    stop_ids = np.array(tokenizer.eos_token_ids, np.int64)
    hashes = np.empty(len(samples), np.int64)
    for block in _blocks(samples):
        block.hash_into_(hashes)
        _add_(summary.other_labels, samples, np.unique(block.samples_of(block.other_labels)))
        _count_stretches_(summary, samples, block, stop_ids, tokenizer)
        if tokenizer.bos_token_id is not None:
            doubled = block.begins_with(tokenizer.bos_token_id, tokenizer.bos_token_id)
            _add_(summary.doubled_bos, samples, doubled)
    _count_duplicates_(summary.duplicates, samples, hashes)
    return summary


def summarize_lengths(dataset: TokenizedDataset, max_length: int) -> DatasetSummary:
    """Return the numbers of a dataset that need no pass over its tokens.

    max_length: tokens of a sample at most.
    """
    samples, lengths = dataset.samples, dataset.samples.lengths
    return DatasetSummary(
        report=dataset.report,
        max_length=max_length,
        samples=len(samples),
        tokens=int(lengths.sum()),
        trained=int(samples.targets.sum()),
        shortest=int(lengths.min()),
        median=float(np.median(lengths)),
        longest=int(lengths.max()),
        bars=histogram(lengths),
    )


def histogram(lengths: np.ndarray) -> list[Bar]:
    """Return the number of samples of each range of lengths.

    The ranges are equally wide, 1, 2, 5, 10, 20 ... tokens, if no sample is over MAX_RATIO times as
    long as another. Otherwise the bounds are 1, 2, 3, 4, 6, 8, 12, 16, 24 ...; the powers of two
    if these are too many.
    """
    shortest, longest = int(lengths.min()), int(lengths.max())
    if longest <= MAX_RATIO * shortest:
        bounds = _equal_bounds(shortest, longest, min(MAX_BARS, len(lengths).bit_length()))
    else:
        bounds = _growing_bounds(shortest, longest)
    counts, _ = np.histogram(lengths, bounds)
    firsts = np.maximum(bounds[:-1], shortest)
    lasts = np.minimum(bounds[1:] - 1, longest)
    return [Bar(*map(int, values)) for values in zip(firsts, lasts, counts, strict=True)]


def _equal_bounds(shortest: int, longest: int, most: int) -> np.ndarray:
    """Return bounds at equal distances around a range.

    most: number of bars at most; by Sturges' rule about log2 of the samples, and one more.
    """
    widths = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
    width = next(w for w in widths if longest // w - shortest // w < most)
    return np.arange(shortest // width, longest // width + 2) * width


def _growing_bounds(shortest: int, longest: int) -> np.ndarray:
    """Return bounds at growing distances around a range, for at most MAX_BARS bars if possible."""
    powers = 2 ** np.arange(0, 2 + longest.bit_length())
    for bounds in (np.sort([*powers, *(3 * powers)]), powers):
        first = np.searchsorted(bounds, shortest, side="right") - 1
        last = np.searchsorted(bounds, longest, side="right")
        bounds = bounds[first : last + 1]
        if len(bounds) - 1 <= MAX_BARS:
            break
    return bounds


# ---- blocks of samples


@dataclass(frozen=True)
class _Block:
    """Samples side by side.

    first: number of the first sample.
    ids: tokens, (N,).
    trained: True for the tokens that the loss counts, (N,).
    other_labels: positions of the trained-on tokens whose label is another token.
    begins: position of each sample's first token, (samples,).
    """

    first: int
    ids: np.ndarray
    trained: np.ndarray
    other_labels: np.ndarray
    begins: np.ndarray

    def hash_into_(self, hashes: np.ndarray) -> None:
        """Write a hash of each sample's tokens to its place in `hashes`."""
        tokens, size = self.ids.tobytes(), self.ids.itemsize
        bounds = [*(self.begins * size).tolist(), len(tokens)]
        for i, (begin, end) in enumerate(itertools.pairwise(bounds), self.first):
            hashes[i] = hash(tokens[begin:end])

    def begins_with(self, *tokens: int) -> np.ndarray:
        """Return the numbers of the samples that begin with `tokens`."""
        ends = np.append(self.begins[1:], len(self.ids))
        found = ends - self.begins >= len(tokens)
        for i, token in enumerate(tokens):
            positions = np.minimum(self.begins + i, len(self.ids) - 1)
            found &= self.ids[positions] == token
        return self.first + np.flatnonzero(found)

    def samples_of(self, positions: np.ndarray) -> np.ndarray:
        """Return the number of the sample of each of the tokens at `positions`."""
        return self.first + np.searchsorted(self.begins, positions, side="right") - 1


def _blocks(samples: FlatSamples) -> Iterator[_Block]:
    ends = np.cumsum(samples.lengths)
    first = 0
    while first < len(samples):
        done = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + BLOCK_TOKENS, side="right")))
        lengths = samples.lengths[first:last]
        begins = np.cumsum(lengths) - lengths
        shifts = samples.begins[first:last] - begins
        if (shifts == shifts[0]).all():  # the samples lie side by side
            places = slice(shifts[0], shifts[0] + lengths.sum())
        else:
            places = np.repeat(shifts, lengths) + np.arange(lengths.sum())
        ids, labels = samples.input_ids[places], samples.labels[places]
        trained = labels != IGNORE_INDEX
        trained[begins] = False  # no token precedes the first one, so nothing predicts it
        yield _Block(first, ids, trained, np.flatnonzero(trained & (labels != ids)), begins)
        first = last


# ---- the facts


def _add_(occurrences: Occurrences, samples: FlatSamples, numbers: np.ndarray) -> None:
    """Count the samples with these numbers."""
    occurrences.count += len(numbers)
    room = MAX_ORIGINS - len(occurrences.origins)
    occurrences.origins += [samples.origin(int(i)) for i in numbers[:room]]


def _count_stretches_(
    summary: DatasetSummary,
    samples: FlatSamples,
    block: _Block,
    stop_ids: np.ndarray,
    tokenizer: Tokenizer,
) -> None:
    """Count the block's stretches by the stop token at their end."""
    trained = block.trained
    firsts = np.flatnonzero(trained & ~np.append(False, trained[:-1]))
    lasts = np.flatnonzero(trained & ~np.append(trained[1:], False))
    places = np.append(-1, np.flatnonzero(np.isin(block.ids, stop_ids)))
    stops = places[np.searchsorted(places, lasts, side="right") - 1]  # the last one up to the end
    ended = stops >= firsts
    is_blank: dict[bytes, bool] = {}  # by the tokens behind a stop token
    for i in np.flatnonzero(ended & (stops < lasts)):
        tail = block.ids[stops[i] + 1 : lasts[i] + 1]
        key = tail.tobytes()
        if key not in is_blank:
            is_blank[key] = not tokenizer.decode(tail.tolist(), skip_special_tokens=False).strip()
        ended[i] = is_blank[key]
    values, counts = np.unique(block.ids[stops[ended]], return_counts=True)
    for token, count in zip(values.tolist(), counts.tolist(), strict=True):
        summary.stops[tokenizer.decode([token], skip_special_tokens=False)] += count
    summary.stretches += len(lasts)
    _add_(summary.endless, samples, block.samples_of(lasts[~ended]))


def _count_duplicates_(duplicates: Occurrences, samples: FlatSamples, hashes: np.ndarray) -> None:
    """Count the samples with the tokens of an earlier sample.

    A sample that is listed several times, because its file has a weight, is no duplicate.
    """
    _, firsts, groups = np.unique(hashes, return_index=True, return_inverse=True)
    originals = firsts[groups]
    is_copy = samples.begins != samples.begins[originals]
    for i in np.flatnonzero(is_copy):
        original = int(originals[i])
        if np.array_equal(samples[i].input_ids, samples[original].input_ids):
            duplicates.add(f"{samples.origin(i)} = {samples.origin(original)}")
