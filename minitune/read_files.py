"""The one reader of small files: JSON, TOML and text, which strangers may have written.

Everything that Python's parsers accept and later code may not survive is refused by name:

- a FIFO, device, socket, folder or broken link in place of a file, before it is opened;
- a file of too many bytes, or of another encoding than UTF-8 (a byte order mark is skipped);
- values nested too deeply, integers of too many digits, and numbers that no float holds;
- a key that stands twice in an object, because one of its values would be lost.

This file imports nothing else of the package.
"""

import errno
import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Real files of models nest 4 to 12 deep, and JSON schemas of tools up to 20.
MAX_DEPTH = 100
REMEDY = f"expected at most {MAX_DEPTH} levels"
# A tokenizer_config.json writes int(1e30), which has 31 digits. Over 308 digits fit no float.
MAX_DIGITS = 100
# The largest tokenizer_config.json of known models has 1 MB, the largest index 9 MB.
MAX_JSON_BYTES = 64 << 20
MAX_TOML_BYTES = 1 << 20
MAX_TEXT_BYTES = 16 << 20
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
WHITE_SPACE = " \t\r\n"
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


def file_exists(path: str | Path) -> bool:
    """Return True if a regular file is at a path, False if nothing is there.

    Raises: ValueError that names the path if something else is there, such as a broken link, a
        folder or a FIFO, or if its folder cannot be read.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass  # require_regular_file says why
    require_regular_file(path)
    return True


def read_text(path: str | Path, *, max_bytes: int = MAX_TEXT_BYTES, hint: str = "") -> str:
    """Return the text of a file in UTF-8, without a byte order mark.

    hint: remedy that the error for a missing file adds.

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
    return _decoded(data, str(path))


def _decoded(data: bytes, where: str) -> str:
    """Return bytes as text. An error begins with `where`."""
    prefix = f"{where}: " if where else ""
    if data.startswith(UTF_16):
        raise ValueError(f"{prefix}UTF-16, not UTF-8; save it in UTF-8")
    try:
        return data.decode("utf-8-sig")
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
    content = _parse(FILE if finite else NOT_FINITE, text, str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object")
    return content


def parse_json(text: str | bytes, where: str = "") -> Any:
    """Return the value of a JSON text that is part of something else.

    where: file or field that an error begins with.

    NaN and Infinity are accepted, because Python and pandas write them into records.

    Raises: ValueError if the text is not JSON, or holds a value that is refused (see above).
    """
    if isinstance(text, bytes):
        text = _decoded(text, where)
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
        raise kind(_reason(LINE, error, text, begin, where)) from None
    return value, end


def _parse(decoder: json.JSONDecoder, text: str, where: str) -> Any:
    try:
        try:
            value, end = decoder.scan_once(text, 0)  # 40% of the time of `decode` on a short line
        except StopIteration:
            value, end = None, -1
        if end != len(text):  # white space, or an error that `decode` explains
            value, end = decoder.decode(text), len(text)
        _require_depth(value, text, 0, end)
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(_reason(decoder, error, text, 0, where)) from None
    return value


def _require_depth(value: Any, text: str, begin: int, end: int) -> None:
    """Raise RecursionError if a value nests over MAX_DEPTH deep.

    A text of few brackets cannot, and counting brackets is far quicker than a walk.
    """
    brackets = text.count("[", begin, end) + text.count("{", begin, end)
    if brackets > MAX_DEPTH and _is_deep(value):
        raise RecursionError


def _is_deep(value: Any) -> bool:
    """Return True if a value nests over MAX_DEPTH deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for container in level
            if isinstance(container, (dict, list))
            for child in (container.values() if isinstance(container, dict) else container)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True


# ---- values of JSON that are refused


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. A key that stands twice is an error: one value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'the key "{twice}" stands twice in an object')
    return found


def _float(text: str) -> float:
    """Return a float of JSON or TOML. A number that overflows is an error."""
    value = float(text)
    if math.isinf(value) and text[-1].isdigit():  # TOML also passes its words inf and nan
        raise ValueError(f"is {_short(text)}, expected a number that fits a float")
    return value


def _int(text: str) -> int:
    """Return an integer of a file. Too many digits are an error."""
    if len(text) > MAX_DIGITS:
        digits = f"{len(text)} digits; expected at most {MAX_DIGITS}"
        raise ValueError(f"is {_short(text)}, an integer of {digits}")
    return int(text)


def _constant(word: str) -> float:
    """Raise ValueError for NaN and Infinity, which Python writes although JSON lacks them."""
    raise ValueError(f"is {word}, expected a number that is finite")


def _short(text: str) -> str:
    return text if len(text) <= 20 else f"{text[:20]}..."


# Parts of something else, such as lines of a dataset. Integers are Python's: up to 4300 digits,
# because a function in parse_int would triple the time of token ids.
LINE = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float)
# Files of a program, which hold few numbers.
FILE = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_float, parse_constant=_constant, parse_int=_int
)
NOT_FINITE = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_int=_int)


# ---- errors of JSON


@dataclass(frozen=True)
class _Refused:
    """A value that a hook of a decoder refuses."""

    reason: str


def _reason(decoder: json.JSONDecoder, error: Exception, text: str, begin: int, where: str) -> str:
    """Return the error text for a JSON text that starts at character `begin`."""
    prefix = f"{where}: " if where else ""
    if isinstance(error, json.JSONDecodeError):
        reason = f"{prefix}not JSON: {error.msg} at {_place(text, begin, error.pos)}"
        return f"{reason}: {mistake}" if (mistake := _usual_mistake(error)) else reason
    if isinstance(error, RecursionError):
        return f"{prefix}JSON that is nested too deeply to be read; {REMEDY}"
    if isinstance(error, MemoryError):
        return f"{prefix}JSON that takes more memory than there is"
    reason, field = _without_advice(error), _refused_field(decoder, text, begin)
    if reason.startswith("is "):  # the value of a field
        reason, field = f"{field or 'a value'} {reason}", ""
    kind = "" if where and decoder is not LINE else "JSON that cannot be read: "
    return f"{prefix}{kind}{reason}{field and f' (in {field})'}"


def _without_advice(error: ValueError) -> str:
    """Return an error of Python without its advice to raise the limit of digits."""
    return re.sub("; use sys.set_int_max_str_digits.*", "", str(error))


def _place(text: str, begin: int, position: int) -> str:
    """Return the column, and the line if there are several, of a position in a text."""
    column = position - max(begin, text.rfind("\n", begin, position) + 1) + 1
    line = text.count("\n", begin, position) + 1
    return f"line {line}, column {column}" if "\n" in text else f"column {column}"


def _refused_field(decoder: json.JSONDecoder, text: str, begin: int) -> str:
    """Return the field that holds a refused value, such as rope_scaling.factor, or ""."""

    def marking(hook: Callable) -> Callable:
        def marked(found: Any) -> Any:
            try:
                return hook(found)
            except ValueError as error:
                return _Refused(str(error))

        return marked

    names = ("object_pairs_hook", "parse_float", "parse_constant", "parse_int")
    marks = json.JSONDecoder(**{name: marking(getattr(decoder, name)) for name in names})
    try:
        waiting = [("", marks.raw_decode(text, begin)[0])]
    except (ValueError, RecursionError, MemoryError):
        return ""
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, _Refused):
            return path
        if isinstance(value, dict):
            waiting += [(f"{path}.{key}".lstrip("."), child) for key, child in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{path}[{index}]", child) for index, child in enumerate(value)]
    return ""


def _usual_mistake(error: json.JSONDecodeError) -> str:
    """Return the usual mistake that explains an error, or "" if it is none of them."""
    before, rest = error.doc[: error.pos].rstrip(WHITE_SPACE), error.doc[error.pos :].lstrip()
    if not rest or error.msg.startswith("Unterminated string"):
        return "the text ends inside a value"
    if error.msg.startswith("Invalid control character"):
        return r"write a line break as \n, and a tab as \t"
    if rest[0] in "]}" and before.endswith(","):
        return f"remove the comma before the {rest[0]}"
    if rest[0] == "'":
        return "write double quotes around keys and texts"
    if rest.startswith(("None", "True", "False")):
        return "write null, true and false, not Python's words"
    if error.msg == "Extra data" and rest[0] == ",":
        return "remove the comma behind the value"
    if error.msg == "Extra data" and rest[0] in "[{":
        return "a second value follows the first"
    return ""


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
        content = tomllib.loads(text, parse_float=_float)
        if _is_deep(content):
            raise RecursionError
    except RecursionError:
        raise ValueError(f"{where}: TOML that is nested too deeply to be read; {REMEDY}") from None
    except MemoryError:
        raise ValueError(f"{where}: TOML that takes more memory than there is") from None
    except ValueError as error:
        raise ValueError(f"{where}: not TOML: {_without_advice(error)}") from None
    return content
