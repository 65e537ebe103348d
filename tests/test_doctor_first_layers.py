"""The first layers of a model are a model of its own, in each form that weights have."""

import json

import pytest
import torch
from fp8_folders import make_fp8
from gguf_files import make_tiny_gguf
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model
from weight_folders import edit_json, load

from minitune.config.model_config import ModelConfig
from minitune.doctor import first_layers
from minitune.doctor.first_layers import layers_to_check, write_first_layers
from minitune.gguf.base.model_files import model_files


def plain(folder):
    return make_tiny_model(folder / "m", layers=3, shards=2)


def float8(folder):
    make_fp8(folder / "m", layers=3)
    return folder / "m"


def nf4(folder):
    model = load(plain(folder))
    model.save_4bit(folder / "nf4")
    return folder / "nf4"


def wrapper(folder):
    """Write a model inside a multimodal one, whose text model it is."""
    base = make_tiny_model(folder / "m", layers=3)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": config}))
    tensors = load_file(base / "model.safetensors")
    renamed = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    return base


def gguf(folder):
    return make_tiny_gguf(folder, "q4_k_m", layers=3)


def loaded(base):
    """Return a model in its own formats, and the weights of its linears by name, dequantised."""
    model = load(base, load_in_4bit=False)
    return model, {name: linear.weight_as(torch.float32) for name, linear in model.linears()}


@pytest.mark.parametrize("make", [plain, float8, nf4, wrapper, gguf])
def test_the_first_layer_of_each_form_loads_with_the_weights_of_the_whole_model(tmp_path, make):
    base, target = make(tmp_path), tmp_path / "short"
    target.mkdir()
    short, found = loaded(write_first_layers(base, 1, target))
    whole, expected = loaded(base)
    assert short.config.num_hidden_layers == 1 < whole.config.num_hidden_layers
    # FP8 becomes bfloat16 on the disk, and float32 in the memory of a CPU run.
    assert short.formats_text == whole.formats_text or make in (gguf, float8)
    for name, weight in found.items():
        rounded = expected[name].bfloat16().float() if make is float8 else expected[name]
        assert torch.equal(weight, rounded), name
    ids = torch.tensor([[5, 6, 7]])
    whole.model.layers = whole.model.layers[:1]
    with torch.no_grad():
        logits, of_whole = (model(input_ids=ids).logits for model in (short, whole))
    assert make is float8 or torch.equal(logits, of_whole)


def test_each_kind_of_layer_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(first_layers, "LAYER_PARAMETERS", {"cpu": 1})
    folder = make_tiny_model(tmp_path / "m", layers=5)
    edit_json(folder / "config.json", model_type="smollm3", no_rope_layers=[1, 1, 0, 1, 1])
    config = ModelConfig.from_folder(folder)
    count = layers_to_check(config, "cpu")
    kinds = config.layer_kinds
    assert set(kinds[:count]) == set(kinds) and set(kinds[: count - 1]) < set(kinds)
    target = tmp_path / "short"
    target.mkdir()
    short = ModelConfig.from_folder(write_first_layers(folder, count, target))
    assert short.layer_kinds == kinds[:count] and count == 3


def test_a_small_model_is_checked_as_a_whole_and_a_large_one_in_part(tmp_path):
    small = ModelConfig.from_folder(make_tiny_model(tmp_path / "m", layers=3))
    assert layers_to_check(small, "cpu") == 3
    file = make_tiny_gguf(tmp_path, "q8_0", layers=3)
    assert layers_to_check(ModelConfig.from_folder(model_files(file)), "cuda") == 3


def test_a_disk_without_room_is_named(tmp_path, monkeypatch):
    def full(path, needed):
        raise ValueError(f"{path}: needs {needed:,} bytes, but only 0 are left on the disk")

    monkeypatch.setattr(first_layers, "require_space", full)
    base, target = plain(tmp_path), tmp_path / "short"
    target.mkdir()
    with pytest.raises(ValueError, match=r"needs [0-9,]+ bytes, but only 0 are left"):
        write_first_layers(base, 1, target)
