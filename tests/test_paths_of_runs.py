"""A run is repeated and continued from every working directory."""

import json
import os
import shutil
import tomllib
from pathlib import Path

import pytest
from command_inputs import train, train_arguments, write_inputs

from minitune.config.cli import parse, read_settings, toml_text, with_absolute_paths
from minitune.data import token_cache
from minitune.training.checkpoint import STATE


@pytest.fixture
def inputs(tmp_path):
    """Return a folder with a tiny model and datasets, and a folder beside it to stand in."""
    (tmp_path / "elsewhere").mkdir()
    return write_inputs(tmp_path)


def relative_run(inputs: Path, monkeypatch, *more: str) -> Path:
    """Train two steps from the inputs' folder with relative paths, and return the run folder."""
    monkeypatch.chdir(inputs)
    arguments = train_arguments(Path("."), Path("runs/x"), "--r", "2", *more)
    assert train([*arguments, "--eval-data", "data.jsonl"]) == 0
    return inputs / "runs" / "x"


def test_config_toml_holds_absolute_paths_and_ids_as_they_are(inputs, monkeypatch):
    run = relative_run(inputs, monkeypatch)
    settings = tomllib.loads((run / "config.toml").read_text())
    data = str(inputs / "data.jsonl")
    assert settings["model"] == str(inputs / "model")
    assert (settings["data"], settings["eval_data"]) == ([data], [data])
    assert settings["output_dir"] == str(run)
    assert with_absolute_paths({"model": "org/name"}) == {"model": "org/name"}


def test_a_run_continues_from_another_working_directory_with_its_token_cache(
    inputs, monkeypatch, capsys
):
    monkeypatch.setattr(token_cache, "MIN_BYTES", 0)
    run = relative_run(inputs, monkeypatch)
    entries = sorted((run / "tokenized").iterdir())
    monkeypatch.chdir(inputs / "elsewhere")
    capsys.readouterr()
    config = os.path.relpath(run / "config.toml")
    assert train(["--config", config, "--resume", "--max-steps", "3", "--logging-steps", "1"]) == 0
    error = capsys.readouterr().err
    assert "continued from checkpoint-2" in error and "read from the cache" in error
    assert "model" not in " ".join(line for line in error.splitlines() if "warning" in line)
    assert sorted((run / "tokenized").iterdir()) == entries
    assert [path.name for path in (inputs / "elsewhere").iterdir()] == []


def test_a_moved_run_is_resumed_in_its_new_folder_unless_the_user_names_one(
    inputs, monkeypatch, capsys
):
    before = relative_run(inputs, monkeypatch)
    run = before.rename(inputs / "moved")
    config, old = str(run / "config.toml"), str(before)
    assert parse(["--config", config]).sft.output_dir == old
    assert parse(["--config", config, "--resume", "--output-dir", old]).sft.output_dir == old
    copied = Path(shutil.copy(config, inputs / "config.toml"))  # no run lies beside it
    assert parse(["--config", str(copied), "--resume"]).sft.output_dir == old
    capsys.readouterr()
    assert train(["--config", config, "--resume", "--max-steps", "3"]) == 0
    error = " ".join(capsys.readouterr().err.split())
    assert f"note: {config} names {old} as its folder" in error
    assert "continued from checkpoint-2" in error and not before.exists()
    assert tomllib.loads((run / "config.toml").read_text())["output_dir"] == str(run)


def test_the_model_of_an_older_checkpoint_is_known_by_its_relative_path(
    inputs, monkeypatch, capsys
):
    run = relative_run(inputs, monkeypatch)
    state = json.loads((run / "checkpoint-2" / STATE).read_text())
    for name in ("weights", "config"):  # an older version recorded no fingerprint
        del state["identity"][name]
    for name, warns in (("model", False), ("./model", False), ("another", True)):
        state["identity"]["model"] = name
        (run / "checkpoint-2" / STATE).write_text(json.dumps(state))
        capsys.readouterr()
        assert train(["--config", str(run / "config.toml"), "--resume"]) == 0
        assert ("model another ->" in capsys.readouterr().err) == warns


def test_overwrite_spares_a_needed_folder_from_every_working_directory(inputs, monkeypatch, capsys):
    run = relative_run(inputs, monkeypatch, "--merge")
    monkeypatch.chdir(run)
    more = ("--overwrite", "--model", "merged", "--output-dir", ".")
    capsys.readouterr()
    assert train(["--config", "config.toml", *more]) == 2
    assert "is needed, but lies in" in capsys.readouterr().err


def test_paths_in_toml_are_relative_to_the_file(tmp_path, monkeypatch):
    folder = tmp_path / "settings"
    (folder / "base").mkdir(parents=True)
    path = folder / "run.toml"
    path.write_text('model = "base"\ndata = ["a.jsonl", "/b.jsonl"]\noutput_dir = "../out"\n')
    expected = {
        "model": str(folder / "base"),
        "data": (str(folder / "a.jsonl"), "/b.jsonl"),
        "output_dir": str(tmp_path / "out"),
    }
    assert read_settings(path) == expected
    monkeypatch.chdir(tmp_path)
    assert read_settings("settings/run.toml") == expected
    # A flag is relative to the working directory, and a model without a folder is an id.
    assert parse(["--config", "settings/run.toml", "--data", "c"]).run.data == ("c",)
    path.write_text('model = "org/name"\n')
    assert read_settings(path) == {"model": "org/name"}


def test_config_toml_of_an_older_version_tells_the_folder_in_which_it_was_written(tmp_path):
    run = tmp_path / "runs" / "1"
    run.mkdir(parents=True)
    (tmp_path / "base").mkdir()
    (run / "metrics.jsonl").write_text("")
    old = {"model": "base", "data": ("a.jsonl",), "output_dir": "runs/1"}
    (run / "config.toml").write_text(toml_text(old))
    assert read_settings(run / "config.toml") == {
        "model": str(tmp_path / "base"),
        "data": (str(tmp_path / "a.jsonl"),),
        "output_dir": str(run),
    }
