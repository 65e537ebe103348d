"""Tiny model folders in FP8, for the tests of loading."""

import torch
from tiny import make_tiny_model
from weight_folders import edit_json, edit_tensors

FP8_MAX = 448.0
UP = "model.layers.1.mlp.up_proj.weight"


def quantize(weight, block):
    """Return (float8_e4m3fn weight, float32 scales) of a 2-D weight, in blocks."""
    rows, columns = block
    scale = torch.zeros(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    quantized = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scale[i, j] = weight[part].float().abs().max() / FP8_MAX
            quantized[part] = (weight[part].float() / scale[i, j]).to(torch.float8_e4m3fn)
    return quantized, scale


def linears_of(tensors):
    return [name for name in tensors if name.endswith("proj.weight")]


def block_size(block, weight):
    """Return rows and columns of a block, of which None means all of the weight's."""
    return [length or size for length, size in zip(block, weight.shape, strict=True)]


def write_fp8(folder, block, quantization, ending, change=lambda scale: scale, extra=None):
    """Quantise the linears of a folder to FP8 in place, and return the exact float32 values."""
    exact = {}

    def replace(tensors):
        for name in linears_of(tensors):
            size = block_size(block, tensors[name])
            weight, scale = quantize(tensors[name], size)
            tensors[name], tensors[name + ending] = weight, change(scale)
            full = change(scale).float().view(scale.shape)
            full = full.repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)
            exact[name] = weight.float() * full[: weight.shape[0], : weight.shape[1]]
            for suffix in extra or ():
                tensors[name.removesuffix(".weight") + suffix] = torch.tensor(0.5)

    edit_tensors(folder, replace)
    edit_json(folder / "config.json", quantization_config=quantization)
    return exact


def deepseek(block, **changes):
    size = None if block is None else list(block)
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": size,
    } | changes


def compressed(strategy, kind="float-quantized", **weights):
    """Return the quantization_config of compressed-tensors; `weights` change its one group."""
    values = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy} | weights
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": values, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "sparsity_config": {"format": "dense", "sparsity_structure": "unstructured"},
        "quantization_status": "compressed",
    }


# name of the case -> arguments of write_fp8
KINDS = {
    "blocks of 128": ((128, 128), deepseek((128, 128)), "_scale_inv"),
    "default blocks": ((128, 128), {"quant_method": "fp8"}, "_scale_inv"),
    "scales in bfloat16": ((64, 64), deepseek((64, 64)), "_scale_inv", torch.Tensor.bfloat16),
    "one scale and static activations": (
        (None, None),
        deepseek(None, activation_scheme="static"),
        "_scale_inv",
        lambda scale: scale.bfloat16().view(()),
        [".activation_scale"],
    ),
    "one scale a tensor": (
        (None, None),
        compressed("tensor"),
        "_scale",
        lambda scale: scale.view(1),
        [".input_scale"],
    ),
    "one scale a row": ((1, None), compressed("channel"), "_scale", torch.Tensor.bfloat16),
    "weights alone": ((1, None), compressed("channel", "naive-quantized"), "_scale"),
    "blocks of compressed-tensors": (
        (32, 64),
        compressed("block", block_structure=[32, 64]),
        "_scale",
    ),
    "groups of columns": ((1, 32), compressed("group", group_size=32), "_scale"),
}


def make_fp8(folder, kind="blocks of 128", **options):
    """Write a tiny model in FP8 with partial blocks, and return its exact float32 values."""
    make_tiny_model(folder, hidden=192, heads=4, kv_heads=2, ffn=320, tie=False, **options)
    return write_fp8(folder, *KINDS[kind])
