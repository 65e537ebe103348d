"""Samples in flat int32 arrays: 8 bytes a token and 48 bytes a sample, in memory or in a file.

    input_ids  [t0 t1 t2 | t3 t4 | ...]      labels  the same length
    begins     [0, 3, ...]    lengths  [3, 2, ...]

A Sample is made when it is asked for. Its arrays are views. A sample may be listed several times:
the lists repeat, the tokens do not.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from minitune.data.records.record_formats import SHAPES
from minitune.data.samples import Sample

SAMPLES_PER_HASH = 1024  # samples that are copied together for their hash
SAMPLE_COLUMNS = ("begins", "lengths", "targets", "sources", "numbers", "shapes")
SHAPE_NAMES = tuple(SHAPES)


@dataclass(frozen=True)
class OriginFormat:
    """The way in which the records of one source are named.

    name: the path of the file, or "dataset" for records in memory.
    by_line: True counts lines from 1 ("a.jsonl:12"), False counts elements from 0 ("a.json[3]").
    """

    name: str
    by_line: bool

    def origin(self, number: int) -> str:
        """Return the name of a record."""
        return f"{self.name}:{number}" if self.by_line else f"{self.name}[{number}]"


@dataclass(frozen=True, eq=False)
class FlatSamples(Sequence[Sample]):
    """A sequence of samples whose tokens lie side by side.

    input_ids, labels: int32, (all tokens,); perhaps mapped from a file.
    begins: position of a sample's first token, int64, (samples,).
    lengths: tokens of a sample, int64, (samples,).
    targets: trained-on tokens of a sample, int64, (samples,).
    sources: the entry of a sample's source in `formats`, int64, (samples,).
    numbers: the number of a sample's record in its source, int64, (samples,).
    shapes: the entry of its record's shape in SHAPE_NAMES, int64, (samples,).
    formats: the names of the sources.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray
    sources: np.ndarray
    numbers: np.ndarray
    shapes: np.ndarray
    formats: tuple[OriginFormat, ...]

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, index: int | slice) -> "Sample | FlatSamples":
        if isinstance(index, slice):
            return self.take(index)
        begin = int(self.begins[index])
        end = begin + int(self.lengths[index])
        return Sample(self.input_ids[begin:end], self.labels[begin:end])

    def take(self, indices: np.ndarray | slice) -> "FlatSamples":
        """Return the samples at `indices`, which may repeat, over the same tokens."""
        return replace(self, **{name: getattr(self, name)[indices] for name in SAMPLE_COLUMNS})

    def origin(self, index: int) -> str:
        """Return the place of a sample's record, such as "data.jsonl:12" or "dataset[3]"."""
        return self.formats[self.sources[index]].origin(self.numbers[index])

    def shape(self, index: int) -> str:
        """Return the name of the shape of a sample's record, such as "messages"."""
        return SHAPE_NAMES[self.shapes[index]]

    def fingerprint(self) -> str:
        """Return a hash of every token and label, to recognise the data of a resumed run.

        The hash is that of (length, ids, labels) of one sample after the other, in int64.
        """
        digest = hashlib.sha256()
        for first in range(0, len(self), SAMPLES_PER_HASH):
            digest.update(self[first : first + SAMPLES_PER_HASH]._hashed_values())
        return digest.hexdigest()[:16]

    def _hashed_values(self) -> np.ndarray:
        """Return (length, ids, labels) of each sample, one after the other, in int64."""
        lengths = self.lengths
        inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        source = np.repeat(self.begins, lengths) + inside
        sizes = 1 + 2 * lengths
        starts = np.cumsum(sizes) - sizes
        first_id = np.repeat(starts + 1, lengths) + inside
        values = np.empty(sizes.sum(), np.int64)
        values[starts] = lengths
        values[first_id] = self.input_ids[source]
        values[first_id + np.repeat(lengths, lengths)] = self.labels[source]
        return values


class TokenColumn:
    """int32 values that grow in memory."""

    def __init__(self):
        self._values = array("i")

    def __len__(self) -> int:
        return len(self._values)

    def extend(self, values: Sequence[int] | np.ndarray) -> None:
        """Append values."""
        if isinstance(values, np.ndarray):
            self._values.frombytes(values.astype(np.int32, copy=False).tobytes())
        else:
            self._values.extend(values)

    def array(self) -> np.ndarray:
        """Return all values; the column cannot grow further."""
        return np.frombuffer(self._values, np.int32)


class SampleBuilder:
    """Flat arrays that grow by one sample at a time.

    input_ids, labels: the columns that take the tokens; default: in memory.
    """

    def __init__(
        self,
        formats: Sequence[OriginFormat],
        input_ids: TokenColumn | None = None,
        labels: TokenColumn | None = None,
    ):
        self._formats = tuple(formats)
        self._input_ids = TokenColumn() if input_ids is None else input_ids
        self._labels = TokenColumn() if labels is None else labels
        self._rows = array("q")  # SAMPLE_COLUMNS of one sample after the other

    def __len__(self) -> int:
        return len(self._rows) // len(SAMPLE_COLUMNS)

    def add(self, sample: Sample, targets: int, source: int, number: int, shape: str) -> None:
        """Append a sample.

        targets: its trained-on tokens.
        source, number: the entry of its source in `formats`, and its record's number there.
        shape: the shape of its record.
        """
        size, entry = len(sample.input_ids), SHAPE_NAMES.index(shape)
        self._rows.extend((len(self._input_ids), size, targets, source, number, entry))
        self._input_ids.extend(sample.input_ids)
        self._labels.extend(sample.labels)

    def index(self) -> np.ndarray:
        """Return SAMPLE_COLUMNS as rows, int64, (columns, samples)."""
        rows = np.frombuffer(self._rows, np.int64).reshape(-1, len(SAMPLE_COLUMNS))
        return np.ascontiguousarray(rows.T)

    def build(self) -> FlatSamples:
        """Return the samples in memory; the builder must not be used again."""
        columns = dict(zip(SAMPLE_COLUMNS, self.index(), strict=True))
        tokens = (self._input_ids.array(), self._labels.array())
        return FlatSamples(*tokens, **columns, formats=self._formats)
