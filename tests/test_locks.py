"""One run a folder, and one writer a file: locks refuse the second one and name the first."""

import errno
import os
import shutil
import signal
import socket

import pytest
from training_runs import new_trainer

from minitune import locks
from minitune.atomic_files import atomic_file, atomic_folder
from minitune.locks import exclusive
from minitune.training.run_folder import LOCK, check_output

TASK = "runs/1: busy"


def in_child(work) -> int:
    """Run `work` in a forked process, and return its exit code; 9 if it raises."""
    process = os.fork()
    if not process:
        code = 9
        try:
            code = work() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def is_refused(path) -> bool:
    """Return True if a lock cannot be taken."""
    try:
        with exclusive(path, TASK, "wait"):
            return False
    except ValueError:
        return True


def test_a_held_lock_is_refused_by_the_process_that_holds_it(tmp_path):
    path = tmp_path / "x.lock"
    with exclusive(path, TASK, "wait") as is_locked:
        assert is_locked and path.read_text() == f"{os.getpid()} {socket.gethostname()}\n"
        with (
            pytest.raises(ValueError, match=r"^runs/1: busy \(this process\); wait$"),
            exclusive(path, TASK, "wait"),
        ):
            pass
        assert path.exists() and in_child(lambda: is_refused(path)) == 1
        path.write_text("12 other-host\n")
        with (
            pytest.raises(ValueError, match="process 12 on 'other-host'"),
            exclusive(path, TASK, "wait"),
        ):
            pass
    assert not path.exists() and not is_refused(path)


def test_a_lock_ends_with_kill_9_and_an_error(tmp_path):
    path = tmp_path / "x.lock"

    def killed():
        with exclusive(path, TASK, "wait"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == -signal.SIGKILL
    assert path.exists() and not is_refused(path)
    with pytest.raises(KeyError), exclusive(path, TASK, "wait"):
        raise KeyError
    assert not path.exists()


def test_a_forked_process_neither_keeps_nor_releases_its_parents_lock(tmp_path):
    path = tmp_path / "x.lock"
    read, write = os.pipe()
    with exclusive(path, TASK, "wait"):
        process = os.fork()
        if not process:
            os.close(write)
            os.read(read, 1)  # until the parent has released the lock
            os._exit(0)
    assert not is_refused(path)
    with exclusive(path, TASK, "wait"):
        os.close(write)
        os.waitpid(process, 0)

        def leaves():
            raise SystemExit

        assert in_child(leaves) == 9 and path.exists() and is_refused(path)
    os.close(read)


def test_a_file_system_without_locks_yields_false(tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    with exclusive(tmp_path / "x.lock", TASK, "wait") as is_locked:
        assert not is_locked
    assert not list(tmp_path.iterdir())


def test_a_second_writer_of_a_file_or_folder_is_refused_and_the_first_one_finishes(tmp_path):
    with atomic_file(tmp_path / "a.gguf") as partial, atomic_folder(tmp_path / "b") as folder:
        partial.write_text("first")
        (folder / "x").write_text("first")
        for writer in (atomic_file(tmp_path / "a.gguf"), atomic_folder(tmp_path / "b")):
            with pytest.raises(ValueError, match=r"another process is writing it \(this"), writer:
                pass
    assert (tmp_path / "a.gguf").read_text() == (tmp_path / "b" / "x").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b"]


# ---- runs


@pytest.mark.parametrize("settings", [{}, {"overwrite": True}, {"resume": True}], ids=str)
def test_a_second_run_in_the_folder_is_refused_and_the_first_one_finishes(
    smallest, tmp_path, settings
):
    first = new_trainer(smallest, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    second = new_trainer(smallest, tmp_path, max_steps=2, **settings)
    accumulate, refused = first.accumulate, []

    def beside(samples):
        for work in (second.train, lambda: check_output(tmp_path, True, False)):
            with pytest.raises(ValueError, match=r"another run trains in this folder \(this pro"):
                work()
            refused.append(True)
        return accumulate(samples)

    first.accumulate = beside
    assert first.train().global_step == 2 and len(refused) == 4
    assert not (tmp_path / LOCK).exists()
    assert second.train().global_step == 2 if settings else True


def test_a_run_whose_folder_is_removed_fails_and_does_not_make_it_again(smallest, tmp_path):
    output = tmp_path / "run"
    for change in (shutil.rmtree, lambda path: path.rename(tmp_path / "moved")):
        trainer = new_trainer(
            smallest, output, max_steps=4, save_strategy="steps", save_steps=1, overwrite=True
        )
        accumulate = trainer.accumulate

        def removing(samples, trainer=trainer, accumulate=accumulate, change=change):
            if trainer.progress.step == 2:
                change(output)
            return accumulate(samples)

        trainer.accumulate = removing
        with pytest.raises(ValueError, match="the folder of this run is no longer there") as error:
            trainer.train()
        assert "if it was moved, move it back, and resume=True continues it" in str(error.value)
        assert "last checkpoint: none" not in str(error.value)
        assert not output.exists()
    assert [path.name for path in (tmp_path / "moved").glob("checkpoint*")] != []
