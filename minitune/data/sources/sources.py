"""The sources of records: files of several formats, and objects in memory.

    .jsonl .ndjson .json, others    one JSON object a line, or one JSON array of objects
    .csv .tsv                       a header row; all cells are texts, an empty cell is null
    .txt                            one record a line that is not blank
    .parquet                        through pyarrow
    a folder                        written by `datasets` (save_to_disk), through pyarrow
    a list, an iterator             dicts; also a Dataset of `datasets`
    a DataFrame                     of pandas; a missing value is null

All except .parquet and folders may be compressed by gzip (.gz). Records are read one by one, so a
file may be larger than the memory.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from minitune.data.flat_samples import OriginFormat
from minitune.data.sources.arrow_files import dataset_files, read_dataset_folder, read_parquet
from minitune.data.sources.jsonl import KNOWN_SHAPES, is_json_array, kind_of, read_json_file
from minitune.data.sources.text_files import read_csv, read_text_lines
from minitune.read_files import file_exists

Dataset = str | Path | Sequence[str | Path] | Iterable[Mapping]
CHECKED_RECORDS = 100  # of a file, before the model is loaded
DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Source:
    """One file, or one object in memory.

    format: the way in which its records are named.
    read: returns an iterator over (number, value) of each record; the value is a ValueError if
        the record cannot be read.
    files: the paths of its files; none for records in memory.
    size: number of records, or None if it is unknown.
    """

    format: OriginFormat
    read: Callable[[], Iterator[tuple[int, Any]]]
    files: tuple[Path, ...] = ()
    size: int | None = None

    def records(self) -> Iterator[tuple[int, Mapping | ValueError]]:
        """Yield (number, record); in place of a bad record, the ValueError without its place.

        Raises: ValueError that names the file if it holds no record or cannot be read further.
        """
        name, empty = self.format.name, True
        try:
            for number, value in self.read():
                empty = False
                if not isinstance(value, Mapping | ValueError):
                    value = ValueError(
                        f"holds {kind_of(value)}, not an object; known are {KNOWN_SHAPES}"
                    )
                yield number, value
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: not UTF-8: {error.reason}; save the file as UTF-8") from None
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{name}: could not be read ({reason})") from None
        if empty:
            raise ValueError(f"{name}: holds no record")


def open_sources(dataset: Dataset, text_field: str = "text") -> list[Source]:
    """Return the sources of a dataset, in order.

    dataset: a path, several paths, or records in memory.
    text_field: key of the records of a .txt file.

    Raises: ValueError if a file is missing, or `dataset` is no dataset.
    """
    if isinstance(dataset, str | Path):
        return [_file_source(Path(dataset), text_field)]
    if is_several_files(dataset):
        return [_file_source(Path(path), text_field) for path in dataset]
    return [_memory_source(dataset)]


def file_names(dataset: Dataset | None) -> tuple[str, ...]:
    """Return the paths of a dataset; none for records in memory."""
    if isinstance(dataset, str | Path):
        return (str(dataset),)
    return tuple(map(str, dataset)) if is_several_files(dataset) else ()


def is_several_files(dataset: Any) -> bool:
    """Return True for a list or tuple of paths."""
    is_list = isinstance(dataset, list | tuple)
    return is_list and bool(dataset) and all(isinstance(item, str | Path) for item in dataset)


def load_dataset(dataset: Dataset) -> list[tuple[str, Mapping]]:
    """Return (origin, record) of all records of a small dataset.

    Raises: ValueError that names the place if a record cannot be read.
    """
    records = []
    for source in open_sources(dataset):
        for number, record in source.records():
            origin = source.format.origin(number)
            if isinstance(record, ValueError):
                raise ValueError(f"{origin}: {record}")
            records.append((origin, record))
    return records


def check_first_records(path: str) -> None:
    """Raise ValueError if a file is missing or not one of its first records can be read."""
    (source,) = open_sources(path)
    bad = []
    for number, record in islice(source.records(), CHECKED_RECORDS):
        if not isinstance(record, ValueError):
            return
        bad.append(f"{source.format.origin(number)}: {record}")
    others = f"; none of the first {len(bad)} records can be read" if len(bad) > 1 else ""
    raise ValueError(bad[0] + others)


# ---- files


def _file_source(path: Path, text_field: str) -> Source:
    if path.is_dir():
        files = (path / "state.json", *dataset_files(path))
        return _source(path, False, read_dataset_folder, path, files=files)
    if not file_exists(path):
        raise ValueError(
            f"{path}: no such file; a dataset is a JSONL, JSON, CSV, Parquet or text file, or a "
            "folder that Dataset.save_to_disk wrote"
        )
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffix = next((suffix for suffix in reversed(suffixes) if suffix != ".gz"), "")
    if suffix == ".parquet":
        return _source(path, False, read_parquet, path)
    if suffix in DELIMITERS:
        return _source(path, True, read_csv, path, DELIMITERS[suffix])
    if suffix == ".txt":
        return _source(path, True, read_text_lines, path, text_field)
    try:
        by_line = not is_json_array(path)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: could not be read ({reason})") from None
    return _source(path, by_line, read_json_file, path)


def _source(
    path: Path, by_line: bool, read: Any, *arguments: Any, files: tuple[Path, ...] = ()
) -> Source:
    return Source(OriginFormat(str(path), by_line), partial(read, *arguments), files or (path,))


# ---- objects in memory


def _memory_source(dataset: Any) -> Source:
    if isinstance(dataset, Mapping):
        raise _mapping_error(dataset)
    if isinstance(dataset, bytes) or not isinstance(dataset, Iterable):
        raise ValueError(
            f"the dataset is {kind_of(dataset)}; expected a path, several paths, a sequence of "
            "dicts or a Dataset of `datasets`"
        )
    if hasattr(dataset, "to_dict") and hasattr(dataset, "notna"):  # a DataFrame of pandas
        cells = dataset.astype(object)
        dataset = cells.where(dataset.notna(), None).to_dict("records")
        dataset = [{name: _plain(cell) for name, cell in row.items()} for row in dataset]
    size = len(dataset) if hasattr(dataset, "__len__") else None
    return Source(OriginFormat("dataset", by_line=False), partial(enumerate, dataset), (), size)


def _mapping_error(dataset: Mapping) -> ValueError:
    """Return the error for a mapping: a DatasetDict, columns, or one record."""
    names = ", ".join(map(repr, list(dataset)[:5]))
    values = list(dataset.values())
    first = next(iter(dataset), None)
    if any(hasattr(value, "column_names") for value in values):
        return ValueError(
            f"the dataset is a DatasetDict with the splits {names}; pass one of them, such as "
            f"dataset[{first!r}]"
        )
    if values and all(isinstance(value, list) for value in values):
        return ValueError(
            f"the dataset is a mapping of the columns {names}; pass a list of records, or "
            "datasets.Dataset.from_dict(...) of it"
        )
    return ValueError(
        f"the dataset is a mapping with the keys {names}; pass one of its values, or a list of "
        "records"
    )


def _plain(value: Any) -> Any:
    """Return a cell of a DataFrame with arrays, also nested ones, as lists."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
