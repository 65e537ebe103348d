"""Dequantisers: the values of each GGUF type against gguf-py's."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as GGMLType

from minitune.gguf.quantization import quantize as door
from minitune.gguf.quantization.quantize import FLOAT_DTYPES, dequantize
from minitune.kernels.ggml_reference import BLOCK_DEQUANTIZERS, BLOCK_SIZES

TYPES = [*(kind.name for kind in FLOAT_DTYPES), *BLOCK_DEQUANTIZERS]
FLOAT16_STARTS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}  # otherwise 0, or 0 and 2
TWO_FLOATS = ("Q4_1", "Q5_1", "Q4_K", "Q5_K")


def random_bytes(name: str, rows: int = 96, blocks: int = 8) -> np.ndarray:
    """Return rows of random blocks whose floats are finite."""
    block_bytes = GGML_QUANT_SIZES[GGMLType[name]][1]
    random = np.random.default_rng(5)
    if GGMLType[name] in FLOAT_DTYPES:
        values = random.standard_normal((rows, 64)).astype(np.float32)
        return quants.quantize(values, GGMLType[name]).view(np.uint8)
    data = random.integers(0, 256, (rows, blocks, block_bytes), dtype=np.uint8)
    for start in FLOAT16_STARTS.get(name, (0, 2) if name in TWO_FLOATS else (0,)):
        floats = random.standard_normal((rows, blocks)).astype(np.float16)
        floats[::7] *= np.float16(2e-6)  # subnormal in float16
        floats[::5] = -0.0
        data[:, :, start : start + 2] = floats[..., None].view(np.uint8)
    return data.reshape(rows, -1)


def bits(values: np.ndarray) -> np.ndarray:
    """Return float32 values as integers, which tell -0 from 0."""
    return np.ascontiguousarray(values).view(np.int32)


@pytest.mark.parametrize("name", TYPES)
def test_values_equal_those_of_gguf_to_the_bit(name, monkeypatch):
    data = random_bytes(name)
    expected = quants.dequantize(data, GGMLType[name])
    found = dequantize(torch.from_numpy(data), GGMLType[name])
    assert np.array_equal(bits(found.numpy()), bits(expected))
    monkeypatch.setattr(door, "CPU_CHUNK", 1)
    assert torch.equal(dequantize(torch.from_numpy(data), GGMLType[name]), found)


@pytest.mark.parametrize("name", TYPES)
def test_every_level_with_every_scale_equals_gguf_to_the_bit(name):
    """Each byte of a block takes each of its 256 values while the other bytes are random."""
    if GGMLType[name] in FLOAT_DTYPES:
        pytest.skip("it has no blocks")
    block_bytes = GGML_QUANT_SIZES[GGMLType[name]][1]
    data = random_bytes(name, rows=256, blocks=2).reshape(256, 2, block_bytes)
    starts = FLOAT16_STARTS.get(name, (0, 2) if name in TWO_FLOATS else (0,))
    floats = {start + byte for start in starts for byte in (0, 1)}
    for position in sorted(set(range(block_bytes)) - floats):
        data[:, 0, position] = (np.arange(256) * 37 + position) % 256
    data = data.reshape(256, -1)
    found = dequantize(torch.from_numpy(data), GGMLType[name]).numpy()
    assert np.array_equal(bits(found), bits(quants.dequantize(data, GGMLType[name])))


@pytest.mark.gpu
@pytest.mark.parametrize("name", TYPES)
def test_values_of_a_gpu_equal_those_of_the_cpu(name):
    data = torch.from_numpy(random_bytes(name))
    assert torch.equal(
        dequantize(data.cuda(), GGMLType[name]).cpu(), dequantize(data, GGMLType[name])
    )


@pytest.mark.parametrize("name", BLOCK_DEQUANTIZERS)
def test_a_single_block_at_an_odd_address_is_read(name):
    width, block_bytes = BLOCK_SIZES[name]
    row = torch.from_numpy(random_bytes(name, rows=1))
    expected = dequantize(row, GGMLType[name])[0, :width]
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), row[0]])[1:]
    block = shifted[None, :block_bytes]
    assert torch.equal(dequantize(block, GGMLType[name])[0], expected)


def test_the_sizes_of_blocks_are_those_of_gguf():
    assert {name: GGML_QUANT_SIZES[GGMLType[name]] for name in BLOCK_DEQUANTIZERS} == BLOCK_SIZES
