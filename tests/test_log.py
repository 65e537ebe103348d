"""The output of a run: the banner's warnings, metrics on a full disk, and Ctrl-C."""

import signal

import pytest
from training_runs import (
    adapter_bytes,
    checkpoint_names,
    edit_json,
    new_trainer,
    read_metrics,
    train_with_ctrl_c,
    without_times,
)

from minitune.training.log import TrainingLog


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
