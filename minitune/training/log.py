"""The output of a training run: banner, progress bar, lines for a person, and metrics as JSONL.

Lines for a person go to stderr, the progress bar only if stderr is a terminal. metrics.jsonl gets
one JSON object a logging step or evaluation. Each line is flushed at once, so the file can be
followed during the run, and an interruption costs at most the line that is being written.
"""

import contextlib
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minitune.atomic_files import atomic_write_text, os_errors_as_value_error
from minitune.config.sft_config import SFTConfig
from minitune.config.visible_text import on_one_line
from minitune.data.tokenize_dataset import TokenizedDataset
from minitune.model.activations import SaveLevel
from minitune.model.causal_lm import CausalLM
from minitune.training.checkpoint import RunSize

# Format of a record's values in the line for a person. Other values are in metrics.jsonl only.
METRIC_FORMATS = {
    "epoch": "epoch {:.2f}",
    "loss": "loss {:.4f}",
    "eval_loss": "eval_loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "grad_norm {:.3f}",
    "tokens": "tokens {:,}",
    "tokens_per_second": "tok/s {:,.0f}",
    "seconds": "{:.1f} s",
}
SAVED_ACTIVATIONS = {
    None: "saved as memory allows",
    SaveLevel.INPUT: "recomputed",
    SaveLevel.ALL: "saved",
}
# GPU memory of a trainable parameter: value 4, gradient 4, two moments 8 or 2.03 bytes.
BYTES_PER_PARAMETER = {"adamw_8bit": "10.03"}
DEFAULT_BYTES_PER_PARAMETER = "16"
MAX_NOTES = 5  # lines of notes on a dataset
STDERR = 2  # file descriptor


def metrics_line(record: dict[str, Any], total_steps: int) -> str:
    """Return a record as one line: `step 10/300  epoch 0.08  loss 1.2345 ...`."""
    parts = [text.format(record[name]) for name, text in METRIC_FORMATS.items() if name in record]
    return "  ".join([f"step {record['step']}/{total_steps}", *parts])


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a temporary progress bar. Yields progress(done, total)."""
    with tqdm(desc=label, file=sys.stderr, leave=False, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


class TrainingLog:
    """The destination of a run's output: stderr and metrics.jsonl.

    A context manager, so that the bar and the file are closed however the run ends.
    """

    def __init__(self, path: Path, total_steps: int, done: int = 0):
        """Open metrics.jsonl, dropping records of steps later than `done`.

        path: metrics.jsonl of the run.
        done: optimizer steps done before, by the run that is resumed.

        Raises: ValueError if the file cannot be written; so does `record`.
        """
        self.path, self.total_steps = path, total_steps
        with os_errors_as_value_error(path):
            _drop_records(path, done)
            self._file = path.open("a", encoding="utf-8")
        self._bar = tqdm(
            total=total_steps,
            initial=done,
            unit="step",
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()
        # `record` flushes; closing can only repeat an error that `record` has raised
        with contextlib.suppress(OSError):
            self._file.close()

    def print_line(self, text: str) -> None:
        """Print a line for a person above the progress bar."""
        self._bar.clear()
        print(text, file=sys.stderr, flush=True)
        self._bar.refresh()

    def advance(self) -> None:
        """Move the progress bar forward by one optimizer step."""
        self._bar.update()

    def record(self, record: dict[str, Any]) -> None:
        """Write a record to metrics.jsonl and print it."""
        with os_errors_as_value_error(self.path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        self.print_line(metrics_line(record, self.total_steps))


def _drop_records(path: Path, done: int) -> None:
    """Keep the records of steps up to `done`; drop later ones and lines that are not complete."""
    if not path.exists():
        return
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= done:
                records.append(line + "\n")
    atomic_write_text(path, "".join(records))


# ---- the banner


@dataclass(frozen=True)
class RunSummary:
    """The facts of a run that the banner prints, beside those of model and data.

    size: the length of the run.
    max_length: tokens of the longest sample, or with packing of a row.
    micro_step_tokens: tokens of one forward/backward at most.
    output: the run folder.
    done: optimizer steps done before.
    source: the checkpoint that the run continues from, or None.
    """

    args: SFTConfig
    size: RunSize
    max_length: int
    micro_step_tokens: int
    output: Path
    done: int = 0
    source: Path | None = None


def banner(model: CausalLM, datasets: dict[str, TokenizedDataset], run: RunSummary) -> str:
    """Return lines that describe model, adapter, data and run.

    datasets: each dataset of the run by its label.
    """
    data_rows = [row for label, data in datasets.items() for row in _data_rows(label, data)]
    notes = [("note", note) for note in model.config.notes]
    rows = [*_model_rows(model), *notes, *data_rows, *_run_rows(run)]
    if dropout := model.lora_dropout:  # of an adapter that was loaded
        text = f"the adapter was trained with lora_dropout {dropout}, which is not applied here"
        rows.append(("warning", text))
    return "\n".join(f"{label:<11}{text}" for label, text in rows)


def _model_rows(model: CausalLM) -> list[tuple[str, str]]:
    """Return the lines on the model, its adapter and how it computes, as (label, text)."""
    total = model.num_parameters()
    trainable = sum(p.numel() for _, p in model.trainable_parameters())
    quantized = any(linear.is_quantized for _, linear in model.linears())
    lora = model.lora
    saved = SAVED_ACTIVATIONS.get(model.planner.level, "saved in part")
    if model.device.type != "cuda":
        attention = "reference (PyTorch)"
    elif model.layer_context.attention == "triton":
        attention = "triton"
    else:
        attention = "triton, or cuDNN for long samples of one length"
    return [
        (
            "model",
            f"{model.name}: {total / 1e6:,.1f} M parameters, {storage_bytes(model) / 1e6:,.0f} MB, "
            f"linears {'NF4' if quantized else '16-bit'}",
        ),
        (
            "adapter",
            f"{trainable / 1e6:,.2f} M trainable ({100 * trainable / total:.2f}%), r {lora.r}, "
            f"lora_alpha {lora.lora_alpha:g}, on {' '.join(lora.target_modules)}",
        ),
        (
            "compute",
            f"{model.device}, {str(model.dtype).removeprefix('torch.')}, attention {attention}, "
            f"activations {saved}",
        ),
    ]


def storage_bytes(model: CausalLM) -> int:
    """Return the bytes of the base model's weights as stored; tied weights count once."""
    adapter = {id(p) for _, p in model.trainable_parameters()}
    base = [p for p in model.parameters() if id(p) not in adapter]
    quantized = [linear for _, linear in model.linears() if linear.is_quantized]
    return sum(p.nbytes for p in base) + sum(linear.nf4.nbytes for linear in quantized)


def _data_rows(label: str, data: TokenizedDataset) -> list[tuple[str, str]]:
    """Return the lines on a dataset and the notes on its records, as (label, text)."""
    tokens, targets = data.samples.lengths.sum(), data.samples.targets.sum()
    report = data.report
    text = f"{len(data.samples):,} samples"
    text += f" by data_weights, of {report.records:,} records:" if data.is_weighted else ","
    text += (
        f" {data.skipped:,} skipped (no token to train on), {data.truncated:,} truncated; "
        f"{tokens:,} tokens, {targets:,} trained on"
    )
    if data.is_cached:
        text += "; read from the cache"
    if report.bad.count:
        text += f"; {report.bad.count:,} bad records left out"
    notes = [
        f"{note} ({found.count:,} of {report.records:,} records, first {found.origins[0]})"
        for note, found in report.notes.items()
    ]
    if report.bad.count:
        notes.insert(0, f"left out: {report.bad.origins[0]}")
    if len(notes) > MAX_NOTES:
        hidden = len(notes) - MAX_NOTES + 1
        notes[MAX_NOTES - 1 :] = [f"{hidden} more notes: `minitune data show` lists them"]
    return [(label, text), *(("note", on_one_line(note)) for note in notes)]


def _run_rows(run: RunSummary) -> list[tuple[str, str]]:
    """Return the lines on steps, optimizer and output, as (label, text)."""
    args, size = run.args, run.size
    unit = f"rows of {run.max_length}" if args.packing else "samples"
    parameter_bytes = BYTES_PER_PARAMETER.get(args.optim, DEFAULT_BYTES_PER_PARAMETER)
    output = str(run.output)
    if run.source:
        output += f", continued from {run.source.name} (step {run.done})"
    rows = [
        (
            "steps",
            f"{size.total_steps:,} optimizer steps of {size.units_per_step} {unit}, "
            f"{size.steps_per_epoch:,} an epoch; at most {run.micro_step_tokens:,} tokens "
            "a forward/backward",
        ),
        (
            "optimizer",
            f"AdamW, {args.learning_rate:g}, {args.lr_scheduler_type}; "
            f"{parameter_bytes} bytes a trainable parameter",
        ),
        ("output", output),
    ]
    if run.source and run.done == size.total_steps:
        text = f"{run.source.name} is of the last step: nothing is left to train"
        rows.append(("note", text))
    return rows


# ---- interruption


def interruption(
    step: int, total_steps: int, output: Path, saved: Path | None, config: Path | None
) -> str:
    """Return the line that an interrupted run ends with: its last checkpoint and how to resume.

    step: optimizer steps done.
    output: the run folder.
    saved: the last checkpoint, or None.
    config: a config.toml that names everything a command needs, or None.
    """
    advice = f"SFTConfig(output_dir={str(output)!r}, resume=True)"
    if config is not None:
        advice = f"minitune train --config {shlex.quote(str(config))} --resume, or {advice}"
    if step == 0:
        state = "before the first step was done: nothing is trained yet; start again"
    elif saved is None:
        state = f"after step {step} of {total_steps}, no checkpoint was saved; start again"
    else:
        state = f"after step {step} of {total_steps}, last checkpoint {saved}; continue"
    return f"interrupted {state} with {advice}"


@contextlib.contextmanager
def deferred_sigint() -> Iterator[list[int]]:
    """Turn the first Ctrl-C into an entry of the yielded list; a second one interrupts at once.

    The training loop looks at the list after each optimizer step.
    """
    caught: list[int] = []
    previous = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or previous in (signal.SIG_IGN, None):
        yield caught
        return

    def stop(number: int, frame) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, previous)
        os.write(STDERR, b"\nstopping after this optimizer step; Ctrl-C again stops at once\n")

    signal.signal(signal.SIGINT, stop)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, previous)
