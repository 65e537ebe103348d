"""The end of a run: the summary of a finished one, and the lines of an interrupted one."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minitune.device import MemoryUse, gib_text
from minitune.progress import LABEL_WIDTH, duration, labelled
from minitune.training.checkpoint import Progress
from minitune.training.log import LoggedLoss
from minitune.training.own_files import CONFIG, METRICS
from minitune.training.run_control import BestEvaluation

SHOWN_CHECKPOINTS = 3  # names in the summary


# ---- a finished run


@dataclass(frozen=True)
class RunResult:
    """The facts of a finished run that its summary prints.

    progress: its position, with steps, tokens and seconds of interrupted parts.
    tokens_per_second: of this process's steps, or None if it made none.
    last_loss: of the last training record with its steps, or None.
    best: the best evaluation.
    memory: the memory of this process.
    adapter: the folder of the adapter, or None if the run has no folder.
    checkpoints: the checkpoints that are there, oldest first.
    """

    progress: Progress
    tokens_per_second: float | None
    last_loss: LoggedLoss | None
    best: BestEvaluation
    memory: MemoryUse
    adapter: Path | None
    checkpoints: Sequence[Path]


def summary_rows(run: RunResult) -> list[tuple[str, str]]:
    """Return the lines that a finished run ends with, as (label, text)."""
    p = run.progress
    trained = f"{p.step:,} steps, {p.tokens:,} tokens in {duration(p.seconds)}"
    if run.tokens_per_second is not None:
        # the time includes evaluations and sample answers, the speed does not
        trained += f", training at {run.tokens_per_second:,.0f} tokens/s"
    rows = [("trained", trained)]
    if run.last_loss is not None:
        rows.append(("loss", _loss_text(run.last_loss, p.step)))
    if run.best.step is not None:
        rows.append(("best", _best_text(run.best, run.checkpoints)))
    if run.memory.peak:
        rows.append(("memory", _memory_text(run.memory)))
    return rows + _saved_rows(run.adapter, run.checkpoints)


def _saved_rows(adapter: Path | None, checkpoints: Sequence[Path]) -> list[tuple[str, str]]:
    """Return the lines on the files of the run, as (label, text)."""
    if adapter is None:
        return [("saved", "nothing: the adapter is in the model; save_model(FOLDER) writes it")]
    size = sum(path.stat().st_size for path in adapter.iterdir())
    names = [folder.name for folder in checkpoints]
    if len(names) > SHOWN_CHECKPOINTS:
        names = [f"{len(names)} checkpoints up to {names[-1]}"]
    return [
        ("saved", f"{adapter} ({size / 1e6:,.1f} MB)"),
        ("files", f"{', '.join([*names, METRICS, CONFIG])} in {adapter.parent}"),
    ]


def _loss_text(loss: LoggedLoss, step: int) -> str:
    """Return the last logged loss with its steps: `0.7809, the mean of the last 10 steps`.

    step: the last step of the run, which may have no record.
    """
    count = loss.last_step - loss.first_step + 1
    if count == 1:
        return f"{loss.mean:.4f} at step {loss.last_step}"
    if loss.last_step == step:
        return f"{loss.mean:.4f}, the mean of the last {count:,} steps"
    return f"{loss.mean:.4f}, the mean of steps {loss.first_step:,} to {loss.last_step:,}"


def _best_text(best: BestEvaluation, checkpoints: Sequence[Path]) -> str:
    """Return the best evaluation, its step, and the checkpoint that holds its adapter."""
    name = f"checkpoint-{best.step}"
    if any(folder.name == name for folder in checkpoints):
        return f"{best.text(best.value)} at step {best.step}, in {name}"
    return f"{best.text(best.value)} at step {best.step}; no checkpoint holds this step"


def _memory_text(memory: MemoryUse) -> str:
    """Return the peak of the process, on the GPU and on the host."""
    text = f"{gib_text(memory.peak)} at the peak"
    if memory.is_gpu and memory.host_peak:
        text += f" on the GPU, {gib_text(memory.host_peak)} on the host"
    return text


# ---- an interrupted run


def interruption(
    step: int,
    total_steps: int,
    output: Path,
    saved: Path | None,
    config: Path | None,
    program: str = "minitune train",
) -> str:
    """Return the lines that an interrupted run ends with: its last checkpoint and how to resume.

    The commands stand on lines of their own, which never wrap: they can be copied.

    step: optimizer steps done.
    output: the run folder.
    saved: the last checkpoint, or None.
    config: a config.toml that names everything a command needs, or None.
    program: `minitune train`, as the user types it.
    """
    ways = ways_to_continue(output, config, program)
    if step == 0:
        state = "before the first step was done: nothing is trained yet; start again"
    elif saved is None:
        state = f"after step {step} of {total_steps}, no checkpoint was saved; start again"
    else:
        state = f"after step {step} of {total_steps}, last checkpoint {saved}; continue"
    indent = " " * LABEL_WIDTH
    return labelled("interrupted", f"{state} with") + f"\n{indent}" + f"\n{indent}or ".join(ways)


def ways_to_continue(
    output: Path, config: Path | None, program: str = "minitune train"
) -> list[str]:
    """Return the command and the Python settings that continue a run.

    output, config, program: as in `interruption`.
    """
    ways = [f"SFTConfig(output_dir={str(output)!r}, resume=True)"]
    if config is not None:
        command = f"minitune train --config {shlex.quote(str(config))} --resume"
        ways.insert(0, command.replace("minitune train", program, 1))
    return ways


def interruption_without_folder(step: int, total_steps: int) -> str:
    """Return the line that an interrupted run without a folder ends with.

    step: optimizer steps done.
    """
    state = f"after step {step} of {total_steps}; nothing was saved, because the run has no folder"
    remedy = "; save_model(FOLDER) writes the adapter as it is now" if step else ""
    return labelled("interrupted", state + remedy)
