"""The check of a number that comes from a file, a command line or a caller.

A number has a type and bounds. True and "8" are no numbers, and NaN lies within no bounds. Bounds
are wide: they refuse damage and attacks, not unusual models. A value within its bounds can be
squared, inverted and multiplied by others in float32 without an overflow.
"""

from typing import Any, NamedTuple

LARGEST_WHOLE = 2**31 - 1  # of lengths and counts; kernels index with 32 bits
SMALLEST_FACTOR, LARGEST_FACTOR = 1e-6, 1e6
MAX_TEXT = 80  # characters of a value in an error
MAX_DIGITS = 30  # of a whole number in an error


class Bounds(NamedTuple):
    """The type of a number and the range that it lies in.

    kind: int, or float, which takes whole numbers too.
    minimum, maximum: the bounds, which belong to the range.
    """

    kind: type
    minimum: float
    maximum: float

    def __str__(self) -> str:
        if self.kind is int:
            return f"a whole number from {self.minimum} to {self.maximum}"
        return f"a number from {self.minimum:g} to {self.maximum:g}"

    def hold(self, value: Any) -> bool:
        """Return True if a value has the type and lies within the bounds."""
        kinds = int if self.kind is int else (int, float)
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        return is_number and self.minimum <= value <= self.maximum


def whole(minimum: int = 0, maximum: int = LARGEST_WHOLE) -> Bounds:
    """Return the bounds of a whole number."""
    return Bounds(int, minimum, maximum)


def number(minimum: float = SMALLEST_FACTOR, maximum: float = LARGEST_FACTOR) -> Bounds:
    """Return the bounds of a number."""
    return Bounds(float, minimum, maximum)


def check_number(name: str, value: Any, bounds: Bounds) -> Any:
    """Return a value that lies within its bounds.

    Raises: ValueError that names the value and the expectation if it does not.
    """
    if not bounds.hold(value):
        raise ValueError(f"{name} is {shown(value)}; expected {bounds}")
    return value


def shown(value: Any) -> str:
    """Return a value as an error shows it: in Python's form, and never long."""
    # Python refuses to write a whole number of more than 4,300 digits.
    if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
        return f"a whole number of more than {MAX_DIGITS} digits"
    try:
        text = repr(value)
    except ValueError:  # such a number inside a list
        return f"a {type(value).__name__} with a very long number"
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 3]}..."
