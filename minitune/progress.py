"""Progress bars, lines and warnings for a person: everything that this package shows on stderr.

    a terminal     a bar of one line, and text that wraps at the terminal's width
    a notebook     the same bar, drawn as text; text wraps at 80 columns
    a pipe         a line for each 10 % of work that takes more than 10 s; text wraps at 80 columns
    no stderr      nothing
    quiet(True)    the lines of a pipe, unwrapped, in logging.getLogger("minitune"); nothing here

All bars are drawn on the same line: an evaluation's bar hides the training's for a moment. The
environment variable COLUMNS replaces the width. A stderr that fails ends no work.
"""

import contextlib
import logging
import os
import re
import sys
import textwrap
import time
import warnings
from collections.abc import Iterable
from enum import Enum

from tqdm import tqdm

from minitune.streams import LenientStream, is_open, is_terminal, terminal_columns

DEFAULT_WIDTH = 80  # columns
LABEL_WIDTH = 11  # columns of a label before its text
LINE_SECONDS, LINE_SHARE = 10.0, 0.1  # least distance of two lines in a pipe
NOTEBOOK_SECONDS = 0.5  # least distance of two drawings: each is a message to the browser
BYTES = "B"  # as a unit
# Sides of a bar that shows a text instead of tqdm's times.
TEXT_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"

LOGGER = logging.getLogger("minitune")
LOGGER.addHandler(logging.NullHandler())  # without any handler, logging prints warnings on stderr

_is_quiet = False
_drawn: dict[int, tqdm] = {}  # the bars on the screen, by id; the last one is on top


class Output(Enum):
    """The kind of place that lines for a person go to."""

    NONE = "none"
    PIPE = "pipe"
    TERMINAL = "terminal"
    NOTEBOOK = "notebook"
    LOG = "log"  # in place of stderr


def quiet(on: bool = True) -> None:
    """Send lines and warnings to logging.getLogger("minitune"), and nothing to stderr.

    Warnings have the level WARNING, all other lines INFO. Answers on stdout stay there, except the
    line of `print_trainable_parameters`, which goes to the logger.

    on: False sends lines, warnings and later bars to stderr again.
    """
    global _is_quiet
    if on:
        clear_bars()
        for bar in list(_drawn.values()):
            bar.disable = True
    _is_quiet = on


def is_quiet() -> bool:
    """Return True after `quiet(True)`."""
    return _is_quiet


def output_kind() -> Output:
    """Return the kind of place that lines for a person go to.

    A notebook's stderr is an object of ipykernel and no terminal. ipykernel is not imported.
    """
    if _is_quiet:
        return Output.LOG
    stream = sys.stderr
    if not is_open(stream):
        return Output.NONE
    if any(cls.__module__.partition(".")[0] == "ipykernel" for cls in type(stream).__mro__):
        return Output.NOTEBOOK
    return Output.TERMINAL if is_terminal(stream) else Output.PIPE


def is_shown(progress: bool | None) -> bool:
    """Return True if progress is shown: None means on a terminal or in a notebook only."""
    if progress is None:
        return output_kind() in (Output.TERMINAL, Output.NOTEBOOK)
    return progress and output_kind() != Output.NONE


# ---- text


def output_width() -> int:
    """Return the columns of a line: COLUMNS, or the terminal's, or 80."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    columns = terminal_columns(sys.stderr) if output_kind() == Output.TERMINAL else None
    return columns or DEFAULT_WIDTH


def wrapped(text: str, indent: int = 0, first: str = "") -> str:
    """Return a text in lines of at most `output_width` columns. A longer word stays whole.

    indent: columns before each line except the first.
    first: text before the first line.
    """
    return textwrap.fill(
        text,
        max(output_width(), indent + 20),
        initial_indent=first,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def labelled(label: str, text: object) -> str:
    """Return a text behind its label. Further lines begin below the text."""
    return wrapped(str(text), LABEL_WIDTH, f"{label:<{LABEL_WIDTH - 1}} ")


def labelled_rows(rows: Iterable[tuple[str, object]]) -> str:
    """Return the lines of (label, text) rows, each as `labelled`."""
    return "\n".join(labelled(label, text) for label, text in rows)


def duration(seconds: float) -> str:
    """Return seconds as 0:45, 12:03 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def print_line(text: str, end: str = "\n") -> None:
    """Print a text on stderr, above the bars that are shown, or log it if the package is quiet."""
    if _is_quiet:
        _log(logging.INFO, text)
    else:
        print_error(text, end)


def print_error(text: str, end: str = "\n") -> None:
    """Print a text on stderr, above the bars that are shown, also if the package is quiet."""
    clear_bars()
    print(text, end=end, file=LenientStream(sys.stderr), flush=True)
    for bar in list(_drawn.values())[-1:]:
        bar.refresh()


def print_message(kind: str, text: str) -> None:
    """Print a warning or a note on stderr. Further lines begin below the text."""
    if _is_quiet:
        _log(logging.WARNING if kind == "warning" else logging.INFO, text)
    else:
        first = f"{kind}: "
        print_line(wrapped(text, len(first), first))


def print_result(text: str) -> None:
    """Print a text that the caller asked for on stdout, or log it if the package is quiet."""
    if _is_quiet:
        _log(logging.INFO, text)
    else:
        print(text, file=LenientStream(sys.stdout), flush=True)


def print_from_handler(text: str) -> None:
    """Print a text on stderr from the handler of a signal, unless the package is quiet.

    The signal may have interrupted a write to the stream or a record of logging. So the text goes
    to the descriptor that Python had as stderr when it began, and never to a logger.
    """
    if output_kind() not in (Output.NONE, Output.LOG) and is_open(sys.__stderr__):
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.__stderr__.fileno(), text.encode())


def warn(text: str, stacklevel: int = 1) -> None:
    """Warn of a fact through `warnings`, or through the logger if the package is quiet.

    stacklevel: as in warnings.warn, counted from the caller of this function.

    Raises: UserWarning if a filter makes errors of warnings.
    """
    if _is_quiet:
        _log(logging.WARNING, text)
        return
    try:
        warnings.warn(text, stacklevel=stacklevel + 1)
    except UserWarning:
        raise
    except Exception:  # a stderr that is closed, or that raises anything
        return


def _log(level: int, text: str) -> None:
    """Log each line of a text. A line that begins with spaces continues the one before."""
    for line in re.sub(r"\n +", " ", text).split("\n"):
        if line.strip():
            LOGGER.log(level, line.strip())


def clear_bars() -> None:
    """Remove all bars from the screen; each one comes back at its next update."""
    for bar in list(_drawn.values()):
        bar.clear()


# ---- bars


class ProgressBar(contextlib.AbstractContextManager):
    """The progress of some work, as the top of this file describes.

    done: units that are done.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        unit: str = BYTES,
        show: bool | None = None,
        done: int = 0,
        has_text: bool = False,
    ):
        """Show the bar.

        label: the work, such as "loading".
        total: units of the whole work, or None if they are not known.
        unit: BYTES, or the name of one item.
        show: True shows it everywhere, None on a terminal or in a notebook, False nowhere.
        done: units that were done before.
        has_text: the bar stays, shows the text of `set_text` instead of label and times, and has no
            lines in a pipe: it belongs to a run that prints its own.
        """
        self.done, self._label, self._total, self._unit = done, label, total, unit
        self._bar: tqdm | None = None
        self._lines: _Lines | None = None
        kind = Output.NONE if show is False else output_kind()
        if kind in (Output.TERMINAL, Output.NOTEBOOK):
            self._bar = self._new_bar(kind, has_text)
        elif kind in (Output.PIPE, Output.LOG) and show and not has_text:
            self._lines = _Lines(done)

    def _new_bar(self, kind: Output, has_text: bool) -> tqdm:
        options = {"bar_format": TEXT_FORMAT} if has_text else {"desc": self._label}
        if kind == Output.NOTEBOOK:
            options["mininterval"] = NOTEBOOK_SECONDS
        bar = tqdm(
            total=self._total,
            initial=self.done,
            unit=self._unit,
            unit_scale=self._unit == BYTES,
            ncols=output_width() - 1,  # some terminals begin a new line behind the last column
            position=0,
            leave=has_text,
            file=LenientStream(sys.stderr),
            **options,
        )
        _drawn[id(bar)] = bar  # tqdm's bars are equal if they are on the same line
        return bar

    @property
    def is_drawn(self) -> bool:
        """True if there is a bar on a terminal or in a notebook."""
        return self._bar is not None

    def update(self, count: int = 1) -> None:
        """Add units to those that are done."""
        self.move_to(self.done + count, self._total)

    def move_to(self, done: int, total: int | None) -> None:
        """Set the units that are done and those of the whole work."""
        count, self.done, self._total = done - self.done, done, total
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(count)
        elif self._lines is not None and self._lines.is_due(done, total):
            print_line(labelled(self._label, self._lines.text(done, total, self._unit)))

    def set_text(self, text: str) -> None:
        """Set the text that the next drawing shows behind the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """Remove the bar, except one with a text of its own."""
        if self._bar is not None:
            _drawn.pop(id(self._bar), None)
            self._bar.close()
        self._bar = self._lines = None

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Lines:
    """The lines that stand for a bar in a pipe: when the next one is due, and its text."""

    def __init__(self, done: int):
        self._start = self._last_time = time.monotonic()
        self._first = self._last_done = done

    def is_due(self, done: int, total: int | None) -> bool:
        """Return True if enough time and work have passed since the last line."""
        now = time.monotonic()
        whole = total or self._last_done  # a growing distance if there is no total
        is_early = now - self._last_time < LINE_SECONDS
        if is_early or done - self._last_done < LINE_SHARE * whole or done == total:
            return False
        self._last_time, self._last_done = now, done
        return True

    def text(self, done: int, total: int | None, unit: str) -> str:
        """Return the line: `45%, 121 MB of 269 MB, 0:12 left`."""
        if not total:
            return f"{_amount(done, unit)} done"
        passed = time.monotonic() - self._start
        left = passed * (total - done) / max(1, done - self._first)
        amount = f"{_amount(done, unit)} of {_amount(total, unit)}"
        if unit != BYTES:
            amount = f"{done:,} of {_amount(total, unit)}"
        return f"{done / total:.0%}, {amount}, {duration(left)} left"


def _amount(count: int, unit: str) -> str:
    if unit == BYTES:
        return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
    return f"{count:,} {unit}s"
