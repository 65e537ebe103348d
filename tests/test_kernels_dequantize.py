"""NF4 dequantisation: the kernel equals its reference bit for bit, and that bitsandbytes."""

from dataclasses import replace

import pytest
import torch
from kernel_checks import CODE, in_each_dtype, kernel, normal, quantised

from minitune.kernels.dequantize_nf4 import NF4Storage, dequantize_nf4, dequantize_nf4_reference


@kernel
@in_each_dtype
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("shape", [(3, 423), (130, 256), (1, 64)])
def test_dequantize_kernel_equals_the_reference_bit_for_bit(shape, nested, dtype, device):
    weight = quantised(shape, nested, device=device)
    assert torch.equal(dequantize_nf4(weight, dtype), dequantize_nf4_reference(weight, dtype))


@kernel
@pytest.mark.parametrize("width", [192, 423])
def test_several_weights_fill_a_range_of_columns_of_wider_rows(width, device):
    weights = [
        quantised((rows, width), nested, device=device)
        for rows, nested in ((70, True), (3, True), (1, False))
    ]
    for chosen in (weights[:2], weights):  # stored in one way (one launch), then in two
        rows = sum(weight.shape[0] for weight in chosen)
        wide = torch.full((rows + 2, width + 5), 7.0, device=device)
        out = wide[1:-1, :width]
        assert dequantize_nf4(chosen, torch.float32, out=out) is out
        expected = torch.cat([dequantize_nf4_reference(w, torch.float32) for w in chosen])
        assert torch.equal(out, expected)
        assert (wide[:, width:] == 7).all() and (wide[[0, -1]] == 7).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_dequantize_reference_equals_bitsandbytes_bit_for_bit(nested, dtype):
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = normal(96, 200, dtype=dtype)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, compress_statistics=nested, quant_type="nf4"
    )
    scales = {}
    if nested:
        scales = {
            "nested_absmax": state.state2.absmax,
            "nested_code": state.state2.code,
            "nested_offset": state.offset,
        }
    mine = NF4Storage(packed, state.absmax, state.code, (96, 200), **scales)
    assert torch.equal(dequantize_nf4(mine, dtype), bnb.dequantize_4bit(packed, state))


def test_dequantize_reference_is_the_formula_over_several_chunks(monkeypatch):
    monkeypatch.setattr("minitune.kernels.dequantize_nf4.CHUNK_BYTES", 128)
    weight = quantised((30, 128), nested=True)
    nibbles = torch.stack([weight.packed >> 4, weight.packed & 15], dim=1).flatten().int()
    block = torch.arange(30 * 128) // 64
    scale = weight.nested_code[weight.absmax.int()[block]] * weight.nested_absmax[block // 256]
    expected = CODE[nibbles] * (scale + weight.nested_offset)
    assert torch.equal(dequantize_nf4(weight, torch.float32).flatten(), expected)


def test_dequantize_refuses_sizes_that_do_not_fit_the_shape():
    weight = quantised((4, 64), nested=False)
    with pytest.raises(ValueError, match=r"packed holds 128 bytes; shape \(5, 64\) needs 160"):
        dequantize_nf4(replace(weight, shape=(5, 64)), torch.float32)
    with pytest.raises(ValueError, match="3 scales; 256 elements in blocks of 64 need 4"):
        dequantize_nf4(replace(weight, absmax=torch.ones(3)), torch.float32)
    with pytest.raises(ValueError, match="differ in in_features"):
        dequantize_nf4([weight, quantised((4, 128), nested=False)], torch.float32)
