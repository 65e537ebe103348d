"""The models that the train command writes at the end, and the files that it must not touch."""

import errno
import os

import pytest
from command_inputs import train, train_arguments, write_inputs
from weight_folders import edit_json


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return a folder with a tiny model and datasets."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_only_models_of_the_same_name_are_replaced(inputs, tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    mine, ours = output / "mine-F16.gguf", output / "model-minitune-F16.gguf"
    mine.write_bytes(b"mine")
    ours.write_bytes(b"old")
    command = train_arguments(inputs, output, "--gguf", "f16", "--merge")
    for more in ([], ["--overwrite"]):
        assert train([*command, *more]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert "model-minitune-F16.gguf exists, but no run wrote it" in error
    assert ours.read_bytes() == b"old"
    (output / "outputs.json").write_text('{"names": ["model-minitune-F16.gguf"]}')
    assert train(command) == 2
    assert "already holds a run (model-minitune-F16.gguf); pass" in capsys.readouterr().err
    for more in ("--overwrite", "--resume"):
        assert train([*command, more]) == 0
        assert ours.read_bytes()[:4] == b"GGUF"
        assert (output / "merged" / "model.safetensors").is_file()
    assert mine.read_bytes() == b"mine"
    assert not list(output.glob(".*"))


def test_an_overwritten_run_loses_its_own_gguf_files_and_no_others(inputs, tmp_path):
    output = tmp_path / "run"
    assert train(train_arguments(inputs, output, "--gguf", "f16", "q8_0")) == 0
    others = {"mine-F16.gguf", "model-minitune-BF16.gguf"}  # the run was not asked for BF16
    for name in others:
        (output / name).write_bytes(b"mine")
    expected = {f"model-minitune-{kind}.gguf" for kind in ("F16", "Q8_0", "BF16")}
    assert {path.name for path in output.glob("model-*")} == expected
    assert train(train_arguments(inputs, output, "--overwrite")) == 0
    assert {path.name for path in output.glob("*.gguf")} == others


def test_a_model_that_gguf_cannot_express_is_refused_before_training(tmp_path, capsys):
    inputs, output = write_inputs(tmp_path), tmp_path / "run"
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    edit_json(inputs / "model" / "config.json", rope_scaling=yarn | {"beta_fast": 2.0})
    assert train(train_arguments(inputs, output, "--gguf", "f16")) == 2
    assert "does not read YaRN's beta_fast for llama" in capsys.readouterr().err
    assert not output.exists()


def test_models_of_an_earlier_run_stay_until_new_ones_are_complete(
    inputs, tmp_path, monkeypatch, capsys
):
    command = train_arguments(inputs, tmp_path, "--gguf", "f16", "--merge")
    assert train(command) == 0
    paths = [tmp_path / "merged" / "model.safetensors", tmp_path / "model-minitune-F16.gguf"]
    before = [path.read_bytes() for path in paths]

    def full_disk(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for writer in ("checkpoints.model_folder.write_model_files", "gguf.export.write_gguf"):
        with monkeypatch.context() as patch:
            patch.setattr(f"minitune.{writer}", full_disk)
            assert train([*command, "--resume"]) == 2
        assert "No space left" in capsys.readouterr().err
        assert [path.read_bytes() for path in paths] == before
        assert not list(tmp_path.glob(".*"))


def test_overwrite_does_not_remove_the_model_that_is_trained_on(inputs, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(train_arguments(inputs, output, "--merge")) == 0
    before = sorted(output.rglob("*"))
    capsys.readouterr()
    for option in ("--overwrite", "--resume"):
        model = str(output / "merged")
        assert train(train_arguments(inputs, output, option, "--model", model)) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and "is needed, but lies in" in error
    assert sorted(output.rglob("*")) == before
