"""SIGTERM and SIGHUP save as Ctrl-C does, and a second signal ends at once."""

import os
import signal
import threading
from pathlib import Path

import pytest
from command_inputs import train, train_arguments, write_inputs
from training_runs import adapter_bytes, checkpoint_names, new_trainer

from minitune import SFTTrainer
from minitune.atomic_files import atomic_folder
from minitune.config.cli import run_command
from minitune.gguf.base import model_files
from minitune.stop_signals import Stopped, deferred_stops

CODES = {signal.SIGTERM: 143, signal.SIGHUP: 129}
ALL = (signal.SIGINT, *CODES)


@pytest.fixture(autouse=True)
def handlers():
    """Give every signal its default handler during a test, and check that they are put back."""
    before = {number: signal.getsignal(number) for number in ALL}
    default = dict.fromkeys(CODES, signal.SIG_DFL)
    default[signal.SIGINT] = signal.default_int_handler
    for number, handler in default.items():
        signal.signal(number, handler)
    yield
    after = {number: signal.getsignal(number) for number in ALL}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == default


def interrupt(trainer, number, step=2, times=1):
    """Make a trainer receive a signal while `step` steps are done."""
    accumulate = trainer.accumulate

    def interrupted(samples):
        for _ in range(times if trainer.progress.step == step else 0):
            signal.raise_signal(number)
        return accumulate(samples)

    trainer.accumulate = interrupted
    return trainer


@pytest.mark.parametrize("number", CODES, ids=str)
def test_a_signal_saves_the_step_and_the_run_goes_on_to_the_same_bits(
    smallest, tmp_path, capsys, number
):
    straight, output = tmp_path / "straight", tmp_path / "run"
    new_trainer(smallest, straight, max_steps=5).train()
    with pytest.raises(Stopped) as stopped:
        interrupt(new_trainer(smallest, output, max_steps=5), number).train()
    assert stopped.value.code == CODES[number] and isinstance(stopped.value, SystemExit)
    assert checkpoint_names(output) == ["checkpoint-3"] and not (output / "adapter").exists()
    assert "interrupted after step 3 of 5, last checkpoint" in capsys.readouterr().err
    new_trainer(smallest, output, max_steps=5, resume=True).train()
    assert adapter_bytes(output) == adapter_bytes(straight)


def test_a_second_signal_ends_the_run_at_once(smallest, tmp_path):
    trainer = interrupt(new_trainer(smallest, tmp_path, max_steps=5), signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert checkpoint_names(tmp_path) == []


def test_a_signal_in_the_last_step_ends_the_process_after_the_whole_run(smallest, tmp_path):
    with pytest.raises(Stopped):
        interrupt(new_trainer(smallest, tmp_path, max_steps=3), signal.SIGTERM).train()
    assert adapter_bytes(tmp_path) and checkpoint_names(tmp_path) == ["checkpoint-3"]


@pytest.mark.parametrize("number", ALL, ids=str)
def test_a_handler_of_the_caller_stays_and_is_called(smallest, tmp_path, number):
    called, default = [], signal.getsignal(number)
    signal.signal(number, lambda *_: called.append(number))
    trainer = interrupt(new_trainer(smallest, tmp_path, max_steps=3), number, step=1)
    assert trainer.train().global_step == 3 and called == [number]
    signal.signal(number, default)


def test_an_ignored_signal_stays_ignored(smallest, tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    trainer = interrupt(new_trainer(smallest, tmp_path, max_steps=3), signal.SIGHUP)
    assert trainer.train().global_step == 3
    assert signal.signal(signal.SIGHUP, signal.SIG_DFL) == signal.SIG_IGN


def test_a_run_in_a_thread_installs_no_handler():
    seen = []

    def work():
        with deferred_stops(print) as caught:
            seen.extend([signal.getsignal(signal.SIGTERM), caught])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL, []]


# ---- commands


@pytest.mark.parametrize(("number", "code"), [*CODES.items(), (signal.SIGINT, 130)], ids=str)
def test_the_train_command_ends_with_the_code_of_the_signal(
    tmp_path, monkeypatch, capsys, number, code
):
    inputs, accumulate = write_inputs(tmp_path), SFTTrainer.accumulate

    def interrupted(trainer, samples):
        signal.raise_signal(number)
        return accumulate(trainer, samples)

    monkeypatch.setattr(SFTTrainer, "accumulate", interrupted)
    assert train(train_arguments(inputs, tmp_path / "run", "--r", "2")) == code
    error = capsys.readouterr().err
    assert "last checkpoint" in error and "--resume" in error and "stopped by" not in error


@pytest.mark.parametrize("number", CODES, ids=str)
def test_a_command_that_a_signal_stops_removes_its_partial_files(tmp_path, capsys, number):
    def write():
        with atomic_folder(tmp_path / "merged") as partial:
            (partial / "model.safetensors").write_text("half")
            signal.raise_signal(number)

    assert run_command("minitune export", write) == CODES[number]
    assert capsys.readouterr().err == f"minitune export: stopped by {number.name}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_kills_a_command_that_cleans_up():
    process = os.fork()
    if not process:

        def clean_up():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        run_command("tool", clean_up)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGTERM


def test_the_temporary_folder_of_a_gguf_base_is_removed_after_a_signal(tmp_path, monkeypatch):
    monkeypatch.setattr(model_files.tempfile, "tempdir", str(tmp_path))
    process = os.fork()
    if not process:

        def stopped():
            parent = Path(model_files.tempfile.mkdtemp(prefix="minitune-"))
            model_files.Finalize(
                None, model_files.shutil.rmtree, args=(parent, True), exitpriority=0
            )
            os.kill(os.getpid(), signal.SIGTERM)

        code = run_command("tool", stopped)
        model_files.Finalize.__init__.__globals__["_exit_function"]()
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 143
    assert list(tmp_path.iterdir()) == []
