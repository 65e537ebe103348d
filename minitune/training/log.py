"""What a training run says: a banner, a progress bar, one line of metrics a logging step, and the same as JSONL.

Everything for a person goes to stderr, the bar only where that is a terminal; metrics.jsonl gets one JSON object a
line, flushed at once, so that it can be watched, and is whole up to its last line whatever happens to the run.
"""

import contextlib
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from minitune.atomic_files import atomic_write_text, os_errors_as_value_error
from minitune.model.activations import SaveLevel

if TYPE_CHECKING:
    from minitune.data.tokenize_dataset import TokenizedDataset
    from minitune.model.causal_lm import CausalLM
    from minitune.training.trainer import SFTTrainer

# How a record's values look in the line for a person; those not named here are in the JSONL only.
LINE = {
    "epoch": "epoch {:.2f}",
    "loss": "loss {:.4f}",
    "eval_loss": "eval_loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "grad_norm {:.3f}",
    "tokens": "tokens {:,}",
    "tokens_per_second": "tok/s {:,.0f}",
    "seconds": "{:.1f} s",
}


def metrics_line(record: dict[str, Any], total: int) -> str:
    """One record as one line: `step 10/300  epoch 0.08  loss 1.2345 ...`."""
    parts = [text.format(record[name]) for name, text in LINE.items() if name in record]
    return "  ".join([f"step {record['step']}/{total}", *parts])


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that goes away, for something within a run; the yielded function takes (done, total)."""
    with tqdm(desc=label, file=sys.stderr, leave=False, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


class TrainingLog:
    """Where a run's output goes. A context manager, so that bar and file are closed however the run ends."""

    def __init__(self, path: Path, total: int, done: int = 0):
        """Records of steps after `done`, left in the file by the run that is resumed, are dropped.

        Raises ValueError, as `record` does, where the file cannot be written.
        """
        self.path, self.total = path, total
        with os_errors_as_value_error(path):
            _keep_records(path, done)
            self._file = path.open("a", encoding="utf-8")
        self._bar = tqdm(
            total=total, initial=done, unit="step", file=sys.stderr, disable=not sys.stderr.isatty()
        )

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()
        with contextlib.suppress(
            OSError
        ):  # `record` has flushed, or raised what would be raised again here
            self._file.close()

    def say(self, text: str) -> None:
        """A line for a person, above the bar."""
        self._bar.clear()
        print(text, file=sys.stderr, flush=True)
        self._bar.refresh()

    def advance(self) -> None:
        self._bar.update()

    def record(self, record: dict[str, Any]) -> None:
        with os_errors_as_value_error(self.path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        self.say(metrics_line(record, self.total))


def _keep_records(path: Path, done: int) -> None:
    """Cut metrics.jsonl back to the records of steps up to `done`; a line that a crash cut short goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= done:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    atomic_write_text(path, "".join(kept))


def storage_bytes(model: "CausalLM") -> int:
    """Bytes that the base model's weights occupy, quantised ones as they are stored; tied weights count once."""
    adapter = {id(p) for _, p in model.trainable_parameters()}
    dense = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in adapter)
    return dense + sum(linear.nf4.nbytes for _, linear in model.linears() if linear.is_quantized)


def banner(model: "CausalLM", data: "TokenizedDataset", rows: Sequence[tuple[str, str]]) -> str:
    """What is about to be trained, on what, with what; `rows` are the trainer's own lines, (label, text)."""
    total, trainable = (
        model.num_parameters(),
        sum(p.numel() for _, p in model.trainable_parameters()),
    )
    linears = [linear for _, linear in model.linears()]
    kind = "NF4" if any(linear.is_quantized for linear in linears) else "16-bit"
    attention = "reference (PyTorch)"
    if model.device.type == "cuda":
        attention = (
            "triton"
            if model.layer_context.attention == "triton"
            else "triton, or cuDNN for long samples of one length"
        )
    kept = {
        None: "kept as far as they fit",
        SaveLevel.INPUT: "recomputed",
        SaveLevel.ALL: "kept",
    }.get(model.planner.level, "kept in part")
    tokens = sum(len(sample.input_ids) for sample in data.samples)
    trained_on = sum(sample.targets for sample in data.samples)
    lora = model.lora
    lines = [
        ("model", f"{model.name}: {total / 1e6:,.1f} M parameters, {storage_bytes(model) / 1e6:,.0f} MB, "
         f"linears {kind}"),
        ("adapter", f"{trainable / 1e6:,.2f} M trainable ({100 * trainable / total:.2f}%), r {lora.r}, "
         f"lora_alpha {lora.lora_alpha:g}, on {' '.join(lora.target_modules)}"),
        ("compute", f"{model.device}, {str(model.dtype).removeprefix('torch.')}, attention {attention}, "
         f"activations {kept}"),
        ("data", f"{len(data.samples):,} samples, {data.skipped:,} skipped for want of a token to train on, "
         f"{data.truncated:,} truncated; {tokens:,} tokens, {trained_on:,} trained on"),
        *rows,
    ]  # fmt: skip
    return "\n".join(f"{label:<11}{text}" for label, text in lines)


def run_rows(trainer: "SFTTrainer", resumed: Path | None) -> list[tuple[str, str]]:
    """The banner's lines about the run: how many steps, the optimizer, where it goes."""
    t, a = trainer, trainer.args
    unit = f"rows of {t.max_length}" if a.packing else "samples"
    plan = f"{t.total_steps:,} optimizer steps of {t.units_per_step} {unit}, {t.steps_per_epoch:,} an epoch"
    bytes_each = "10.03" if a.optim == "adamw_8bit" else "16"
    optimizer = f"AdamW, {a.learning_rate:g}, {a.lr_scheduler_type}; {bytes_each} bytes a trainable parameter"
    output = f"{t.output}" + (
        f", continued from {resumed.name} (step {t.progress.step})" if resumed else ""
    )
    rows = [
        ("steps", f"{plan}; at most {t.micro_step_tokens:,} tokens a forward/backward"),
        ("optimizer", optimizer),
        ("output", output),
    ]
    if resumed and t.progress.step == t.total_steps:
        rows.append(("note", f"{resumed.name} is the last step's: nothing is left to train"))
    if dropout := t.model.lora_dropout:  # of an adapter that was loaded
        rows.append(
            ("warning", f"the adapter comes with lora_dropout {dropout}, which is not applied here")
        )
    return rows


def interruption(step: int, total: int, saved: Path | None, config: Path | None) -> str:
    """What a run that was interrupted after `step` leaves, and how to go on; by command where `config` has all."""
    advice = "SFTConfig(resume=True)"
    if config is not None:
        advice = f"train.py --config {shlex.quote(str(config))} --resume, or {advice}"
    if step == 0:
        return f"interrupted before the first step was done: nothing is trained yet; start again with {advice}"
    if saved is None:
        return f"interrupted after step {step} of {total}, no checkpoint was saved; start again with {advice}"
    return (
        f"interrupted after step {step} of {total}, last checkpoint {saved}; continue with {advice}"
    )


@contextlib.contextmanager
def deferred_sigint() -> Iterator[list[int]]:
    """Ctrl-C fills the yielded list, for the loop to stop after its step; a second Ctrl-C interrupts at once."""
    caught: list[int] = []
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous in (
        signal.SIG_IGN,
        None,
    ):
        yield caught
        return

    def stop(number: int, frame) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, previous)
        os.write(2, b"\nstopping after this optimizer step; Ctrl-C again stops at once\n")

    signal.signal(signal.SIGINT, stop)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, previous)
