"""Read Parquet files and folders of `datasets` (save_to_disk), if pyarrow is installed.

A `datasets` folder holds state.json, which lists Arrow files in the stream format. Rows count from
0. A cell without a value is None.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from minitune.read_files import file_exists, parse_json, read_json

STATE, SPLITS = "state.json", "dataset_dict.json"
BATCH_BYTES = 4 << 20  # of rows that are decoded together
MAX_BATCH_ROWS = 1000


def read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (number, row) of a Parquet file.

    Raises: ValueError if pyarrow is missing or the file is broken.
    """
    arrow, parquet = _pyarrow(path, "pyarrow"), _pyarrow(path, "pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            metadata = file.metadata
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            size = sum(group.total_byte_size for group in groups)
            rows = BATCH_BYTES * metadata.num_rows // max(1, size)
            for batch in file.iter_batches(batch_size=min(max(1, rows), MAX_BATCH_ROWS)):
                for row in _rows(path, arrow, batch):
                    yield number, row
                    number += 1
    except arrow.ArrowException as error:
        raise ValueError(f"{path}: not a Parquet file that can be read: {error}") from None


def dataset_files(folder: Path) -> list[Path]:
    """Return the Arrow files of a `datasets` folder, in order.

    Raises: ValueError if the folder holds splits, no dataset or a selection of rows, or lacks a
        file.
    """
    if file_exists(folder / SPLITS):
        splits = read_json(folder / SPLITS).get("splits")
        splits = splits if isinstance(splits, list) else []
        names = [name for name in splits if isinstance(name, str)]
        raise ValueError(
            f"{folder}: holds the splits {', '.join(names)}; choose one, such as "
            f"{folder / (names or ['train'])[0]}"
        )
    if not file_exists(folder / STATE):
        raise ValueError(
            f"{folder}: a folder without {STATE}; a dataset is a file, or a folder that "
            "Dataset.save_to_disk wrote"
        )
    state = read_json(folder / STATE)
    if any(state.get(name) for name in ("_indices_data_files", "_indices_files")):
        raise ValueError(
            f"{folder}: holds a selection of rows; call flatten_indices() before save_to_disk"
        )
    files = state.get("_data_files")
    entries = files if isinstance(files, list) else []
    names = [file.get("filename") for file in entries if isinstance(file, dict)]
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(
            f"{folder / STATE}: _data_files is {files!r}, expected a list of "
            '{"filename": name of a file in this folder}'
        )
    for name in names:
        if not file_exists(folder / name):
            raise ValueError(f"{folder / name}: no such file, but {STATE} names it; copy it there")
    return [folder / name for name in names]


def read_dataset_folder(folder: Path) -> Iterator[tuple[int, Any]]:
    """Yield (number, row) of a `datasets` folder.

    Raises: ValueError if pyarrow is missing, or the folder or one of its files is wrong.
    """
    arrow = _pyarrow(folder, "pyarrow")
    files = dataset_files(folder)
    columns = read_json(folder / STATE).get("_format_columns")  # None: all of them
    is_list = isinstance(columns, list) and all(isinstance(name, str) for name in columns)
    if columns is not None and not is_list:
        raise ValueError(
            f"{folder / STATE}: _format_columns is {columns!r:.60}; expected null, or a list of "
            "names of columns"
        )
    number = 0
    for path in files:
        try:
            with arrow.memory_map(str(path)) as file, arrow.ipc.open_stream(file) as stream:
                for batch in stream:
                    batch.validate(full=True)  # a wrong offset would end the process
                    size = max(1, BATCH_BYTES * batch.num_rows // max(1, batch.nbytes))
                    for first in range(0, batch.num_rows, min(size, MAX_BATCH_ROWS)):
                        part = batch.slice(first, min(size, MAX_BATCH_ROWS))
                        part = part if columns is None else part.select(columns)
                        for row in _rows(path, arrow, part):
                            yield number, row
                            number += 1
        except (arrow.ArrowException, KeyError) as error:
            raise ValueError(f"{path}: not an Arrow file that can be read: {error}") from None


def _pyarrow(path: Path, module: str) -> ModuleType:
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(
            f"{path}: reading it needs the package pyarrow; run `pip install pyarrow`, or convert "
            "the file to JSONL"
        )
    return importlib.import_module(module)


def _rows(path: Path, arrow: ModuleType, batch: Any) -> Iterator[dict | ValueError]:
    """Yield the rows of a record batch as dicts; columns of type JSON are parsed.

    A row whose JSON cannot be parsed is a ValueError.
    """
    names = batch.schema.names
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: several columns have one name among {', '.join(names)}")
    with_json = [field for field in batch.schema if _holds_json(arrow, field.type)]
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError, RecursionError, MemoryError) as error:  # year 10000
        raise ValueError(f"{path}: a value that Python cannot hold: {error}") from None
    for row in rows:
        try:
            for field in with_json:
                row[field.name] = _parsed(arrow, field.type, row[field.name])
        except ValueError as error:
            row = ValueError(f"{field.name} is a text that is {error}")
        yield row


def _holds_json(arrow: ModuleType, kind: Any) -> bool:
    """Return True if a type is arrow.json, or has a part of this type."""
    if isinstance(kind, getattr(arrow, "JsonType", ())):
        return True
    return any(_holds_json(arrow, kind.field(i).type) for i in range(kind.num_fields))


def _parsed(arrow: ModuleType, kind: Any, value: Any) -> Any:
    """Return a value of Arrow type `kind` with its JSON texts parsed."""
    if value is None or not _holds_json(arrow, kind):
        return value
    if arrow.types.is_struct(kind):
        fields = (kind.field(i) for i in range(kind.num_fields))
        return {item.name: _parsed(arrow, item.type, value[item.name]) for item in fields}
    if kind.num_fields == 1:  # the lists
        return [_parsed(arrow, kind.field(0).type, item) for item in value]
    return parse_json(value) if isinstance(value, str) else value
