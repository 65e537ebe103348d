"""Broken or unsupported quantised folders are refused with the tensor or the key at fault."""

import pytest
import torch
from fp8_folders import UP, compressed, deepseek, make_fp8
from tiny import make_tiny_model
from weight_folders import edit_json, edit_tensors, load

from minitune.checkpoints.fp8 import block_of
from minitune.checkpoints.load_weights import open_model_folder

# Each function below damages a folder with blocks of 128, and returns the error of loading.


def change_tensor(folder, name, change):
    edit_tensors(folder, lambda tensors: tensors.update({name: change(tensors[name])}))


def no_scale(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(f"{UP}_scale_inv"))
    return rf"{UP} is F8_E4M3, and the folder holds no {UP}_scale_inv; expected one scale"


def two_scales(folder):
    edit_tensors(folder, lambda t: t.update({f"{UP}_scale": t[f"{UP}_scale_inv"].clone()}))
    return rf"the folder holds both {UP}_scale_inv and {UP}_scale; expected one scale"


def scale_without_fp8(folder):
    change_tensor(folder, UP, torch.Tensor.bfloat16)
    return rf"{UP}_scale_inv has no place in the model"


def scale_of_wrong_shape(folder):
    change_tensor(folder, f"{UP}_scale_inv", lambda scale: scale.t().contiguous())
    return r"has shape \(2, 3\); blocks of \(128, 128\) in a weight \(320, 192\) need \(3, 2\)"


def scale_of_integers(folder):
    change_tensor(folder, f"{UP}_scale_inv", torch.Tensor.int)
    return r"up_proj\.weight_scale_inv is I32; scales of FP8 weights are F32, BF16"


def scale_is_nan(folder):
    change_tensor(
        folder, f"{UP}_scale_inv", lambda scale: scale.index_fill(0, torch.tensor(1), torch.nan)
    )
    return r"up_proj\.weight_scale_inv is not finite"


def other_fp8_type(folder):
    change_tensor(folder, UP, lambda weight: weight.float().to(torch.float8_e5m2))
    return rf"{UP} is F8_E5M2; weights are F32, F16 or BF16"


def weight_of_wrong_shape(folder):
    change_tensor(folder, UP, lambda weight: weight[:-1].contiguous())
    return rf"{UP} has shape \(319, 192\), config\.json asks for \(320, 192\)"


def norm_in_fp8(folder):
    name = "model.norm.weight"
    one = {name + "_scale": torch.tensor(1.0)}
    edit_tensors(folder, lambda t: t.update(one | {name: t[name].to(torch.float8_e4m3fn)}))
    return r"model\.norm\.weight has shape \(192,\); FP8 weights have two dimensions"


def config_says_nothing(folder):
    edit_json(folder / "config.json", quantization_config=None)
    return r"is F8_E4M3; weights are F32, F16 or BF16, and FP8 with a quantization_config"


def block_is_one_number(folder):
    edit_json(folder / "config.json", quantization_config=deepseek((128,)))
    return r"config\.json: weight_block_size is \[128\]; expected two whole numbers above 0"


DAMAGES = [
    no_scale,
    two_scales,
    scale_without_fp8,
    scale_of_wrong_shape,
    scale_of_integers,
    scale_is_nan,
    other_fp8_type,
    weight_of_wrong_shape,
    norm_in_fp8,
    config_says_nothing,
    block_is_one_number,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_broken_fp8_folder_is_refused_by_name(tmp_path, damage):
    make_fp8(tmp_path / "m")
    message = damage(tmp_path / "m")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "m")


OTHER_FORMATS = {
    "pack-quantized": compressed("channel", "pack-quantized", num_bits=4, type="int"),
    "nvfp4-pack-quantized": compressed("tensor_group", "nvfp4-pack-quantized", num_bits=4),
    "8-bit int weights": compressed("channel", "naive-quantized", type="int"),
    "4-bit float weights": compressed("group", num_bits=4),
    "asymmetric weights": compressed("channel", symmetric=False),
    "strategy 'token'": compressed("token"),
    "sparsity_config .*sparse-24-bitmask": compressed("channel")
    | {"sparsity_config": {"format": "sparse-24-bitmask"}},
    "transform_config": compressed("channel") | {"transform_config": {"config_groups": {"a": {}}}},
    "mxfp4": {"quant_method": "mxfp4"},
    "awq": {"quant_method": "awq", "bits": 4},
    "gptq": {"quant_method": "gptq", "bits": 4},
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_other_formats_are_refused_by_name_with_a_remedy(tmp_path, name):
    make_tiny_model(tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", quantization_config=OTHER_FORMATS[name])
    with pytest.raises(ValueError, match=f"quantised with .*{name}.*: load the 16-bit model"):
        open_model_folder(tmp_path / "m")


GROUPS = {
    "config_groups of the quantization_config is missing": None,
    "has a group without weights": {"a": {"targets": ["Linear"], "weights": None}},
    "have several kinds of blocks": {
        "a": {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}},
        "b": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}},
    },
    "block_structure is None; expected two whole numbers": {
        "a": {"weights": {"num_bits": 8, "type": "float", "strategy": "block"}}
    },
}


@pytest.mark.parametrize("message", GROUPS)
def test_broken_groups_of_compressed_tensors_are_refused(message):
    quantization = compressed("tensor") | {"config_groups": GROUPS[message]}
    with pytest.raises(ValueError, match=message):
        block_of(quantization)
