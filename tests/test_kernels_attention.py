"""Attention, by its kernels and by cuDNN, against PyTorch, within kernel_checks.py's bound."""

import functools
import math

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
    strided,
)

from minitune.kernels import attention as attention_fwd
from minitune.kernels import attention_backward as attention_bwd
from minitune.kernels import attention_cudnn, attention_dkdv, backend
from minitune.kernels.attention import attention, attention_backward


def visible(start):
    """Return the mask (N, N) of the keys that each row sees."""
    row = torch.arange(len(start), device=start.device)
    return (row[None, :] <= row[:, None]) & (row[None, :] >= start[:, None])


def run_attention(lengths, H, G, K, dtype, device, **options):
    """Return ((q, k, v), dout, mask, [out, lse, dq, dk, dv]) of packed sequences."""
    N = sum(lengths)
    fused = normal(N, (H + 2 * G) * K, dtype=dtype, device=device)
    q, k, v = (x.unflatten(1, (-1, K)) for x in fused.split([H * K, G * K, G * K], dim=1))
    dout = strided(normal(N, H, K, dtype=dtype, device=device, seed=1))
    start, end = bounds(lengths, device)
    out, lse = attention(q, k, v, start, end, K**-0.5, **options)
    grads = attention_backward(dout, q, k, v, out, lse, start, end, K**-0.5, **options)
    return (q, k, v), dout, visible(start), [out, lse, *grads]


@kernel
@in_each_dtype
@pytest.mark.parametrize(
    ("lengths", "H", "G", "K"),
    [
        ([213], 2, 1, 64),
        ([1], 1, 1, 64),
        ([3, 1, 70, 1, 100], 3, 1, 64),
        ([80, 140], 2, 2, 24),
        ([40, 30], 4, 2, 128),
        ([33, 5], 1, 1, 256),
    ],
    ids=str,
)
def test_attention_and_its_backward_err_at_most_twice_as_much_as_pytorch(
    lengths, H, G, K, dtype, device
):
    inputs, dout, seen, results = run_attention(lengths, H, G, K, dtype, device)
    dlse = torch.zeros_like(results[1])
    judge(results, lambda q, k, v: plain_attention(q, k, v, seen, K**-0.5), inputs, [dout, dlse])


@kernel
def test_a_sequence_attends_only_to_itself(device):
    """Changing the other sequences must not change a bit of the sequence in the middle."""
    lengths = [40, 50, 60]
    mine = slice(40, 90)
    q, k, v, dout = (normal(150, 2, 16, device=device, seed=s) for s in range(4))
    start, end = bounds(lengths, device)
    results = []
    for _ in range(2):
        out, lse = attention(q, k, v, start, end, 0.25)
        results.append([out, lse.T, *attention_backward(dout, q, k, v, out, lse, start, end, 0.25)])
        for x in (q, k, v, dout):
            x[:40] *= 30
            x[90:] -= 5
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[mine], after[mine])
        assert not torch.equal(before, after)


@kernel
def test_attention_shows_a_nan_of_a_query_in_its_row_only(device):
    q, k, v = (normal(70, 1, 16, device=device, seed=s) for s in range(3))
    q[66] = math.nan
    out, lse = attention(q, k, v, *bounds([70], device), 0.25)
    assert out.isnan().all(-1)[:, 0].nonzero().tolist() == [[66]]
    assert lse.isnan()[0].nonzero().tolist() == [[66]]


@kernel
@pytest.mark.parametrize("max_seqlen", [1, 10**6])
def test_attention_is_right_with_the_block_sizes_of_any_length(max_seqlen, device, monkeypatch):
    """With MIN_PROGRAMS at 40, the heads of some groups are split over several programs."""
    monkeypatch.setattr(attention_dkdv, "MIN_PROGRAMS", 40)
    assert attention_dkdv.num_splits(10, 2, 6) == 2
    for lengths, H, G, K in (([3, 150, 1, 100], 4, 2, 64), ([70, 1], 6, 1, 24), ([130], 3, 3, 128)):
        inputs, dout, seen, results = run_attention(
            lengths, H, G, K, torch.float16, device, max_seqlen=max_seqlen
        )
        formula = functools.partial(plain_attention, seen=seen, scale=K**-0.5)
        judge(results, formula, inputs, [dout, torch.zeros_like(results[1])])


@pytest.mark.usefixtures("triton_everywhere")
@pytest.mark.parametrize("triton", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("max_seqlen", [1, 10**6])
def test_attention_writes_its_results_into_columns_of_wider_rows(
    max_seqlen, triton, device, monkeypatch
):
    if not triton:
        monkeypatch.setattr(backend, "use_triton", lambda x: False)
    H, G, K, lengths = 4, 2, 24, [40, 30]
    inputs, dout, _, (out, lse, *grads) = run_attention(
        lengths, H, G, K, torch.float32, device, max_seqlen=max_seqlen
    )
    start, end = bounds(lengths, device)
    row = torch.full((70, H * K + 8), math.nan, device=device)
    drow = torch.full((70, (H + 2 * G) * K + 16), math.nan, device=device)
    buffer = row[:, : H * K].unflatten(1, (H, K))
    result, _ = attention(*inputs, start, end, K**-0.5, out=buffer, max_seqlen=max_seqlen)
    dbuffers = [x.unflatten(1, (-1, K)) for x in drow[:, :-16].split([H * K, G * K, G * K], dim=1)]
    dresults = attention_backward(
        dout, *inputs, result, lse, start, end, K**-0.5, *dbuffers, max_seqlen=max_seqlen
    )
    for x, given, alone in zip(
        (result, *dresults), (buffer, *dbuffers), (out, *grads), strict=True
    ):
        assert x is given
        assert torch.equal(x, alone)
    assert row[:, H * K :].isnan().all()
    assert drow[:, -16:].isnan().all()


def test_attention_refuses_buffers_and_lengths_that_do_not_fit():
    q, (start, end) = normal(6, 2, 8), bounds([3, 3])
    for wrong, message in (
        (q[:5], r"\(5, 2, 8\) .* expected \(6, 2, 8\)"),
        (q.half(), "is .*torch.float16 .* expected .* torch.float32"),
        (q.mT, r"\(6, 8, 2\) .* expected \(6, 2, 8\)"),
        (q.to("meta"), "on meta .* expected .* on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(q, q, q, start, end, 1.0, out=wrong)
        with pytest.raises(ValueError, match=message):
            attention_backward(q, q, q, q, q, normal(2, 6), start, end, 1.0, dv=wrong)
    with pytest.raises(
        ValueError, match=r"out is .* with strides \(32, 16, 2\); expected .* contiguous rows"
    ):
        attention(q, q, q, start, end, 1.0, out=normal(6, 2, 16)[..., ::2])
    with pytest.raises(ValueError, match="6 rows do not divide into sequences of uniform_seqlen 4"):
        attention(q, q, q, start, end, 1.0, uniform_seqlen=4)
    with pytest.raises(ValueError, match=r"scale -1\.0; expected above 0"):
        attention(q, q, q, start, end, -1.0)


def test_attention_runs_without_cudnn_on_a_cpu():
    q, (start, end) = normal(6, 2, 8), bounds([3, 3])
    expected = attention(q, q, q, start, end, 1.0)
    for x, e in zip(attention(q, q, q, start, end, 1.0, uniform_seqlen=3), expected, strict=True):
        assert torch.equal(x, e)


def test_the_backward_of_the_attention_reference_passes_gradcheck():
    start, end = bounds([3, 1, 4])

    def forward(q, k, v):
        out, lse = attention_fwd.attention_reference(q, k, v, start, end, 0.4)
        return out, [out, lse]

    def backward(dout, q, k, v, out, lse):
        return attention_bwd.attention_backward_reference(dout, q, k, v, out, lse, start, end, 0.4)

    inputs = double(8, 4, 8), double(8, 2, 8, seed=1), double(8, 2, 8, seed=2)
    assert torch.autograd.gradcheck(as_function(forward, backward), inputs)


# ---- GPU only


@pytest.mark.gpu
@in_each_dtype
@pytest.mark.parametrize(("N", "H", "G", "K"), [(1500, 9, 3, 64), (1100, 8, 2, 128)])
def test_attention_holds_its_bound_at_real_sizes(N, H, G, K, dtype):
    inputs, dout, seen, results = run_attention([N // 2, 7, N // 2 - 7], H, G, K, dtype, "cuda")
    dlse = torch.zeros_like(results[1])
    judge(results, lambda q, k, v: plain_attention(q, k, v, seen, K**-0.5), inputs, [dout, dlse])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("lengths", "H", "G", "K"), [([1024] * 2, 32, 8, 128), ([300, 1500, 7, 200], 9, 3, 64)], ids=str
)
def test_the_backward_of_attention_repeats_bit_for_bit(lengths, H, G, K):
    _, _, _, first = run_attention(lengths, H, G, K, torch.bfloat16, "cuda")
    for _ in range(5):
        _, _, _, again = run_attention(lengths, H, G, K, torch.bfloat16, "cuda")
        assert all(map(torch.equal, first, again))


def test_cudnn_takes_as_few_heads_a_call_as_keep_a_gpu_busy():
    rows = [4096, 8192, 16384, 32768, 65536, 200_000]
    assert [attention_cudnn.kv_heads_at_once(N, 32, 8) for N in rows] == [8, 8, 4, 2, 1, 1]
    assert [attention_cudnn.kv_heads_at_once(N, 9, 3) for N in rows] == [3, 3, 3, 3, 2, 1]
    q, k = (torch.empty(1, device="meta").expand(65536, heads, 8) for heads in (9, 3))
    assert list(attention_cudnn._parts(q, k)) == [
        (slice(0, 6), slice(0, 2)),
        (slice(6, 9), slice(2, 3)),
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("row_heads", [attention_cudnn.CUDNN_ROW_HEADS_PER_CALL, 1000, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("B", "L", "H", "G", "K"),
    [(2, 512, 8, 2, 128), (4, 119, 9, 3, 64), (1, 700, 4, 4, 96), (8, 16, 2, 1, 64)],
)
def test_cudnn_holds_the_bound_and_mixes_with_the_kernels(
    B, L, H, G, K, dtype, row_heads, monkeypatch
):
    monkeypatch.setattr(attention_cudnn, "CUDNN_ROW_HEADS_PER_CALL", row_heads)
    inputs, dout, seen, results = run_attention([L] * B, H, G, K, dtype, "cuda", uniform_seqlen=L)
    if not attention_cudnn.cudnn_supports(*inputs, L):
        pytest.skip("cuDNN does not support this shape on this GPU")
    start, end = bounds([L] * B, "cuda")
    scale, (out, lse) = K**-0.5, results[:2]
    formula = functools.partial(plain_attention, seen=seen, scale=scale)
    douts = [dout, torch.zeros_like(lse)]
    judge(results, formula, inputs, douts)
    mixed = attention_backward(dout, *inputs, out, lse, start, end, scale)
    judge([out, lse, *mixed], formula, inputs, douts)
    row = torch.zeros(B * L, H * K + 16, dtype=dtype, device="cuda")
    drow = torch.zeros(B * L, (H + 2 * G) * K, dtype=dtype, device="cuda")
    buffer = row[:, : H * K].unflatten(1, (H, K))
    dbuffers = [x.unflatten(1, (-1, K)) for x in drow.split([H * K, G * K, G * K], dim=1)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(*inputs, start, end, scale, out=buffer, uniform_seqlen=L)
        attention_backward(
            dout, *inputs, buffer, lse, start, end, scale, *dbuffers, uniform_seqlen=L
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(buffer, out)
    judge([buffer, lse, *dbuffers], formula, inputs, douts)
