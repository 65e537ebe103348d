"""The work that a chat template may do for one conversation, counted in units.

A template is a foreign program. Its steps spend units before they run, so a step that would take
too long or too much memory does not begin. Counting gives the same result on every machine and in
every thread, and also ends work inside of a C function.

    units = 10**6 + 512 * size of the conversation + 200 * messages**2
    units of a node in a loop = 1 + length of the longest text / 4096
    units of a call or filter = number of characters and entries that it reads and makes

Real templates spend less than 10**5 for a short conversation. The last term of the first line is
for templates that look through all messages for each message. A macro that writes the 2,000
parameters of 100 tools beside a message of 100,000 characters spends 1.5 * 10**7.

No single value may be larger than 2 * 10**6 + 8 * size of the conversation. The size of a value is
that of its tree: a list that holds the same text twice has it twice, because JSON, a comparison and
`str` walk through it twice.
"""

import re
import string
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import jinja2

BASE_UNITS, UNITS_A_CHARACTER = 1_000_000, 512
UNITS_A_PAIR = 200  # of messages
BASE_SIZE, SIZE_A_CHARACTER = 2_000_000, 8  # of a value
SMALL = 4096  # characters that a node handles in the time of one unit
LARGE_TREE, IMMENSE = 200_000, 10**15  # entries that are counted at most, and the size beyond
INTEGER_BITS = 4096  # of the largest integer
FIELD_WIDTH = 1000  # characters that a number in a format may ask for

# A width or precision of four digits, or one that an argument gives, in a format for `%`.
WIDE_PERCENT = re.compile(r"[%)][-#0 +]*+(?:\d*+\.)?(?:\*|\d{4})")
WIDE_FIELD = re.compile(r"\d{4}|\{")  # the same in the format of a field for str.format


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """A template that asks for more work than a conversation needs, while it is rendered."""


class CostlyTemplateError(ValueError):
    """A template that asks for more work than a conversation needs: no record is at fault."""


class ConversationRefusedError(ValueError):
    """A template that refuses one conversation."""


class Budget:
    """The units that are left for one rendering, and the size that a value may have.

    messages, tools: the conversation. Its size is computed only if the base does not suffice.
    """

    def __init__(self, messages: list = (), tools: Any = None):
        self._left, self._largest_allowed = BASE_UNITS, BASE_SIZE
        self._messages, self._tools = messages, tools
        self._is_extended = False
        contents = [message.get("content") for message in messages]
        self._largest = max([len(text) for text in contents if isinstance(text, str)], default=0)

    def spend(self, units: int) -> None:
        """Take units from the rest.

        Raises: TemplateLimitError if there are not enough.
        """
        self._left -= units
        if self._left < 0:
            self._extend()
            if self._left < 0:
                raise TemplateLimitError(
                    "it takes more steps than any conversation of this size needs; look for an "
                    "endless loop"
                )

    def spend_nodes(self, count: int) -> None:
        """Take the units of some evaluated nodes."""
        self.spend(count * (1 + self._largest // SMALL))

    def allow(self, size: int) -> None:
        """Take the units of a value that is made.

        Raises: TemplateLimitError if it is larger than a template may need.
        """
        if size > self._largest_allowed:
            self._extend()
            if size > self._largest_allowed:
                shown = f"{size:,}" if size < IMMENSE else f"over {LARGE_TREE:,}"
                raise TemplateLimitError(
                    f"it makes a text or list of {shown} characters or entries; look for a text "
                    "that grows with each step"
                )
        self._largest = max(self._largest, size)
        self.spend(size)

    def _extend(self) -> None:
        """Add what the size of the conversation allows, once."""
        if not self._is_extended:
            self._is_extended = True
            size = size_of(self._messages) + size_of(self._tools)
            self._left += UNITS_A_CHARACTER * size + UNITS_A_PAIR * len(self._messages) ** 2
            self._largest_allowed += SIZE_A_CHARACTER * size


BUDGET: ContextVar[Budget] = ContextVar("budget of the template that is rendered")


def checked(value: Any) -> Any:
    """Return a value that a template has made.

    Raises: TemplateLimitError if it is too large.
    """
    if type(value) is str and len(value) <= SMALL:
        return value
    if isinstance(value, int):
        check_bits(value.bit_length())
    elif isinstance(value, str | bytes | list | tuple | dict):
        BUDGET.get().allow(size_of(value))
    return value


def check_bits(bits: int) -> None:
    """Raise TemplateLimitError if an integer of so many bits is too long."""
    if bits > INTEGER_BITS:
        raise TemplateLimitError(f"it computes an integer of {bits:,} bits")


def size_of(value: Any) -> int:
    """Return the number of characters and entries of a value's tree.

    A tree of more entries than any conversation has counts as immense: it may hold shared lists.
    """
    if type(value) is str:
        return len(value) + 1
    total, entries, waiting = 0, 0, [value]
    while waiting:
        item = waiting.pop()
        entries += 1
        total += 1
        if max(entries, len(waiting)) > LARGE_TREE:
            return IMMENSE
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            total += len(item)
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, list | tuple | set | frozenset):
            total += len(item)
            waiting += item
        elif isinstance(item, int):
            total += item.bit_length() >> 3
        elif hasattr(item, "__len__"):
            total += len(item)
    return total


def factor_of(arguments: tuple, named: Mapping[str, Any]) -> int:
    """Return the factor by which arguments, such as a width, may lengthen a text."""
    factor = 1
    for value in (*arguments, *named.values()):
        if value is None or isinstance(value, bool):
            continue
        factor += abs(int(value)) if isinstance(value, int | float) else size_of(value)
    return factor


# ---- sizes of results


def percent_size(text: str | bytes, values: Any) -> int:
    """Return an upper bound of the length of `text % values`.

    Raises: TemplateLimitError if a field has a width of four digits.
    """
    if WIDE_PERCENT.search(text if isinstance(text, str) else text.decode("latin-1")):
        raise TemplateLimitError("it formats a text with a width of four digits or of an argument")
    parts = values if isinstance(values, tuple) else (values,)
    fields = text.count("%" if isinstance(text, str) else b"%")
    return len(text) + fields * (FIELD_WIDTH + max(map(size_of, parts), default=0))


def format_size(text: str, values: tuple, named: Mapping[str, Any]) -> int:
    """Return an upper bound of the length of `text.format(*values, **named)`.

    Raises: TemplateLimitError if a field has a width of four digits.
    """
    fields = 0
    for _, name, layout, _ in string.Formatter().parse(text):
        fields += name is not None
        if layout and WIDE_FIELD.search(layout):
            raise TemplateLimitError("it formats a text with a width of four digits or of a field")
    widest = max(map(size_of, (*values, *named.values())), default=0)
    return len(text) + fields * (FIELD_WIDTH + widest)


def replace_size(text: Any, old: Any, new: Any, *_: Any) -> int:
    """Return an upper bound of the length of `text.replace(old, new)`."""
    if not isinstance(text, str) or not isinstance(old, str):
        return size_of(text) * factor_of((old, new), {})
    found = text.count(old) if old else len(text) + 1
    return len(text) + found * size_of(new)


def join_size(separator: Any, items: Any) -> int:
    """Return an upper bound of the length of `separator.join(items)`."""
    return size_of(items) + len(items) * size_of(separator)


def indent_size(text: Any, width: Any = 4, *_: Any, **__: Any) -> int:
    """Return an upper bound of the length of a text whose lines are indented."""
    lines = len(text.splitlines()) if isinstance(text, str) else size_of(text)
    return size_of(text) + (lines + 1) * factor_of((width,), {})


def binary_size(operator: str, left: Any, right: Any) -> int:
    """Return an upper bound of the size of the result of `*`, `**` or `%`.

    Raises: TemplateLimitError if an integer becomes too long.
    """
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length(), right.bit_length()
        check_bits(bits[0] * max(right, 0) if operator == "**" else sum(bits))
        return 1
    if operator == "%" and isinstance(left, str | bytes):
        return percent_size(left, right)
    counts = [value for value in (left, right) if isinstance(value, int)]
    return (size_of(left) + size_of(right)) * (max(counts[0], 1) if counts else 1)
