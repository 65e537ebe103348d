"""NF4 against bitsandbytes: equal nibbles, offset and nested scales, nearest 8-bit codes."""

import pytest
import torch

from minitune.model.nf4 import CODE, NF4, dynamic_map, nf4_code

CPU = torch.device("cpu")


def bnb_quantize(weight):
    functional = pytest.importorskip("bitsandbytes.functional")
    return functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )


def test_code_and_dynamic_map_equal_bitsandbytes_bit_for_bit():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(nf4_code(CPU), functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_map(CPU), functional.create_dynamic_map())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 64), (213, 64), (96, 576), (1024, 1024)])
def test_quantized_weight_equals_bitsandbytes(shape, dtype):
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    packed, state = bnb_quantize(weight)
    ours = NF4.quantize(weight)
    assert torch.equal(ours.packed, packed.view(-1))
    assert torch.equal(ours.nested_offset, state.offset)
    assert torch.equal(ours.nested_absmax, state.state2.absmax)
    scales = weight.float().view(-1, 64).abs().amax(1) - state.offset
    unit = scales / ours.nested_absmax.repeat_interleave(256)[: len(scales)]
    distance = (unit[:, None].double() - dynamic_map(CPU).double()).abs()
    assert torch.allclose(
        distance.gather(1, ours.absmax[:, None].long())[:, 0], distance.amin(1), atol=1e-7
    )


def test_values_on_a_tie_and_blocks_of_zeros_are_quantised_as_bitsandbytes_does():
    ties = (torch.tensor(CODE)[:-1] + torch.tensor(CODE)[1:]) / 2
    weight = torch.zeros(4, 64)
    weight[0, :15], weight[0, 15] = ties, 1.0
    weight[1] = weight[0] * 3.7
    weight[2, :16] = torch.tensor(CODE)
    assert torch.equal(NF4.quantize(weight).packed, bnb_quantize(weight)[0].view(-1))
    assert NF4.quantize(weight).dequantize(torch.float32)[3].abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantised_values_equal_bitsandbytes_given_the_same_codes(dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(128, 192, generator=torch.Generator().manual_seed(1))
    packed, state = bnb_quantize(weight)
    state.absmax, state.dtype = NF4.quantize(weight).absmax, dtype
    assert torch.equal(
        NF4.quantize(weight).dequantize(dtype), functional.dequantize_4bit(packed, state)
    )


def test_a_weight_takes_4_127_bits_a_parameter():
    ours = NF4.quantize(torch.randn(512, 512))
    assert abs(ours.nbytes * 8 / 512**2 - 4.127) < 0.001


def test_a_weight_that_does_not_divide_into_blocks_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 7\) does not divide into blocks of 64"):
        NF4.quantize(torch.zeros(3, 7))
