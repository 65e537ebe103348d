"""Broken multimodal folders are refused with the key or the tensor at fault."""

import json

import pytest
import torch
from transformers_twin import load
from weight_folders import edit_json, edit_tensors
from wrapper_folders import make_wrapper

# Each function below damages a llava folder and returns the error that loading must give.


def text_config_is_a_list(folder):
    edit_json(folder / "config.json", text_config=["llama"])
    return r"config\.json: text_config is \['llama'\]; expected an object"


def text_config_without_type(folder):
    edit_json(folder / "config.json", text_config={"hidden_size": 64})
    return r"text_config has no model_type"


def other_text_model(folder):
    edit_json(folder / "config.json", text_config={"model_type": "gpt2"})
    return r"model_type 'gpt2' is not supported"


def text_tensor_without_place(folder):
    name = "language_model.model.layers.0.self_attn.q_norm.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(16)}))
    return r"self_attn\.q_norm\.weight has no place in the model"


def other_tensor_under_the_prefix(folder):
    name = "language_model.adapter.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(16)}))
    return r"language_model\.adapter\.weight has no place in the model \(1 such"


def quantization_is_a_list(folder):
    edit_json(folder / "config.json", quantization_config=["fp8"])
    return r"config\.json: quantization_config is \['fp8'\]; expected an object"


def text_tensor_missing(folder):
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    return r"holds no tensor model\.layers\.1\.mlp\.up_proj\.weight"


def text_tensor_of_wrong_shape(folder):
    name = "language_model.model.norm.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(65)}))
    return r"language_model\.model\.norm\.weight has shape \(65,\), config\.json asks for \(64,\)"


def two_heads(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(512, 64)}))
    return r"lm_head\.weight and .*lm_head\.weight, which are the same tensor of the text model"


def no_text_model(folder):
    def drop(tensors):
        for name in list(tensors):
            if name.startswith("language_model."):
                tensors.pop(name)

    edit_tensors(folder, drop)
    return r"holds no text model; its tensors would begin with language_model\.model\., "


def a_plain_config_beside_the_tensors_of_a_wrapper(folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw["text_config"]))
    return r"holds no tensor model\.embed_tokens\.weight"


DAMAGES = [
    text_config_is_a_list,
    text_config_without_type,
    other_text_model,
    text_tensor_without_place,
    other_tensor_under_the_prefix,
    quantization_is_a_list,
    text_tensor_missing,
    text_tensor_of_wrong_shape,
    two_heads,
    no_text_model,
    a_plain_config_beside_the_tensors_of_a_wrapper,
]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    make_wrapper(folder, "llava")
    return folder


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_broken_wrapper_is_refused_by_name(tmp_path, llava, damage):
    folder = tmp_path / "m"
    folder.mkdir()
    for path in llava.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    message = damage(folder)
    with pytest.raises(ValueError, match=message):
        load(folder)
