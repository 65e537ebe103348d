"""The streams that texts for a person go to: stdout and stderr, which may be missing or fail.

A program without a console has None in their place. A service may have closed them, and a window
may have replaced them by an object that only has `write`. This file imports nothing else of the
package.
"""

import contextlib
import os
from typing import TextIO


def is_open(stream: TextIO | None) -> bool:
    """Return True if a stream is there and not closed."""
    try:
        return stream is not None and not getattr(stream, "closed", False)
    except Exception:  # a stream whose buffer was detached, or any error of a deleted object
        return False


def is_terminal(stream: TextIO | None) -> bool:
    """Return True if a stream is there and leads to a terminal."""
    try:
        return is_open(stream) and bool(stream.isatty())
    except Exception:  # an object without isatty, or any error of a deleted object
        return False


def terminal_columns(stream: TextIO | None) -> int | None:
    """Return the width of the terminal that a stream leads to, or None if it is not known."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except Exception:  # an object without a descriptor, or any error of a deleted object
        return None


def encoding_of(stream: TextIO | None) -> str:
    """Return the encoding of a stream: UTF-8 if none is named, ASCII if Python lacks it."""
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        " ".encode(encoding, "backslashreplace").decode(encoding)
    except Exception:  # a codec that does not exist or takes no text, or a deleted object
        return "ascii"
    return encoding


def printable(text: str, stream: TextIO | None) -> str:
    """Return a text with escapes for the characters that the stream's encoding lacks."""
    encoding = encoding_of(stream)
    return text.encode(encoding, "backslashreplace").decode(encoding)


class LenientStream:
    """A stream that drops what cannot be written.

    The stream behind it may raise anything: a pipe without a reader, a window that was destroyed.
    """

    def __init__(self, stream: TextIO | None):
        self._stream, self.encoding = stream, encoding_of(stream)

    def write(self, text: str) -> None:
        """Write a text."""
        if is_open(self._stream):
            with contextlib.suppress(Exception):
                self._stream.write(printable(text, self._stream))

    def flush(self) -> None:
        """Flush the stream."""
        if is_open(self._stream):
            with contextlib.suppress(Exception):
                self._stream.flush()
