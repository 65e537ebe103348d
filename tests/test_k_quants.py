"""K types: blocks and errors against ggml's golden data, and properties of the searches."""

import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType
from referees.ggml_quantizers import ExactRandom, cases, golden_data, seeded_inputs

from minitune.gguf.quantization.k_quants import K_QUANTIZERS
from minitune.gguf.quantization.k_searches import EAGER_STEPS, Steps
from minitune.gguf.quantization.quantize import dequantize, quantize

GOLDEN = golden_data()
INPUTS = seeded_inputs()
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
AFFINE = {"Q2_K": (16, 3), "Q4_K": (32, 15), "Q5_K": (32, 31)}  # sub-block, largest level
SYMMETRIC = {"Q3_K": 4, "Q6_K": 32}  # magnitude of the lowest level


def round_trip(values, name, importance=None):
    return dequantize(quantize(values, GGMLType[name], importance), GGMLType[name])


def rmse(values, restored, weight=1.0):
    return (weight * (restored - values).square()).mean().sqrt().item()


def nearest(values, name):
    """Return the values, rounded with float32 scales that span each sub-block."""
    if name in SYMMETRIC:
        blocks, lowest = values.view(-1, 16), SYMMETRIC[name]
        peak = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        scale = peak / -lowest
        return ((blocks / scale).round().clamp(-lowest, lowest - 1) * scale).view_as(values)
    size, levels = AFFINE[name]
    blocks = values.view(-1, size)
    low = blocks.amin(1, keepdim=True).clamp(max=0)
    scale = (blocks.amax(1, keepdim=True) - low) / levels
    return (((blocks - low) / scale).round() * scale + low).view_as(values)


@pytest.mark.parametrize("name", TYPES)
def test_blocks_and_errors_equal_those_of_ggml(name):
    for case in cases(INPUTS, (name,)):
        data, expected = case.ours(), GOLDEN[case.name]
        identical = (case.digests(data) == expected.digests).mean()
        assert identical >= 0.95, f"{case.name}: {identical:.1%}"
        assert case.rmse(data) == pytest.approx(expected.error, rel=1e-3), case.name


@pytest.mark.gpu
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_and_errors_of_a_gpu_equal_those_of_the_cpu(name, weighted):
    random = ExactRandom(3)
    importance = torch.linspace(0.1, 2, 1024) if weighted else None
    for draw in (random.normal, random.student):
        values = torch.from_numpy(0.02 * draw(1 << 19)).float().view(-1, 1024)
        on_cpu = quantize(values, GGMLType[name], importance)
        on_gpu = quantize(
            values.cuda(), GGMLType[name], importance.cuda() if weighted else None
        ).cpu()
        same = (on_gpu == on_cpu).view(values.numel() // 256, -1).all(1)
        assert same.float().mean() >= 0.95, draw.__name__
        errors = [rmse(values, dequantize(data, GGMLType[name])) for data in (on_gpu, on_cpu)]
        assert errors[0] == pytest.approx(errors[1], rel=5e-3), draw.__name__


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_zeros_stay_zeros(name, weighted):
    values = torch.zeros(4, 512)
    importance = torch.linspace(0, 2, 512) if weighted else None
    assert not round_trip(values, name, importance).any()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_constant_blocks_are_restored_up_to_the_rounding_of_float16(name, weighted):
    values = torch.tensor([-3.0, -0.5, 0.4, 1.0])[:, None].expand(4, 512).contiguous()
    importance = torch.linspace(0.1, 2, 512) if weighted else None
    assert torch.allclose(round_trip(values, name, importance), values, rtol=2e-3)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_power_of_two_scales_the_restored_values(name, weighted):
    values = torch.from_numpy(INPUTS["Student"])
    importance = torch.linspace(0, 2, values.shape[1]) if weighted else None
    restored = round_trip(64 * values, name, importance)
    assert torch.equal(round_trip(128 * values, name, importance), 2 * restored)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("input_name", ["Gaussian", "Student"])
def test_the_error_is_below_that_of_scales_that_span_the_sub_blocks(name, input_name):
    values = torch.from_numpy(INPUTS[input_name])
    assert rmse(values, round_trip(values, name)) < rmse(values, nearest(values, name))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("input_name", ["Gaussian", "Student"])
def test_an_importance_lowers_the_error_that_it_weighs(name, input_name):
    values = torch.from_numpy(INPUTS[input_name])
    importance = torch.exp(torch.randn(1024, generator=torch.Generator().manual_seed(0)))
    plain = rmse(values, round_trip(values, name), importance)
    assert rmse(values, round_trip(values, name, importance), importance) < plain


def test_torch_compile_traces_each_step_as_one_graph_with_equal_bytes():
    traced = [
        torch.compile(step, backend="eager", fullgraph=True, dynamic=True) for step in EAGER_STEPS
    ]
    blocks = torch.from_numpy(INPUTS["Gaussian"]).view(-1, 256)
    importance = torch.linspace(0, 2, 256).expand_as(blocks)
    for name in ("Q2_K", "Q3_K"):  # sums of 16 terms have the same order when traced
        quantizer = K_QUANTIZERS[GGMLType[name]]
        data = quantizer(blocks, importance, None, Steps(*traced))
        assert torch.equal(data, quantizer(blocks, importance, None)), name
