"""The checked fields of a config.json."""

import math
from typing import Any

EXPECTED = {bool: "true or false", int: "a whole number above 0", float: "a number above 0"}


def read_value(raw: dict, name: str, kind: type, default: Any = None) -> Any:
    """Return a field of config.json, or the default if the field is missing or null.

    Raises: ValueError if the value has another type, or is a number that is not above 0 and finite.
    """
    if (value := raw.get(name)) is None:
        if default is None:
            raise ValueError(f"{name} is missing; expected {EXPECTED[kind]}")
        return default
    is_bool = isinstance(value, bool)
    if kind is bool:
        valid = is_bool
    else:
        is_number = isinstance(value, int if kind is int else (int, float)) and not is_bool
        valid = is_number and 0 < value < math.inf
    if not valid:
        raise ValueError(f"{name} is {value!r}; expected {EXPECTED[kind]}")
    return value


def read_list(raw: dict, name: str, length: int) -> list | None:
    """Return a list of `length` entries of config.json, or None if it is missing or null.

    Raises: ValueError if the field is no list, or has another length.
    """
    if (value := raw.get(name)) is None:
        return None
    if not isinstance(value, list) or len(value) != length:
        found = f"{len(value)} entries" if isinstance(value, list) else repr(value)
        raise ValueError(f"{name} is {found}; expected a list of {length} entries")
    return value


def read_numbers(raw: dict, name: str, length: int) -> tuple[float, ...]:
    """Return a list of numbers above 0 of config.json.

    Raises: ValueError if the field is missing, has another length, or holds anything else.
    """
    values = read_list(raw, name, length)
    if values is None:
        raise ValueError(f"{name} is missing; expected a list of {length} numbers")
    return tuple(float(read_value({name: value}, name, float)) for value in values)
