"""Dequantisation of the GGUF block types: bit for bit the values of gguf-py, rounded once."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType
from gguf import quants
from kernel_checks import DTYPES

from minitune.kernels.dequantize_ggml import GgmlStorage, dequantize_ggml, embed_ggml
from minitune.kernels.ggml_reference import BLOCK_SIZES

FLOAT16_STARTS = {  # of a block's float16 numbers
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
each_type = pytest.mark.parametrize("name", BLOCK_SIZES)


def random_blocks(name: str, rows: int, blocks: int, device: str = "cpu") -> GgmlStorage:
    """Return a weight of random bytes with finite scales: some negative, subnormal or zero."""
    width, block_bytes = BLOCK_SIZES[name]
    random = np.random.default_rng(rows)
    data = random.integers(0, 256, (rows, blocks, block_bytes), dtype=np.uint8)
    for start in FLOAT16_STARTS.get(name, (0,)):
        floats = random.standard_normal((rows, blocks)).astype(np.float16).reshape(-1)
        floats[::7] *= np.float16(2e-6)  # subnormal in float16
        floats[::5] = -0.0
        data[:, :, start : start + 2] = floats.reshape(rows, blocks, 1).view(np.uint8)
    stored = torch.from_numpy(data.reshape(rows, -1)).to(device)
    return GgmlStorage(stored, name, (rows, blocks * width))


def of_gguf(weight: GgmlStorage) -> torch.Tensor:
    """Return gguf-py's float32 values on the weight's device."""
    values = quants.dequantize(weight.blocks.cpu().numpy(), GGMLType[weight.type])
    return torch.from_numpy(values).to(weight.blocks.device)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return True if two tensors are equal, also in the sign of their zeros."""
    return torch.equal(found, expected) and torch.equal(found.signbit(), expected.signbit())


@each_type
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_values_of_the_reference_are_those_of_gguf_rounded_once(name, dtype, monkeypatch):
    monkeypatch.setattr("minitune.kernels.dequantize_ggml.CHUNK_VALUES", 512)
    weight = random_blocks(name, rows=9, blocks=3)
    assert same_bits(dequantize_ggml(weight, dtype), of_gguf(weight).to(dtype))


@each_type
def test_the_reference_embeds_rows_times_a_multiplier_rounded_once(name):
    weight = random_blocks(name, rows=50, blocks=2)
    ids = torch.tensor([3, 49, 3, 0])
    assert same_bits(embed_ggml(ids, weight, torch.float16), of_gguf(weight)[ids].half())
    found = embed_ggml(ids, weight, torch.float16, 12.3)
    assert same_bits(found, (of_gguf(weight)[ids] * 12.3).half())


def test_wrong_types_and_sizes_are_refused():
    weight = random_blocks("Q4_K", rows=4, blocks=2)
    cases = {
        r"type is Q9_K; expected one of Q8_0, Q4_0": replace(weight, type="Q9_K"),
        r"in_features is 500; Q4_K needs a multiple of 256": replace(weight, shape=(4, 500)),
        r"blocks are \(4, 288\) torch.uint8; shape \(5, 512\) in Q4_K needs \(5, 288\)": replace(
            weight, shape=(5, 512)
        ),
        r"blocks have strides \(576, 1\)": replace(
            weight, blocks=torch.cat([weight.blocks, weight.blocks], 1)[:, :288]
        ),
    }
    for message, wrong in cases.items():
        with pytest.raises(ValueError, match=message):
            dequantize_ggml(wrong, torch.float32)
    with pytest.raises(ValueError, match="differ in in_features"):
        dequantize_ggml([weight, random_blocks("Q4_K", 4, 3)], torch.float32)
    with pytest.raises(ValueError, match=r"out is \(4, 511\) torch.float32; expected \(4, 512\)"):
        dequantize_ggml(weight, torch.float32, out=torch.empty(4, 511))
    with pytest.raises(ValueError, match=r"ids \(1, 2\); expected \(rows,\)"):
        embed_ggml(torch.tensor([[0, 1]]), weight, torch.float32)
