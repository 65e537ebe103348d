"""Attention, by its own kernels and by cuDNN, against plain PyTorch, within the bound of kernel_checks.py."""

import math

import pytest
import torch
from kernel_checks import as_function, bounds, double, in_each_dtype, judge, kernel, normal, strided

from minitune.kernels import attention as attention_fwd
from minitune.kernels import attention_backward as attention_bwd
from minitune.kernels import attention_cudnn, backend
from minitune.kernels.attention import attention, attention_backward


def plain_attention(q, k, v, seen, scale):
    """The textbook formula in the dtype of its inputs, with the softmax in at least float32."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1).transpose(0, 1) for x in (k, v))
    scores = (q.transpose(0, 1) * scale) @ k.mT
    scores = scores.to(backend.accumulator(q.dtype)).masked_fill(~seen, -math.inf)
    return (scores.softmax(-1).to(q.dtype) @ v).transpose(0, 1), scores.logsumexp(-1)


def visible(start):
    row = torch.arange(len(start), device=start.device)
    return (row[None, :] <= row[:, None]) & (row[None, :] >= start[:, None])


def run_attention(lengths, H, G, K, dtype, device, **how):
    N = sum(lengths)
    fused = normal(N, (H + 2 * G) * K, dtype=dtype, device=device)
    q, k, v = (x.unflatten(1, (-1, K)) for x in fused.split([H * K, G * K, G * K], dim=1))
    dout = strided(normal(N, H, K, dtype=dtype, device=device, seed=1))
    start, end = bounds(lengths, device)
    out, lse = attention(q, k, v, start, end, K**-0.5, **how)
    grads = attention_backward(dout, q, k, v, out, lse, start, end, K**-0.5, **how)
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
def test_attention_and_its_backward_err_no_more_than_plain_pytorch(lengths, H, G, K, dtype, device):
    inputs, dout, seen, results = run_attention(lengths, H, G, K, dtype, device)
    dlse = torch.zeros_like(results[1])
    judge(results, lambda q, k, v: plain_attention(q, k, v, seen, K**-0.5), inputs, [dout, dlse])


@kernel
def test_a_sample_attends_only_to_itself(device):
    """Other samples are changed, and not a bit of the one in the middle changes."""
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
def test_attention_is_right_with_the_tiles_for_any_length(max_seqlen, device, monkeypatch):
    """The heads of a group too, split over programs: PROGRAMS says how many those for long samples have to be."""
    monkeypatch.setattr(attention_bwd, "MIN_PROGRAMS", 40)
    assert attention_bwd.parts_of_a_group(10, 2, 6) == 2
    for lengths, H, G, K in (([3, 150, 1, 100], 4, 2, 64), ([70, 1], 6, 1, 24), ([130], 3, 3, 128)):
        inputs, dout, seen, results = run_attention(
            lengths, H, G, K, torch.float16, device, max_seqlen=max_seqlen
        )
        dlse = torch.zeros_like(results[1])
        judge(
            results, lambda q, k, v: plain_attention(q, k, v, seen, K**-0.5), inputs, [dout, dlse]
        )  # noqa: B023


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
    row, drow = (
        torch.full((70, width), math.nan, device=device)
        for width in (H * K + 8, (H + 2 * G) * K + 16)
    )
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
        (q[:5], "expected \\(6"),
        (q.half(), "expected torch.float32"),
        (q.mT, "expected \\(6"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(q, q, q, start, end, 1.0, out=wrong)
        with pytest.raises(ValueError, match=message):
            attention_backward(q, q, q, q, q, normal(2, 6), start, end, 1.0, dv=wrong)
    with pytest.raises(ValueError, match="head vectors of out have stride 2"):
        attention(q, q, q, start, end, 1.0, out=normal(6, 2, 16)[..., ::2])
    with pytest.raises(ValueError, match="6 rows are no whole number of samples of 4"):
        attention(q, q, q, start, end, 1.0, uniform_seqlen=4)
    with pytest.raises(ValueError, match=r"scale -1\.0; expected above 0"):
        attention(q, q, q, start, end, -1.0)


def test_attention_runs_without_cudnn_where_there_is_none():
    q, (start, end) = normal(6, 2, 8), bounds([3, 3])
    expected = attention(q, q, q, start, end, 1.0)
    for x, e in zip(attention(q, q, q, start, end, 1.0, uniform_seqlen=3), expected, strict=True):
        assert torch.equal(x, e)


def test_the_backward_of_the_attention_reference_passes_gradcheck():
    start, end = bounds([3, 1, 4])
    pair = as_function(
        lambda q, k, v: (
            lambda out, lse: (out, [out, lse])
        )(*attention_fwd.attention_reference(q, k, v, start, end, 0.4)),
        lambda dout, q, k, v, out, lse: attention_bwd.attention_backward_reference(
            dout, q, k, v, out, lse, start, end, 0.4
        ),
    )  # fmt: skip
    assert torch.autograd.gradcheck(
        pair, (double(8, 4, 8), double(8, 2, 8, seed=1), double(8, 2, 8, seed=2))
    )


# ---------------------------------------------------------------------------------------------------- GPU only


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
        for x, again in zip(
            first, run_attention(lengths, H, G, K, torch.bfloat16, "cuda")[3], strict=True
        ):
            assert torch.equal(x, again)


def test_cudnn_takes_as_few_heads_at_a_time_as_keep_a_gpu_busy():
    rows = [4096, 8192, 16384, 32768, 65536, 200_000]
    assert [attention_cudnn.kv_heads_at_once(N, 32, 8) for N in rows] == [8, 8, 4, 2, 1, 1]
    assert [attention_cudnn.kv_heads_at_once(N, 9, 3) for N in rows] == [3, 3, 3, 3, 2, 1]
    q, k = (torch.empty(1, device="meta").expand(65536, heads, 8) for heads in (9, 3))
    assert list(attention_cudnn._parts(q, k)) == [
        (slice(0, 6), slice(0, 2)),
        (slice(6, 9), slice(2, 3)),
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("enough", [attention_cudnn.CUDNN_ROW_HEADS_PER_CALL, 1000, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("B", "L", "H", "G", "K"),
    [(2, 512, 8, 2, 128), (4, 119, 9, 3, 64), (1, 700, 4, 4, 96), (8, 16, 2, 1, 64)],
)
def test_cudnn_holds_the_bound_and_mixes_with_the_kernels(
    B, L, H, G, K, dtype, enough, monkeypatch
):
    monkeypatch.setattr(attention_cudnn, "CUDNN_ROW_HEADS_PER_CALL", enough)
    inputs, dout, seen, results = run_attention([L] * B, H, G, K, dtype, "cuda", uniform_seqlen=L)
    if not attention_cudnn.cudnn_supports(*inputs, L):
        pytest.skip("cuDNN does not take this here")
    dlse = torch.zeros_like(results[1])
    judge(results, lambda q, k, v: plain_attention(q, k, v, seen, K**-0.5), inputs, [dout, dlse])
    start, end = bounds([L] * B, "cuda")
    scale, (out, lse) = K**-0.5, results[:2]
    mixed = attention_backward(dout, *inputs, out, lse, start, end, scale)
    judge(
        [out, lse, *mixed],
        lambda q, k, v: plain_attention(q, k, v, seen, scale),
        inputs,
        [dout, dlse],
    )
    row, drow = (
        torch.zeros(B * L, H * K + 16, dtype=dtype).cuda(),
        torch.zeros(B * L, (H + 2 * G) * K, dtype=dtype).cuda(),
    )
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
    judge(
        [buffer, lse, *dbuffers],
        lambda q, k, v: plain_attention(q, k, v, seen, scale),
        inputs,
        [dout, dlse],
    )
