"""A run's record holds everything that its folder tells, and a note on everything that it lacks."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_runs import RECORDS, edit_json, make_smallest_model, new_trainer, read_metrics

from minitune.data.inspector.dataset_summary import summarize
from minitune.memory.plan import Plan
from minitune.memory.planner import Planner
from minitune.model.activations import LayerPlan, SaveLevel
from minitune.report.html_report import html_report
from minitune.report.run_record import read_run
from minitune.training import run_facts
from minitune.training.callbacks import TrainerCallback
from minitune.training.run_facts import RunFacts, read_facts

SETTINGS = {
    "max_steps": 4,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "sample_prompts": ("a lamp", "<b>"),
}


class Ending(TrainerCallback):
    """Ends the run after its second step."""

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for the end."""
        control.should_training_stop = state.global_step == 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a trainer that has trained 4 steps with an evaluation and samples at each second."""
    folder = tmp_path_factory.mktemp("runs")
    model = make_smallest_model(folder / "model")
    trainer = new_trainer(model, folder / "run", RECORDS[:5], **SETTINGS)
    trainer.train()
    return trainer


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


def test_the_facts_are_those_of_the_banner_and_of_the_end(finished):
    facts = dict(read_run(finished.output).facts)
    assert list(facts)[:5] == ["model", "adapter", "compute", "steps", "optimizer"]
    assert "r 4, lora_alpha 8" in facts["adapter"] and "float32" in facts["compute"]
    assert facts["steps"].startswith("4 optimizer steps of 5 samples")
    assert facts["trained"].startswith(f"4 steps, {finished.progress.tokens:,} tokens in ")
    assert facts["saved"].startswith(f"{finished.output}/adapter (")
    losses = [line["loss"] for line in read_metrics(finished.output) if "loss" in line]
    assert facts["whole run"].startswith(f"mean loss {np.mean(losses):.4f}, ")
    assert facts["whole run"].endswith(" samples/s")
    assert "torch" in facts["versions"] and "Python" in facts["versions"]


def test_the_data_is_summarised_with_the_histogram_of_its_lengths(finished):
    data, evaluation = read_run(finished.output).data
    samples, tokenizer = finished.data.train.samples, finished.processing_class
    rows = dict(data.rows)
    assert (data.label, evaluation.label) == ("data", "eval data")
    assert rows["samples"] == "24" and rows["records"] == "24 (messages 24)"
    assert rows["tokens"] == f"{samples.lengths.sum():,}"
    assert rows["trained on"].startswith(f"{samples.targets.sum():,} (")
    bars = summarize(finished.data.train, tokenizer, 128).bars
    assert data.bars == [(bar.first, bar.last, bar.count) for bar in bars]
    assert sum(count for _, _, count in data.bars) == 24
    assert sum(count for _, _, count in evaluation.bars) == 5


def test_faults_of_the_data_are_notes(finished, tmp_path):
    records = [*RECORDS, RECORDS[0], {"no": "shape"}]
    options = {"records": records, "skip_bad": True, "max_length": 50}
    trainer = new_trainer(finished.model.folder, tmp_path, max_steps=1, **options)
    trainer.train()
    notes = read_run(tmp_path).data[0].notes
    assert any(note.startswith("duplicates: 1 (the same tokens as an earlier") for note in notes)
    assert any(note.startswith("truncated: ") for note in notes)
    assert any(note.startswith("dataset[25]: ") for note in notes)


def test_the_tokens_of_very_large_data_are_not_looked_at(finished, monkeypatch):
    monkeypatch.setattr(run_facts, "MAX_CHECKED_TOKENS", 10)
    monkeypatch.setattr(run_facts, "summarize", None)
    summary = finished._summary(None)
    facts = run_facts.facts_at_begin(
        finished.model, finished.processing_class, finished.data, summary
    )
    assert dict(facts.data[0].rows)["samples"] == "24" and "packed rows" not in facts.data[0].rows
    assert facts.data[0].notes[0].startswith("only lengths and records are counted")


def test_weighted_data_says_so(finished):
    data = replace(finished.data, train=replace(finished.data.train, is_weighted=True))
    summary = finished._summary(None)
    facts = run_facts.facts_at_begin(finished.model, finished.processing_class, data, summary)
    assert any("data_weights" in note for note in facts.data[0].notes)


def test_a_plan_shows_the_parts_of_the_memory_on_a_gpu_and_the_layers_everywhere(monkeypatch):
    planner, cuda = Planner(), run_facts.torch.device("cuda")
    assert run_facts.plan_rows(planner, cuda) == []
    layers = (LayerPlan(SaveLevel.ALL),) * 3
    planner.largest = Plan(layers, parts=(("weights", 3 << 30),), host_bytes=1 << 30, seconds=0.25)
    monkeypatch.setattr(run_facts.torch.cuda, "max_memory_allocated", lambda _: 2 << 30)
    assert run_facts.plan_rows(planner, cuda) == [
        ("weights", "3.00 GiB"),
        ("peak", "3.00 GiB"),
        ("host memory", "1.00 GiB"),
        ("peak, measured", "2.00 GiB"),
        ("time", "250 ms a forward/backward, as planned"),
        ("layers", "3 layers save everything"),
    ]
    on_cpu = run_facts.plan_rows(planner, run_facts.torch.device("cpu"))
    assert on_cpu == [("layers", "3 layers save everything")]


def test_a_run_that_a_callback_ends_is_finished_before_its_last_step(finished, tmp_path):
    trainer = new_trainer(finished.model.folder, tmp_path, max_steps=4, logging_strategy="no")
    trainer.add_callback(Ending())
    trainer.train()
    record = read_run(tmp_path)
    assert (record.steps_done, record.total_steps, record.is_finished) == (2, 4, True)
    assert record.training == []


# ---- runs that are going on, or older


def test_a_run_that_was_stopped_shows_its_steps_and_says_that_it_is_not_finished(run):
    edit_json(run / "run.json", end=[], steps_done=1)
    shutil.rmtree(run / "adapter")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:3]) + '\n{"step": 3, "lo')
    record = read_run(run)
    assert (record.steps_done, record.total_steps, record.is_finished) == (4, 4, False)
    trained = dict(record.facts)["trained"]
    assert trained.startswith("4 of 4 steps; ") and trained.endswith("not finished")
    assert record.notes[-1] == "the run is not finished"
    assert "line 4" in record.notes[0] and len(record.training) == 2


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
    assert record.notes == ["metrics.jsonl: not finite: loss at step 5, x at step 6"]
    for line in (*record.training, *record.evaluations):
        assert all(math.isfinite(number) for number in line.values())


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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("total_steps", -1),
        ("total_steps", "4"),
        ("steps_done", 1.5),
        ("facts", [["a"]]),
        ("plan", [["a", 1]]),
        ("data", [{"rows": []}]),
        ("data", [{"label": "a", "bars": [[1, 2]]}]),
        ("data", [{"label": "a", "bars": [[1, 2, -3]]}]),
        ("data", [{"label": "a", "notes": [1]}]),
        ("end", {}),
    ],
)
def test_a_wrong_value_of_run_json_is_named_and_the_others_are_read(tmp_path, key, value):
    values = RunFacts(4, 2, [("a", "b")], [], [("c", "d")], [("e", "f")]).to_json() | {key: value}
    (tmp_path / "run.json").write_text(json.dumps(values))
    facts, notes = read_facts(tmp_path / "run.json")
    assert len(notes) == 1 and notes[0].startswith(f"run.json: {key}: ")
    assert facts.to_json() == values | {key: getattr(RunFacts(), key)}


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


def test_facts_that_cannot_be_written_are_a_warning_and_the_run_goes_on(
    finished, tmp_path, monkeypatch, capsys
):
    def full(path, text):
        if path.name == "run.json":
            raise ValueError(f"{path}: could not be written (No space left on device)")
        path.write_text(text)

    monkeypatch.setattr("minitune.training.run_files.atomic_write_text", full)
    result = new_trainer(finished.model.folder, tmp_path, max_steps=1).train()
    assert result.global_step == 1 and np.isfinite(result.training_loss)
    assert capsys.readouterr().err.replace("\n", " ").count("run.json: could not be written") == 3
    assert read_run(tmp_path).notes == ["no facts, plan and data: there is no run.json"]
