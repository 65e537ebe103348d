"""Texts that end an answer, under transformers' names: stop_strings, with the tokenizer.

An answer ends with the token that completes one of the strings. The string stays in the answer, as
in transformers. Only the answer's own text counts, not the prompt's.
"""

from collections.abc import Sequence
from typing import Any

from minitune.config.numbers import shown
from minitune.incremental_text import IncrementalText


class StopStrings:
    """The texts of several answers, searched for stop strings as the tokens come.

    strings: the stop strings, at least one.
    tokenizer: its `decode` returns the text of ids.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any, answers: int):
        self._strings = strings
        self._kept = max(map(len, strings)) - 1  # characters that may begin a string
        self._texts = [IncrementalText(tokenizer.decode) for _ in range(answers)]
        self._tails = [""] * answers
        self.found: list[str | None] = [None] * answers  # the string that ended each answer

    def add(self, index: int, token: int) -> bool:
        """Take a token of an answer, and return True if its text contains a stop string now."""
        text = self._texts[index]
        tail = self._tails[index] + text.add([token])
        # Bytes of a character that is not complete do not hide the characters before them.
        visible = tail + text.unfinished
        found = (string for string in self._strings if string in visible)
        self.found[index] = min(found, key=visible.index, default=None)
        self._tails[index] = tail[-self._kept :] if self._kept else ""
        return self.found[index] is not None


def read_stop_strings(
    strings: str | Sequence[str] | None, tokenizer: Any, answers: int
) -> StopStrings | None:
    """Return the search for the stop strings of a call, or None if there are none.

    Raises: ValueError if a string is empty or no text, or the tokenizer is missing.
    """
    is_list = strings is None or (isinstance(strings, Sequence) and not isinstance(strings, str))
    strings = list(strings or ()) if is_list else [strings]
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(
                f"stop_strings hold {shown(string)}; expected texts that are not empty"
            )
    if strings and tokenizer is None:
        raise ValueError("stop_strings are searched in the text; pass tokenizer=tokenizer too")
    return StopStrings(strings, tokenizer, answers) if strings else None
