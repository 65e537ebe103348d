"""The one reader of small files: JSON, TOML and text, which strangers may have written.

Everything that Python's parsers accept and later code may not survive is refused by name:

- a FIFO, device, socket, folder or broken link in place of a file, before it is opened;
- a file of too many bytes, or of another encoding than UTF-8 (a byte order mark is skipped);
- values nested too deeply, integers of too many digits, and numbers that no float holds;
- a key that has two values in an object, because one of them would be lost.

json_decoders.py holds the decoders of JSON. Nothing else of the package is imported.
"""

import contextlib
import errno
import gc
import json
import os
import re
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitune.json_decoders import (
    FILE,
    LINE,
    MAX_DEPTH,
    NOT_FINITE,
    REMEDY,
    WHITE_SPACE,
    error_text,
    is_deep,
    parse_float,
    require_whole_characters,
    without_advice,
)

# The largest tokenizer_config.json of known models has 1 MB, the largest index 9 MB. As values of
# Python, brackets take up to 40 times their bytes.
MAX_JSON_BYTES, MAX_INDEX_BYTES = 16 << 20, 64 << 20
MAX_TOML_BYTES = 1 << 20
MAX_TEXT_BYTES = 16 << 20
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
BYTE_ORDER_MARK = "\ufeff"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
# A key of more than MAX_DEPTH parts in TOML. Its time would grow with the square of the parts.
LONG_KEY = re.compile(
    rf"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){{{MAX_DEPTH}}}"""
)


# ---- files


def require_regular_file(path: str | Path, hint: str = "") -> None:
    """Raise ValueError that names a path unless a regular file is there, or a link to one.

    hint: remedy that the error for a missing file adds.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except ValueError:  # a null byte
        raise ValueError(f"{str(path)!r}: is no path of a file") from None
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        if missing and path.is_symlink():
            raise ValueError(
                f"{path}: a broken link to {os.readlink(path)}; copy the file itself"
            ) from None
        if missing:
            raise ValueError(f"{path}: not found{hint and f'; {hint}'}") from None
        raise ValueError(f"{path}: could not be read ({error.strerror or error})") from None
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "a special file")
        raise ValueError(f"{path}: {kind}, not a file; put a regular file there, or remove it")


def require_readable(path: str | Path) -> None:
    """Raise ValueError that names a path unless a regular file is there that may be read.

    For files that a library opens: safetensors calls a forbidden file missing.
    """
    require_regular_file(path)
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        raise ValueError(f"{path}: could not be read ({error.strerror or error})") from None


def file_exists(path: str | Path) -> bool:
    """Return True if a regular file is at a path, False if nothing is there.

    Raises: ValueError that names the path if something else is there, such as a broken link, a
        folder or a FIFO, or if its folder cannot be read.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null byte
        return False
    except OSError:
        pass  # `require_regular_file` says why
    require_regular_file(path)
    return True


def read_text(
    path: str | Path, *, max_bytes: int = MAX_TEXT_BYTES, hint: str = "", keep_mark: bool = False
) -> str:
    """Return the text of a file in UTF-8, with \\n as line ends.

    hint: remedy that the error for a missing file adds.
    keep_mark: True keeps a byte order mark at the beginning.

    Raises: ValueError that names the file if it is missing, unreadable, no regular file, larger
        than `max_bytes`, or not UTF-8.
    """
    require_regular_file(path, hint)
    try:
        with Path(path).open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or error or "too little memory"
        raise ValueError(f"{path}: could not be read ({reason})") from None
    if len(data) > max_bytes:
        raise ValueError(f"{path}: is larger than {max_bytes:,} bytes, the most that is read")
    text = _decoded(data, str(path)).replace("\r\n", "\n").replace("\r", "\n")
    return text if keep_mark else text.removeprefix(BYTE_ORDER_MARK)


def _decoded(data: bytes, where: str) -> str:
    """Return bytes as text. An error begins with `where`."""
    prefix = f"{where}: " if where else ""
    if data.startswith(UTF_16):
        raise ValueError(f"{prefix}UTF-16, not UTF-8; save it in UTF-8")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{prefix}not UTF-8: {error.reason} at byte {error.start}; save it in UTF-8"
        ) from None


# ---- JSON


class IncompleteJson(ValueError):
    """An error in a JSON text that may be complete if more of the text is read."""


def read_json(
    path: str | Path,
    *,
    default: dict | None = None,
    hint: str = "",
    max_bytes: int = MAX_JSON_BYTES,
    finite: bool = True,
) -> dict[str, Any]:
    """Return the object that a JSON file in UTF-8 holds.

    default: result if there is no such file; None makes a missing file an error.
    hint: remedy that the error for a missing file adds.
    finite: False accepts NaN and Infinity, which Python writes for such floats.

    Raises: ValueError naming the file if it is missing, unreadable, no regular file, not JSON, not
        an object, or holds a value that is refused (see above).
    """
    if default is not None and not file_exists(path):
        return default
    text = read_text(path, max_bytes=max_bytes, hint=hint)
    with _no_garbage_collection():
        content = _parse(FILE if finite else NOT_FINITE, text, str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object")
    return content


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect no cyclic garbage in the block: values of JSON have no cycles.

    For the 500,000 merges of a tokenizer.json the collector takes 1.3 of 2.0 s.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def parse_json(text: str | bytes, where: str = "") -> Any:
    """Return the value of a JSON text that is part of something else.

    where: file or field that an error begins with.

    NaN and Infinity are accepted, because Python and pandas write them into records.

    Raises: ValueError if the text is not JSON, or holds a value that is refused (see above).
    """
    if isinstance(text, bytes):
        text = _decoded(text, where).removeprefix(BYTE_ORDER_MARK)
    return _parse(LINE, text, where)


def parse_json_at(text: str, begin: int, where: str = "") -> tuple[Any, int]:
    """Return the JSON value that starts at character `begin`, and the position behind its end.

    where: file or field that an error begins with.

    Raises: IncompleteJson if the text may end inside the value; ValueError as in `parse_json`.
    """
    try:
        value, end = LINE.raw_decode(text, begin)
        _require_depth(value, text, begin, end)
    except (ValueError, RecursionError, MemoryError) as error:
        kind = IncompleteJson if isinstance(error, json.JSONDecodeError) else ValueError
        raise kind(error_text(LINE, error, text, begin, where)) from None
    return value, end


def _parse(decoder: json.JSONDecoder, text: str, where: str) -> Any:
    try:
        try:
            value, end = decoder.scan_once(text, 0)  # quicker than `decode` on a short line
        except StopIteration:
            value, end = None, -1
        if end < 0 or text[end:].strip(WHITE_SPACE):  # an error that `decode` explains
            value, end = decoder.decode(text), len(text)
        _require_depth(value, text, 0, end)
        if decoder is not LINE:
            require_whole_characters(text, value)
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(error_text(decoder, error, text, 0, where)) from None
    return value


def _require_depth(value: Any, text: str, begin: int, end: int) -> None:
    """Raise RecursionError if a value nests over MAX_DEPTH deep.

    A text of few brackets cannot, and counting brackets is far quicker than a walk.
    """
    brackets = text.count("[", begin, end) + text.count("{", begin, end)
    if brackets > MAX_DEPTH and is_deep(value):
        raise RecursionError


# ---- TOML


def read_toml(path: str | Path, *, hint: str = "") -> dict[str, Any]:
    """Return the content of a TOML file in UTF-8.

    hint: remedy that the error for a missing file adds.

    Raises: ValueError naming the file if it is missing, unreadable, no regular file, not TOML, or
        holds a value that is refused (see above).
    """
    return parse_toml(read_text(path, max_bytes=MAX_TOML_BYTES, hint=hint), str(path))


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Return the content of a TOML text.

    where: file or field that an error begins with.

    Raises: ValueError if the text is not TOML, or holds a value that is refused (see above).
    """
    if LONG_KEY.search(text):
        raise ValueError(f"{where}: TOML with a key of over {MAX_DEPTH} parts; expected fewer")
    try:
        content = tomllib.loads(text, parse_float=parse_float)
        if is_deep(content):
            raise RecursionError
    except RecursionError:
        raise ValueError(f"{where}: TOML that is nested too deeply to be read; {REMEDY}") from None
    except MemoryError:
        raise ValueError(f"{where}: TOML that takes more memory than there is") from None
    except ValueError as error:
        reason = without_advice(error)
        number = "a number " if reason.startswith("is ") else ""
        raise ValueError(f"{where}: not TOML: {number}{reason}") from None
    return content
