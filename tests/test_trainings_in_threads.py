"""Two trainings in two threads of one process: side by side, or refused by name."""

import io
import math
import os
import signal
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from training_runs import RECORDS, new_trainer

from minitune import TrainerCallback, threads
from minitune.training.one_run import only_run

SETTINGS = {"max_steps": 6, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
GPU_MODEL = SimpleNamespace(device=torch.device("cuda:0"))
SECONDS = 60  # a thread that waits longer has failed


class Meeting(TrainerCallback):
    """A callback that lets every step begin when the other run's step begins too."""

    def __init__(self, count=2):
        self.barrier = threading.Barrier(count, timeout=SECONDS)

    def on_step_begin(self, args, state, control, **kwargs):
        """Wait for the other run."""
        self.barrier.wait()


class Terminal(io.StringIO):
    """A stderr that is a terminal, so that bars are drawn."""

    def isatty(self):
        """Return True."""
        return True


def at_once(*tasks):
    """Run each task in a thread of its own, and return their results or errors."""
    results = [None] * len(tasks)

    def work(index, task):
        try:
            results[index] = task()
        except Exception as error:
            results[index] = error

    started = [threading.Thread(target=work, args=pair) for pair in enumerate(tasks)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(SECONDS)
    return results


def trained(folder, seed, output=None, callbacks=(), **settings):
    """Return the loss of a run and the adapter that it leaves in the model."""
    trainer = new_trainer(folder, output, RECORDS[:3], seed=seed, **{**SETTINGS, **settings})
    for callback in callbacks:
        trainer.add_callback(callback)
    loss = trainer.train().training_loss
    return [torch.tensor(loss), *(p.detach() for _, p in trainer.model.trainable_parameters())]


def test_two_runs_at_once_give_the_bits_of_each_alone(smallest, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    alone = [trained(smallest, seed) for seed in range(2)]
    meeting, terminal = Meeting(), Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    results = at_once(*(lambda seed=i: trained(smallest, seed, None, [meeting]) for i in range(2)))
    for result, expected in zip(results, alone, strict=True):
        assert isinstance(result, list), result
        assert all(map(torch.equal, result, expected))
    assert not torch.equal(*(result[0] for result in results))
    assert terminal.getvalue().count("\nsaved      nothing") == 2
    assert os.listdir() == []


def test_the_model_of_a_run_takes_no_second_run(smallest):
    first, second = (new_trainer(smallest, None, RECORDS[:3], **SETTINGS) for _ in range(2))
    second.model = first.model
    refusals = []

    class Starting(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            refusals.extend(at_once(second.train))

    first.add_callback(Starting)
    assert first.train().global_step == 6
    assert "another run of this process trains this model; wait for its end" in str(refusals[0])
    begun = len(first.state.log_history)
    before = [p.detach().clone() for _, p in first.model.trainable_parameters()]
    assert first.train().global_step == 6  # the model is free again, and trained from step 0
    assert len(first.state.log_history) == begun
    after = [p for _, p in first.model.trainable_parameters()]
    assert not any(map(torch.equal, before, after))


def test_a_run_that_fails_gives_its_model_back(smallest):
    trainer = new_trainer(smallest, None, RECORDS[:3], **SETTINGS)
    with pytest.raises(ValueError, match="resume needs output_dir"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.train().global_step == 6


def test_gpus_take_the_runs_of_one_thread():
    def other_run():
        with only_run(SimpleNamespace(device=torch.device("cuda:1"))):
            return "a run"

    def run_on_the_cpu():
        with only_run(SimpleNamespace(device=torch.device("cpu"))):
            return "a run"

    with only_run(GPU_MODEL):
        refused, allowed = at_once(other_run, run_on_the_cpu)
        assert "another thread of this process trains on a GPU" in str(refused)
        assert (allowed, other_run()) == ("a run", "a run")
    assert at_once(other_run) == ["a run"]


def test_two_runs_have_folders_of_their_own(smallest, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tasks = [lambda: trained(smallest, 1, callbacks=[meeting], save_strategy="steps")] * 2
    meeting = Meeting()
    results = at_once(*tasks)
    assert all(map(torch.equal, *results))
    assert sorted(os.listdir("runs")) == ["1", "2"]
    files = [(tmp_path / "runs" / n / "adapter/adapter_model.safetensors") for n in "12"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_second_run_in_the_folder_of_another_thread_is_refused(smallest, tmp_path):
    refusals = []

    class Starting(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            second = new_trainer(
                smallest, tmp_path / "run", RECORDS[:3], **SETTINGS, overwrite=True
            )
            refusals.extend(at_once(second.train))

    assert len(trained(smallest, 1, tmp_path / "run", [Starting])) > 1
    assert "another run trains in this folder (this process)" in str(refusals[0])


def test_ctrl_c_of_the_main_thread_leaves_a_run_in_another_thread_to_its_callbacks(smallest):
    begun, stopping = threading.Event(), threading.Event()

    class Stopping(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            begun.set()
            stopping.wait(SECONDS)
            control.should_training_stop = True

    trainer = new_trainer(smallest, None, RECORDS[:3], **SETTINGS)
    trainer.add_callback(Stopping)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=trainer.train)
    try:
        thread.start()
        assert begun.wait(SECONDS)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
        stopping.set()
        thread.join(SECONDS)
    assert trainer.state.global_step == 1


# ---- the number of threads that torch computes with


@pytest.fixture
def four_cores(monkeypatch):
    """Make torch take four threads by itself, of which the other program leaves `free`."""
    before = torch.get_num_threads()
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_at_import", 4)
    monkeypatch.setattr(threads, "allowed_cores", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(threads, "cpu_quota", lambda: math.inf)
    torch.set_num_threads(4)
    yield lambda free: monkeypatch.setattr(threads, "free_cores", lambda: free)
    torch.set_num_threads(before)


def test_each_run_chooses_its_threads_and_leaves_those_of_the_others_alone(four_cores):
    both_chose, one_ended = (threading.Barrier(2, timeout=SECONDS) for _ in range(2))
    first_chose = threading.Event()

    def first():
        with threads.kept_threads():
            four_cores(3.0)
            threads.use_free_cores(torch.device("cpu"))
            first_chose.set()
            both_chose.wait()
            chosen = torch.get_num_threads()
        one_ended.wait()
        return [chosen, torch.get_num_threads()]

    def second():
        first_chose.wait(SECONDS)
        with threads.kept_threads():
            four_cores(2.0)
            threads.use_free_cores(torch.device("cpu"))
            both_chose.wait()
            one_ended.wait()
            chosen, text = torch.get_num_threads(), threads.threads_text()
        return [chosen, text, torch.get_num_threads()]

    assert at_once(first, second) == [[3, 4], [2, "2 threads of 4 (no more cores are free)", 4]]
    assert [torch.get_num_threads(), *at_once(torch.get_num_threads)] == [4, 4]


def test_threads_that_begin_during_a_run_get_the_number_of_the_program(four_cores):
    with threads.kept_threads():
        four_cores(1.0)
        threads.use_free_cores(torch.device("cpu"))
        assert [torch.get_num_threads(), *at_once(torch.get_num_threads)] == [1, 4]
    assert [torch.get_num_threads(), *at_once(torch.get_num_threads)] == [4, 4]
