"""Attention with sliding windows, and the bounds that make them, against a mask and PyTorch."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import (
    as_function,
    double,
    in_each_dtype,
    judge,
    kernel,
    normal,
    plain_attention,
    strided,
)

from minitune.kernels import attention_common, attention_dkdv
from minitune.kernels.attention import attention, attention_backward, attention_reference
from minitune.kernels.attention_backward import attention_backward_reference
from minitune.model.packed_sequences import PackedSequences

LENGTHS = [3, 1, 90, 17]
WINDOWS = [1, 5, 16, 64, 1000]


def packed_samples(lengths, device="cpu"):
    """Return samples of these lengths, one behind the other."""
    positions = torch.cat([torch.arange(n) for n in lengths])
    return PackedSequences.from_positions(positions).to(torch.device(device))


def window_mask(lengths, window, device="cpu"):
    """Return the mask (N, N) of the keys that each row sees, from samples and distances."""
    sample = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    row = torch.arange(len(sample))
    distance = row[:, None] - row
    same = sample[:, None] == sample
    return (same & (distance >= 0) & (distance < window)).to(device)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 12))
def test_the_bounds_of_a_window_are_those_of_a_mask(lengths, window):
    packed = packed_samples(lengths).windowed(window)
    row = torch.arange(sum(lengths), dtype=torch.int32)
    expected = window_mask(lengths, window)
    by_start = (row <= row[:, None]) & (row >= packed.start[:, None])
    by_end = (row <= row[:, None]) & (row[:, None] < packed.end)
    assert torch.equal(by_start, expected) and torch.equal(by_end, expected)
    assert not (packed.start.diff() < 0).any() and not (packed.end.diff() < 0).any()
    assert packed.start.dtype == packed.end.dtype == torch.int32
    sequences = attention_common.sequence_bounds(packed.start)
    for a, b in sequences:
        hidden = attention_common.hidden_keys(packed.start, a, b)
        assert torch.equal(~hidden, expected[a:b, a:b])
        assert not expected[a:b, :a].any() and not expected[a:b, b:].any()
    assert [b for _, b in sequences[:-1]] == [a for a, _ in sequences[1:]]
    if window > 1:
        assert [b - a for a, b in sequences] == lengths


def test_a_window_keeps_positions_and_longest_sample_and_drops_the_uniform_length():
    packed = packed_samples([4, 4])
    windowed = packed.windowed(3)
    assert packed.uniform_seqlen == windowed.max_seqlen == 4 and windowed.uniform_seqlen is None
    assert torch.equal(windowed.positions, packed.positions)
    assert windowed.start.tolist() == [0, 0, 0, 1, 4, 4, 4, 5]
    assert windowed.end.tolist() == [3, 4, 4, 4, 7, 8, 8, 8]


def attention_inputs(N, H, G, K, dtype, device):
    """Return (dout, q, k, v), the latter three as slices of wider rows."""
    shapes = (N, H, K), (N, H, K), (N, G, K), (N, G, K)
    x = [normal(*s, dtype=dtype, device=device, seed=i) for i, s in enumerate(shapes)]
    return x[0], *map(strided, x[1:])


@kernel
@pytest.mark.parametrize(
    ("window", "dtype", "max_seqlen"),
    [
        *((window, torch.float32, 1) for window in WINDOWS),
        *((window, torch.float16, 10**6) for window in WINDOWS[::2]),
        (16, torch.float16, 1),
    ],
    ids=str,
)
def test_attention_with_a_window_errs_at_most_twice_as_much_as_pytorch(
    window, dtype, max_seqlen, device
):
    """The query heads of a group are split over two programs."""
    assert attention_dkdv.num_splits(4, 1, 2) == 2
    dout, *inputs = attention_inputs(sum(LENGTHS), 2, 1, 24, dtype, device)
    packed = packed_samples(LENGTHS, device).windowed(window)
    rest = packed.start, packed.end, 0.3
    out, lse = attention(*inputs, *rest, max_seqlen=max_seqlen)
    grads = attention_backward(dout, *inputs, out, lse, *rest, max_seqlen=max_seqlen)
    seen = window_mask(LENGTHS, window, device)
    formula = functools.partial(plain_attention, seen=seen, scale=0.3)
    judge([out, lse, *grads], formula, inputs, [dout, torch.zeros_like(lse)])


@pytest.mark.parametrize("window", WINDOWS)
def test_the_references_equal_a_mask_in_float64(window):
    dout, *inputs = attention_inputs(sum(LENGTHS), 4, 2, 8, torch.float64, "cpu")
    packed = packed_samples(LENGTHS).windowed(window)
    out, lse = attention(*inputs, packed.start, packed.end, 0.3)
    grads = attention_backward(dout, *inputs, out, lse, packed.start, packed.end, 0.3)
    seen = window_mask(LENGTHS, window)
    formula = functools.partial(plain_attention, seen=seen, scale=0.3)
    judge([out, lse, *grads], formula, inputs, [dout, torch.zeros_like(lse)])


def test_the_backward_of_the_reference_with_a_window_passes_gradcheck():
    packed = packed_samples([1, 4]).windowed(2)
    rest = packed.start, packed.end, 0.4

    def forward(q, k, v):
        out, lse = attention_reference(q, k, v, *rest)
        return out, [out, lse]

    def backward(dout, q, k, v, out, lse):
        return attention_backward_reference(dout, q, k, v, out, lse, *rest)

    inputs = double(5, 2, 8), double(5, 1, 8, seed=1), double(5, 1, 8, seed=2)
    assert torch.autograd.gradcheck(as_function(forward, backward), inputs)


@pytest.mark.parametrize("window", [None, 2])
def test_the_references_score_one_sample_at_a_time(window, monkeypatch):
    """The largest scores are those of the longest sample, also with a window."""
    largest = 0
    logsumexp = torch.logsumexp

    def record(x, **options):
        nonlocal largest
        largest = max(largest, x.numel())
        return logsumexp(x, **options)

    monkeypatch.setattr(torch, "logsumexp", record)
    packed = packed_samples([5, 7, 1, 3])
    packed = packed.windowed(window) if window else packed
    q = normal(16, 2, 8)
    attention(q, q, q, packed.start, packed.end, 1.0)
    assert largest == 2 * 7 * 7


# ---- GPU only


@pytest.mark.gpu
@in_each_dtype
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("window", [3, 100, 700])
def test_attention_with_a_window_holds_its_bound_at_real_sizes(window, softcap, dtype):
    lengths = [750, 7, 1243]
    dout, *inputs = attention_inputs(sum(lengths), 8, 2, 128, dtype, "cuda")
    packed = packed_samples(lengths, "cuda").windowed(window)
    rest = packed.start, packed.end, 128**-0.5
    out, lse = attention(*inputs, *rest, softcap=softcap)
    grads = attention_backward(dout, *inputs, out, lse, *rest, softcap=softcap)
    seen = window_mask(lengths, window, "cuda")
    formula = functools.partial(plain_attention, seen=seen, scale=128**-0.5, softcap=softcap)
    judge([out, lse, *grads], formula, inputs, [dout, torch.zeros_like(lse)])
