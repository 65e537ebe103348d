"""Arguments that other libraries have and minitune lacks: accepted if they change nothing.

    @foreign_arguments(
        token=Foreign("nothing is downloaded", neutral=ANYTHING),
        load_in_8bit=Foreign("use load_in_4bit=True", neutral=(False, None)),
        max_seq_length=Renamed("max_length"),
    )
    def from_pretrained(model_name, ...): ...

A pasted call works if each foreign argument has a neutral value. Another value is a ValueError with
the reason. A name that no library has is a TypeError that names the nearest argument.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import FrozenInstanceError
from typing import Any, NamedTuple

ANYTHING = None  # as Foreign.neutral: no value changes anything


class Foreign(NamedTuple):
    """An argument that is not supported.

    reason: why there is none, and what to use instead.
    neutral: values that ask for nothing and are accepted, or ANYTHING. A class stands for all its
        objects.
    """

    reason: str
    neutral: tuple | None = (None,)


class Renamed(NamedTuple):
    """An argument that goes by another name here.

    name: the name here.
    """

    name: str


class Replaced(NamedTuple):
    """An argument that stands for several arguments here.

    arguments: returns the arguments that a value stands for, by their names here.
    """

    arguments: Callable[[Any], dict[str, Any]]


def foreign_arguments(**table: Foreign | Renamed | Replaced) -> Callable[[Callable], Callable]:
    """Return a decorator that gives a function or a dataclass these foreign arguments.

    The decorated callable raises ValueError if a foreign argument has a value that is not neutral,
    and TypeError if an argument is unknown or given twice. A function with **kwargs gets unknown
    arguments itself.
    """

    def decorate(target: Callable) -> Callable:
        call = target.__init__ if inspect.isclass(target) else target
        parameters = inspect.signature(call).parameters
        known = {name: None for name in parameters if name != "self"}
        passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

        @functools.wraps(call)
        def checked(*args: Any, **kwargs: Any) -> Any:
            own = _own_arguments(target.__name__, kwargs, known, table, passes_on)
            return call(*args, **own)

        if inspect.isclass(target):
            target.__init__ = checked
            return target
        return checked

    return decorate


def foreign_attributes(**table: Foreign) -> Callable[[type], type]:
    """Return a decorator that lets neutral values be assigned to a frozen dataclass object.

    The assignment of another value is a ValueError with the reason, and that of any other attribute
    a FrozenInstanceError.
    """

    def decorate(target: type) -> type:
        def checked(self: Any, name: str, value: Any) -> None:
            if name not in table:
                raise FrozenInstanceError(
                    f"{target.__name__}.{name} cannot be assigned: the files of the model count"
                )
            _check_neutral(target.__name__, name, value, table[name])

        target.__setattr__ = checked
        return target

    return decorate


def _own_arguments(
    function: str,
    given: Mapping[str, Any],
    known: Mapping[str, None],
    table: Mapping[str, Foreign | Renamed | Replaced],
    passes_on: bool,
) -> dict[str, Any]:
    """Return the given arguments under their names here, without the neutral ones.

    passes_on: True if the function takes unknown names itself, as **kwargs.

    Raises: ValueError and TypeError, as `foreign_arguments` says.
    """
    own = {}
    for name, value in given.items():
        if name not in known and name not in table and not passes_on:
            raise unknown_argument(function, name, known)
        entry = None if name in known else table.get(name)
        if isinstance(entry, Foreign):
            _check_neutral(function, name, value, entry)
            continue
        arguments = {name: value}
        if isinstance(entry, Renamed):
            arguments = {entry.name: value}
        elif isinstance(entry, Replaced):
            arguments = entry.arguments(value)
        for own_name in arguments:
            if own_name in own or (own_name != name and own_name in given):
                raise TypeError(f"{function}() got both {own_name} and {name}, which mean the same")
        own |= arguments
    return own


def _check_neutral(function: str, name: str, value: Any, entry: Foreign) -> None:
    """Raise ValueError with the reason unless a value asks for nothing."""
    if entry.neutral is ANYTHING or any(_is_same(value, item) for item in entry.neutral):
        return
    raise ValueError(f"{function}: {name}={value!r:.80} is not supported: {entry.reason}")


def _is_same(value: Any, neutral: Any) -> bool:
    """Return True if a value is the neutral one, or an object of the neutral class."""
    if isinstance(neutral, type):
        return isinstance(value, neutral)
    # `is` and types first: False == 0, and an array has no truth value
    return value is neutral or (type(value) is type(neutral) and value == neutral)


def unknown_argument(function: str, name: str, known: Iterable[str]) -> TypeError:
    """Return the error for an argument that does not exist: it names the nearest ones."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        hint = f"did you mean {' or '.join(close)}?"
    else:
        hint = f"there is no such setting, and none in its place; known are {', '.join(known)}"
    return TypeError(f"{function}() has no argument {name!r}; {hint}")
