"""The wall around `tokenizers` and `sentencepiece`: each of their errors names the file.

`tokenizers` raises nothing narrower than Exception. A panic of its Rust code is a BaseException of
the class PanicException, which no module exports, and prints a trace on stderr before.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

PANIC = "PanicException"
SHOWN_ERROR = 500  # characters
STDERR = 2
_REDIRECTED = Lock()


@contextmanager
def library_errors(path: Path, action: str, library: str = "tokenizers") -> Iterator[None]:
    """Turn every error of a library, panics included, into a ValueError that names the file."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise  # KeyboardInterrupt and its kin
        reason = str(error)[:SHOWN_ERROR] or type(error).__name__
        raise ValueError(f"{path}: {library} cannot {action}: {reason}") from None


@contextmanager
def no_panic_trace() -> Iterator[None]:
    """Keep the trace of a panic off stderr; its text is in the error.

    All output on stderr is dropped meanwhile, so this is for the short time of loading. If Python
    began without stderr, its descriptor may be that of any file, and stays as it is.
    """
    if sys.__stderr__ is None:
        yield
        return
    with _REDIRECTED:
        try:
            saved, sink = os.dup(STDERR), os.open(os.devnull, os.O_WRONLY)
        except OSError:  # stderr is closed
            yield
            return
        os.dup2(sink, STDERR)
        try:
            yield
        finally:
            os.dup2(saved, STDERR)
            os.close(saved)
            os.close(sink)
