"""The number of threads that torch computes with on a CPU, chosen from the cores that are free.

    threads = min(torch's own number, quota of the control group, free cores), at least 1

torch takes a thread for each core. All threads meet after each operation, and the early ones wait
in a loop that keeps their cores busy. If other programs use the cores, the late threads hold up all
others.

An explicit choice wins: OMP_NUM_THREADS, MKL_NUM_THREADS, or torch.set_num_threads. A call of
torch.set_num_threads with torch's own number looks like no call; the variables are always seen.

Sums of floats depend on the number of threads. A run therefore records its number. A resumed run
takes the recorded number, even if fewer cores are free at that moment.

OpenMP has a number for each thread of Python, so runs in several threads do not disturb each other.
A new thread begins with the number that was set last, by any thread. The numbers that are set here
hold for the calling thread only: that of new threads stays as it was.
"""

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from minitune.cgroups import cgroup_folders

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
STAT = Path("/proc/stat")
TOPOLOGY = Path("/sys/devices/system/cpu")
WINDOWS, WINDOW_SECONDS = 3, 0.1  # of measuring; the kernel counts in steps of 0.01 s

_at_import = torch.get_num_threads()
_setting = threading.Lock()  # held while the number of new threads is wrong


# ---- cores


def allowed_cores() -> set[int]:
    """Return the numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def cpu_quota() -> float:
    """Return the cores' worth of time that the control groups allow; infinite without a limit."""
    quota = float("inf")
    for folder in cgroup_folders("cpu"):
        with contextlib.suppress(OSError):
            quota = min(quota, parse_quota((folder / "cpu.max").read_text(encoding="utf-8")))
        with contextlib.suppress(OSError):
            used, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8")
                for name in ("quota", "period")
            )
            quota = min(quota, parse_quota(f"{used} {period}"))
    return quota


def parse_quota(text: str) -> float:
    """Return the cores of a quota `MICROSECONDS PERIOD`; infinite for "max", -1 and other texts."""
    found = re.fullmatch(r"\s*(\d+)\s+(\d+)\s*", text)
    if found is None or int(found[1]) == 0 or int(found[2]) == 0:
        return float("inf")
    return int(found[1]) / int(found[2])


def usable_cores() -> int:
    """Return the number of cores that the affinity and the quota leave to this process."""
    return whole_cores(min(len(allowed_cores()), cpu_quota()))


def whole_cores(cores: float) -> int:
    """Return cores as a number of threads: rounded to the nearest, at least 1."""
    return max(1, int(cores + 0.5))


def free_cores() -> float:
    """Measure the cores that are idle, in cores' worth of time, while this process sleeps.

    A program that works without a pause is busy in each of the windows of measuring, a short burst
    in some of them. So the window with the most idle time counts.
    """
    cores = allowed_cores()
    free = 0.0
    before = _read_times()
    for _ in range(WINDOWS):
        time.sleep(WINDOW_SECONDS)
        after = _read_times()
        free = max(free, idle_cores(before, after, cores))
        before = after
    return free


def _read_times() -> dict[int, tuple[int, int]]:
    with contextlib.suppress(OSError):
        return parse_times(STAT.read_text(encoding="utf-8"))
    return {}  # not Linux


def parse_times(stat: str) -> dict[int, tuple[int, int]]:
    """Return core -> (idle, total) time since the start of the system, from /proc/stat's text.

    A line is `cpuN user nice system idle iowait irq softirq steal guest guest_nice`. The guests'
    time is part of user and nice.
    """
    times = {}
    for core, numbers in re.findall(r"^cpu(\d+)((?: +\d+)+)", stat, re.MULTILINE):
        values = [int(value) for value in numbers.split()][:8]
        times[int(core)] = (sum(values[3:5]), sum(values))
    return times


def idle_cores(
    before: Mapping[int, tuple[int, int]],
    after: Mapping[int, tuple[int, int]],
    cores: set[int],
) -> float:
    """Return the sum of the cores' idle shares between two readings of `parse_times`.

    A core without a reading, or whose time stands still, counts as idle.
    """
    free = 0.0
    for core in cores:
        idle, total = (
            new - old
            for new, old in zip(after.get(core, (0, 0)), before.get(core, (0, 0)), strict=True)
        )
        free += min(max(idle / total, 0.0), 1.0) if total > 0 else 1.0
    return free


# ---- the choice


class Choice(NamedTuple):
    """A number of threads that this file has set, and the reason if it is below torch's own."""

    threads: int
    reason: str


class _ThisThread(threading.local):
    """The last choice for the calling thread, or None."""

    choice: Choice | None = None


_this_thread = _ThisThread()


def is_users_choice() -> bool:
    """Return True if the user set the number of torch's threads, as far as that can be known."""
    if any(os.environ.get(name) for name in VARIABLES):
        return True
    now, choice = torch.get_num_threads(), _this_thread.choice
    if choice is not None:
        return now != choice.threads
    return now != _at_import or now not in _default_numbers()


def _default_numbers() -> set[int]:
    """Return the numbers that torch takes by itself: the cores, or their hardware threads."""
    cores = allowed_cores()
    siblings = set()
    for core in cores:
        path = TOPOLOGY / f"cpu{core}/topology/thread_siblings_list"
        with contextlib.suppress(OSError):
            siblings.add(path.read_text(encoding="utf-8"))
    return {len(cores), len(siblings), os.cpu_count() or 1}


def use_free_cores(device: torch.device, recorded: int | None = None) -> None:
    """Set the number of torch's threads for work on a CPU, unless the user has set it.

    device: nothing happens on a GPU, whose operations need no threads.
    recorded: the number of the run that is continued, or None. It is taken if as many cores can be
        used.
    """
    if device.type != "cpu" or is_users_choice():
        return
    usable = usable_cores()
    if recorded is not None and recorded <= usable:
        choice = Choice(recorded, "as before")
    else:
        threads = min(_at_import, usable, whole_cores(free_cores()))
        choice = Choice(threads, "no more cores are free")
    set_own_threads(choice.threads)
    _this_thread.choice = choice


def set_own_threads(threads: int) -> None:
    """Set the number of torch's threads for work of the calling thread.

    torch.set_num_threads also sets the number that new threads begin with, which is put back.
    """
    if threads == torch.get_num_threads():
        return
    with _setting:
        of_new_threads = _in_new_thread(torch.get_num_threads)
        torch.set_num_threads(threads)
        _in_new_thread(lambda: torch.set_num_threads(of_new_threads))


def _in_new_thread(work: Callable[[], int | None]) -> int | None:
    """Return the result of `work` in a thread of its own."""
    results: list[int | None] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


@contextlib.contextmanager
def kept_threads() -> Iterator[None]:
    """Give the number of torch's threads back when a block ends, however it ends."""
    threads, choice = torch.get_num_threads(), _this_thread.choice
    try:
        yield
    finally:
        set_own_threads(threads)
        _this_thread.choice = choice


def threads_text() -> str:
    """Return the number of threads for a person, with the reason if it is below torch's own."""
    threads, choice = torch.get_num_threads(), _this_thread.choice
    text = "1 thread" if threads == 1 else f"{threads} threads"
    if choice is not None and threads == choice.threads < _at_import:
        text += f" of {_at_import} ({choice.reason})"
    return text
