"""Text of unknown origin that is safe to print.

Records, file names and templates are a stranger's. A control character, an escape sequence or a
character that reorders the line would act on the reader's terminal; each gets a visible sign.
"""

import unicodedata

LINE_BREAK = "⏎\n"
# Categories of characters that are invisible or act on the characters around them.
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
JOINERS = "\u200c\u200d"  # parts of emoji and of Persian words


class _Signs(dict):
    """A table for str.translate that finds the sign of a character when it first occurs."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        is_hidden = unicodedata.category(character) in HIDDEN and character not in JOINERS
        self[code] = f"<U+{code:04X}>" if is_hidden else character
        return self[code]


_SIGNS = _Signs({ord("\n"): LINE_BREAK, ord("\t"): "⇥\t"})


def visible(text: str) -> str:
    """Return a text with signs for control characters and other invisible ones.

    A line break keeps its effect behind its sign, and so does a tab.
    """
    return text.translate(_SIGNS)


def on_one_line(text: str) -> str:
    """Return `visible` text without line breaks and tabs, for names and messages."""
    return visible(text).replace("\n", "").replace("\t", "")
