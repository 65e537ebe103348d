"""TODO docstring."""

import math
from dataclasses import field, fields
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints


def setting(default: Any, help: str, *, choices=None, **limits) -> Any:
    """A dataclass field with its help text and what its values must satisfy: least, above, below, most, choices."""
    return field(default=default, metadata={"help": help, "choices": choices, "limits": limits})


def check_settings(settings) -> None:
    """ValueError where a value of the dataclass is not of its field's type, or outside its range or choices."""
    hints = get_type_hints(type(settings))
    for item in fields(settings):
        name, value, kinds = (
            item.name,
            getattr(settings, item.name),
            get_args(hints[item.name]) or (hints[item.name],),
        )
        if get_origin(hints[item.name]) is tuple:
            if not (isinstance(value, tuple) and all(isinstance(part, str) for part in value)):
                raise ValueError(f"{name} is {value!r}; expected a list of names")
            if wrong := [
                part
                for part in value
                if item.metadata.get("choices") and part not in item.metadata["choices"]
            ]:
                raise ValueError(
                    f"{name} names {wrong[0]!r}; choose from {', '.join(item.metadata['choices'])}"
                )
            continue
        if value is None and NoneType in kinds:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = (
            bool in kinds
            if isinstance(value, bool)
            else isinstance(value, kinds) or (float in kinds and number)
        )
        if not fits:
            raise ValueError(
                f"{name} is {value!r}; expected {' or '.join(WORDS.get(k, k.__name__) for k in kinds)}"
            )
        if number and not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}; expected a finite number")
        choices = item.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(str, choices))}")
        for bound, limit in item.metadata.get("limits", {}).items():
            holds, words = LIMITS[bound]
            if not holds(value, limit):
                raise ValueError(f"{name} is {value!r}; expected {words} {limit}")


WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    NoneType: "none",
}


LIMITS = {
    "least": (lambda value, limit: value >= limit, "at least"),
    "above": (lambda value, limit: value > limit, "more than"),
    "below": (lambda value, limit: value < limit, "less than"),
    "most": (lambda value, limit: value <= limit, "at most"),
}
