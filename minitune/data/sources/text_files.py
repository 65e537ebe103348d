"""Read text files line by line: plain text and CSV, perhaps compressed by gzip (.gz)."""

import codecs
import csv
import gzip
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TextIO

MAX_RECORD_BYTES = 64 << 20  # 16 million tokens, and at most 2 GB as values of Python
LONG_RECORD = f"is longer than {MAX_RECORD_BYTES:,} bytes, the most of a record; cut it"


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed if its name ends in .gz."""
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def open_text(path: Path, errors: str = "strict") -> TextIO:
    """Open a file in UTF-8, perhaps with a byte-order mark.

    errors: "strict" raises UnicodeDecodeError, "replace" gives U+FFFD.
    """
    return io.TextIOWrapper(open_binary(path), encoding="utf-8-sig", errors=errors)


def numbered_lines(path: Path) -> Iterator[tuple[int, str | ValueError]]:
    """Yield (number, line) from 1 on, with the line's end, or ValueError if it is not UTF-8.

    Raises: ValueError that names the file if its byte-order mark is UTF-16's, or if a line is too
        long.
    """
    with open_binary(path) as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_RECORD_BYTES + 1), b""), 1):
            if len(line) > MAX_RECORD_BYTES:
                raise ValueError(f"{path}:{number}: the line {LONG_RECORD}")
            if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ValueError(f"{path}: the file is UTF-16; save it as UTF-8")
            encoding = "utf-8-sig" if number == 1 else "utf-8"  # a byte-order mark may come first
            try:
                text: str | ValueError = line.decode(encoding)
            except UnicodeDecodeError as error:
                text = ValueError(
                    f"not UTF-8: {error.reason} at byte {error.start}; save the file as UTF-8"
                )
            yield number, text


def read_text_lines(path: Path, field: str) -> Iterator[tuple[int, Any]]:
    """Yield (number, {field: line}) of each line that is not blank, without the line's end."""
    for number, line in numbered_lines(path):
        if isinstance(line, ValueError):
            yield number, line
        elif line.strip():
            yield number, {field: line.rstrip("\r\n")}


def read_csv(path: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    """Yield (number of its first line, {column: cell}) of each row below the header.

    All cells are texts, except that an empty cell is None. The value of a row with another number
    of cells than the header is a ValueError.

    Raises: ValueError that names the line if the header is wrong, a line is not UTF-8 or a quoted
        cell does not end.
    """
    csv.field_size_limit(MAX_RECORD_BYTES)  # 131,072 by default
    reader = csv.reader(_decoded_lines(path), delimiter=delimiter, strict=True)
    header = None
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}:{number}: not CSV: {error}") from None
        if row is None:
            return
        if not row:
            continue  # a blank line
        if header is None:
            header = row
            _check_header(f"{path}:{number}", header)
        elif len(row) != len(header):
            yield number, ValueError(f"{_cells(len(row))}, but the header has {len(header)}")
        else:
            yield number, {name: cell or None for name, cell in zip(header, row, strict=True)}


def _decoded_lines(path: Path) -> Iterator[str]:
    for number, line in numbered_lines(path):
        if isinstance(line, ValueError):
            raise ValueError(f"{path}:{number}: {line}")
        yield line


def _check_header(origin: str, header: list[str]) -> None:
    if len(header) == 1 and any(mark in header[0] for mark in "\t,;|"):
        raise ValueError(
            f"{origin}: the header is the one cell {header[0]!r:.60}; cells are separated by "
            "commas in a .csv file, and by tabs in a .tsv file"
        )
    for name in header:
        if not name.strip():
            raise ValueError(f"{origin}: a column has no name; the first row names the columns")
        if header.count(name) > 1:
            raise ValueError(f"{origin}: two columns are named {name!r}; rename one of them")


def _cells(count: int) -> str:
    return "1 cell" if count == 1 else f"{count} cells"
