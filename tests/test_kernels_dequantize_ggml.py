"""Dequantisation of the GGUF block types: bit for bit the values of gguf-py, rounded once."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType
from gguf import quants
from kernel_checks import DTYPES, in_each_dtype, kernel

from minitune.kernels import dequantize_ggml as dequantize_ggml_file
from minitune.kernels.dequantize_ggml import (
    GgmlStorage,
    dequantize_ggml,
    dequantize_ggml_reference,
    embed_ggml,
)
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
    assert same_bits(dequantize_ggml_reference(weight, dtype), of_gguf(weight).to(dtype))


@kernel
@in_each_dtype
@each_type
def test_values_of_the_kernel_are_those_of_gguf_rounded_once(name, dtype, device):
    weight = random_blocks(name, 9, 3, device)
    assert same_bits(dequantize_ggml(weight, dtype), of_gguf(weight).to(dtype))


@kernel
@each_type
# Rows that are longer and shorter than a program, with and without a last program that is full.
@pytest.mark.parametrize(("rows", "blocks"), [(8, 2), (3, 5), (1, 1)])
def test_the_kernel_takes_weights_of_every_size(name, rows, blocks, device):
    weight = random_blocks(name, rows, blocks, device)
    assert same_bits(dequantize_ggml(weight, torch.float32), of_gguf(weight))


@kernel
def test_weights_of_several_types_fill_a_range_of_columns_of_wider_rows(device):
    kinds = {"Q4_K": 4, "Q6_K": 5, "Q8_0": 1, "Q4_0": 2}
    weights = [
        random_blocks(name, rows, 768 // BLOCK_SIZES[name][0], device)
        for name, rows in [*kinds.items(), ("Q4_K", 3), ("Q6_K", 16)]
    ]
    for chosen in (weights, weights[:1], weights[4:5] * 3):
        rows = sum(weight.shape[0] for weight in chosen)
        wide = torch.full((rows + 2, 768 + 5), 7.0, device=device)
        out = wide[1:-1, :768]
        assert dequantize_ggml(chosen, torch.float32, out=out) is out
        assert same_bits(out, torch.cat([of_gguf(weight) for weight in chosen]))
        assert (wide[:, 768:] == 7).all() and (wide[[0, -1]] == 7).all()


@kernel
def test_weights_of_one_type_take_one_launch(device, monkeypatch):
    launches = []
    monkeypatch.setattr(dequantize_ggml_file, "_launch", lambda *pairs: launches.append(pairs))
    a, b = random_blocks("Q4_K", 4, 2, device), random_blocks("Q6_K", 4, 2, device)
    dequantize_ggml([a, b, a], torch.float32)
    assert [[w.type for w in weights] for weights, _ in launches] == [["Q4_K"] * 2, ["Q6_K"]]


@kernel
@in_each_dtype
@each_type
def test_the_embedding_returns_rows_times_a_multiplier_rounded_once(name, dtype, device):
    weight = random_blocks(name, 50, 5, device)
    ids = torch.tensor([3, 49, 3, 0], device=device)
    rows = of_gguf(weight)[ids]
    assert same_bits(embed_ggml(ids.int(), weight, dtype), rows.to(dtype))
    assert same_bits(embed_ggml(ids, weight, dtype, 0.3), (rows * 0.3).to(dtype))
    assert embed_ggml(ids[:0], weight, dtype).shape == (0, weight.shape[1])


def test_the_embedding_in_pytorch_multiplies_before_it_rounds():
    weight = random_blocks("Q5_K", rows=50, blocks=2)
    ids = torch.tensor([3, 49, 3, 0])
    rows = of_gguf(weight)[ids]
    assert same_bits(embed_ggml(ids, weight, torch.float16, 0.3), (rows * 0.3).half())
    exact = rows.double() * 0.3
    assert same_bits(embed_ggml(ids, weight, torch.float64, 0.3), exact)


@pytest.mark.gpu
@each_type
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_whole_linears_on_a_gpu_equal_gguf(name, dtype):
    weights = [
        random_blocks(name, rows, 4096 // BLOCK_SIZES[name][0], "cuda") for rows in (512, 128, 131)
    ]
    out = torch.empty(771, 4096 + 48, dtype=dtype, device="cuda")[:, :4096]
    dequantize_ggml(weights, dtype, out=out)
    assert same_bits(out, torch.cat([of_gguf(weight) for weight in weights]).to(dtype))


@pytest.mark.gpu
@each_type
def test_a_gpu_embeds_rows_of_pinned_host_memory(name):
    weight = random_blocks(name, 300, 4096 // BLOCK_SIZES[name][0])
    pinned = replace(weight, blocks=weight.blocks.pin_memory())
    ids = torch.randint(0, 300, (1000,), device="cuda")
    expected = of_gguf(weight)[ids.cpu()].bfloat16()
    assert same_bits(embed_ggml(ids, pinned, torch.bfloat16).cpu(), expected)


@pytest.mark.gpu
def test_weights_of_more_than_two_billion_values_are_dequantised_to_their_end():
    rows, blocks = 70_000, 1024
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of GPU memory")
    stored = torch.zeros(rows, blocks * 34, dtype=torch.uint8, device="cuda")
    weight = GgmlStorage(stored, "Q8_0", (rows, blocks * 32))
    part = random_blocks("Q8_0", 100, blocks, "cuda")
    stored[-100:] = part.blocks
    assert same_bits(dequantize_ggml(weight, torch.bfloat16)[-100:], of_gguf(part).bfloat16())
    ids = torch.arange(rows - 100, rows, device="cuda")
    assert same_bits(embed_ggml(ids, weight, torch.bfloat16), of_gguf(part).bfloat16())


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


@kernel
def test_blocks_at_an_address_that_a_load_cannot_take_are_refused(device):
    weight = random_blocks("Q4_K", 3, 1, device)
    shifted = torch.cat([weight.blocks.new_zeros(4), weight.blocks.view(-1)])[4:].view(3, -1)
    weight = replace(weight, blocks=shifted)
    with pytest.raises(ValueError, match=r"a multiple of 8, which blocks.clone\(\) has"):
        dequantize_ggml(weight, torch.float32)
    with pytest.raises(ValueError, match=r"a multiple of 8, which blocks.clone\(\) has"):
        embed_ggml(torch.zeros(1, dtype=torch.int64, device=device), weight, torch.float32)
