"""The output of a run: the banner's warnings, metrics on a full disk, and Ctrl-C."""

import signal

import pytest
from training_runs import (
    RECORDS,
    adapter_bytes,
    checkpoint_names,
    edit_json,
    new_trainer,
    read_metrics,
    train_with_ctrl_c,
    without_times,
)

from minitune import TrainerCallback
from minitune.training import metrics
from minitune.training.checkpoint import Progress
from minitune.training.log import TrainingLog, metrics_line
from minitune.training.metrics import RunClock
from minitune.training.trainer import Trainer


def interruption(capsys):
    """Return the lines of an interrupted run's end, joined."""
    err = capsys.readouterr().err
    return " ".join(err[err.rindex("interrupted") :].split())


def test_ctrl_c_saves_the_step_and_the_run_can_go_on(smallest, tmp_path, capsys):
    settings = {"max_steps": 6, "logging_steps": 2}
    straight, output = tmp_path / "straight", tmp_path / "run"
    new_trainer(smallest, straight, **settings).train()
    train_with_ctrl_c(new_trainer(smallest, output, **settings), step=2)
    assert (output / "checkpoint-3").is_dir() and not (output / "adapter").exists()
    # No command can continue the run, because its records are in memory.
    assert interruption(capsys) == (
        f"interrupted after step 3 of 6, last checkpoint {output}/checkpoint-3; "
        f"continue with SFTConfig(output_dir={str(output)!r}, resume=True)"
    )
    new_trainer(smallest, output, **settings, resume=True).train()
    assert without_times(read_metrics(output)) == without_times(read_metrics(straight))
    assert adapter_bytes(output) == adapter_bytes(straight)


@pytest.mark.parametrize(
    ("step", "strategy", "words"),
    [
        (
            0,
            "steps",
            "interrupted before the first step was done: nothing is trained yet; start again with ",
        ),
        (3, "no", "interrupted after step 3 of 6, no checkpoint was saved; start again with "),
        (
            3,
            "steps",
            "interrupted after step 3 of 6, last checkpoint {output}/checkpoint-2; continue with ",
        ),
    ],
)
def test_second_ctrl_c_stops_at_once_and_says_what_is_left(
    smallest, tmp_path, capsys, step, strategy, words
):
    output = tmp_path / "a run"
    settings = {"max_steps": 6, "save_strategy": strategy, "save_steps": 2}
    train_with_ctrl_c(new_trainer(smallest, output, **settings), step, times=2)
    advice = f"SFTConfig(output_dir={str(output)!r}, resume=True)"
    assert interruption(capsys) == words.format(output=output) + advice
    expected = ["checkpoint-2"] if "checkpoint-2" in words else []
    assert checkpoint_names(output) == expected


def test_ctrl_c_before_the_first_step_says_that_nothing_is_trained(
    smallest, tmp_path, capsys, monkeypatch
):
    trainer, print_line = new_trainer(smallest, tmp_path, max_steps=2), TrainingLog.print_line

    def pressed(log, text):
        if text.startswith("model"):  # the banner
            signal.raise_signal(signal.SIGINT)
        print_line(log, text)

    monkeypatch.setattr(TrainingLog, "print_line", pressed)
    train_with_ctrl_c(trainer, step=-1)
    last = interruption(capsys)
    assert "nothing is trained yet; start again with" in last and "checkpoint" not in last


def test_metrics_that_cannot_be_written_end_the_run_after_a_checkpoint(
    smallest, tmp_path, monkeypatch
):
    class Full(TrainingLog):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self._file.close()
            self._file = open("/dev/full", "a")  # noqa: SIM115 (TrainingLog closes it)

    output, settings = tmp_path / "run", {"max_steps": 4, "logging_steps": 3}
    monkeypatch.setattr("minitune.training.trainer.TrainingLog", Full)
    with pytest.raises(
        ValueError, match=r"metrics.jsonl: could not be written \(No space left.*run/checkpoint-3"
    ):
        new_trainer(smallest, output, **settings).train()
    monkeypatch.undo()
    assert new_trainer(smallest, output, **settings, resume=True).train().global_step == 4


def test_dropout_that_an_adapter_was_trained_with_is_said_not_to_be_applied(
    smallest, tmp_path, capsys
):
    new_trainer(smallest, tmp_path / "run", max_steps=1).train()
    assert "lora_dropout" not in capsys.readouterr().err
    path = tmp_path / "run" / "adapter" / "adapter_config.json"
    edit_json(path, lora_dropout=0.1)
    trainer = new_trainer(smallest, tmp_path / "more", max_steps=1)
    trainer.model.load_adapter(path.parent)
    trainer.train()
    words = " ".join(capsys.readouterr().err.split())
    assert words.count("lora_dropout 0.1, which is not applied here") == 1


@pytest.mark.parametrize("scale", [1, 1000])
@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_a_metrics_line_fits_80_columns_and_names_the_time_left(monkeypatch, scale, kind):
    monkeypatch.setenv("COLUMNS", "80")
    record = {"step": 12 * scale, "epoch": 0.08 * scale, "tokens": 10**9, "seconds": 1e5}
    if kind == "training":
        record |= {"loss": 12.3456, "learning_rate": 1.98e-5, "grad_norm": 12.34}
        record["tokens_per_second"] = 123.0 * scale
    else:
        record |= {"eval_loss": 12.3456, "eval_seconds": 1234.5}
    line = metrics_line(record, 30 * scale, 45.0 * scale, is_best=kind == "evaluation")
    assert len(line) <= 80 and line.startswith(f"step {12 * scale}/{30 * scale} ")
    assert line.endswith(" 0:45 left" if scale == 1 else " 12:30:00 left")
    assert "loss 12.3456" in line and (" best " in line) == (kind == "evaluation")


def test_the_best_evaluation_is_marked_and_named_at_the_end_of_a_resumed_run_too(
    smallest, tmp_path, monkeypatch, capsys
):
    losses = iter([3.0, 2.0, 2.5, 2.25])
    monkeypatch.setattr(Trainer, "_evaluation", lambda _: {"eval_loss": next(losses)})
    settings = {"max_steps": 4, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2}
    settings |= {"eval_strategy": "steps", "eval_dataset": RECORDS[:2]}
    train_with_ctrl_c(new_trainer(smallest, tmp_path, **settings), step=2)
    new_trainer(smallest, tmp_path, **settings, resume=True).train()
    lines = capsys.readouterr().err.splitlines()
    evaluations = [line for line in lines if line.startswith("step") and "eval_loss" in line]
    assert [line.split("  ")[-1] for line in evaluations[:2]] == ["best", "best"]
    assert not any("best" in line for line in evaluations[2:])
    assert any(
        line.startswith("best ") and line.endswith("eval_loss 2.0000 at step 2, in checkpoint-2")
        for line in lines
    )


class StopAt3(TrainerCallback):
    """Ends the run after step 3."""

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for the end."""
        control.should_training_stop = state.global_step == 3


@pytest.mark.parametrize(
    ("interval", "callbacks", "text"),
    [
        (1, [], "{} at step 5"),
        (5, [], "{}, the mean of the last 5 steps"),
        (2, [StopAt3], "{}, the mean of steps 1 to 2"),
    ],
)
def test_the_summary_names_the_steps_of_its_loss(
    smallest, tmp_path, capsys, interval, callbacks, text
):
    trainer = new_trainer(smallest, tmp_path, max_steps=5, logging_steps=interval)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().err.splitlines()[-5:])
    assert lines["loss"] == text.format(f"{read_metrics(tmp_path)[-1]['loss']:.4f}")


def test_the_steps_of_the_loss_count_on_in_a_resumed_run(smallest, tmp_path, capsys):
    settings = {"max_steps": 4, "logging_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train_with_ctrl_c(new_trainer(smallest, tmp_path, **settings), step=2)
    new_trainer(smallest, tmp_path, **settings, resume=True).train()
    assert ", the mean of the last 2 steps\n" in capsys.readouterr().err


def test_the_summary_names_loss_speed_memory_and_files(smallest, tmp_path, capsys):
    result = new_trainer(smallest, tmp_path, max_steps=3, logging_steps=1).train()
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().err.splitlines()[-5:])
    last = read_metrics(tmp_path)[-1]
    assert lines["trained"].startswith(f"3 steps, {result.metrics['tokens']:,} tokens in 0:0")
    assert ", training at " in lines["trained"] and lines["trained"].endswith(" tokens/s")
    assert lines["loss"] == f"{last['loss']:.4f} at step 3"
    assert last["peak_memory_bytes"] > 2**20 and lines["memory"].endswith(" GiB at the peak")
    assert lines["saved"].startswith(f"{tmp_path}/adapter (0.")
    assert lines["files"] == f"metrics.jsonl, config.toml in {tmp_path}"


def test_the_time_left_and_the_speed_are_those_of_this_process(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    clock = RunClock(seconds=5000.0, tokens=700)
    now[0] += 60  # the first step compiles
    clock.step_done(Progress(step=8, tokens=800))
    assert clock.seconds_left(Progress(step=8, tokens=800), 10) is None
    now[0] += 2
    with clock.paused():
        now[0] += 1  # an evaluation, which comes again
    clock.step_done(Progress(step=9, tokens=900))
    assert clock.seconds_left(Progress(step=9, tokens=900), 12) == 9
    assert clock.mean_tokens_per_second(Progress(step=9, tokens=900)) == 50
    assert clock.seconds() == 5063
