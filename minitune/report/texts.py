"""Texts of one or two runs: cut to a limit, named, and paired label by label."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from minitune.report.run_record import RunRecord


def cut(text: str, limit: int) -> str:
    """Return a text of at most `limit` characters and a word about the rest."""
    hidden = len(text) - limit
    return f"{text[:limit]} … {hidden:,} more characters" if hidden > 0 else text


def run_style(i: int) -> str:
    """Return the class of a run's colour and stroke.

    i: 0 for the first run, 1 for the second one.
    """
    return f"run-{i + 1}"


def short_names(runs: Sequence[RunRecord]) -> list[str]:
    """Return the names of runs for legends: the last folder of each path, if these differ."""
    names = [PurePath(run.name).name or run.name for run in runs]
    return names if len(set(names)) == len(names) else [run.name for run in runs]


@dataclass(frozen=True)
class PairedRow:
    """A label with the text of each run; None if a run has no such label."""

    label: str
    texts: Sequence[str | None]

    @property
    def differs(self) -> bool:
        """Return True if the runs have different texts."""
        return len(set(self.texts)) > 1


def paired(columns: Sequence[Sequence[tuple[str, str]]]) -> list[PairedRow]:
    """Return the rows of all runs by their label, in the order of the first run.

    The n-th row of a label, such as a note, belongs to the n-th one of the other run.

    columns: the (label, text) rows of each run.
    """
    found: dict[tuple[str, int], list[str | None]] = {}
    for i, rows in enumerate(columns):
        seen: dict[str, int] = {}
        for label, text in rows:
            seen[label] = seen.get(label, 0) + 1
            texts = found.setdefault((label, seen[label]), [None] * len(columns))
            texts[i] = text
    return [PairedRow(label, texts) for (label, _), texts in found.items()]
