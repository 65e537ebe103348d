"""A dataclass field with its help text and the limits of its values, and the check of both.

Command-line flags and TOML keys are built from these fields (cli.py).
"""

from dataclasses import Field, field, fields
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from minitune.config.numbers import LARGEST_WHOLE, shown

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
# Limits of a number whose field gives none. Float32 holds the product of two of the largest ones.
DEFAULT_LIMITS: dict[type, dict[str, float]] = {
    int: {"minimum": -LARGEST_WHOLE, "maximum": LARGEST_WHOLE},
    float: {"minimum": -1e15, "maximum": 1e15},
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
        raise ValueError(f"{item.name} is {shown(value)}; expected a list of {LIST_NAMES[kind]}")
    if kind is float:
        for number in value:
            _check_value(item, number, (float,))
        return
    if not all(isinstance(name, str) for name in value):
        raise ValueError(f"{item.name} is {shown(value)}; expected a list of {LIST_NAMES[kind]}")
    choices = item.metadata.get("choices")
    wrong = [name for name in value if choices and name not in choices]
    if wrong:
        raise ValueError(f"{item.name} names {shown(wrong[0])}; choose from {', '.join(choices)}")


def _check_value(item: Field, value: Any, types: tuple[type, ...]) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(value, bool):  # a bool is an int to isinstance
        fits = bool in types
    else:
        fits = isinstance(value, types) or (float in types and is_number)
    if not fits:
        expected = " or ".join(TYPE_NAMES.get(kind, kind.__name__) for kind in types)
        raise ValueError(f"{item.name} is {shown(value)}; expected {expected}")
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{item.name} is {value!r}; expected a finite number")
    choices = item.metadata.get("choices")
    if choices and value not in choices:
        raise ValueError(
            f"{item.name} is {shown(value)}; expected one of {', '.join(map(str, choices))}"
        )
    limits = item.metadata.get("limits", {})
    if is_number:
        limits = DEFAULT_LIMITS[float if float in types else int] | limits
    for name, limit in limits.items():
        holds, words = LIMITS[name]
        if not holds(value, limit):
            raise ValueError(f"{item.name} is {shown(value)}; expected {words} {limit}")
