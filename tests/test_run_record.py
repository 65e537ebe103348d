"""A run's record holds everything that its folder tells, and a note on everything that it lacks."""

import json
import math
import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reported_runs import train_reported_run
from training_runs import edit_json, new_trainer, read_metrics

from minitune.report.html_report import html_report
from minitune.report.run_record import read_run
from minitune.training import run_facts
from minitune.training.callbacks import TrainerCallback


class Ending(TrainerCallback):
    """Ends the run after its second step."""

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for the end."""
        control.should_training_stop = state.global_step == 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a trainer that has trained."""
    return train_reported_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(finished, tmp_path):
    """Return a copy of the folder of the finished run."""
    return shutil.copytree(finished.output, tmp_path / "run")


def add_lines(run, *lines: str) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


# ---- whole runs


def test_a_finished_run_is_read_whole(finished):
    record, lines = read_run(finished.output), read_metrics(finished.output)
    assert record.name == str(finished.output) and record.notes == []
    assert (record.steps_done, record.total_steps, record.is_finished) == (4, 4, True)
    assert record.training == [line for line in lines if "loss" in line]
    assert record.evaluations == [line for line in lines if "eval_loss" in line]
    assert record.samples == [line for line in lines if "samples" in line]
    assert [len(record.training), len(record.evaluations), len(record.samples)] == [4, 2, 3]
    assert record.settings["max_steps"] == 4 and record.settings["learning_rate"] == 1e-2


def test_a_run_that_a_callback_ends_is_finished_before_its_last_step(finished, tmp_path):
    trainer = new_trainer(finished.model.folder, tmp_path, max_steps=4, logging_strategy="no")
    trainer.add_callback(Ending())
    trainer.train()
    record = read_run(tmp_path)
    assert (record.steps_done, record.total_steps, record.is_finished) == (2, 4, True)
    assert record.training == []


# ---- runs that are going on, or older


def test_a_run_that_was_stopped_shows_its_steps_and_says_that_it_is_not_finished(run):
    edit_json(run / "run.json", end=[], steps_done=1, seconds=0)
    shutil.rmtree(run / "adapter")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:3]) + '\n{"step": 3, "lo')
    os.utime(run / "metrics.jsonl", (1e9, 1e9))
    record = read_run(run)
    assert (record.steps_done, record.total_steps, record.is_finished) == (2, 4, False)
    assert len(record.training) == 2 and record.seconds == record.training[-1]["seconds"]
    written = f"the last line was written {run_facts.time_text(1e9)}"
    continues = f"if it was stopped, SFTConfig(output_dir='{run}', resume=True) continues it"
    assert record.notes == [f"the run came to step 2 of 4; {written}; {continues}"]
    config = run / "config.toml"
    config.write_text(config.read_text().replace("\ndata = []", '\ndata = ["a.jsonl"]'))
    command = f"minitune train --config {run}/config.toml --resume continues it"
    assert read_run(run).notes[0].endswith(command)
    for folder in run.glob("checkpoint-*"):
        shutil.rmtree(folder)
    assert read_run(run).notes == [f"the run came to step 2 of 4; {written}"]


def test_a_checkpoint_of_an_earlier_part_that_went_further_does_not_count(finished, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    new_trainer(finished.model.folder, tmp_path, max_steps=4, **options).train()
    seen = []

    class Reading(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(read_run(tmp_path).steps_done)

    again = new_trainer(finished.model.folder, tmp_path, max_steps=5, **options)
    again.add_callback(Reading())
    again.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert seen == [3, 3, 4]  # the record of a step follows its end


def test_a_saved_step_is_done_without_a_record_of_it(finished, tmp_path):
    class Stopping(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            raise RuntimeError("killed")

    options = {"save_strategy": "steps", "save_steps": 2, "logging_strategy": "no"}
    trainer = new_trainer(finished.model.folder, tmp_path, max_steps=4, **options)
    trainer.add_callback(Stopping())
    with pytest.raises(RuntimeError, match="killed"):
        trainer.train()
    record = read_run(tmp_path)
    assert record.steps_done == 2 and record.seconds > 0


def test_a_resumed_run_takes_back_that_the_run_was_finished(finished, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    new_trainer(finished.model.folder, tmp_path, max_steps=1, **options).train()
    assert read_run(tmp_path).is_finished
    longer = new_trainer(finished.model.folder, tmp_path, max_steps=3, resume=True, **options)

    class Reading(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(read_run(tmp_path))

    seen = []
    longer.add_callback(Reading())
    longer.train()
    assert [record.is_finished for record in seen] == [False, False]
    assert seen[0].total_steps == 3 and seen[0].plan
    assert read_run(tmp_path).is_finished


@pytest.mark.parametrize("max_steps", [-1, 4])
def test_a_run_of_an_older_version_is_read_without_facts(run, max_steps):
    (run / "run.json").unlink()
    config = (run / "config.toml").read_text()
    config = config.replace("max_steps = 4", f"max_steps = {max_steps}")
    config = config.replace("num_train_epochs = 3.0", "num_train_epochs = 2")
    (run / "config.toml").write_text(config)
    record = read_run(run)
    assert record.notes == ["no facts, plan and data: there is no run.json"]
    assert record.facts == record.plan == record.data == []
    # 24 samples in steps of 5: 5 steps an epoch
    assert (record.steps_done, record.is_finished) == (4, True)
    assert record.total_steps == (4 if max_steps == 4 else 10)


# ---- damaged runs


def test_broken_lines_are_left_out_and_named(run):
    lines = ["{", "[]", '{"step": -1}', '{"step": 3}', '{"step": 3, "samples": [{"prompt": 1}]}']
    whole, first = read_run(run), len(read_metrics(run)) + 1
    add_lines(run, *lines, "", '{"step": 9, "loss": 0.5}', '{"step": 8, "loss": 0.6}')
    record = read_run(run)
    assert record.notes == [
        f"metrics.jsonl: left out: line {first}, line {first + 1}, line {first + 2} and 2 more"
    ]
    assert record.evaluations == whole.evaluations and record.samples == whole.samples
    assert [line["step"] for line in record.training] == [1, 2, 3, 4, 8, 9]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1" + 400 * "0", '"high"', "true", "null"])
def test_values_that_are_no_finite_numbers_are_left_out_and_named(run, value):
    add_lines(run, f'{{"step": 5, "loss": {value}}}', f'{{"step": 6, "loss": 1, "x": {value}}}')
    record = read_run(run)
    assert record.training[-1] == {"step": 6, "loss": 1}
    assert record.gaps == {"loss": [5], "x": [6]}
    assert record.notes == ["metrics.jsonl: no finite numbers: loss at step 5, x at step 6"]
    for line in (*record.training, *record.evaluations):
        assert all(math.isfinite(number) for number in line.values())


def test_a_last_line_without_an_end_is_a_fault_of_a_finished_run_only(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    (note,) = read_run(run).notes
    assert note.startswith("metrics.jsonl: left out: line ")
    edit_json(run / "run.json", end=[])
    assert all("left out" not in note for note in read_run(run).notes)
    add_lines(run, "")  # now the broken line has an end
    assert any("left out" in note for note in read_run(run).notes)


def test_metrics_that_are_too_long_are_read_from_their_begin(run, monkeypatch):
    size = (run / "metrics.jsonl").stat().st_size
    monkeypatch.setattr("minitune.report.run_record.MAX_BYTES", size // 2)
    record = read_run(run)
    assert record.notes[0].startswith("no further metrics: metrics.jsonl: is read up to line ")
    assert 0 < len(record.training) < 4


NUMBERS = st.sampled_from([0, 1, -1, 1e300, -1e300, 5e-324, 10**200, 2**31 - 1]) | st.floats()
NAMES = ("epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds")
LINES = st.dictionaries(
    st.sampled_from([*NAMES, "eval_loss", "peak_memory_bytes", "loss_scale"]), NUMBERS
)


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(st.tuples(st.integers(0, 2**31 - 1), LINES), max_size=8))
def test_any_numbers_of_any_steps_are_read_and_become_a_page(tmp_path_factory, lines):
    folder = tmp_path_factory.getbasetemp() / "any numbers"
    folder.mkdir(exist_ok=True)
    records = [json.dumps({**values, "step": step}) for step, values in lines]
    (folder / "metrics.jsonl").write_text("\n".join(records))
    (folder / "config.toml").write_text("num_train_epochs = 1e300")
    record = read_run(folder)
    assert record.steps_done >= 0 and not record.is_finished
    assert html_report([record]).startswith("<!doctype html>")


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.toml", "run.json"])
@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"{", b"[1", b'{"facts": 1}'])
def test_a_file_that_is_missing_or_damaged_leaves_the_others(run, name, content):
    path = run / name
    path.unlink() if content is None else path.write_bytes(content)
    record = read_run(run)
    assert record.steps_done == 4
    assert bool(record.training) == (name != "metrics.jsonl")
    assert bool(record.settings) == (name != "config.toml")
    assert bool(record.plan) == (name != "run.json")
    if (name, content) not in [("metrics.jsonl", b""), ("config.toml", b"")]:
        assert len(record.notes) >= 1 and any(name in note for note in record.notes)


def test_a_folder_that_is_named_by_dots_has_its_own_name(run, monkeypatch):
    monkeypatch.chdir(run)
    assert read_run(".").name == str(run)
    monkeypatch.chdir(run / "adapter")
    assert read_run("..").name == str(run) and read_run("../../run").name == "../../run"


def test_a_folder_without_a_run_is_refused_by_name(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for folder, words in [
        ("empty", "holds no run: there is no metrics.jsonl; name the folder of a run"),
        ("file", "a file; name the folder of a run"),
        ("absent", "not found; name the folder of a run"),
        ("run/adapter", f"holds no run.*name the folder of the run, {run}"),
        ("run/checkpoint-2", f"holds no run.*name the folder of the run, {run}"),
    ]:
        with pytest.raises(ValueError, match=f"{folder}: {words}"):
            read_run(tmp_path / folder)
