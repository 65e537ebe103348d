"""The number of threads on a CPU: cores that are allowed, within the quota, and free."""

import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_runs import new_trainer

from minitune import cgroups, threads

CPU = torch.device("cpu")
JIFFIES = st.integers(0, 10**9)
GROUP_NAME = st.text("abc-._:9", min_size=1, max_size=8).filter(lambda name: name.strip("."))
PARTS = st.lists(GROUP_NAME, max_size=4)


@pytest.fixture
def cores(monkeypatch):
    """Make torch take four threads by itself, on four allowed cores; returns a setter of free ones.

    The number of threads of this process is given back.
    """
    before = torch.get_num_threads()
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_at_import", 4)
    monkeypatch.setattr(threads._this_thread, "choice", None)
    monkeypatch.setattr(threads, "allowed_cores", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(threads, "cpu_quota", lambda: math.inf)
    torch.set_num_threads(4)
    yield lambda free: monkeypatch.setattr(threads, "free_cores", lambda: free)
    torch.set_num_threads(before)


# ---- the choice


@pytest.mark.parametrize(
    ("free", "quota", "chosen"),
    [(4.0, math.inf, 4), (2.4, math.inf, 2), (0.0, math.inf, 1), (4.0, 1.5, 2), (3.0, 0.2, 1)],
)
def test_threads_are_the_cores_that_are_free_within_the_quota(
    cores, monkeypatch, free, quota, chosen
):
    cores(free)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    with threads.kept_threads():
        threads.use_free_cores(CPU)
        assert torch.get_num_threads() == chosen
        number = "1 thread" if chosen == 1 else f"{chosen} threads"
        reason = "" if chosen == 4 else " of 4 (no more cores are free)"
        assert threads.threads_text() == number + reason
    assert torch.get_num_threads() == 4
    assert threads.threads_text() == "4 threads"


def test_a_users_choice_stays(cores, monkeypatch):
    cores(1.0)
    torch.set_num_threads(3)
    threads.use_free_cores(CPU)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    threads.use_free_cores(CPU)
    assert torch.get_num_threads() == 4


def test_a_choice_is_renewed_and_a_later_choice_of_the_user_stays(cores):
    cores(1.0)
    threads.use_free_cores(CPU)
    cores(3.0)
    threads.use_free_cores(CPU)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(4)
    threads.use_free_cores(CPU)
    assert torch.get_num_threads() == 4


def test_a_gpu_run_leaves_the_threads_alone(cores):
    cores(1.0)
    threads.use_free_cores(torch.device("cuda:0"))
    assert torch.get_num_threads() == 4


def test_a_resumed_run_takes_its_recorded_threads_if_as_many_cores_are_usable(cores, monkeypatch):
    cores(1.0)
    threads.use_free_cores(CPU, recorded=3)
    assert torch.get_num_threads() == 3
    assert threads.threads_text() == "3 threads of 4 (as before)"
    monkeypatch.setattr(threads, "cpu_quota", lambda: 2.0)
    threads.use_free_cores(CPU, recorded=3)
    assert torch.get_num_threads() == 1


def test_a_run_on_busy_cores_resumes_with_its_threads_and_gives_them_back(
    cores, smallest, tmp_path, capsys
):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    cores(2.0)
    new_trainer(smallest, tmp_path / "run", **settings).train()
    assert "cpu, 2 threads of 4" in " ".join(capsys.readouterr().err.split())
    assert torch.get_num_threads() == 4
    cores(1.0)
    trainer = new_trainer(smallest, tmp_path / "run", **settings)
    trainer.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-1")
    error = " ".join(capsys.readouterr().err.split())
    assert "cpu, 2 threads of 4 (as before)" in error
    assert "warning" not in error


# ---- quotas and groups


@given(st.integers(1, 10**9), st.integers(1, 10**7))
def test_a_quota_is_time_divided_by_the_period(quota, period):
    assert threads.parse_quota(f"{quota} {period}\n") == quota / period


@given(st.one_of(st.text(), st.sampled_from(["max 100000", "-1 100000", "0 0", "5", ""])))
def test_other_texts_are_no_quota(text):
    if threads.parse_quota(text) != math.inf:
        quota, period = map(int, text.split())
        assert quota > 0 < period


def test_the_smallest_quota_of_a_group_and_its_parents_holds(tmp_path, monkeypatch):
    inner, outer = tmp_path / "outer" / "inner", tmp_path / "outer"
    inner.mkdir(parents=True)
    monkeypatch.setattr(threads, "cgroup_folders", lambda controller: [inner, outer, tmp_path])
    assert threads.cpu_quota() == math.inf
    (inner / "cpu.max").write_text("max 100000\n")
    (outer / "cpu.max").write_text("250000 100000\n")
    assert threads.cpu_quota() == 2.5
    (inner / "cpu.cfs_quota_us").write_text("50000\n")  # version 1
    (inner / "cpu.cfs_period_us").write_text("100000\n")
    assert threads.cpu_quota() == 0.5


@given(PARTS, PARTS, st.booleans())
def test_groups_are_folders_of_their_controller_or_of_version_2(parts, others, controller_first):
    paths = ["/" + "/".join(names) for names in (parts, others)]
    lines = [f"4:cpu,cpuacct:{paths[0]}", f"0::{paths[1]}"]
    text = "\n".join(lines if controller_first else reversed(lines))
    mounts = {"cpu": cgroups.MOUNT / "cpu", "memory": cgroups.MOUNT}
    for controller, names in (("cpu", parts), ("memory", others)):
        folders = cgroups._folders(text, controller)
        assert folders[0] == mounts[controller].joinpath(*names)
        assert folders[-1] == mounts[controller]
        assert len(folders) == len(names) + 1


# ---- idle cores


def stat_text(times):
    rows = [f"cpu{core} {' '.join(map(str, values))}" for core, values in times.items()]
    return "\n".join(["cpu  1 2 3 4 5 6 7 8 9 10", *rows, "intr 12 0 9", ""])


@given(st.dictionaries(st.integers(0, 63), st.tuples(*[JIFFIES] * 10), min_size=1, max_size=5))
def test_times_of_a_core_are_idle_and_total_without_the_guests_twice(times):
    expected = {core: (values[3] + values[4], sum(values[:8])) for core, values in times.items()}
    assert threads.parse_times(stat_text(times)) == expected


@given(st.lists(st.tuples(JIFFIES, JIFFIES), min_size=1, max_size=8), JIFFIES)
def test_idle_cores_are_the_sum_of_idle_shares(used_and_idle, start):
    before = dict.fromkeys(range(len(used_and_idle)), (start, 2 * start))
    after = {
        core: (start + idle, 2 * start + used + idle)
        for core, (used, idle) in enumerate(used_and_idle)
    }
    shares = [idle / (used + idle) if used + idle else 1.0 for used, idle in used_and_idle]
    free = threads.idle_cores(before, after, set(before))
    assert free == pytest.approx(sum(shares))
    assert 1 <= threads.whole_cores(free) <= len(shares)


def test_without_readings_all_cores_count_as_free():
    assert threads.idle_cores({}, {}, {0, 5, 7}) == 3.0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_free_cores_lie_within_the_affinity():
    assert threads.allowed_cores() == os.sched_getaffinity(0)
    assert 0.0 <= threads.free_cores() <= len(threads.allowed_cores())
