"""A run is continued on the base that it began with, wherever the files lie."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model
from training_runs import adapter_bytes, edit_json, make_smallest_model, new_trainer

from minitune import FastLanguageModel
from minitune.training.base_identity import base_identity
from minitune.training.checkpoint import STATE

CHECKPOINTS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def finished(smallest, tmp_path_factory):
    """Return a run of 4 steps with checkpoint-2 and checkpoint-4, which tests copy."""
    output = tmp_path_factory.mktemp("finished")
    new_trainer(smallest, output, **CHECKPOINTS).train()
    return output


@pytest.fixture
def model(smallest, tmp_path):
    """Return a copy of the model that the run was trained on."""
    return shutil.copytree(smallest, tmp_path / "copied")


def resume(model, run, **settings):
    """Continue a run for one step more on the model in a folder."""
    trainer = new_trainer(model, run, **{**CHECKPOINTS, "max_steps": 5, **settings})
    return trainer.train(resume_from_checkpoint=True)


def identity_of(folder):
    """Return the identity of the model in a folder."""
    return base_identity(FastLanguageModel.from_pretrained(folder, 64, device="cpu")[0])


def test_a_moved_model_is_continued_without_a_warning_and_to_the_same_bits(
    model, run, tmp_path, capsys
):
    shutil.rmtree(run / "checkpoint-4")
    expected = adapter_bytes(run)
    shutil.rmtree(run / "adapter")
    resume(model, run, max_steps=4)
    error = capsys.readouterr().err
    assert "warning" not in error and "fingerprint" not in error
    assert adapter_bytes(run) == expected


def test_changed_weights_are_refused_by_name_with_the_remedy(model, run):
    tensors = load_file(model / WEIGHTS)
    tensors["model.norm.weight"][3] *= 1.5  # a norm is hashed as a whole
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    before = sorted(run.rglob("*"))
    message = (
        r"checkpoint-4 cannot be continued: the weights of .*copied are not those .* overwrite=True"
    )
    with pytest.raises(ValueError, match=message):
        resume(model, run)
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_theta": 500000.0}, r"ropes\.0\.theta 10000\.0 -> 500000\.0"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps 1e-05 -> 1e-06"),
        ({"max_position_embeddings": 128}, "max_position_embeddings 256 -> 128"),
    ],
    ids=str,
)
def test_a_changed_config_is_refused_by_field(model, run, change, words):
    edit_json(model / "config.json", **change)
    with pytest.raises(ValueError, match=f"config.json of .*copied changed: {words};"):
        resume(model, run)


def test_a_key_of_the_config_that_changes_no_number_is_ignored(model, run, capsys):
    edit_json(model / "config.json", transformers_version="9.9", _name_or_path="elsewhere")
    assert resume(model, run).global_step == 5


def test_a_checkpoint_without_a_fingerprint_is_continued_with_a_note(smallest, run, capsys):
    path = run / "checkpoint-4" / STATE
    state = json.loads(path.read_text())
    for name in ("weights", "config"):
        del state["identity"][name]
    path.write_text(json.dumps(state))
    assert resume(smallest, run).global_step == 5
    error = " ".join(capsys.readouterr().err.split())
    assert "was saved by an older version, without a fingerprint of the base" in error


def test_the_fingerprint_does_not_depend_on_shards_and_sees_each_dtype(tmp_path):
    whole = make_smallest_model(tmp_path / "whole")
    shards = make_smallest_model(tmp_path / "shards", shards=3)
    other = make_smallest_model(tmp_path / "other", seed=1)
    assert identity_of(whole) == identity_of(shards)
    assert identity_of(whole)["config"] == identity_of(other)["config"]
    assert identity_of(whole)["weights"] != identity_of(other)["weights"]


def test_a_large_tensor_is_sampled_from_its_first_to_its_last_row(tmp_path):
    folder = make_tiny_model(tmp_path / "model", vocab=2048, layers=1)
    before = identity_of(folder)["weights"]
    name, tensors = "model.embed_tokens.weight", load_file(folder / WEIGHTS)
    seen = []
    for row in (0, 1, 1024, 2047):
        changed = {**tensors, name: tensors[name].clone()}
        changed[name][row] += 1
        save_file(changed, folder / WEIGHTS, metadata={"format": "pt"})
        seen.append(identity_of(folder)["weights"] != before)
    assert seen == [True, False, False, True]  # 256 KiB: 16 rows of 2,048
