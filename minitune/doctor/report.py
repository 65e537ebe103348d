"""The rows of a report: a check, its result, its figures and its time.

A check is a function that returns a Finding. A check that raises has failed, and its error is the
text of its row. All that a check prints is dropped, because the report alone is for the reader.
"""

import contextlib
import io
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minitune.config.visible_text import on_one_line

PASS, FAIL, SKIPPED = "pass", "fail", "skipped"
NAME_WIDTH, STATUS_WIDTH = 36, 9  # characters
TIME_LIMIT = 120.0  # seconds of a report


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    status: PASS, FAIL or SKIPPED.
    text: the figures or the reason, for the reader.
    values: the figures by name, for a program.
    """

    status: str
    text: str
    values: dict[str, Any] = field(default_factory=dict)


def passed(text: str, **values: Any) -> Finding:
    """Return the finding of a check that passed."""
    return Finding(PASS, text, values)


def failed(text: str, **values: Any) -> Finding:
    """Return the finding of a check that failed."""
    return Finding(FAIL, text, values)


def skipped(reason: str, **values: Any) -> Finding:
    """Return the finding of a check that does not apply."""
    return Finding(SKIPPED, reason, values)


def judged(is_good: bool, text: str, **values: Any) -> Finding:
    """Return a finding that passed if `is_good`."""
    return Finding(PASS if is_good else FAIL, text, values)


def within(error: float, bound: float, unit: str, **values: Any) -> Finding:
    """Return a finding that passed if an error is at most its bound; not-a-number fails.

    unit: the words behind the error, such as "of the largest value".
    """
    text = f"error {error:.1e} {unit}, bound {bound:.1e}"
    error = error if math.isfinite(error) else str(error)  # JSON has no infinity
    is_good = not isinstance(error, str) and error <= bound
    return judged(is_good, text, error=error, bound=bound, **values)


class Row(NamedTuple):
    """A line of a report; seconds is the time of the check."""

    name: str
    finding: Finding
    seconds: float

    def line(self) -> str:
        """Return the row as a line of the table."""
        status = self.finding.status
        shown = status.upper() if status == FAIL else status
        return f"{self.name:<{NAME_WIDTH}}{shown:<{STATUS_WIDTH}}{self.finding.text}".rstrip()

    def to_json(self) -> dict[str, Any]:
        """Return the row as an object of JSON."""
        found = self.finding
        row = {"name": self.name, "status": found.status, "text": found.text}
        return row | {"seconds": round(self.seconds, 2), "figures": found.values}


class Report:
    """The rows of the checks that ran.

    show: called with each row when its check is done.
    limit: seconds after which no further check begins.
    """

    def __init__(self, show: Callable[[Row], None], limit: float = TIME_LIMIT):
        self.rows: list[Row] = []
        self._show, self._limit, self._start = show, limit, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Return the time since the report began."""
        return time.perf_counter() - self._start

    @property
    def has_failed(self) -> bool:
        """Return True if any check failed."""
        return any(row.finding.status == FAIL for row in self.rows)

    def check(self, name: str, check: Callable[[], Finding]) -> Finding:
        """Run a check, add its row, and return its finding."""
        start = time.perf_counter()
        if self.seconds > self._limit:
            finding = skipped(f"not begun, because {self._limit:.0f} s are over")
        else:
            finding = _finding_of(check)
        row = Row(name, finding, time.perf_counter() - start)
        self.rows.append(row)
        self._show(row)
        return finding

    def summary(self) -> str:
        """Return the last line of the table."""
        counts = Counter(row.finding.status for row in self.rows)
        counted = f"{counts[PASS]} passed, {counts[FAIL]} failed, {counts[SKIPPED]} skipped"
        return f"{counted} in {self.seconds:.0f} s"

    def to_json(self) -> dict[str, Any]:
        """Return the report as an object of JSON."""
        return {
            "passed": not self.has_failed,
            "seconds": round(self.seconds, 1),
            "checks": [row.to_json() for row in self.rows],
        }


def _finding_of(check: Callable[[], Finding]) -> Finding:
    """Return the finding of a check. Any error of a check is a failure with the error's text."""
    try:
        with silenced():
            finding = check()
    except Exception as error:  # a report has to go on, whatever breaks on this machine
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        finding = failed(f"{kind}{error}")
    text = on_one_line(" ".join(finding.text.split()))
    return Finding(finding.status, text, finding.values)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Drop all that Python code of the block prints, and its warnings."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield
