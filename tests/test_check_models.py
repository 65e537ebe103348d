"""What a run cannot write at its end is refused before its first step."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from command_inputs import train, train_arguments, write_inputs
from gguf_files import make_tiny_gguf
from safetensors.torch import load_file, save_file
from test_gguf_refused import DAMAGES
from test_merge import load, write_prequantized
from training_runs import make_smallest_model, new_trainer
from weight_folders import edit_json

from minitune.config.sft_config import SFTConfig
from minitune.gguf.export import check_gguf
from minitune.training.check_models import bytes_of_run, check_base_range, require_room
from minitune.training.checkpoint import RunSize

GGUF_NAME = "model-minitune-F16.gguf"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return a folder with a tiny model and datasets."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def copied(inputs, tmp_path):
    """Return a copy of the model that a test may damage."""
    return shutil.copytree(inputs / "model", tmp_path / "model")


@pytest.fixture
def refusal(inputs, tmp_path, capsys):
    """Return a function that runs the command and returns the error of its refusal."""

    def run(*more):
        output = tmp_path / "run"
        assert train(train_arguments(inputs, output, *more)) == 2
        assert not (output / "metrics.jsonl").exists()
        assert not list(output.glob("checkpoint-*"))
        return capsys.readouterr().err

    return run


@pytest.fixture
def no_loading(monkeypatch):
    """Make the test fail if a model is loaded."""

    def fail(*arguments, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("minitune.api._fill", fail)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_model_that_gguf_cannot_hold_is_refused(copied, refusal, damage):
    message = damage(copied)
    assert re.search(message, refusal("--model", str(copied), "--gguf", "f16"))


def test_a_weight_beyond_float16_is_refused_for_the_types_that_hold_float16_alone(copied, refusal):
    tensors = load_file(copied / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"][1, 2] = -1e5
    save_file(tensors, copied / "model.safetensors")
    for kind in ("f16", "q8_0", "q4_k_m"):
        for base in ("--load-in-4bit", "--no-load-in-4bit"):
            error = refusal("--model", str(copied), "--gguf", "bf16", kind, base)
            assert "blk.0.attn_v.weight: 99840 does not fit into float16; export as bf16" in error
    model, _ = load(copied)
    check_base_range(model, "auto", check_gguf("", copied, ["bf16", "f32"]))


def sampling_default(folder):
    (folder / "generation_config.json").write_text('{"top_k": "40"}')
    return "top_k is '40', expected a number"


def yarn_key(folder):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    edit_json(folder / "config.json", rope_scaling=yarn | {"beta_slow": 2.0})
    return "does not read YaRN's beta_slow for llama"


@pytest.mark.parametrize("damage", [sampling_default, yarn_key], ids=lambda d: d.__name__)
def test_a_key_that_gguf_cannot_hold_is_refused_before_the_model_is_loaded(
    copied, refusal, no_loading, damage
):
    message = damage(copied)
    assert message in refusal("--model", str(copied), "--gguf", "q8_0")


def test_an_unknown_type_is_refused(refusal, no_loading):
    assert "q9" in refusal("--gguf", "q9")


@pytest.mark.parametrize(
    ("name", "is_folder", "message"),
    [
        ("merged", False, "a folder of the run gets this name"),
        ("adapter", False, "a folder of the run gets this name"),
        (GGUF_NAME, True, "is no file, and a GGUF file gets this name"),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_refused_and_stays(
    refusal, no_loading, tmp_path, name, is_folder, message
):
    output = tmp_path / "run"
    output.mkdir()
    (output / "outputs.json").write_text(json.dumps({"names": [name]}))  # so a run wrote it
    path = output / name
    path.mkdir() if is_folder else path.write_bytes(b"mine")
    error = refusal("--merge", "--gguf", "f16", "--resume")
    assert message in error and path.exists()


def test_a_name_that_is_too_long_for_a_file_is_refused(inputs, refusal, tmp_path):
    model = shutil.copytree(inputs / "model", tmp_path / ("m" * 235))
    assert "rename the model's folder" in refusal("--model", str(model), "--gguf", "f16")


def test_a_folder_that_cannot_be_written_is_refused(refusal, no_loading, monkeypatch, tmp_path):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert f"{tmp_path} is not writable; choose another one" in refusal()


def test_a_merge_base_that_the_model_will_lack_is_refused(inputs, refusal, no_loading, tmp_path):
    gguf = make_tiny_gguf(tmp_path / "gguf", "q8_0")
    for export in (("--merge",), ("--gguf", "f16")):
        error = refusal(*export, "--merge-base", "nf4", "--no-load-in-4bit")
        assert "the model was loaded in 16 bit and has no NF4 weights" in error
        error = refusal(*export, "--merge-base", "original", "--model", str(gguf))
        assert "the only weights of this model are those of" in error


def test_original_weights_of_a_folder_of_4_bit_weights_are_refused(inputs, refusal, tmp_path):
    write_prequantized(load(inputs / "model")[0], tmp_path / "nf4")
    error = refusal("--merge", "--merge-base", "original", "--model", str(tmp_path / "nf4"))
    assert "holds 4-bit weights only" in error


@pytest.mark.filterwarnings("ignore:.*llama.cpp")
def test_samples_beyond_a_window_that_llama_cpp_ignores_are_refused(copied, refusal):
    edit_json(copied / "config.json", model_type="mistral", sliding_window=8)
    error = refusal("--model", str(copied), "--gguf", "f16")
    assert "set --max-length to 8, or save the merged folder instead" in error


# ---- disk


def free_disk(monkeypatch, nbytes):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=nbytes))


def test_too_little_disk_for_the_models_is_refused_before_the_model_is_loaded(
    refusal, no_loading, monkeypatch
):
    free_disk(monkeypatch, 200_000)
    for export in (("--merge",), ("--gguf", "f16", "q8_0")):
        error = refusal(*export)
        assert re.search(r"run needs [\d,]+ bytes at its end .* but only 200,000 are left", error)


def test_the_room_that_is_asked_for_is_the_room_that_a_run_takes(inputs, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        "minitune.commands.train.require_room", lambda args, needed: asked.update(needed)
    )
    output = tmp_path / "run"
    command = train_arguments(inputs, output, "--merge", "--gguf", "f16", "q4_0")
    assert train([*command, "--save-steps", "1"]) == 0

    def nbytes(*patterns):
        paths = [path for pattern in patterns for path in output.glob(pattern)]
        return sum(path.stat().st_size for path in paths if path.is_file())

    assert asked["GGUF files"] == nbytes("*.gguf")
    assert asked["the merged model"] == pytest.approx(nbytes("merged/model*"), rel=0.05)
    assert asked["the adapter"] == pytest.approx(nbytes("adapter/*.safetensors"), rel=0.1)
    assert asked["2 checkpoints"] == pytest.approx(nbytes("checkpoint-*/*.safetensors"), rel=0.1)


def test_checkpoints_are_counted_as_far_as_they_stay(tmp_path):
    model = new_trainer(make_smallest_model(tmp_path / "m"), tmp_path / "run").model
    size = RunSize(units_per_step=1, steps_per_epoch=4, total_steps=10)
    expected = {
        ("steps", 3, None): 4,
        ("steps", 3, 2): 2,
        ("steps", 500, None): 1,
        ("epoch", 3, None): 3,
        ("no", 3, None): 0,
    }
    for (strategy, steps, limit), count in expected.items():
        args = SFTConfig(save_strategy=strategy, save_steps=steps, save_total_limit=limit)
        words = "1 checkpoint" if count == 1 else f"{count} checkpoints"
        assert words in bytes_of_run(model, args, size)
    adapter = 4 * sum(p.numel() for _, p in model.adapter_parameters())
    whole = bytes_of_run(model, SFTConfig(save_steps=5), size)
    assert whole == {"2 checkpoints": 2 * 3 * adapter, "the adapter": adapter}
    few_bits = bytes_of_run(model, SFTConfig(save_steps=5, optim="adamw_8bit"), size)
    assert few_bits["2 checkpoints"] < 2 * 1.6 * adapter


@pytest.mark.parametrize(("words", "advised"), [("1 checkpoint", False), ("3 checkpoints", True)])
def test_a_limit_of_checkpoints_is_advised_if_there_are_several(
    tmp_path, monkeypatch, words, advised
):
    free_disk(monkeypatch, 200)
    with pytest.raises(ValueError, match=rf"\(900 for {words}\)") as error:
        require_room(SFTConfig(output_dir=str(tmp_path)), {words: 900})
    assert ("save_total_limit" in str(error.value)) == advised


def test_outputs_that_a_run_deletes_first_count_as_free(tmp_path, monkeypatch):
    output = tmp_path / "run"
    (output / "merged").mkdir(parents=True)
    (output / "outputs.json").write_text(json.dumps({"names": ["merged"]}))
    (output / "merged" / "model.safetensors").write_bytes(bytes(900))
    (output / "mine").write_bytes(bytes(900))
    free_disk(monkeypatch, 200)
    require_room(SFTConfig(output_dir=str(output), overwrite=True), {"the merged model": 1100})
    for settings in ({"overwrite": True}, {"resume": True}):
        needed = 1101 if "overwrite" in settings else 201
        with pytest.raises(ValueError, match=f"needs {needed:,} bytes at its end"):
            require_room(SFTConfig(output_dir=str(output), **settings), {"adapter": needed})


def test_a_float16_model_with_larger_norms_is_refused_before_a_merge(inputs, refusal, copied):
    tensors = {name: t.half() for name, t in load_file(copied / "model.safetensors").items()}
    tensors["model.norm.weight"] = torch.full((64,), 1e5)
    save_file(tensors, copied / "model.safetensors")
    error = refusal("--model", str(copied), "--merge")
    assert "model.norm.weight: the merged weight is not finite in torch.float16" in error
