"""A dataclass field with its help text and the limits of its values, and the check of both.

Command-line flags and TOML keys are built from these fields (cli.py).
"""

import math
from dataclasses import Field, field, fields
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    NoneType: "none",
}
LIST_NAMES = {str: "names", float: "numbers"}
LIMITS = {
    "minimum": (lambda value, limit: value >= limit, "at least"),
    "greater_than": (lambda value, limit: value > limit, "more than"),
    "less_than": (lambda value, limit: value < limit, "less than"),
    "maximum": (lambda value, limit: value <= limit, "at most"),
}


class ListedErrors(ValueError):
    """An error whose text has several lines, such as one for each bad record."""


def setting(default: Any, help: str, *, choices=None, python_only=False, **limits) -> Any:
    """Return a dataclass field that `check_settings` checks.

    default: value of the field if the user gives none.
    help: the text of --help.
    choices: the allowed values, or the allowed names if the field is a tuple.
    python_only: True if the field is neither a flag nor a TOML key.
    limits: `minimum`, `greater_than`, `less_than` and `maximum` of a number.
    """
    assert limits.keys() <= LIMITS.keys(), f"limits are {', '.join(LIMITS)}, not {limits}"
    metadata = {"help": help, "choices": choices, "python_only": python_only, "limits": limits}
    return field(default=default, metadata=metadata)


def check_settings(settings: Any) -> None:
    """Check the type, the choices and the limits of every field of a dataclass object.

    Raises: ValueError that names the first wrong field, its value and the expectation.
    """
    hints = get_type_hints(type(settings))
    for item in fields(settings):
        value, hint = getattr(settings, item.name), hints[item.name]
        types = get_args(hint) or (hint,)
        if get_origin(hint) is tuple:
            _check_list(item, value, types[0])
        elif value is not None or NoneType not in types:
            _check_value(item, value, types)


def _check_list(item: Field, value: Any, kind: type) -> None:
    if not isinstance(value, tuple):
        raise ValueError(f"{item.name} is {value!r}; expected a list of {LIST_NAMES[kind]}")
    if kind is float:
        for number in value:
            _check_value(item, number, (float,))
        return
    if not all(isinstance(name, str) for name in value):
        raise ValueError(f"{item.name} is {value!r}; expected a list of {LIST_NAMES[kind]}")
    choices = item.metadata.get("choices")
    wrong = [name for name in value if choices and name not in choices]
    if wrong:
        raise ValueError(f"{item.name} names {wrong[0]!r}; choose from {', '.join(choices)}")


def _check_value(item: Field, value: Any, types: tuple[type, ...]) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(value, bool):  # a bool is an int to isinstance
        fits = bool in types
    else:
        fits = isinstance(value, types) or (float in types and is_number)
    if not fits:
        expected = " or ".join(TYPE_NAMES.get(kind, kind.__name__) for kind in types)
        raise ValueError(f"{item.name} is {value!r}; expected {expected}")
    if is_number and not math.isfinite(value):
        raise ValueError(f"{item.name} is {value!r}; expected a finite number")
    choices = item.metadata.get("choices")
    if choices and value not in choices:
        raise ValueError(
            f"{item.name} is {value!r}; expected one of {', '.join(map(str, choices))}"
        )
    for name, limit in item.metadata.get("limits", {}).items():
        holds, words = LIMITS[name]
        if not holds(value, limit):
            raise ValueError(f"{item.name} is {value!r}; expected {words} {limit}")
