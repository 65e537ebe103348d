"""Read JSON: the lines of a JSONL file, and the elements of a JSON array.

An array is read element by element, so a file may be larger than the memory.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minitune.data.sources.text_files import (
    LONG_RECORD,
    MAX_RECORD_BYTES,
    numbered_lines,
    open_text,
)
from minitune.read_files import IncompleteJson, parse_json, parse_json_at

# Error messages list the shapes of records that record_formats.py knows.
KNOWN_SHAPES = (
    '{"messages": [...]}, {"prompt": ..., "completion": ...}, '
    '{"instruction": ..., "input": ..., "output": ...}, {"conversations": [...]}, '
    '{"text": ...} or {"input_ids": [...], "labels": [...]}'
)
BLOCK = 1 << 20  # characters of an array that are read at once
WHITE_SPACE = " \t\r\n"


def read_json_file(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of each line that is not blank, or of each element of an array.

    Lines count from 1 and elements from 0. The value of a line that is not JSON is a ValueError.

    Raises: ValueError that names the place if an array is not JSON.
    """
    return _read_array(path) if is_json_array(path) else _read_lines(path)


def is_json_array(path: Path) -> bool:
    """Return True if the first character of a file, except white space, is a bracket."""
    with open_text(path, errors="replace") as file:
        while block := file.read(BLOCK):
            if text := block.lstrip(WHITE_SPACE):
                return text[0] == "["
    return False


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in numbered_lines(path):
        if isinstance(line, ValueError):
            yield number, line
        elif line.strip():
            try:
                yield number, parse_json(line.strip())
            except ValueError as error:
                advice = (
                    "each line holds one JSON object, or the file holds one JSON list; "
                    "a file of plain text needs a name in .txt"
                )
                yield number, ValueError(f"{error}; {advice}")


def _read_array(path: Path) -> Iterator[tuple[int, Any]]:
    with open_text(path) as file:
        reader = _ArrayReader(file)
        reader.expect("[")
        index, separator = 0, ""
        if reader.next_character() == "]":
            separator = reader.expect("]")
        while separator != "]":
            try:
                value = reader.value()
                separator = reader.expect(",", "]")
            except ValueError as error:
                raise ValueError(f"{path}[{index}]: {error}") from None
            yield index, value
            index += 1
        if rest := reader.next_character():
            raise ValueError(f"{path}: {rest!r} follows the array; expected the end of the file")


class _ArrayReader:
    """Reads the values and separators of a JSON array from a text file, block by block."""

    def __init__(self, file):
        self._file = file
        self._text, self._at = "", 0  # characters that are in memory, and the next one to read

    def _read_more(self) -> bool:
        """Read as much as is still unread, so that a long value is parsed few times."""
        unread = self._text[self._at :]
        if len(unread) > MAX_RECORD_BYTES:
            raise ValueError(LONG_RECORD)
        block = self._file.read(max(BLOCK, len(unread)))
        self._text, self._at = unread + block, 0
        return bool(block)

    def next_character(self) -> str:
        """Return the next character that is no white space, without reading it; "" at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in WHITE_SPACE:
                    return self._text[self._at]
                self._at += 1
            if not self._read_more():
                return ""

    def expect(self, *characters: str) -> str:
        """Read one of the characters and return it."""
        found = self.next_character()
        if found not in characters:
            expected = " or ".join(map(repr, characters))
            place = repr(found) if found else "the end"
            raise ValueError(f"not a JSON array: {expected} is missing before {place}")
        self._at += 1
        return found

    def value(self) -> Any:
        """Read a value."""
        self.next_character()
        while True:
            try:
                value, self._at = parse_json_at(self._text, self._at)
                return value
            except IncompleteJson:
                if not self._read_more():
                    raise


def kind_of(value: Any) -> str:
    """Return the kind of a JSON value in words, for error messages."""
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, Mapping):
        return "an object"
    words = {
        type(None): "null",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return words.get(type(value), f"a {type(value).__name__}")
