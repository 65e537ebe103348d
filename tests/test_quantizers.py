"""Quantisers: the bytes of each GGUF type against gguf-py and ggml."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType

from minitune.gguf.quantization.quantize import quantize


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0"])
def test_bytes_equal_those_of_gguf(name):
    values = torch.randn(37, 96, generator=torch.Generator().manual_seed(1))
    expected = gguf.quants.quantize(values.numpy(), GGMLType[name]).view(np.uint8)
    assert np.array_equal(quantize(values, GGMLType[name]).numpy(), expected)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["F32", "BF16", "Q8_0"])
def test_values_that_are_not_finite_are_refused(name, value):
    with pytest.raises(ValueError, match="finite"):
        quantize(torch.tensor([[0.0] * 31 + [value]]), GGMLType[name])


@pytest.mark.parametrize("name", ["F16", "Q8_0"])
def test_values_beyond_float16_are_refused(name):
    with pytest.raises(ValueError, match="70000 does not fit into float16; export as bf16"):
        quantize(torch.full((1, 32), -70000.0), GGMLType[name])


def test_a_width_without_whole_blocks_is_refused():
    with pytest.raises(ValueError, match="rows of 48 values have no whole number of Q8_0 blocks"):
        quantize(torch.zeros(1, 48), GGMLType.Q8_0)
