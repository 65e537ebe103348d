"""Read the records of a dataset: the lines of a JSONL file, or dicts that are in memory already.

Every error is a ValueError that begins with the file and the line number.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Error messages list the shapes of records that record_formats.py knows.
KNOWN_SHAPES = (
    '{"messages": [...]}, {"prompt": ..., "completion": ...}, '
    '{"instruction": ..., "input": ..., "output": ...}, {"conversations": [...]}, '
    '{"text": ...} or {"input_ids": [...], "labels": [...]}'
)


def load_dataset(source: str | Path | Sequence[Mapping]) -> list[tuple[str, Mapping]]:
    """Return (origin, record) of each line of a JSONL file, or of each element of a sequence.

    Raises: ValueError if the file is missing, empty or not UTF-8, or a line is not a JSON object.
    """
    if isinstance(source, str | Path):
        name, records = str(source), _read_lines(Path(source))
    else:
        name, records = "dataset", [(f"dataset[{i}]", record) for i, record in enumerate(source)]
    for origin, record in records:
        if not isinstance(record, Mapping):
            raise ValueError(
                f"{origin}: holds {kind_of(record)}, not an object; known are {KNOWN_SHAPES}"
            )
    if not records:
        raise ValueError(f"{name}: holds no record")
    return records


def _read_lines(path: Path) -> list[tuple[str, Any]]:
    """Return (origin, value) of each line that is not blank."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a dataset is a JSONL file, one JSON object a line")
    records = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            origin = f"{path}:{number}"
            encoding = "utf-8-sig" if number == 1 else "utf-8"  # a byte-order mark may come first
            try:
                text = line.decode(encoding).strip()
                if text:
                    records.append((origin, parse_json(text)))
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{origin}: not UTF-8: {error.reason} at byte {error.start}"
                ) from None
            except ValueError as error:
                raise ValueError(
                    f"{origin}: {error}; known are, one a line, {KNOWN_SHAPES}"
                ) from None
    return records


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises: ValueError if the text is not JSON, or Python cannot read it.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deeply to be read") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"JSON that cannot be read: {str(error).partition(';')[0]}") from None


def kind_of(value: Any) -> str:
    """Return the kind of a JSON value in words, for error messages."""
    if isinstance(value, list | tuple):
        return "a list"
    words = {
        type(None): "null",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return words.get(type(value), f"a {type(value).__name__}")
