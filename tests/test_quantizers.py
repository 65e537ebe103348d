"""Quantisers: the bytes of each GGUF type against ggml's."""

import hashlib

import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType
from referees.ggml_quantizers import (
    FLOAT_TYPES,
    SIMPLE_TYPES,
    cases,
    golden_data,
    seeded_inputs,
)

from minitune.gguf.quantization import quantize as door
from minitune.gguf.quantization.quantize import quantize

GOLDEN = golden_data()
INPUTS = seeded_inputs()
SEARCHED = (*SIMPLE_TYPES, "IQ4_NL", "IQ4_XS")  # the K types have a file of their own


@pytest.mark.parametrize("name", [*FLOAT_TYPES, *SIMPLE_TYPES])
def test_bytes_equal_those_of_ggml(name):
    for case in cases(INPUTS, (name,)):
        if case.importance is None:
            expected = GOLDEN[case.name].sha256
            assert hashlib.sha256(case.ours().tobytes()).digest() == expected, case.name


@pytest.mark.parametrize("name", SEARCHED)
def test_searched_blocks_and_errors_equal_those_of_ggml(name):
    for case in cases(INPUTS, (name,)):
        data, expected = case.ours(), GOLDEN[case.name]
        identical = (case.digests(data) == expected.digests).mean()
        # Of subnormal and signed zeros, a search with an importance may choose other bytes.
        assert identical >= 0.95 or case.input_name == "edges", f"{case.name}: {identical:.1%}"
        assert case.rmse(data) == pytest.approx(expected.error, rel=1e-3), case.name


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*FLOAT_TYPES, *SIMPLE_TYPES])
def test_bytes_of_a_gpu_equal_those_of_the_cpu(name):
    for input_name, values in INPUTS.items():
        values = torch.from_numpy(values)
        on_gpu = quantize(values.cuda(), GGMLType[name])
        assert torch.equal(on_gpu.cpu(), quantize(values, GGMLType[name])), input_name


@pytest.mark.parametrize("name", ["F16", "Q4_0"])
@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_and_threads_do_not_change_the_bytes(name, threads, monkeypatch):
    values = torch.from_numpy(INPUTS["Student"]).view(-1, 256)
    whole = quantize(values, GGMLType[name])
    monkeypatch.setattr(door, "CPU_CHUNK", 1)
    monkeypatch.setattr(door, "ROW_GROUP", 3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(quantize(values, GGMLType[name]), whole)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q5_1"])
def test_other_dtypes_give_the_bytes_of_their_float32_values(name, dtype):
    values = torch.from_numpy(INPUTS["Gaussian"]).to(dtype)
    assert torch.equal(quantize(values, GGMLType[name]), quantize(values.float(), GGMLType[name]))


def test_a_transposed_view_and_a_vector_are_quantised_as_their_rows():
    values = torch.from_numpy(INPUTS["Gaussian"])[:, :64]
    view = values.t().contiguous().t()
    data = quantize(values, GGMLType.Q8_0)
    assert torch.equal(quantize(view, GGMLType.Q8_0), data)
    assert torch.equal(quantize(values[3], GGMLType.Q8_0), data[3])


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
