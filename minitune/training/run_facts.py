"""The facts of a run that none of its other files holds: run.json, for the report of the run.

    total_steps   optimizer steps of the whole run
    facts         rows [label, text]: model, adapter, compute, steps, optimizer, versions
    data          an object for each dataset: label, rows, bars of its histogram, notes
    plan          rows [label, text] of the largest micro-step, from the first step on
    end           rows [label, text] of a finished run; empty before

Nothing that decides about the training is read from this file, so a damaged one stops no run.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from minitune.config.numbers import shown, whole
from minitune.read_files import read_json

Rows = list[tuple[str, str]]  # of a label and a text
COUNTS = whole(0, 1 << 62)


@dataclass(frozen=True)
class DataRecord:
    """The numbers of a dataset.

    label: "data" or "eval data".
    rows: (label, text) of its sizes.
    bars: (first, last, count): the number of samples whose length in tokens is in [first, last].
    notes: texts on its records.
    """

    label: str
    rows: Rows = field(default_factory=list)
    bars: list[tuple[int, int, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class RunFacts:
    """The content of run.json; its fields are the keys of the file."""

    total_steps: int | None = None
    facts: Rows = field(default_factory=list)
    data: list[DataRecord] = field(default_factory=list)
    plan: Rows = field(default_factory=list)
    end: Rows = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        return asdict(self)


# ---- reading


def read_facts(path: Path) -> tuple[RunFacts, list[str]]:
    """Return the facts in a run.json, and a note for each key whose value is of another form.

    Raises: ValueError if the file is missing or not JSON.
    """
    values, notes = read_json(path), []
    known = {}
    for item in fields(RunFacts):
        if item.name in values:
            try:
                known[item.name] = READERS[item.name](values[item.name])
            except ValueError as error:
                notes.append(f"{path.name}: {item.name}: {error}")
    return RunFacts(**known), notes


def _total_steps(value: Any) -> int | None:
    return None if value is None else _of(value, int)


def _rows(value: Any) -> Rows:
    """Return rows of two texts.

    Raises: ValueError if the value has another form.
    """
    rows = [_of(row, list) for row in _of(value, list)]
    if any(len(row) != 2 for row in rows):
        raise ValueError("a row has not two texts")
    return [(_of(label, str), _of(text, str)) for label, text in rows]


def _bars(value: Any) -> list[tuple[int, int, int]]:
    bars = [_of(bar, list) for bar in _of(value, list)]
    if any(len(bar) != 3 for bar in bars):
        raise ValueError("a bar has not three numbers")
    return [tuple(_of(number, int) for number in bar) for bar in bars]


def _data(value: Any) -> list[DataRecord]:
    return [
        DataRecord(
            label=_of(item.get("label"), str),
            rows=_rows(item.get("rows", [])),
            bars=_bars(item.get("bars", [])),
            notes=[_of(note, str) for note in _of(item.get("notes", []), list)],
        )
        for item in (_of(item, dict) for item in _of(value, list))
    ]


def _of(value: Any, kind: type) -> Any:
    """Return a value of a kind; a whole number is a count.

    Raises: ValueError if it is of another kind.
    """
    if not (COUNTS.hold(value) if kind is int else isinstance(value, kind)):
        raise ValueError(f"{shown(value)} is no {kind.__name__}")
    return value


READERS: dict[str, Callable[[Any], Any]] = {
    "total_steps": _total_steps,
    "facts": _rows,
    "data": _data,
    "plan": _rows,
    "end": _rows,
}
