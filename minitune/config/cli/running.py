"""Run a command: its errors, warnings and notes are lines for a person at a terminal.

The package speaks of settings in Python's words, such as `overwrite=True`. A person at a terminal
reads the flags instead, here --overwrite.
"""

import ast
import contextlib
import errno
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from minitune.config.cli.settings import flag_of, known_settings
from minitune.config.fields import ListedErrors
from minitune.config.visible_text import on_one_line
from minitune.progress import clear_bars, is_quiet, print_error, print_message, quiet, warn, wrapped
from minitune.stop_signals import (
    FIRST_EXIT_CODE,
    Stopped,
    signal_name,
    signal_of,
    stops_raised,
)
from minitune.streams import is_open

EXPECTED_ERROR = 2  # exit code
CLOSED_PIPE = FIRST_EXIT_CODE + 13  # exit code: SIGPIPE is 13 on all systems that have it
WARNING_INDENT = len("warning: ")  # of further lines
# Arguments of Python that are no settings and have flags.
ARGUMENTS = {
    "verify=False": "--no-verify",
    "ollama=True": "--ollama",
    "quantization_method": "--quantization-method",
    "max_new_tokens": "--max-new-tokens",
}
# Errors on the content of these files speak of its keys.
OF_A_FILE = re.compile(r"^.{0,400}?(?:\.toml|config\.json|state\.json): ")
WORDS = re.compile(
    r"""
    [\w.]+\([^()]*\) | (?<!\w)'[^']*' | "[^"]*" | [\w.~-]*/[\w./~-]*    # calls, quotes, paths
    | (?<![\w.-]) (?P<name>[a-z]\w*) (?:= (?P<value>"[^"]*" | '[^']*' | \[[^\[\]]*\] | [\w.:-]*\w))?
      (?! [\w/=(] | \.\w )
    """,
    re.VERBOSE,
)


def in_flags(text: str) -> str:
    """Return a text with flags in place of Python's setting words.

        overwrite=True       --overwrite              load_in_4bit=False    --no-load-in-4bit
        dtype='float16'      --dtype float16          output_dir            --output-dir
        gguf=["f16"]         --gguf f16

    A name without a value is a setting if it has an underscore. Calls, quotes and paths stay as
    they are, and so does a text on the content of a TOML or JSON file.
    """
    if OF_A_FILE.match(text):
        return text
    known = known_settings()

    def as_flag(found: re.Match) -> str:
        name, value = found["name"], found["value"]
        if found[0] in ARGUMENTS:
            return ARGUMENTS[found[0]]
        if name not in known or (value is None and "_" not in name):
            return found[0]
        if value == "False":
            return flag_of(f"no_{name}")
        return flag_of(name) if value in (None, "True") else f"{flag_of(name)} {_words(value)}"

    return WORDS.sub(as_flag, text)


def _words(value: str) -> str:
    """Return a value of Python as it is typed behind a flag."""
    try:
        items = ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return value
    return shlex.join(map(str, items if isinstance(items, list) else [items]))


def run_command(program: str, command: Callable[..., int | None], *arguments: Any) -> int:
    """Call `command(*arguments)` and return the exit code of the process.

    program: the command as the user types it; error lines begin with it.

    An expected error (ValueError or OSError) becomes one line on stderr and exit code 2;
    ListedErrors keep their lines. A warning is one line on stderr. Ctrl-C gives 130, SIGTERM 143
    and SIGHUP 129, with one line unless the command has said how to continue. A closed pipe at
    stdout ends the command without a word and with 141, as SIGPIPE ends others. The flag --quiet
    of a command ends with the command.
    """
    open_closed_descriptors()
    python_format, warnings.formatwarning = warnings.formatwarning, _format_warning
    was_quiet = is_quiet()
    try:
        with stops_raised(), _flushed_stdout():
            return command(*arguments) or 0
    except (KeyboardInterrupt, Stopped) as error:
        number = signal_of(error)
        if is_quiet() or not getattr(error, "__notes__", None):
            print_error(f"{program}: stopped by {signal_name(number)}")
        return FIRST_EXIT_CODE + number
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and error.filename is None:
            _discard_stdout()
            return CLOSED_PIPE
        if isinstance(error, OSError) and (reason := _stdout_fault()):
            _discard_stdout()
            error = f"stdout: could not be written ({reason}); free space, or write elsewhere"
        elif isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            # Python drops a long text that it could not write.
            error = f"stdout or a file: could not be written ({error.strerror}); free space"
        lines = str(error).splitlines() if isinstance(error, ListedErrors) else [str(error)]
        text = "\n".join(map(_terminal_line, lines))
        print_error(f"{program}: error: {text}")
        return EXPECTED_ERROR
    finally:
        warnings.formatwarning = python_format
        quiet(was_quiet)


@contextlib.contextmanager
def _flushed_stdout() -> Iterator[None]:
    """Flush stdout behind the block, also if it ends with SystemExit, as --help does.

    Raises: OSError if stdout cannot be written. Python would report it when it ends.
    """
    try:
        yield
    except SystemExit:
        _flush_stdout()
        raise
    _flush_stdout()


def _flush_stdout() -> None:
    if is_open(sys.stdout):
        sys.stdout.flush()


def _stdout_fault() -> str | None:
    """Return the reason if stdout cannot be written: it keeps text that was not written."""
    try:
        _flush_stdout()
    except OSError as error:
        return error.strerror
    return None


def _discard_stdout() -> None:
    """Send the rest of stdout to /dev/null: Python flushes stdout when it ends."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_closed_descriptors() -> None:
    """Open /dev/null for each of stdin, stdout and stderr that the caller has closed.

    Otherwise the next file that is opened takes its number, and a library that writes to stderr
    would write into that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _terminal_line(text: str) -> str:
    return on_one_line(in_flags(" ".join(text.split())))


def _format_warning(message: Warning | str, *_: Any, **__: Any) -> str:
    """Return the lines of a warning, without Python's file name and line of code.

    With --quiet the warnings of other packages go to the logger, and the lines are empty.
    """
    if is_quiet():
        warn(str(message))
        return ""
    clear_bars()  # the line is written where the bar begins
    return wrapped(f"warning: {_terminal_line(str(message))}", WARNING_INDENT) + "\n"


def print_notes(notes: Iterable[str]) -> None:
    """Print facts that the user should know, one a line, on stderr."""
    for note in notes:
        print_message("note", _terminal_line(note))
