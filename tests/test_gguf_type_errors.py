"""The known error of a type is above that of a good quantiser and below that of a wrong layout."""

import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as GGMLType

from minitune.gguf.quantization.quantize import dequantize, quantize
from minitune.gguf.type_errors import STEPS, error_limit

ROWS, WIDTH = 64, 1024


def values_of(kind):
    """Return weights (ROWS, WIDTH) of a kind."""
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(ROWS, WIDTH, generator=generator)
    other = torch.randn(ROWS, WIDTH, generator=generator)
    kinds = {
        "normal": normal,
        "heavy-tailed": normal / other.abs().clamp(min=1e-3),
        "one side": normal.abs(),
        "two values": normal.sign(),
        "constant": torch.full((ROWS, WIDTH), 0.37),
        "zero": torch.zeros(ROWS, WIDTH),
        "tiny": 1e-7 * normal,
        "scales of their own": normal * torch.exp(2 * other[:, ::16]).repeat_interleave(16, 1),
        "shifted": normal + 3,
    }
    return kinds[kind]


@pytest.mark.parametrize("importance", [None, 2.0], ids=["plain", "importance"])
@pytest.mark.parametrize("kind", STEPS, ids=lambda kind: kind.name)
def test_a_good_quantiser_stays_below_the_known_error(kind, importance):
    names = ("normal", "heavy-tailed", "one side", "two values", "constant", "zero", "tiny")
    if importance is not None:
        spread = torch.randn(WIDTH, generator=torch.Generator().manual_seed(5))
        importance = torch.exp(importance * spread)
    for name in (*names, "scales of their own", "shifted"):
        values = values_of(name)
        back = dequantize(quantize(values, kind, importance), kind)
        error = (back - values).square().mean(dtype=torch.float64)
        assert error <= error_limit(values, kind), name


def wrong_scales(data, kind):
    """Return blocks whose scales belong to the next block."""
    blocks = data.view(-1, GGML_QUANT_SIZES[kind][1]).clone()
    scale = slice(-2, None) if kind in (GGMLType.Q3_K, GGMLType.Q6_K) else slice(0, 2)
    if kind == GGMLType.Q2_K:
        scale = slice(0, 16)
    blocks[:, scale] = blocks[:, scale].roll(1, 0)
    return blocks.view(data.shape)


def wrong_values(data, kind):
    """Return blocks whose codes stand in the opposite order."""
    block = GGML_QUANT_SIZES[kind][1]
    blocks = data.view(-1, block).clone()
    codes = slice(2, block // 2) if kind in (GGMLType.Q3_K, GGMLType.Q6_K) else slice(20, None)
    if block < 40:
        codes = slice(6, None)
    blocks[:, codes] = blocks[:, codes].flip(1)
    return blocks.view(data.shape)


@pytest.mark.parametrize("damage", [wrong_scales, wrong_values])
@pytest.mark.parametrize("kind", STEPS, ids=lambda kind: kind.name)
def test_a_wrong_layout_is_above_the_known_error(kind, damage):
    values = values_of("scales of their own")
    data = damage(quantize(values, kind), kind)
    error = (dequantize(data, kind) - values).square().mean(dtype=torch.float64)
    assert not error <= error_limit(values, kind)  # a wrong scale may be NaN
