"""Broken or unsupported model folders are refused with the name of the file, field or tensor."""

import errno
import json
import os
import re

import pytest
import torch
from tiny import make_tiny_model
from weight_folders import edit_json, edit_tensors, load, write_bitsandbytes

from minitune.checkpoints.safetensors_folder import SafetensorsFolder, read_safetensors

QUANTIZATIONS = {
    "FP4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "8-bit": {"load_in_8bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4},
}


def test_other_quantisations_are_refused_by_name(tmp_path):
    source = make_tiny_model(tmp_path / "base")
    for name, quantization in QUANTIZATIONS.items():
        edit_json(source / "config.json", quantization_config=quantization)
        with pytest.raises(ValueError, match=f"quantised with .*{name}"):
            load(source)


def test_an_fp4_linear_is_refused_even_where_config_says_nothing(tmp_path):
    source = make_tiny_model(tmp_path / "base", tie=False)
    write_bitsandbytes(source, tmp_path / "bnb", quant_type="fp4")
    (tmp_path / "bnb" / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(ValueError, match="q_proj is quantised as FP4; only NF4 is read"):
        load(tmp_path / "bnb")


STATES = [{"blocksize": 0}, {"nested_offset": None}, {"nested_blocksize": 0}, {"shape": 64}]


@pytest.mark.parametrize("change", STATES, ids=str)
def test_a_broken_state_of_a_quantised_linear_is_named(tmp_path, change):
    source = make_tiny_model(tmp_path / "base", tie=False)
    write_bitsandbytes(source, tmp_path / "bnb")
    name = "model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"

    def damage(tensors):
        state = json.loads(bytes(tensors[name].tolist())) | change
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    edit_tensors(tmp_path / "bnb", damage)
    with pytest.raises(ValueError, match=f"{name} is not what bitsandbytes writes: "):
        load(tmp_path / "bnb")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_weights_that_may_not_be_read_are_not_called_missing(tmp_path, monkeypatch):
    folder, opened = make_tiny_model(tmp_path / "m"), os.open
    weights = folder / "model.safetensors"

    def forbidden(path, *arguments, **named):  # root may read everything
        if str(path) == str(weights):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **named)

    monkeypatch.setattr(os, "open", forbidden)
    message = rf"^{re.escape(str(weights))}: could not be read \(Permission denied\)$"
    for read in (SafetensorsFolder, lambda folder: read_safetensors(weights)):
        with pytest.raises(ValueError, match=message):
            read(folder)


def test_a_folder_of_other_formats_is_refused_by_the_file_it_holds(tmp_path):
    folder = make_tiny_model(tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no \*\.safetensors, but pytorch_model\.bin; .*may run"):
        load(folder)
    weights.write_text("version https://git-lfs.example/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=r"model\.safetensors: a pointer of Git LFS, .*lfs pull"):
        load(folder)


def test_a_whole_file_beside_the_index_of_other_shards_is_refused(tmp_path):
    folder = make_tiny_model(tmp_path / "m", shards=3)
    other = make_tiny_model(tmp_path / "other", seed=1) / "model.safetensors"
    (folder / "model.safetensors").write_bytes(other.read_bytes())
    message = r"holds model\.safetensors, and model\.safetensors\.index\.json, which lists other"
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_pickled_adapter_is_refused_by_its_file(tmp_path):
    model = load(make_tiny_model(tmp_path / "m"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(b"0")
    with pytest.raises(ValueError, match=r"adapter_model\.bin: a pickled file, which may run code"):
        model.load_adapter(tmp_path / "adapter")


# Each function below damages a folder and returns the error that loading must give.


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return r"model\.safetensors: truncated or not a safetensors file"


def wrong_shape(folder):
    up = {"model.layers.1.mlp.up_proj.weight": torch.zeros(64, 128)}
    edit_tensors(folder, lambda tensors: tensors.update(up))
    return r"up_proj\.weight has shape \(64, 128\), config\.json asks for \(128, 64\)"


def tensor_missing(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    return r"holds no tensor model\.layers\.1\.mlp\.up_proj\.weight"


def foreign_tensor(folder):
    norm = {"model.layers.0.self_attn.q_norm.weight": torch.zeros(16)}
    edit_tensors(folder, lambda tensors: tensors.update(norm))
    return r"model\.layers\.0\.self_attn\.q_norm\.weight has no place in the model"


def integers(folder):
    norm = {"model.norm.weight": torch.zeros(64, dtype=torch.int32)}
    edit_tensors(folder, lambda tensors: tensors.update(norm))
    return r"model\.norm\.weight is I32; weights are F32, F16 or BF16"


def no_weights(folder):
    (folder / "model.safetensors").unlink()
    return r"holds no \*\.safetensors"


def adapter(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    return r"adapter_config\.json: names no base model; load the base model by its own path"


def no_config(folder):
    (folder / "config.json").unlink()
    return r"config\.json: not found"


def other_family(folder):
    edit_json(folder / "config.json", model_type="gemma")
    return r"config\.json: model_type 'gemma' is not supported"


def other_rope(folder):
    edit_json(folder / "config.json", rope_scaling={"rope_type": "dynamic", "factor": 4})
    return r"rope scaling 'dynamic' is not supported"


def bias_missing(folder):
    edit_json(folder / "config.json", attention_bias=True)
    return r"holds no tensor model\.layers\.0\.self_attn\.q_proj\.bias"


def bias_unexpected(folder):
    bias = {"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)}
    edit_tensors(folder, lambda tensors: tensors.update(bias))
    return r"model\.layers\.1\.self_attn\.q_proj\.bias has no place in the model"


def two_files(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    return r"model\.\S+ is in both a\.safetensors and b\.safetensors"


def odd_width(folder):
    edit_json(folder / "config.json", intermediate_size=130, hidden_size=40, head_dim=16)
    shapes = {
        "q_proj": (64, 40),
        "k_proj": (32, 40),
        "v_proj": (32, 40),
        "o_proj": (40, 64),
        "gate_proj": (130, 40),
        "up_proj": (130, 40),
        "down_proj": (40, 130),
        "embed_tokens": (512, 40),
    }

    def shrink(tensors):
        for name in tensors:
            module = name.split(".")[-2]
            tensors[name] = torch.zeros(shapes.get(module, (40,)))  # the rest are norms

    edit_tensors(folder, shrink)
    return r"gate_proj\.weight has shape \(130, 40\), which NF4 cannot divide into blocks of 64"


def small_embedding(folder):
    edit_json(folder / "config.json", vocab_size=64)
    rows = {"model.embed_tokens.weight": torch.zeros(64, 64)}
    edit_tensors(folder, lambda tensors: tensors.update(rows))
    return "tokenizer"


DAMAGES = [
    truncated,
    wrong_shape,
    tensor_missing,
    foreign_tensor,
    integers,
    no_weights,
    no_config,
    other_family,
    other_rope,
    small_embedding,
    adapter,
    bias_missing,
    bias_unexpected,
    two_files,
    odd_width,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_broken_folder_is_refused_by_name(tmp_path, damage):
    folder = make_tiny_model(tmp_path / "m")
    message = damage(folder)
    with pytest.raises(ValueError, match=message):
        load(folder)


def shard_missing(folder):
    name = "model-00002-of-00003.safetensors"
    (folder / name).unlink()
    return rf"index\.json: names the shard {name}, which is not in the folder"


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def not_in_index(folder):
    edit_index(folder, lambda index: index["weight_map"].pop("model.norm.weight"))
    return r"model-00003-of-00003\.safetensors: holds model\.norm\.weight, which is missing from"


def index_names_more(folder):
    shard = "model-00001-of-00003.safetensors"
    edit_index(folder, lambda index: index["weight_map"].update({"model.extra.weight": shard}))
    return rf"says that {shard} holds model\.extra\.weight, but it does not"


def index_without_a_map(folder):
    edit_index(folder, lambda index: index.update(weight_map=["model.norm.weight"]))
    return r"index\.json: not a safetensors index; expected a weight_map"


def index_is_no_json(folder):
    (folder / "model.safetensors.index.json").write_text("{")
    return r"index\.json: not JSON"


INDEX_DAMAGES = [
    shard_missing,
    not_in_index,
    index_names_more,
    index_without_a_map,
    index_is_no_json,
]


@pytest.mark.parametrize("damage", INDEX_DAMAGES, ids=lambda damage: damage.__name__)
def test_a_broken_index_is_refused_by_name(tmp_path, damage):
    folder = make_tiny_model(tmp_path / "m", shards=3)
    message = damage(folder)
    with pytest.raises(ValueError, match=message):
        SafetensorsFolder(folder)


CONFIGS = {
    "holds a list, not an object": [],
    "num_attention_heads is 0; expected a whole number from 1 to 1048576": {
        "num_attention_heads": 0
    },
    "vocab_size is True; expected a whole number": {"vocab_size": True},
    "head_dim is '16'; expected a whole number": {"head_dim": "16"},
    "head_dim 20 is not supported; attention takes multiples of 8": {"head_dim": 20},
    "rms_norm_eps is '1e-5'; expected a number": {"rms_norm_eps": "1e-5"},
    "tie_word_embeddings is 'false'; expected true or false": {"tie_word_embeddings": "false"},
    "rope_scaling is 'linear'; expected an object": {"rope_scaling": "linear"},
    "factor is missing": {"rope_scaling": {"rope_type": "linear", "factor": None}},
    "4 is not a multiple of num_key_value_heads 3": {"num_key_value_heads": 3},
    "quantization_config is \\['nf4'\\]; expected an object": {"quantization_config": ["nf4"]},
    "sliding_window is 'all'; expected a whole number": {
        "model_type": "mistral",
        "sliding_window": "all",
    },
    "layer_types is 1 entries; expected a list of 2 entries": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "layer_types": ["full_attention"],
    },
    "layer_types has 'linear_attention'; expected 'full_attention' or": {
        "model_type": "qwen3",
        "use_sliding_window": True,
        "layer_types": ["full_attention", "linear_attention"],
    },
    "no_rope_layers is 2; expected a whole number from 0 to 1": {
        "model_type": "smollm3",
        "no_rope_layers": [1, 2],
    },
    "attention_multiplier is 0; expected a number from 1e-06 to 1e\\+06": {
        "model_type": "granite",
        "attention_multiplier": 0,
    },
    "long_factor is 3 entries; expected a list of 8 entries": {
        "model_type": "phi3",
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 3},
    },
}


@pytest.mark.parametrize("message", CONFIGS)
def test_a_config_that_is_no_llamas_is_refused_by_field(tmp_path, message):
    folder, change = make_tiny_model(tmp_path / "m"), CONFIGS[message]
    if isinstance(change, dict):
        edit_json(folder / "config.json", **change)
    else:
        (folder / "config.json").write_text(json.dumps(change))
    with pytest.raises(ValueError, match=message):
        load(folder)
