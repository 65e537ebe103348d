"""The record of a run, as far as its folder tells it: the input of the report.

    metrics.jsonl   losses, evaluations and sample answers, one object a line
    config.toml     the settings
    run.json        facts of the banner, plan, data and end (training/run_facts.py)
    checkpoint-N/   the steps that are done, if the run was stopped between two lines

A run may be unfinished, older or damaged: everything that can be read is read, and a note says what
is missing. Every number of a record is finite, and every text is a text.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitune.checkpoints.find_model import ADAPTER, checkpoint_step
from minitune.config.numbers import number, whole
from minitune.data.sources.text_files import numbered_lines
from minitune.read_files import file_exists, parse_json, read_toml, require_regular_file
from minitune.training.own_files import CONFIG, FACTS, METRICS, OUTPUTS, checkpoints
from minitune.training.run_end import ways_to_continue
from minitune.training.run_facts import DataRecord, RunFacts, read_facts, time_text

MAX_BYTES = 256 << 20  # of metrics.jsonl; a run with 100,000 lines has 25 MB
MAX_LISTED = 3  # places of broken lines in a note
STEPS, VALUES = whole(), number(-1e300, 1e300)
SHARES = number(1e-12, 1e12)  # of the data, in epochs


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it.

    name: the folder as the user named it, or its whole path if that is "." or "..".
    steps_done, total_steps: optimizer steps; total_steps is None if no file tells it.
    is_finished: True if the run has come to its end, also to one that a callback asked for.
    seconds: time of the run so far, with evaluations and sample answers, or None.
    training: records with "step" and "loss", and mostly "learning_rate", "grad_norm", "tokens",
        "tokens_per_second", "seconds", "peak_memory_bytes", "epoch". All values are numbers.
    evaluations: records with "step" and "eval_loss". All values are numbers.
    samples: {"step", "samples": [{"prompt", "answer"}]} of each step that has answers.
    settings: the content of config.toml.
    facts: (label, text) on model, adapter, compute, steps, optimizer, versions and the end.
    plan: (label, text) on the largest micro-step.
    data: the datasets.
    notes: texts on everything that is missing or broken.
    gaps: metric -> steps whose records hold no finite number for the metric.
    """

    name: str
    steps_done: int
    total_steps: int | None
    is_finished: bool
    seconds: float | None = None
    training: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    facts: list[tuple[str, str]] = field(default_factory=list)
    plan: list[tuple[str, str]] = field(default_factory=list)
    data: list[DataRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    gaps: dict[str, list[int]] = field(default_factory=dict)


def read_run(folder: str | Path) -> RunRecord:
    """Return the record of the run in a folder.

    Raises: ValueError if the folder is missing or holds no run.
    """
    folder = Path(folder)
    _require_run(folder)
    notes: list[str] = []
    settings = _read_settings(folder / CONFIG, notes)
    facts = _read_facts(folder / FACTS, notes)
    # an older version writes no end, but its adapter, which a stopped run has not
    is_finished = bool(facts.end) or (not facts.facts and (folder / ADAPTER).is_dir())
    metrics = _Metrics(folder / METRICS, is_finished, notes)
    # beside run.json, later checkpoints may be those of an earlier part that went further
    saved = [] if facts.facts else map(checkpoint_step, checkpoints(folder))
    steps_done = max([facts.steps_done, *metrics.steps, *saved])
    total_steps = facts.total_steps or _total_steps(settings, metrics.training)
    if not is_finished:
        notes.insert(0, _state(folder, settings, steps_done, total_steps))
    last = metrics.training[-1] if metrics.training else {}
    return RunRecord(
        name=str(folder if folder.name.strip(".") else folder.resolve()),
        steps_done=steps_done,
        total_steps=total_steps,
        is_finished=is_finished,
        seconds=max(facts.seconds, last.get("seconds", 0)) or None,
        training=metrics.training,
        evaluations=metrics.evaluations,
        samples=metrics.samples,
        settings=settings,
        facts=[*facts.facts, *facts.end],
        plan=facts.plan,
        data=facts.data,
        notes=notes,
        gaps=metrics.gaps,
    )


def _require_run(folder: Path) -> None:
    """Raise ValueError unless a folder holds a file of a run."""
    try:
        if not folder.is_dir():
            text = "a file" if folder.exists() else "not found"
            raise ValueError(f"{folder}: {text}; name the folder of a run, such as runs/1")
        if any((folder / name).exists() for name in (METRICS, OUTPUTS, FACTS)):
            return
        if checkpoints(folder):
            return
    except OSError as error:
        raise ValueError(f"{folder}: could not be read ({error.strerror or error})") from None
    hint = "name the folder of a run, such as runs/1"
    if folder.name == ADAPTER or checkpoint_step(folder) is not None:
        hint = f"name the folder of the run, {folder.parent}"
    raise ValueError(f"{folder}: holds no run: there is no {METRICS}; {hint}")


def _read_settings(path: Path, notes: list[str]) -> dict[str, Any]:
    """Return the content of config.toml; {}, with a note, if there is none."""
    try:
        return read_toml(path)
    except ValueError as error:
        notes.append(f"no settings: {_without_folder(error, path)}")
        return {}


def _read_facts(path: Path, notes: list[str]) -> RunFacts:
    """Return the content of run.json; nothing, with a note, if there is none."""
    try:
        if not file_exists(path):
            notes.append(f"no facts, plan and data: there is no {path.name}")
            return RunFacts()
        facts, broken = read_facts(path)
    except ValueError as error:
        notes.append(f"no facts, plan and data: {_without_folder(error, path)}")
        return RunFacts()
    notes += broken
    return facts


def _without_folder(error: ValueError, path: Path) -> str:
    """Return an error about a file of the run, which needs no folder in front of its name."""
    return str(error).replace(str(path), path.name)


def _total_steps(settings: dict[str, Any], training: Sequence[dict[str, float]]) -> int | None:
    """Return the steps of a run from its settings and the epoch of its last record, or None."""
    steps, epochs = settings.get("max_steps"), settings.get("num_train_epochs")
    if STEPS.hold(steps) and steps > 0:
        return steps
    last = training[-1] if training else {}
    epoch = last.get("epoch", 0)
    if not (VALUES.hold(epochs) and SHARES.hold(epoch)):
        return None
    steps = epochs * round(last["step"] / epoch)
    return math.ceil(steps) if 0 < steps <= STEPS.maximum else None


def _state(folder: Path, settings: dict[str, Any], steps_done: int, total_steps: int | None) -> str:
    """Return how far an unfinished run came, the time of its last line, and how to continue it."""
    steps = f"step {steps_done:,}" + (f" of {total_steps:,}" if total_steps else "")
    text = f"the run came to {steps}" if steps_done else "no step of the run is recorded"
    with contextlib.suppress(OSError):
        written = time_text((folder / METRICS).stat().st_mtime)
        text += f"; the last line was written {written}"
    if checkpoints(folder):
        config = folder / CONFIG if settings.get("data") else None
        text += f"; if it was stopped, {ways_to_continue(folder, config)[0]} continues it"
    return text


# ---- metrics


class _Metrics:
    """The records of a metrics.jsonl by their kind.

    training, evaluations, samples, gaps: as in RunRecord.
    steps: the steps of all records.
    """

    def __init__(self, path: Path, is_finished: bool, notes: list[str]):
        """Read the file, and note the lines that are broken and the values that are not finite."""
        self.training: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []
        self.samples: list[dict[str, Any]] = []
        self._broken: list[str] = []
        self.gaps: dict[str, list[int]] = {}
        self._no_numbers: list[str] = []
        try:
            for line, record in _records(path, is_finished):
                self._add(line, record)
        except ValueError as error:
            notes.append(f"no further metrics: {_without_folder(error, path)}")
        for kind in (self.training, self.evaluations, self.samples):
            kind.sort(key=lambda record: record["step"])
        if self._broken:
            notes.append(f"{path.name}: left out: {_listed(self._broken)}")
        if self._no_numbers:
            notes.append(f"{path.name}: no finite numbers: {_listed(self._no_numbers)}")

    @property
    def steps(self) -> Iterator[int]:
        """Yield the steps of all records."""
        for kind in (self.training, self.evaluations, self.samples):
            yield from (record["step"] for record in kind)

    def _add(self, line: int, record: Any) -> None:
        """Append a record to those of its kind, or note that it is broken."""
        step = record.get("step") if isinstance(record, dict) else None
        if not STEPS.hold(step):
            self._broken.append(f"line {line}")
        elif "samples" in record:
            answers = record["samples"]
            if _are_answers(answers):
                self.samples.append({"step": step, "samples": answers})
            else:
                self._broken.append(f"line {line}")
        else:
            numbers = {name: value for name, value in record.items() if VALUES.hold(value)}
            wrong = [name for name in record if name not in numbers]
            self._no_numbers += [f"{name} at step {step}" for name in wrong]
            for name in wrong:
                self.gaps.setdefault(name, []).append(step)
            if "loss" in numbers:
                self.training.append(numbers)
            elif "eval_loss" in numbers:
                self.evaluations.append(numbers)
            elif not wrong:
                self._broken.append(f"line {line}")


def _records(path: Path, is_finished: bool) -> Iterator[tuple[int, Any]]:
    """Yield (line number, record); the record is None if the line is not JSON.

    is_finished: False if the last line may be half written; such a line is left out.

    Raises: ValueError if the file is missing, no file, or too long.
    """
    require_regular_file(path)
    size = 0
    for line, text in numbered_lines(path):
        size += len(text) if isinstance(text, str) else 0
        if size > MAX_BYTES:
            raise ValueError(f"{path}: is read up to line {line - 1:,}, {MAX_BYTES >> 20} MiB")
        if isinstance(text, str) and not text.strip():
            continue
        try:
            yield line, None if isinstance(text, ValueError) else parse_json(text)
        except ValueError:
            if is_finished or text.endswith("\n"):
                yield line, None


def _are_answers(value: Any) -> bool:
    """Return True if a value is a list of prompts with their answers."""
    return isinstance(value, list) and all(
        isinstance(item, dict)
        and all(isinstance(item.get(key), str) for key in ("prompt", "answer"))
        for item in value
    )


def _listed(places: Sequence[str]) -> str:
    """Return the first places in words, and the number of the others."""
    more = len(places) - MAX_LISTED
    return ", ".join(places[:MAX_LISTED]) + (f" and {more:,} more" if more > 0 else "")
