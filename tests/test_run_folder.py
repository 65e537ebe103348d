"""The run folder: a run replaces and deletes only its own outputs, listed in outputs.json."""

import json
import shutil
import tomllib

import pytest
from full_disk import files_limited_to
from tiny import make_tiny_model
from training_runs import (
    RECORDS,
    adapter_bytes,
    checkpoint_names,
    new_trainer,
)

from minitune import FastLanguageModel, SFTConfig, SFTTrainer
from minitune.config.training_config import RunConfig
from minitune.training.checkpoint import STATE
from minitune.training.run_folder import (
    CONFIG,
    OUTPUTS,
    check_output,
    clear_run,
    existing_outputs,
)
from minitune.training.write_models import write_models

CHECKPOINTS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def finished(smallest, tmp_path_factory):
    """Return a run of 4 steps with checkpoint-2 and checkpoint-4, which tests copy."""
    output = tmp_path_factory.mktemp("finished")
    new_trainer(smallest, output, **CHECKPOINTS).train()
    return output


def listed(output):
    return json.loads((output / OUTPUTS).read_text())["names"]


def test_run_folder_is_replaced_only_with_overwrite_and_other_files_stay(smallest, run):
    (run / "notes.txt").write_text("mine")
    before = adapter_bytes(run)
    with pytest.raises(ValueError, match=r"already holds a run .*resume=True .*overwrite=True"):
        new_trainer(smallest, run, **CHECKPOINTS, seed=3).train()
    assert adapter_bytes(run) == before
    new_trainer(smallest, run, **CHECKPOINTS, seed=3, overwrite=True).train()
    assert adapter_bytes(run) != before
    assert (run / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("place", ["merged", "adapter", "checkpoint-2"])
def test_run_does_not_replace_the_model_or_the_data_that_it_needs(smallest, tmp_path, place):
    model = make_tiny_model(tmp_path / place / "model")
    data = tmp_path / place / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    if place.startswith("checkpoint"):
        (tmp_path / place / STATE).write_text('{"optimizer_steps": 2}')
    else:
        (tmp_path / OUTPUTS).write_text(json.dumps({"names": [place]}))
    before = sorted(tmp_path.rglob("*"))
    for settings in ({"folder": model}, {"folder": smallest, "records": data}):
        with pytest.raises(ValueError, match=f"is needed, but lies in .*{place}"):
            new_trainer(**settings, output=tmp_path, max_steps=1, overwrite=True).train()
    assert sorted(tmp_path.rglob("*")) == before


def test_output_folder_below_a_file_is_refused_by_name(smallest, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes.txt is a file; choose another"):
        new_trainer(smallest, tmp_path / "notes.txt" / "run", max_steps=1).train()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_config_that_cannot_be_written_is_named_and_leaves_no_half_of_it(smallest, tmp_path):
    trainer = new_trainer(smallest, tmp_path / "run", max_steps=1)
    with (
        files_limited_to(96),
        pytest.raises(ValueError, match=r"config.toml: could not be written"),
    ):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [OUTPUTS]


def test_without_output_dir_runs_are_numbered(smallest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "²").mkdir()  # a digit to str.isdigit, and not to int
    for _ in range(2):
        new_trainer(smallest, None, max_steps=1, save_strategy="steps").train()
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["1", "2", "²"]


def test_config_holds_the_settings_of_the_command_and_those_of_the_model_beside_them(
    smallest, tmp_path
):
    model, tokenizer = FastLanguageModel.from_pretrained(smallest, max_seq_length=64, device="cpu")
    FastLanguageModel.get_peft_model(model, r=2, use_gradient_checkpointing=True, random_state=5)
    given = RunConfig(
        model="org/name", merge=True, gguf=("f16",), use_gradient_checkpointing="auto"
    )
    args = SFTConfig(output_dir=tmp_path / "run", max_steps=1, save_strategy="no")
    SFTTrainer(model, args, RECORDS, None, tokenizer, run_config=given).train()
    assert given == RunConfig(
        model="org/name", merge=True, gguf=("f16",), use_gradient_checkpointing="auto"
    )
    settings = tomllib.loads((tmp_path / "run" / CONFIG).read_text())
    from_command = ("model", "merge", "gguf", "use_gradient_checkpointing")
    assert [settings[name] for name in from_command] == ["org/name", True, ["f16"], "auto"]
    from_model = ("max_seq_length", "max_length", "r", "random_state", "dtype", "load_in_4bit")
    assert [settings[name] for name in from_model] == [64, 64, 2, 5, "float32", True]


# ---- names that look like a checkpoint's


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"overwrite": True}, [2, 4, 6]), ({"resume": True, "save_total_limit": 1}, [6])],
    ids=["overwrite", "save_total_limit"],
)
def test_folders_that_no_run_wrote_survive_overwrite_and_save_total_limit(
    smallest, run, settings, steps
):
    names = ["checkpoint--3", "checkpoint-03", "checkpoint-9", "checkpoint-best-3", "checkpoint-²"]
    for name in names:
        (run / name).mkdir()
        (run / name / "precious.txt").write_text("mine")
    new_trainer(smallest, run, **{**CHECKPOINTS, "max_steps": 6, **settings}).train()
    assert all((run / name / "precious.txt").read_text() == "mine" for name in names)
    assert checkpoint_names(run) == sorted([*names, *(f"checkpoint-{step}" for step in steps)])


def test_run_that_could_replace_a_file_in_a_users_folder_is_refused(smallest, run):
    (run / "checkpoint-3").mkdir()
    (run / "checkpoint-3" / "adapter_config.json").write_text("mine")
    before = sorted(run.rglob("*"))
    for settings in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(ValueError, match=r"checkpoint-3 has the name of a checkpoint, but no"):
            new_trainer(smallest, run, **CHECKPOINTS, **settings).train()
    assert sorted(run.rglob("*")) == before


# ---- outputs.json


def test_outputs_are_listed_as_they_are_written_and_overwrite_deletes_those_alone(smallest, run):
    trainer = new_trainer(smallest, run, **CHECKPOINTS, overwrite=True)
    trainer.train()
    own = ["config.toml", "metrics.jsonl", "run.json", "adapter"]
    assert listed(run) == own
    write_models(trainer.model, trainer.processing_class, run, merge=True, methods=["f16", "q8_0"])
    ggufs = [path.name for path in sorted(run.glob("*.gguf"))]
    assert len(ggufs) == 2
    assert listed(run) == [*own, "merged", *ggufs]
    assert existing_outputs(run) == ["checkpoint-2", "checkpoint-4", *listed(run)]
    for name in ("mine.gguf", ggufs[0].replace("F16", "BF16")):
        (run / name).write_text("mine")
    clear_run(run)
    assert {path.read_text() for path in run.iterdir()} == {"mine"}


def test_resumed_run_keeps_the_names_that_the_run_before_listed(smallest, run):
    (run / "model-F16.gguf").write_text("ours")
    names = [*listed(run), "model-F16.gguf"]
    (run / OUTPUTS).write_text(json.dumps({"names": names}))
    new_trainer(smallest, run, **{**CHECKPOINTS, "max_steps": 5}, resume=True).train()
    assert listed(run) == names


def test_folder_of_an_older_version_without_a_list_is_known_by_the_fixed_names(smallest, run):
    (run / OUTPUTS).unlink()
    (run / "merged").mkdir()
    for name in ("model-F16.gguf", "notes.txt"):
        (run / name).write_text("mine")
    with pytest.raises(ValueError, match="already holds a run"):
        check_output(run, overwrite=False, resume=False)
    new_trainer(smallest, run, **{**CHECKPOINTS, "max_steps": 5}, resume=True).train()
    assert set(listed(run)) == {"adapter", "metrics.jsonl", "config.toml", "run.json"}
    (run / OUTPUTS).unlink()
    clear_run(run)
    assert sorted(path.name for path in run.iterdir()) == ["merged", "model-F16.gguf", "notes.txt"]


def test_folder_with_a_list_holds_no_run_if_nothing_in_the_list_is_there(tmp_path):
    (tmp_path / OUTPUTS).write_text(json.dumps({"names": ["adapter", CONFIG]}))
    (tmp_path / "merged").mkdir()
    check_output(tmp_path, overwrite=False, resume=False)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="merged exists, but no run wrote it"):
            check_output(tmp_path, overwrite=overwrite, resume=False, new_names=["merged"])


@pytest.mark.parametrize(
    "content",
    [
        '{"names": ["../precious"]}',
        '{"names": ["folder/precious"]}',
        '{"names": ["/precious"]}',
        '{"names": [".."]}',
        '{"names": ["."]}',
        '{"names": [""]}',
        '{"names": [3]}',
        '{"names": ["thesis.docx"]}',
        '{"names": ["src"]}',
        '{"names": [".gguf"]}',
        '{"names": "adapter"}',
        "{}",
        "[]",
        "{",
    ],
)
def test_list_of_outputs_that_names_other_folders_or_nothing_is_refused(tmp_path, content):
    output = tmp_path / "run"
    output.mkdir()
    (output / OUTPUTS).write_text(content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"outputs.json: "):
        clear_run(output)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_to_itself_among_a_runs_files_ends_in_no_other_error(smallest, run):
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to("metrics.jsonl")
    with pytest.raises(ValueError, match="already holds a run"):
        check_output(run, overwrite=False, resume=False, protected_paths=[smallest])
    check_output(run, overwrite=True, resume=False, protected_paths=[smallest])


def test_linked_outputs_are_unlinked_and_their_targets_stay(run, tmp_path):
    for name in ("adapter", "checkpoint-2"):
        shutil.move(run / name, tmp_path / name)
        (run / name).symlink_to(tmp_path / name)
    clear_run(run)
    assert list(run.iterdir()) == []
    assert (tmp_path / "adapter").is_dir() and (tmp_path / "checkpoint-2" / STATE).is_file()
