"""Attention with a soft cap of the scores, against PyTorch, within kernel_checks.py's bound."""

import functools

import pytest
import torch
from kernel_checks import (
    as_function,
    bounds,
    double,
    in_each_dtype,
    judge,
    kernel,
    normal,
    plain_attention,
)

from minitune.kernels import attention as attention_fwd
from minitune.kernels import attention_backward as attention_bwd
from minitune.kernels.attention import attention, attention_backward
from minitune.model.packed_sequences import PackedSequences

LENGTHS = [3, 1, 60, 17]


def attention_inputs(H, G, K, dtype, device):
    """Return (dout, q, k, v) of packed samples of LENGTHS, and their start, end and mask."""
    N = sum(LENGTHS)
    shapes = (N, H, K), (N, H, K), (N, G, K), (N, G, K)
    tensors = [normal(*s, dtype=dtype, device=device, seed=i) for i, s in enumerate(shapes)]
    start, end = bounds(LENGTHS, device)
    row = torch.arange(N, device=device)
    return tensors, start, end, (row <= row[:, None]) & (row >= start[:, None])


@kernel
@in_each_dtype
@pytest.mark.parametrize("softcap", [0.5, 50.0])
@pytest.mark.parametrize("max_seqlen", [1, 10**6], ids=["short", "long"])
def test_capped_attention_and_its_backward_err_at_most_twice_as_much_as_pytorch(
    max_seqlen, softcap, dtype, device
):
    """Scores spread by 5: at a cap of 0.5 most of them are at the cap."""
    (dout, *inputs), start, end, seen = attention_inputs(2, 1, 24, dtype, device)
    options = {"max_seqlen": max_seqlen, "softcap": softcap}
    out, lse = attention(*inputs, start, end, 1.0, **options)
    grads = attention_backward(dout, *inputs, out, lse, start, end, 1.0, **options)
    formula = functools.partial(plain_attention, seen=seen, scale=1.0, softcap=softcap)
    judge([out, lse, *grads], formula, inputs, [dout, torch.zeros_like(lse)])


def test_the_references_equal_capped_scores_in_float64():
    (dout, *inputs), start, end, seen = attention_inputs(4, 2, 8, torch.float64, "cpu")
    out, lse = attention(*inputs, start, end, 1.0, softcap=3.0)
    grads = attention_backward(dout, *inputs, out, lse, start, end, 1.0, softcap=3.0)
    formula = functools.partial(plain_attention, seen=seen, scale=1.0, softcap=3.0)
    judge([out, lse, *grads], formula, inputs, [dout, torch.zeros_like(lse)])


def test_the_backward_of_the_capped_reference_with_a_window_passes_gradcheck():
    packed = PackedSequences.from_positions(torch.tensor([0, 0, 1, 2, 3])).windowed(2)
    rest = packed.start, packed.end, 0.9, 1.5

    def forward(q, k, v):
        out, lse = attention_fwd.attention_reference(q, k, v, *rest)
        return out, [out, lse]

    def backward(*inputs):
        return attention_bwd.attention_backward_reference(*inputs, *rest)

    inputs = double(5, 2, 8), double(5, 1, 8, seed=1), double(5, 1, 8, seed=2)
    assert torch.autograd.gradcheck(as_function(forward, backward), inputs)


def test_a_huge_cap_changes_nothing_beyond_rounding():
    (dout, *inputs), start, end, _ = attention_inputs(2, 1, 8, torch.float64, "cpu")
    results = []
    for softcap in (0.0, 1e9):
        out, lse = attention(*inputs, start, end, 1.0, softcap=softcap)
        grads = attention_backward(dout, *inputs, out, lse, start, end, 1.0, softcap=softcap)
        results.append([out, lse, *grads])
    for plain, capped in zip(*results, strict=True):
        torch.testing.assert_close(plain, capped, rtol=1e-6, atol=1e-6)


def test_cudnn_is_not_used_with_a_soft_cap(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("cuDNN has no soft cap")

    for module, name in ((attention_fwd, "attention"), (attention_bwd, "attention_backward")):
        monkeypatch.setattr(module, "cudnn_supports", lambda *arguments: True)
        monkeypatch.setattr(module, f"cudnn_{name}", refuse)
    q, (start, end) = normal(6, 2, 8), bounds([3, 3])
    options = {"uniform_seqlen": 3, "softcap": 2.0}
    out, lse = attention(q, q, q, start, end, 1.0, **options)
    attention_backward(q, q, q, q, out, lse, start, end, 1.0, **options)
    with pytest.raises(AssertionError, match="cuDNN has no soft cap"):
        attention(q, q, q, start, end, 1.0, uniform_seqlen=3)


def test_a_negative_soft_cap_is_refused():
    q, (start, end) = normal(6, 2, 8), bounds([3, 3])
    message = r"softcap -2\.0; expected above 0, or 0 for none"
    with pytest.raises(ValueError, match=message):
        attention(q, q, q, start, end, 1.0, softcap=-2.0)
    with pytest.raises(ValueError, match=message):
        attention_backward(q, q, q, q, q, normal(2, 6), start, end, 1.0, softcap=-2.0)
