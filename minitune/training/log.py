"""The output of a training run: progress bar, lines for a person, and metrics as JSONL.

Lines for a person go to stderr, and a progress bar if somebody watches (progress.py). metrics.jsonl
gets one JSON object a logging step, an evaluation or a set of sample answers. Each line is flushed
at once, so the file can be followed during the run, and an interruption costs at most the line that
is being written. A run without a folder has no metrics.jsonl.
"""

import contextlib
import json
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from minitune.atomic_files import atomic_write_text, os_errors_as_value_error
from minitune.config.visible_text import on_one_line
from minitune.progress import (
    LABEL_WIDTH,
    Output,
    ProgressBar,
    duration,
    output_kind,
    output_width,
    print_line,
)
from minitune.read_files import file_exists, parse_json
from minitune.training.score_functions import scores_in

# Format of a record's values in the line for a person. Other values are in metrics.jsonl only.
METRIC_FORMATS = {
    "epoch": "epoch {:.2f}",
    "loss": "loss {:.4f}",
    "eval_loss": "eval_loss {:.4f}",
    "learning_rate": "lr {:.1e}",
    "grad_norm": "grad {:.2f}",
    "tokens_per_second": "{:,.0f} tok/s",
    "eval_runtime": "in {:.1f} s",
    "eval_answers_runtime": "answers in {:.1f} s",
}
TEXT_SECONDS = 1.0  # least distance of two texts of the bar: each one waits for the device
ANSWER_LINES = 2  # of a sample answer on the screen


def metrics_line(
    record: dict[str, Any],
    total_steps: int,
    seconds_left: float | None = None,
    is_best: bool = False,
) -> str:
    """Return a record as one line: `step 10/300  epoch 0.08  loss 1.2345 ...  2:05 left`.

    A line that would not fit gets narrower gaps, and then no epoch, which follows from the step. A
    line for the logger has no width to fit.

    seconds_left: until the end of the run.
    is_best: True for the best evaluation so far.
    """
    parts = {"step": f"step {record['step']}/{total_steps}"}
    for name, form in METRIC_FORMATS.items():
        if name in record:
            parts[name] = form.format(record[name])
        if name == "eval_loss":
            scores = scores_in(record).items()
            parts |= {f"eval_{name}": f"{name} {value:.4g}" for name, value in scores}
    if is_best:
        parts["best"] = "best"
    if seconds_left is not None:
        parts["left"] = f"{duration(seconds_left)} left"
    short = [text for name, text in parts.items() if name != "epoch"]
    wide = "  ".join(parts.values())
    if output_kind() == Output.LOG:
        return wide
    lines = (wide, " ".join(parts.values()), " ".join(short))
    return next((line for line in lines if len(line) <= output_width()), lines[-1])


def sample_lines(samples: list[dict[str, str]]) -> str:
    """Return prompts and answers in a few lines each, without characters that act on a terminal."""
    lines = [
        textwrap.fill(
            on_one_line(sample[label]) or "(nothing)",
            max(output_width(), LABEL_WIDTH + 20),
            initial_indent=f"{label:<{LABEL_WIDTH}}",
            subsequent_indent=" " * LABEL_WIDTH,
            max_lines=ANSWER_LINES,
            placeholder=" ...",
        )
        for sample in samples
        for label in ("prompt", "answer")
    ]
    return "\n".join(lines)


class LoggedLoss(NamedTuple):
    """The loss of a training record: the mean over the steps since the record before."""

    mean: float
    first_step: int
    last_step: int


class TrainingLog:
    """The destination of a run's output: stderr and metrics.jsonl.

    A context manager, so that the bar and the file are closed however the run ends. It knows the
    records of the run so far, those before an interruption too:

    last_loss: the loss of the last training record with its steps, or None.
    sampled_steps: the steps that have sample answers.
    """

    def __init__(self, path: Path | None, total_steps: int, done: int = 0, show_bar: bool = True):
        """Open metrics.jsonl, dropping records of steps later than `done`.

        path: metrics.jsonl of the run, or None to write no file.
        done: optimizer steps done before, by the run that is resumed.
        show_bar: show the progress bar, on a terminal.

        Raises: ValueError if the file cannot be written; so does `record`.
        """
        self.path, self.total_steps = path, total_steps
        self.last_loss: LoggedLoss | None = None
        self.sampled_steps: set[int] = set()
        self._file = None
        if path is not None:
            with os_errors_as_value_error(path):
                for record in _drop_records(path, done):
                    self._remember(record)
                self._file = path.open("a", encoding="utf-8")
        self._bar = ProgressBar("training", total_steps, "step", show_bar, done, has_text=True)
        self._last_text = -TEXT_SECONDS

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()
        if self._file is not None:
            # `record` flushes; closing can only repeat an error that `record` has raised
            with contextlib.suppress(OSError):
                self._file.close()

    def print_line(self, text: str) -> None:
        """Print a text for a person above the progress bar."""
        print_line(text)

    def print_last(self, text: str) -> None:
        """Print a text for a person below the progress bar, which stays as it is."""
        self._bar.close()
        print_line(text)

    def advance(self, text: Callable[[], str]) -> None:
        """Move the progress bar forward by one optimizer step.

        text: makes the text behind the bar; called only for a bar that is drawn, once a second at
            most and at the last step.
        """
        now = time.monotonic()
        is_due = now - self._last_text >= TEXT_SECONDS or self._bar.done + 1 == self.total_steps
        if self._bar.is_drawn and is_due:
            self._last_text = now
            self._bar.set_text(text())
        self._bar.update()

    def record(self, record: dict[str, Any], **shown: Any) -> None:
        """Write a record to metrics.jsonl and print it.

        shown: further arguments of `metrics_line`.
        """
        if self._file is not None:
            with os_errors_as_value_error(self.path):
                self._file.write(json.dumps(record, allow_nan=False) + "\n")
                self._file.flush()
        self._remember(record)
        if "samples" in record:
            print_line(sample_lines(record["samples"]))
        else:
            print_line(metrics_line(record, self.total_steps, **shown))

    def _remember(self, record: dict[str, Any]) -> None:
        """Store the values of a record that are needed later."""
        if "samples" in record:
            self.sampled_steps.add(record["step"])
        if "loss" in record:
            before = 0 if self.last_loss is None else self.last_loss.last_step
            self.last_loss = LoggedLoss(record["loss"], before + 1, record["step"])


def _drop_records(path: Path, done: int) -> list[dict[str, Any]]:
    """Keep and return the records of steps up to `done`.

    Later ones are dropped, and lines that are not complete.
    """
    if not file_exists(path):
        return []
    records, lines = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = parse_json(line)
            if record["step"] <= done:
                records.append(record)
                lines.append(line + "\n")
    atomic_write_text(path, "".join(lines))
    return records
