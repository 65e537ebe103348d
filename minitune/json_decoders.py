"""The decoders of JSON texts, the values that they refuse, and the texts of their errors.

A decoder refuses integers of too many digits, numbers that no float holds, and a key that has two
values in an object. An error names the place in the text, or the field that holds the value.

This file imports nothing else of the package.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Real files of models nest 4 to 12 deep, and JSON schemas of tools up to 20.
MAX_DEPTH = 100
REMEDY = f"expected at most {MAX_DEPTH} levels"
# A tokenizer_config.json writes int(1e30), which has 31 digits. Over 308 digits fit no float.
MAX_DIGITS = 100
WHITE_SPACE = " \t\r\n"
HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # or a whole pair


def parse_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. A key with two values is an error: one of them would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise ValueError(f'the key "{_short(key)}" stands twice in an object')
    return found


def parse_float(text: str) -> float:
    """Return a float of JSON or TOML. A number that overflows is an error."""
    value = float(text)
    if math.isinf(value) and text[-1].isdigit():  # TOML also passes its words inf and nan
        raise ValueError(f"is {_short(text)}, expected a number that fits a float")
    return value


def parse_int(text: str) -> int:
    """Return an integer of a file. Too many digits are an error."""
    if len(text) > MAX_DIGITS:
        digits = f"{len(text)} digits; expected at most {MAX_DIGITS}"
        raise ValueError(f"is {_short(text)}, an integer of {digits}")
    return int(text)


def refuse_constant(word: str) -> float:
    """Raise ValueError for NaN and Infinity, which Python writes although JSON lacks them."""
    raise ValueError(f"is {word}, expected a number that is finite")


def _short(text: str) -> str:
    return text if len(text) <= 20 else f"{text[:20]}..."


# Parts of something else, such as lines of a dataset. Integers are Python's: up to 4300 digits,
# because a function in parse_int would triple the time of token ids.
LINE = json.JSONDecoder(object_pairs_hook=parse_object, parse_float=parse_float)
# Files of a program, which hold few numbers.
FILE = json.JSONDecoder(
    object_pairs_hook=parse_object,
    parse_float=parse_float,
    parse_constant=refuse_constant,
    parse_int=parse_int,
)
NOT_FINITE = json.JSONDecoder(
    object_pairs_hook=parse_object, parse_float=parse_float, parse_int=parse_int
)


# ---- checks of whole values


def require_whole_characters(text: str, value: Any) -> None:
    """Raise ValueError if a value holds half a surrogate pair, which no file can hold as text."""
    if HALF_PAIR.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"holds {error.object[error.start]!r}, half a surrogate pair"
            ) from None


def is_deep(value: Any) -> bool:
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


# ---- errors


@dataclass(frozen=True)
class _Refused:
    """A value that a hook of a decoder refuses."""

    reason: str


def error_text(
    decoder: json.JSONDecoder, error: Exception, text: str, begin: int, where: str
) -> str:
    """Return the error text for a JSON text that starts at character `begin`."""
    prefix = f"{where}: " if where else ""
    if isinstance(error, json.JSONDecodeError):
        reason = f"{prefix}not JSON: {error.msg} at {_place(text, begin, error.pos)}"
        return f"{reason}: {mistake}" if (mistake := _usual_mistake(error)) else reason
    if isinstance(error, RecursionError):
        return f"{prefix}JSON that is nested too deeply to be read; {REMEDY}"
    if isinstance(error, MemoryError):
        return f"{prefix}JSON that takes more memory than there is"
    reason, field = without_advice(error), _refused_field(decoder, text, begin)
    if reason.startswith("is "):  # the value of a field
        reason, field = f"{field or 'a value'} {reason}", ""
    kind = "" if where and decoder is not LINE else "JSON that cannot be read: "
    return f"{prefix}{kind}{reason}{field and f' (in {field})'}"


def without_advice(error: ValueError) -> str:
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
