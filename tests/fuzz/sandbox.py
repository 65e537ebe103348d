"""Run mutants in forked processes, each under a limit of time, of memory and of places to write.

A process is forked after the imports and runs mutants one after the other, because a fork of torch
costs 30 ms. A mutant that ends, hangs or fills the process is reported, and the next mutants run in
a new process. The process reports one JSON line a mutant through a pipe.

    outcome   "success", "refused" (a ValueError), or a fault
    text      the error, or a description of the fault
"""

import json
import os
import resource
import selectors
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from fuzz.observer import Observer

MAX_SECONDS = 20  # on a core
MAX_WALL_SECONDS = 60  # of a mutant that waits; other programs may hold the cores
MAX_BYTES = 2 << 30
MAX_FILE_BYTES = 1 << 29
FRESH_BYTES = 200 << 20  # a process whose peak grew by more is left to no other mutant
PER_PROCESS = 100  # mutants


class Result(NamedTuple):
    """The outcome of one mutant.

    names: True if the error of a refused mutant names its file.
    cpu_seconds: time on a core, with the time that making the mutant took.
    grown: bytes by which the peak of the process grew.
    """

    reader: str
    seed: int
    outcome: str
    text: str = ""
    names: bool = True
    cpu_seconds: float = 0.0
    grown: int = 0

    @property
    def is_fault(self) -> bool:
        """Return True if the outcome is neither success nor a ValueError."""
        return self.outcome not in ("success", "refused")


def run_mutants(
    reader: str,
    seeds: Iterable[int],
    run: Callable[[int, Path, Observer], tuple[str, str, bool]],
    scratch: Path,
) -> Iterator[Result]:
    """Yield the result of each seed.

    run: takes seed, an empty folder and the observer of the process; returns (outcome, text,
        names) and never raises.
    scratch: folder for the folders of the mutants.
    """
    waiting = list(seeds)
    while waiting:
        batch = waiting[:PER_PROCESS]
        finished = 0
        for result in _run_batch(reader, batch, run, scratch):
            finished += 1
            yield result
        waiting = waiting[finished:]


def _run_batch(reader: str, seeds: list[int], run: Callable, scratch: Path) -> Iterator[Result]:
    """Yield results until the seeds are done or the process has ended."""
    scratch.mkdir(parents=True, exist_ok=True)
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        _work(reader, seeds, run, scratch, writing)
    os.close(writing)
    position, ended = 0, None
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        for line in _lines(pipe, process):
            if line is None:
                os.kill(process, signal.SIGKILL)
                ended = f"over {MAX_SECONDS} s"
                break
            yield Result(*json.loads(line))
            position += 1
    _, status, _ = os.wait4(process, 0)
    shutil.rmtree(scratch, ignore_errors=True)
    if ended is None and status:
        ended = _end_of(status)
    if ended is not None and position < len(seeds):
        seconds = float(MAX_SECONDS) if ended.startswith("over") else 0.0
        yield Result(reader, seeds[position], ended, ended, cpu_seconds=seconds)


def _end_of(status: int) -> str:
    """Return the end of a process in words."""
    if os.WIFSIGNALED(status):
        return f"signal {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exit code {os.WEXITSTATUS(status)}"


def _lines(pipe, process: int) -> Iterator[bytes | None]:
    """Yield the lines of a pipe, and None if none comes within the limits of time."""
    buffer = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            start, used = time.monotonic(), _cpu_seconds(process)
            while not selector.select(1):
                waited, worked = time.monotonic() - start, _cpu_seconds(process) - used
                if waited > MAX_WALL_SECONDS or worked > MAX_SECONDS:
                    yield None
                    return
            part = os.read(pipe.fileno(), 1 << 16)
            if not part:
                return
            *lines, buffer = (buffer + part).split(b"\n")
            yield from lines


def _cpu_seconds(process: int) -> float:
    """Return the time that a process has had on a core."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _work(reader: str, seeds: list[int], run: Callable, scratch: Path, pipe: int) -> None:
    """Run mutants in the forked process, and end the process."""
    try:
        _limit()
        observer = Observer(scratch)
        for seed in seeds:
            start, peak = time.process_time(), _peak()
            folder = scratch / str(seed)
            folder.mkdir()
            outcome, text, names = run(seed, folder, observer)
            os.chdir(scratch)
            shutil.rmtree(folder, ignore_errors=True)
            grown = _peak() - peak
            line = [reader, seed, outcome, text[:2000], names, time.process_time() - start, grown]
            os.write(pipe, json.dumps(line).encode() + b"\n")
            if outcome not in ("success", "refused") or grown > FRESH_BYTES:
                break
    except BaseException as error:
        os.write(observer.real_stderr, f"the fuzzer itself failed: {error!r}\n".encode())
        os._exit(99)
    os._exit(0)


def _limit() -> None:
    """Set the limits of memory and of file sizes, from the present size on."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def _peak() -> int:
    """Return the peak of the resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
