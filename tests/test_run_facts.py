"""run.json holds the facts of a run: those of its banner, its data, its plan and its end."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from reported_runs import train_reported_run
from training_runs import RECORDS, edit_json, new_trainer, read_metrics

from minitune.data.inspector.dataset_summary import summarize
from minitune.memory.plan import Plan
from minitune.memory.planner import Planner
from minitune.model.activations import LayerPlan, SaveLevel
from minitune.report.run_record import read_run
from minitune.training import run_facts
from minitune.training.run_facts import RunFacts, read_facts


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a trainer that has trained."""
    return train_reported_run(tmp_path_factory.mktemp("runs"))


def test_the_facts_are_those_of_the_banner_and_of_the_end(finished):
    facts = dict(read_run(finished.output).facts)
    assert list(facts)[:5] == ["model", "adapter", "compute", "steps", "optimizer"]
    assert "r 4, lora_alpha 8" in facts["adapter"] and "float32" in facts["compute"]
    assert facts["steps"].startswith("4 optimizer steps of 5 samples")
    assert facts["saved"].startswith(f"{finished.output}/adapter (")
    losses = [line["loss"] for line in read_metrics(finished.output) if "loss" in line]
    assert facts["mean loss"] == f"{np.mean(losses):.4f}, over all steps"
    assert facts["begun"].startswith("20") and "continued" not in facts
    assert not {"trained", "loss", "memory"} & set(facts)  # the cards show these
    assert facts["model"].startswith("model: ")
    assert read_run(finished.output).seconds == finished.progress.seconds
    assert "torch" in facts["versions"] and "Python" in facts["versions"]


def test_the_data_is_summarised_with_the_histogram_of_its_lengths(finished):
    data, evaluation = read_run(finished.output).data
    samples, tokenizer = finished.data.train.samples, finished.processing_class
    rows = dict(data.rows)
    assert (data.label, evaluation.label) == ("data", "eval data")
    assert rows["samples"] == "24" and rows["records"] == "24 (messages 24)"
    assert "packed rows" not in rows
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


def test_a_model_has_one_name_whatever_path_leads_to_it(finished, monkeypatch):
    folder, summary = finished.model.folder, finished._summary(None)
    monkeypatch.chdir(folder.parent)
    (folder.parent / "other").mkdir(exist_ok=True)
    names = {"model": "model", str(folder): "model", "other/../model": "model"}
    for name, shown in (names | {"org/model": "org/model", "": ""}).items():
        monkeypatch.setattr(finished.model, "name", name)
        tokenizer = finished.processing_class
        facts = run_facts.facts_at_begin(finished.model, tokenizer, finished.data, summary)
        assert dict(facts.facts)["model"].startswith(f"{shown}: ")


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
    assert run_facts.plan_rows(planner, cuda) == [
        ("weights", "3.00 GiB"),
        ("peak", "3.00 GiB"),
        ("host memory", "1.00 GiB"),
        ("time", "250 ms a forward/backward, as planned"),
        ("layers", "3 layers save everything"),
    ]
    on_cpu = run_facts.plan_rows(planner, run_facts.torch.device("cpu"))
    assert on_cpu == [("layers", "3 layers save everything")]


def test_a_resumed_run_keeps_its_begin_and_names_each_continuation(finished, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    new_trainer(finished.model.folder, tmp_path, max_steps=1, **options).train()
    facts = read_facts(tmp_path / "run.json")[0].facts
    early = [(k, "2001-01-01" if k == "begun" else text) for k, text in facts]
    edit_json(tmp_path / "run.json", facts=early)
    for steps in (2, 3):
        longer = new_trainer(finished.model.folder, tmp_path, max_steps=steps, **options)
        longer.train(resume_from_checkpoint=True)
    rows = [row for row in read_run(tmp_path).facts if row[0] in ("begun", "continued")]
    assert rows[0] == ("begun", "2001-01-01") and len(rows) == 3
    assert [text.split(", ")[1] for _, text in rows[1:]] == ["from step 1", "from step 2"]
    (tmp_path / "run.json").write_text("{")
    longer = new_trainer(finished.model.folder, tmp_path, max_steps=4, **options)
    longer.train(resume_from_checkpoint=True)
    assert "begun" not in dict(read_run(tmp_path).facts)


def test_only_the_last_continuations_are_kept():
    before = [("begun", "a"), *(("continued", str(i)) for i in range(30))]
    run = SimpleNamespace(source="checkpoint-7", done=7)
    rows = run_facts._times(before, run)
    assert rows[0] == ("begun", "a") and rows[1] == ("continued", "21") and len(rows) == 11


def test_packed_rows_are_counted_if_the_run_packs(finished, tmp_path):
    new_trainer(finished.model.folder, tmp_path, max_steps=1, packing=True).train()
    assert "packed rows" in dict(read_run(tmp_path).data[0].rows)


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
        ("seconds", -1),
        ("seconds", "1"),
    ],
)
def test_a_wrong_value_of_run_json_is_named_and_the_others_are_read(tmp_path, key, value):
    values = RunFacts(4, 2, [("a", "b")], [], [("c", "d")], [("e", "f")]).to_json() | {key: value}
    (tmp_path / "run.json").write_text(json.dumps(values))
    facts, notes = read_facts(tmp_path / "run.json")
    assert len(notes) == 1 and notes[0].startswith(f"run.json: {key}: ")
    assert facts.to_json() == values | {key: getattr(RunFacts(), key)}


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
