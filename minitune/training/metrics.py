"""The metrics of a run: losses of training and evaluation, and tokens a second.

Losses stay on the device until they are logged, so that no step waits for the device.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minitune.data.batching import Batch, collate, micro_steps
from minitune.data.flat_samples import FlatSamples
from minitune.device import MemoryUse, gib_text, memory_use
from minitune.model.causal_lm import CausalLM
from minitune.progress import ProgressBar, duration
from minitune.training.checkpoint import Progress, RunSize
from minitune.training.loss_scale import check_evaluation_loss
from minitune.training.micro_step import MicroStep
from minitune.training.out_of_memory import run_in_graph_pool

EVAL_SAMPLES_PER_PACKING = 256  # samples that are packed into micro-steps together


class PendingLosses:
    """Losses and gradient norms of optimizer steps that are still on the device."""

    def __init__(self):
        self._rows: list[Tensor] = []

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Append the numbers of a step, 0-dim each."""
        self._rows.append(torch.stack([loss, grad_norm]))

    def clear(self) -> None:
        """Forget all numbers."""
        self._rows.clear()

    def move_to_(self, progress: Progress) -> None:
        """Copy the numbers into `progress`, in place, and forget them here.

        Raises: ValueError if a loss or a gradient norm is not finite.
        """
        rows = torch.stack(self._rows).tolist() if self._rows else []
        self._rows.clear()
        for step, (loss, grad_norm) in enumerate(rows, start=progress.step - len(rows) + 1):
            for name, value in (("loss", loss), ("gradient norm", grad_norm)):
                if not math.isfinite(value):
                    raise ValueError(f"{name} became {value} at step {step}")
            progress.unlogged.append(loss)
            progress.loss_sum += loss
            progress.grad_norm = grad_norm


def training_record(
    progress: Progress,
    steps_per_epoch: int,
    learning_rate: float,
    tokens_per_second: float,
    device: torch.device,
) -> dict[str, Any]:
    """Return the metrics since the last record, and start the next one in `progress`, in place."""
    losses, progress.unlogged = progress.unlogged, []
    scale = progress.loss_scale
    return {
        "step": progress.step,
        "epoch": progress.step / steps_per_epoch,
        "loss": sum(losses) / len(losses),
        "learning_rate": learning_rate,
        "grad_norm": progress.grad_norm,
        "tokens": progress.tokens,
        "tokens_per_second": tokens_per_second,
        "seconds": progress.seconds,
        "peak_memory_bytes": memory_use(device).peak,
        **({} if scale is None else {"loss_scale": scale.scale}),
    }


def status_text(
    progress: Progress,
    seconds_left: float | None,
    tokens_per_second: float | None,
    memory: MemoryUse,
) -> str:
    """Return the text behind the bar of a run: time left, loss, speed and memory.

    progress: with at least one loss in `unlogged`, or the loss of the last step is not shown.
    """
    parts = []
    if seconds_left is not None:
        parts.append(f"{duration(seconds_left)} left")
    if progress.unlogged:
        parts.append(f"loss {progress.unlogged[-1]:.3f}")
    if tokens_per_second is not None:
        parts.append(f"{tokens_per_second:,.0f} tok/s")
    if memory.is_gpu:
        parts.append(f"{memory.now / 2**30:.1f} GiB, peak {memory.peak / 2**30:.1f}")
    elif memory.now:
        parts.append(gib_text(memory.now))
    return ", ".join(parts)


def run_metrics(progress: Progress, size: RunSize) -> dict[str, float]:
    """Return the numbers of a whole run, under transformers' names.

    A sample counts as one unit; with packing a row does.
    """
    seconds = max(progress.seconds, 1e-9)  # a run that had nothing to train took no time
    return {
        "train_runtime": progress.seconds,
        "train_samples_per_second": progress.step * size.units_per_step / seconds,
        "train_steps_per_second": progress.step / seconds,
        "train_loss": progress.loss_sum / max(1, progress.step),
        "epoch": progress.step / size.steps_per_epoch,
        "tokens": progress.tokens,
    }


class RunClock:
    """The seconds of a run, including those before an interruption, and the speed of its steps.

    The mean speed and the time left follow from this process's own steps, except its first one,
    which compiles and measures.
    """

    def __init__(self, seconds: float, tokens: int):
        """Start the clock.

        seconds, tokens: of the run so far.
        """
        now = time.perf_counter()
        self._start = now - seconds
        self._interval_start, self._interval_tokens = now, tokens
        self._first: Progress | None = None  # a copy, after this process's first step
        self._first_end, self._paused = now, 0.0

    def step_done(self, progress: Progress) -> None:
        """Note the end of an optimizer step."""
        if self._first is None:
            self._first = replace(progress)
            self._first_end, self._paused = time.perf_counter(), 0.0

    def mean_tokens_per_second(self, progress: Progress) -> float | None:
        """Return the mean speed, or None before the second step."""
        if self._first is None or progress.step == self._first.step:
            return None
        seconds = time.perf_counter() - self._first_end - self._paused
        return (progress.tokens - self._first.tokens) / seconds

    def seconds_left(self, progress: Progress, total_steps: int) -> float | None:
        """Return the time to the last step, with evaluations as often as so far.

        None before the second step.
        """
        if self._first is None or progress.step == self._first.step:
            return None
        a_step = (time.perf_counter() - self._first_end) / (progress.step - self._first.step)
        return a_step * (total_steps - progress.step)

    def seconds(self) -> float:
        """Return the seconds of the run."""
        return time.perf_counter() - self._start

    def tokens_per_second(self, tokens: int) -> float:
        """Return the tokens a second since the last call, and start the next interval.

        tokens: of the whole run.
        """
        now = time.perf_counter()
        rate = (tokens - self._interval_tokens) / (now - self._interval_start)
        self._interval_start, self._interval_tokens = now, tokens
        return rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out of the tokens a second."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._interval_start += seconds
        self._paused += seconds


# ---- evaluation


@torch.no_grad()
def evaluation_loss(
    model: CausalLM,
    samples: FlatSamples,
    micro_step_tokens: int,
    micro_step: MicroStep | None = None,
    show_bar: bool = True,
) -> float:
    """Return the loss over all samples, a mean over their trained-on tokens.

    micro_step_tokens: tokens of one forward pass at most.
    micro_step: of a model that trains; its memory is used.
    show_bar: show a progress bar, on a terminal.

    Raises: NotFinite if the loss is NaN or infinite.
    """
    targets = int(samples.targets.sum())
    loss = torch.zeros((), device=model.device)
    with ProgressBar("evaluating", len(samples), "sample", show_bar) as bar:
        for first in range(0, len(samples), EVAL_SAMPLES_PER_PACKING):
            part = samples[first : first + EVAL_SAMPLES_PER_PACKING]
            for pack in micro_steps(part, micro_step_tokens):
                forward = partial(_share_of_loss, model, collate(pack), targets)
                loss += forward() if micro_step is None else run_in_graph_pool(micro_step, forward)
                bar.update(len(pack))
    value = float(loss)
    check_evaluation_loss(value, model.dtype, model.device)
    return value


def _share_of_loss(model: CausalLM, batch: Batch, targets: int) -> Tensor:
    """Return the sum of a batch's token losses over `targets`."""
    output = model(
        input_ids=batch.input_ids,
        labels=batch.labels,
        position_ids=batch.position_ids,
        num_items_in_batch=targets,
    )
    return output.loss
