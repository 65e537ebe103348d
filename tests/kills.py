"""Runs that are killed with kill -9 at random points, resumed, and compared with a whole run.

    python tests/kills.py 200     one line for each point that fails, and the figures

A run trains, saves checkpoints, and exports a merged folder and GGUF files, in a process that is
forked after the imports. It counts its events: audit events of files (open, rename, mkdir, remove)
and optimizer steps. A point is an event and a delay of up to 3 ms after it, both drawn from a seed.
The parent kills the process there, so kills within a write occur too.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from training_runs import make_smallest_model, new_trainer, read_metrics, without_times

from minitune.training.write_models import write_models

SETTINGS = {
    "max_steps": 6,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "resume": True,
}
METHODS = ("f16", "q8_0")
FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.ftruncate"}
MAX_DELAY = 0.003  # seconds
# kill -9 loses no page of a file, so the kind of disk changes only the time.
MEMORY_DISK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
EXPORTS = ("adapter", "merged", "*.gguf")


def run(model: Path, output: Path, step: Callable[[], None] = lambda: None) -> None:
    """Train, or resume, and export.

    step: called before each optimizer step.
    """
    trainer = new_trainer(model, output, **SETTINGS)
    accumulate = trainer.accumulate

    def counted(samples):
        step()
        return accumulate(samples)

    trainer.accumulate = counted
    trainer.train()
    write_models(trainer.model, trainer.processing_class, output, merge=True, methods=METHODS)


def in_child(work: Callable[[], None], log: Path) -> int:
    """Fork, run `work`, and return the id of the process; it ends with 0, or 1 after an error."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        sys.stdout, sys.stderr = (open(stream, "w") for stream in (1, 2))  # noqa: SIM115
        work()
        code = 0
    except Exception as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def exit_code(process: int) -> int:
    """Wait for a process, and return its exit code; -9 after kill -9."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


class Events:
    """The events of a process; a byte goes to a pipe at the event `last`."""

    def __init__(self, output: Path, pipe: int, last: int | None):
        self.count, self._prefix, self._pipe, self._last = 0, str(output), pipe, last
        sys.addaudithook(self._hook)

    def _hook(self, name: str, arguments: tuple) -> None:
        if name in FILE_EVENTS and any(self._prefix in str(value) for value in arguments[:2]):
            self.step()

    def step(self) -> None:
        """Count an event."""
        self.count += 1
        if self.count == self._last:
            os.write(self._pipe, b"x")


@dataclass
class Whole:
    """A run that was not killed, and the number of its events."""

    model: Path
    output: Path
    events: int

    @classmethod
    def run(cls, folder: Path) -> "Whole":
        """Run once in a forked process."""
        model, output = make_smallest_model(folder / "model"), folder / "whole"
        read, write = os.pipe()

        def work():
            events = Events(output, write, None)
            run(model, output, events.step)
            os.write(write, str(events.count).encode())

        process = in_child(work, folder / "log")
        assert exit_code(process) == 0, (folder / "log").read_text()
        events = int(os.read(read, 16))
        os.close(read)
        os.close(write)
        return cls(model, output, events)


@dataclass
class Figures:
    """The outcomes of the kills.

    killed: kills before the process had ended by itself.
    phases: the newest output that was there when the process was killed -> kills.
    wrong: texts on points at which a file differs.
    """

    killed: int = 0
    phases: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def kill_and_resume(whole: Whole, folder: Path, seed: int, figures: Figures) -> None:
    """Kill a run at the point of a seed, check its exports, resume it, and compare all files."""
    chosen = random.Random(seed)
    event, delay = chosen.randint(1, whole.events), chosen.uniform(0, MAX_DELAY)
    output, log = folder / "run", folder / "log"
    read, write = os.pipe()

    def work():
        events = Events(output, write, event)
        run(whole.model, output, events.step)

    process = in_child(work, log)
    os.close(write)
    os.read(read, 1)
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    os.close(read)
    figures.killed += exit_code(process) == -signal.SIGKILL
    figures.phases[_phase(output)] += 1
    point = f"seed {seed} (event {event} of {whole.events}, {delay * 1e3:.2f} ms)"
    figures.wrong += [f"{point}: {text} after the kill" for text in _half_exports(whole, output)]
    code = exit_code(in_child(lambda: run(whole.model, output), log))
    if code:
        figures.wrong.append(f"{point}: not resumed: {log.read_text().splitlines()[-1]}")
        return
    figures.wrong += [f"{point}: {text} after resuming" for text in _differences(whole, output)]


def _phase(output: Path) -> str:
    """Return the newest kind of output in a run folder."""
    for name, pattern in (("gguf", "*.gguf"), ("merged", "merged"), ("adapter", "adapter")):
        if list(output.glob(pattern)):
            return f"after {name}"
    return "training" if list(output.glob("checkpoint-*")) else "before a checkpoint"


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of all files below a folder, or of a file."""
    if folder.is_file():
        return {"": folder.read_bytes()}
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _half_exports(whole: Whole, output: Path) -> list[str]:
    """Return the exports that are there and differ from those of the whole run."""
    found = [path.name for pattern in EXPORTS for path in output.glob(pattern)]
    return [
        f"{name} is not whole"
        for name in found
        if files_of(output / name) != files_of(whole.output / name)
    ]


def _differences(whole: Whole, output: Path) -> list[str]:
    """Return the names and files in which two run folders differ, except times and paths."""
    names, expected = (
        sorted(path.name for path in folder.iterdir()) for folder in (output, whole.output)
    )
    if names != expected:
        return [f"the folder holds {names}, expected {expected}"]
    wrong = _half_exports(whole, output)
    for name in ("checkpoint-5", "checkpoint-6"):
        for file in ("adapter_model.safetensors", "optimizer.safetensors"):
            if (output / name / file).read_bytes() != (whole.output / name / file).read_bytes():
                wrong.append(f"{name}/{file} differs")
    if without_times(read_metrics(output)) != without_times(read_metrics(whole.output)):
        wrong.append("metrics.jsonl differs")
    return wrong


def run_kills(count: int) -> Figures:
    """Kill and resume `count` runs, of the seeds from 0 on."""
    figures = Figures()
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as name:
        folder = Path(name)
        whole = Whole.run(folder)
        for seed in range(count):
            point = folder / str(seed)
            point.mkdir()
            kill_and_resume(whole, point, seed, figures)
            shutil.rmtree(point)
    return figures


def main(count: int) -> int:
    """Print the figures of `count` kills, and return the exit code."""
    start = time.monotonic()
    figures = run_kills(count)
    for text in figures.wrong:
        print(text)
    phases = ", ".join(f"{count} {name}" for name, count in figures.phases.most_common())
    print(
        f"{count} kills, {figures.killed} of a living process ({phases}); "
        f"{len(figures.wrong)} wrong; {time.monotonic() - start:.0f} s"
    )
    return bool(figures.wrong)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
