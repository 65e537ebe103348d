"""The weights of a GGUF file are those of the exported folder, in Hugging Face's order."""

import warnings

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_tiny_model
from tiny_families import make_tiny_family

from minitune.config.model_config import ModelConfig
from minitune.gguf.base.open_gguf import open_gguf, read_config
from minitune.gguf.export import convert_folder
from minitune.gguf.file_weights import FileWeights
from minitune.gguf.quantization.quantize import dequantize

# One case for each family, and those with biases and with a head of its own.
CASES = (
    "mistral",
    "ministral3",
    "qwen2",
    "qwen3",
    "smollm3",
    "granite tied",
    "phi3",
    "olmo2",
    "olmo3",
    "gemma2",
    "gemma3",
)
ROUNDING = 1e-6  # of Gemma's norms, from which the file's offset is subtracted
# Half a step of 8 bits of the largest value, and the rounding of the step to float16.
STEP = 0.57 / 127


def open_weights(path):
    reader = open_gguf(path)
    return FileWeights(reader, ModelConfig.from_dict(read_config(reader)))


def check_weights(folder):
    """Check `load` of a float32 file against the folder, and `blocks` of a file in 8 bit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of windows that llama.cpp ignores
        paths = convert_folder(folder, folder, ["f32", "q8_0"], verify=False)
    exact, quantized = map(open_weights, paths)
    stored = load_file(folder / "model.safetensors")
    assert sorted(exact.config.tensor_shapes()) == sorted(stored)
    for name, values in stored.items():
        values = values.float()
        offset = exact.config.architecture.norm_offset if values.dim() == 1 else 0.0
        assert (exact.load(name) - values).abs().max() <= ROUNDING * offset, name
        if values.dim() == 1:
            continue
        blocks = quantized.blocks(name)
        assert torch.equal(dequantize(blocks, quantized.type_of(name)), quantized.load(name)), name
        assert blocks.nbytes == quantized.nbytes(name)
        assert (quantized.load(name) - values).abs().max() <= values.abs().max() * STEP, name


@pytest.mark.parametrize("case", CASES)
def test_the_weights_of_a_family_come_back_from_its_file(tmp_path, case):
    check_weights(make_tiny_family(tmp_path / "base", case))


def test_rows_and_biases_of_heads_come_back_in_order(tmp_path):
    folder = make_tiny_model(
        tmp_path / "base", attention_bias=True, tie=False, head_dim=32, dtype=torch.float32
    )
    check_weights(folder)


def test_a_row_of_blocks_is_moved_as_a_whole(tmp_path):
    folder = make_tiny_model(tmp_path / "base", hidden=64, heads=2, kv_heads=1, head_dim=32)
    weights = open_weights(convert_folder(folder, tmp_path / "x.gguf", "q8_0", verify=False))
    stored = weights.reader.data("blk.0.attn_q.weight")
    blocks = weights.blocks("model.layers.0.self_attn.q_proj.weight")
    for row in range(64):
        head, pair = divmod(row, 32)
        place = 2 * (pair % 16) + pair // 16  # of row i or i + 16 of a head, in pairs
        assert torch.equal(blocks[row], stored[32 * head + place])
