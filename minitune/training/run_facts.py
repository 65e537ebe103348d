"""The facts of a run that none of its other files holds: run.json, for the report of the run.

    total_steps   optimizer steps of the whole run
    steps_done    optimizer steps that are done, when the file is written: at each checkpoint too
    facts         rows [label, text]: model, adapter, compute, steps, optimizer, versions, begin
    data          an object for each dataset: label, rows, bars of its histogram, notes
    plan          rows [label, text] of the largest micro-step, from the first step on
    end           rows [label, text] of a finished run; empty before
    seconds       time spent on steps_done, with evaluations and sample answers

Nothing that decides about the training is read from this file, so a damaged one stops no run.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from minitune.config.numbers import number, shown, whole
from minitune.data.inspector.dataset_summary import (
    DatasetSummary,
    summarize,
    summarize_lengths,
)
from minitune.data.inspector.summary_text import Row, bad_records, fault_rows, total_rows
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.data.tokenize_dataset import TokenizedDataset
from minitune.device import gib_text
from minitune.memory.planner import Planner
from minitune.model.causal_lm import CausalLM
from minitune.read_files import read_json
from minitune.training.banner import RunSummary, banner_rows
from minitune.training.run_data import RunData
from minitune.training.versions import versions

Rows = list[tuple[str, str]]  # of a label and a text
COUNTS, SECONDS = whole(0, 1 << 62), number(0, 1e12)
# A pass over the tokens of a dataset took 0.1 s for 8.5 million (one CPU core, November 2026).
# More tokens than these are not looked at: only lengths and records are counted then.
MAX_CHECKED_TOKENS = 50_000_000
MAX_NOTES = 50  # of a dataset
MAX_CONTINUED = 10  # rows on the continuations of a run
BEGUN, CONTINUED = "begun", "continued"
# The other rows of a run's summary are in its records too, and would be those of one part only.
END_LABELS = ("best", "saved", "files")


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


@dataclass(frozen=True)
class RunFacts:
    """The content of run.json; its fields are the keys of the file."""

    total_steps: int | None = None
    steps_done: int = 0
    facts: Rows = field(default_factory=list)
    data: list[DataRecord] = field(default_factory=list)
    plan: Rows = field(default_factory=list)
    end: Rows = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        return asdict(self)


# ---- of a run that trains


def facts_at_begin(
    model: CausalLM, tokenizer: Tokenizer, data: RunData, run: RunSummary, before: Rows = ()
) -> RunFacts:
    """Return the facts of a run before its first step.

    before: the times of the run that is continued (`times_in`).
    """
    rows = banner_rows(model, {}, run)
    # a continued run may name the folder of its model by another path
    if model.name and Path(model.name).exists():
        short = Path(model.name).resolve().name
        rows[0] = ("model", rows[0][1].replace(model.name, short, 1))
    rows += [("versions", versions()), *_times(before, run)]
    records = [
        _data_record(label, dataset, tokenizer, data.max_length, run.args.packing)
        for label, dataset in data.by_label.items()
    ]
    return RunFacts(run.size.total_steps, run.done, facts=rows, data=records)


def times_in(path: Path) -> Rows:
    """Return the rows of a run.json that tell when the run was begun and continued."""
    try:
        facts, _ = read_facts(path)
    except ValueError:  # missing or damaged; the report says so
        return []
    return [row for row in facts.facts if row[0] in (BEGUN, CONTINUED)]


def time_text(seconds: float) -> str:
    """Return a time as people read it, such as "2026-11-26 09:30 +0100".

    seconds: since 1970.
    """
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %z")


def _times(before: Rows, run: RunSummary) -> Rows:
    """Return the rows of `times_in`, and one for the present time."""
    now = time_text(time.time())
    if run.source is None:
        return [(BEGUN, now)]
    begun = [row for row in before if row[0] == BEGUN][:1]
    continued = [row for row in before if row[0] == CONTINUED]
    continued.append((CONTINUED, f"{now}, from step {run.done:,}"))
    return begun + continued[-MAX_CONTINUED:]


def _data_record(
    label: str, dataset: TokenizedDataset, tokenizer: Tokenizer, max_length: int, packing: bool
) -> DataRecord:
    """Return the numbers of a dataset, with a note for each of its possible faults.

    packing: True if samples are trained on in packed rows, which are counted then.
    """
    notes = []
    if dataset.samples.lengths.sum() <= MAX_CHECKED_TOKENS:
        summary = summarize(dataset, tokenizer, max_length, count_rows=packing)
    else:
        summary = summarize_lengths(dataset, max_length)
        notes.append(
            f"only lengths and records are counted, because there are over {MAX_CHECKED_TOKENS:,} "
            "tokens; `minitune data show` looks at each token"
        )
    if dataset.is_weighted:
        notes.append("samples are repeated or left out by data_weights")
    notes += _faults(summary)
    if len(notes) > MAX_NOTES:
        hidden = len(notes) - MAX_NOTES + 1
        notes[MAX_NOTES - 1 :] = [f"{hidden} more notes: `minitune data show` lists them"]
    bars = [(bar.first, bar.last, bar.count) for bar in summary.bars]
    totals = [(row.label, _text(row)) for row in total_rows(summary)]
    return DataRecord(label, totals, bars, notes)


def _faults(summary: DatasetSummary) -> list[str]:
    """Return a text for each possible fault that occurs, and the first bad records."""
    rows = [row for row in fault_rows(summary) if row.is_fault]
    return [f"{row.label}: {_text(row)}" for row in rows] + bad_records(summary.report.bad)


def _text(row: Row) -> str:
    """Return the number of a row with its details."""
    return f"{row.number:,} ({row.detail})" if row.detail else f"{row.number:,}"


def plan_rows(planner: Planner, device: torch.device) -> Rows:
    """Return the plan of the largest micro-step so far; on a CPU only the saved activations."""
    plan, rows = planner.largest, []
    if plan is None:
        return rows
    if device.type == "cuda":
        rows += [(name, gib_text(nbytes)) for name, nbytes in plan.memory_rows()]
        if math.isfinite(plan.seconds):
            rows.append(("time", f"{1e3 * plan.seconds:,.0f} ms a forward/backward, as planned"))
    return [*rows, ("layers", str(plan))]


def end_rows(summary: Rows, mean_loss: float) -> Rows:
    """Return the rows of a finished run that its records do not tell.

    summary: from summary_rows.
    mean_loss: over all steps.
    """
    rows = [row for row in summary if row[0] in END_LABELS]
    return [*rows, ("mean loss", f"{mean_loss:.4f}, over all steps")]


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


def _count(value: Any) -> int:
    return _of(value, int)


def _seconds(value: Any) -> float:
    if not SECONDS.hold(value):
        raise ValueError(f"{shown(value)} is no number of seconds")
    return value


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
    "total_steps": _count,
    "steps_done": _count,
    "seconds": _seconds,
    "facts": _rows,
    "data": _data,
    "plan": _rows,
    "end": _rows,
}
