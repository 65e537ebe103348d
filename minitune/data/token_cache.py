"""Tokenized datasets on disk, so that a second run of the same data starts at the disk's speed.

    OUTPUT/tokenized/KEY/input_ids.npy, labels.npy    int32, (tokens,)
    OUTPUT/tokenized/KEY/samples.npy                  int64, (columns, samples): SAMPLE_COLUMNS
    OUTPUT/tokenized/KEY/dataset.json                 format, key, checksums, origins, report

KEY is a hash of everything that decides about the tokens: the content and the names of the data
files, the tokenizer's files, the chat template, the options, the versions of this package's code
and of the libraries. An entry is written whole or not at all. An entry that is damaged or of
another origin is never used: sizes, checksums and the range of every number are checked.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tokenize
import zlib
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from minitune.atomic_files import atomic_folder, write_json
from minitune.data.dataset_report import DatasetReport
from minitune.data.flat_samples import (
    SAMPLE_COLUMNS,
    SHAPE_NAMES,
    FlatSamples,
    OriginFormat,
    SampleBuilder,
    TokenColumn,
)
from minitune.data.sources.sources import Source
from minitune.data.tokenization.tokenizer import FILES, READ_JSON_FILES, Tokenizer
from minitune.kernels.cross_entropy import IGNORE_INDEX
from minitune.read_files import read_json, require_regular_file

FORMAT = 1
FOLDER = "tokenized"  # in the run folder
DESCRIPTION, SAMPLES = "dataset.json", "samples.npy"
TOKEN_FILES = ("input_ids.npy", "labels.npy")
KEY = re.compile("[0-9a-f]{32}")
PARTIAL = re.compile(r"\.[0-9a-f]{32}\.(partial|old)")  # of atomic_folder
MIN_BYTES = 1 << 20  # smaller data is tokenized each time, in less than a second
FLUSHED = 1 << 20  # values that are written together
LIBRARIES = ("tokenizers", "sentencepiece", "jinja2")


def dataset_key(
    sources: Sequence[Source], tokenizer: Tokenizer, settings: dict[str, Any]
) -> str | None:
    """Return the hash of everything that decides about the tokens of a dataset.

    settings: the options of tokenization.

    Returns None if the records are in memory, or the files are small.
    """
    files = [path for source in sources for path in source.files]
    if not all(source.files for source in sources):
        return None
    if sum(path.stat().st_size for path in files) < MIN_BYTES:
        return None
    code = sorted(Path(__file__).parent.rglob("*.py"))
    beside = [tokenizer.folder / name for name in dict.fromkeys((*FILES, *READ_JSON_FILES))]
    templates = tokenizer.chat_template
    template_date = settings.get("template_date") or str(date.today())
    if "strftime_now" not in json.dumps(templates):  # no text depends on the day
        template_date = None
    values = {
        "format": FORMAT,
        "libraries": [version(name) for name in LIBRARIES],
        "templates": templates,
        "names": [os.path.abspath(source.format.name) for source in sources],
        "settings": {**settings, "template_date": template_date},
    }
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for path in (*code, *beside, *files):
        digest.update(f"\n{path.name}\n".encode())
        if path.is_file():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


class TokenFile(TokenColumn):
    """A .npy file of int32 that grows."""

    def __init__(self, path: Path):
        super().__init__()
        self._file, self._written, self.checksum = path.open("wb"), 0, 0
        self._write_header()

    def __len__(self) -> int:
        return self._written + super().__len__()

    def extend(self, values: Sequence[int] | np.ndarray) -> None:
        """Append values."""
        super().extend(values)
        if super().__len__() >= FLUSHED:
            self._flush()

    def close(self) -> None:
        """Write everything."""
        if not self._file.closed:
            self._flush()
            self._file.seek(0)
            self._write_header()  # as long as the first one: numpy leaves room for the number
            self._file.close()

    def _flush(self) -> None:
        self._file.write(self._values)
        self.checksum = zlib.crc32(self._values, self.checksum)
        self._written += super().__len__()
        del self._values[:]

    def _write_header(self) -> None:
        header = {"descr": "<i4", "fortran_order": False, "shape": (self._written,)}
        np.lib.format.write_array_header_1_0(self._file, header)


@contextlib.contextmanager
def new_entry(cache: Path, key: str, formats: Sequence[OriginFormat]) -> Iterator["EntryWriter"]:
    """Yield the writer of an entry, which becomes part of the cache when the block succeeds."""
    try:
        with atomic_folder(cache / key, keep_others=False) as partial:
            writer = EntryWriter(partial, key, formats)
            try:
                yield writer
            finally:
                writer.close()
    finally:
        with contextlib.suppress(OSError):  # the cache holds entries
            cache.rmdir()


class EntryWriter:
    """Writes the files of one entry. Samples go to `builder`, then `finish` writes the rest."""

    def __init__(self, folder: Path, key: str, formats: Sequence[OriginFormat]):
        self._folder, self._key, self._formats = folder, key, formats
        self._files = [TokenFile(folder / name) for name in TOKEN_FILES]
        self.builder = SampleBuilder(formats, *self._files)

    def close(self) -> None:
        """Close the files of the tokens."""
        for file in self._files:
            file.close()

    def finish(self, report: DatasetReport) -> None:
        """Write the index and the description."""
        self.close()
        index = self.builder.index()
        np.save(self._folder / SAMPLES, index, allow_pickle=False)
        origins = [[item.name, item.by_line] for item in self._formats]
        of_files = [file.checksum for file in self._files]
        described = {"origins": origins, "report": report.to_json()}
        description = {
            "format": FORMAT,
            "key": self._key,
            "checksums": [*of_files, zlib.crc32(index), _checksum(described)],
            **described,
        }
        write_json(self._folder / DESCRIPTION, description)


def read_entry(folder: Path, key: str, id_count: int) -> tuple[FlatSamples, DatasetReport] | None:
    """Return the samples and the report of an entry, or None if it is missing or damaged.

    id_count: ids of the tokenizer.
    """
    try:
        description = read_json(folder / DESCRIPTION)
        if (description["format"], description["key"]) != (FORMAT, key):
            return None
        input_ids, labels = (_map(folder / name, np.int32, 1) for name in TOKEN_FILES)
        index = np.array(_map(folder / SAMPLES, np.int64, 2))
        checksums = [zlib.crc32(values) for values in (input_ids, labels, index)]
        checksums.append(_checksum({name: description[name] for name in ("origins", "report")}))
        formats = tuple(OriginFormat(*origin) for origin in description["origins"])
        report = DatasetReport.from_json(description["report"])
        if checksums != description["checksums"] or not formats:
            return None
        columns = dict(zip(SAMPLE_COLUMNS, index, strict=True))
    except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError):
        return None
    samples = FlatSamples(input_ids, labels, **columns, formats=formats)
    return (samples, report) if _is_valid(samples, id_count) else None


def _checksum(values: dict[str, Any]) -> int:
    """Return the checksum of a part of the description."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _map(path: Path, kind: type, dimensions: int) -> np.ndarray:
    """Map a .npy file into memory.

    Raises: ValueError if the file is none, or of another type or number of dimensions.
    """
    require_regular_file(path)
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (tokenize.TokenError, SyntaxError, OverflowError) as error:  # in the header
        raise ValueError(f"{path}: {error}") from None
    if values.dtype != kind or values.ndim != dimensions or not values.flags.c_contiguous:
        raise ValueError(f"{path}: {values.dtype} in {values.ndim} dimensions")
    return values


def _is_valid(samples: FlatSamples, id_count: int) -> bool:
    """Return True if every number of an entry is within its range."""
    tokens, ends = len(samples.input_ids), samples.begins + samples.lengths
    ranges = (
        (samples.begins, 0, tokens),
        (samples.lengths, 2, tokens + 1),
        (ends, 0, tokens + 1),
        (samples.targets, 1, tokens + 1),
        (samples.sources, 0, len(samples.formats)),
        (samples.shapes, 0, len(SHAPE_NAMES)),
        (samples.input_ids, 0, id_count),
        (samples.labels, IGNORE_INDEX, id_count),
    )
    return (
        len(samples.labels) == tokens
        and len(samples) > 0
        and all(low <= values.min() and values.max() < high for values, low, high in ranges)
        and not any(map(_holds_unknown_label, range(0, tokens, FLUSHED), repeat(samples.labels)))
    )


def _holds_unknown_label(first: int, labels: np.ndarray) -> bool:
    """Return True if one of the FLUSHED labels from `first` on is negative and not -100."""
    part = labels[first : first + FLUSHED]
    return bool(np.any((part < 0) & (part != IGNORE_INDEX)))


def remove_other_entries(cache: Path, kept: Sequence[str]) -> None:
    """Delete the entries of earlier data or settings, and those that a killed process left.

    Nothing else in the folder is touched.
    """
    for folder in cache.glob("*"):
        is_entry = KEY.fullmatch(folder.name) and (folder / DESCRIPTION).is_file()
        is_partial = PARTIAL.fullmatch(folder.name)
        if (is_entry and folder.name not in kept) or is_partial:
            shutil.rmtree(folder, ignore_errors=True)
