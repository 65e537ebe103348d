"""The backward of causal attention within packed samples (attention.py has the forward, its shapes and its legend).

    P = exp(scale q k^T - lse)              again, from what the forward saved
    dP = dout v^T                           delta = rowsum(dout * out)
    dS = P * (dP - delta)
    dq = scale dS k                         (N, H, K)
    dk = scale dS^T q      dv = P^T dout    (N, G, K), summed over the query heads of a group

Two kernels: dq, a program for each block of rows, which walks over their keys, and leaves lse and delta of its rows for
the other; dk and dv, a program for each block of keys, which walks over the rows that see them in every head of the
group, as one loop. Where that makes too few programs for the GPU, each of `parts` programs takes some of the heads, and
a third kernel sums what they leave in float32. The scores are so computed twice, but no sum depends on which program is
first: no atomics, results repeat bit for bit. 7 K T^2 FLOPs a head for a sample of T rows.
"""

import math

import torch

from . import backend
from .attention_common import (
    MAX_BLOCK,
    check_buffer,
    check_packed,
    choose_block_sizes,
    load_rows,
    pack_floats,
    samples,
    store_rows,
    unpack_floats,
)
from .attention_cudnn import cudnn_attention_backward, cudnn_supports
from .backend import accumulator, cdiv, copy_into, power_of_two, tl, triton


def attention_backward_reference(dout, q, k, v, out, lse, start, end, scale):
    (_, H, K), G, wide = q.shape, k.shape[1], accumulator(q.dtype)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for a, b in samples(start):
        T, stacked = (
            b - a,
            (G, H // G * (b - a), -1),
        )  # the heads of a group one below the other, as in the forward
        qs, douts, outs = (x[a:b].to(wide).transpose(0, 1).reshape(stacked) for x in (q, dout, out))
        ks, vs = (x[a:b].to(wide).transpose(0, 1) for x in (k, v))
        unseen = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        p = (qs @ ks.mT).mul_(scale).sub_(lse[:, a:b].reshape(stacked)).exp_()
        p.view(G, H // G, T, T).masked_fill_(unseen, 0.0)
        ds = (douts @ vs.mT).sub_((douts * outs).sum(-1, keepdim=True)).mul_(p).mul_(scale)
        dq[a:b] = (ds @ ks).view(H, T, K).transpose(0, 1)
        dk[a:b] = (ds.mT @ qs).transpose(0, 1)
        dv[a:b] = (p.mT @ douts).transpose(0, 1)
    return dq, dk, dv


@triton.jit
def _attention_dq(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    stats_ptr,
    dq_ptr,
    start_ptr,
    dout_row_stride,
    dout_head_stride,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    out_row_stride,
    out_head_stride,
    dq_row_stride,
    dq_head_stride,
    stats_head_stride,
    N,
    H,
    scale,
    scale_log2,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_M rows of one head, in the order of the forward. stats: (lse in base 2, delta) of each row."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    head = (tl.program_id(0) % H).to(tl.int64)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) // H * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    last = tl.minimum(first + BLOCK_M, N) - 1
    start = tl.load(start_ptr + tl.minimum(rows, last))
    low, inner_low, inner_high = tl.load(start_ptr + first), tl.load(start_ptr + last), first + 1
    dout = load_rows(
        dout_ptr + head * dout_head_stride, first, dout_row_stride, N, K, BLOCK_M, BLOCK_K
    )
    out = load_rows(out_ptr + head * out_head_stride, first, out_row_stride, N, K, BLOCK_M, BLOCK_K)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    lse = tl.load(lse_ptr + head * N + tl.minimum(rows, last)) * LOG2_E
    tl.store(stats_ptr + head * stats_head_stride + rows, pack_floats(lse, delta), mask=rows < N)
    q = load_rows(q_ptr + head * q_head_stride, first, q_row_stride, N, K, BLOCK_M, BLOCK_K)
    k_ptr += head // GROUP * k_head_stride
    v_ptr += head // GROUP * v_head_stride
    dq = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for t in range(tl.cdiv(last + 1 - low, BLOCK_N)):
        key = low + t * BLOCK_N
        k = load_rows(k_ptr, key, k_row_stride, N, K, BLOCK_N, BLOCK_K)
        v = load_rows(v_ptr, key, v_row_stride, N, K, BLOCK_N, BLOCK_K)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse[:, None])
        if (key < inner_low) | (key + BLOCK_N > inner_high):
            keys = key + tl.arange(0, BLOCK_N)
            p = tl.where(
                (keys[None, :] <= rows[:, None]) & (keys[None, :] >= start[:, None]), p, 0.0
            )
        ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    store_rows(
        dq_ptr + head * dq_head_stride, dq * scale, first, dq_row_stride, N, K, BLOCK_M, BLOCK_K
    )


@triton.jit
def _attention_dkdv(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    stats_ptr,
    dk_ptr,
    dv_ptr,
    end_ptr,
    dout_row_stride,
    dout_head_stride,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    dk_row_stride,
    dk_head_stride,
    dv_row_stride,
    dv_head_stride,
    stats_head_stride,
    part_stride,
    N,
    G,
    scale,
    scale_log2,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_N keys of one key/value head, and GROUP / PARTS of its query heads, one after the other.

    Scores are (keys, rows) here, so that p needs no transpose. stats is readable BLOCK_M rows past N.
    """
    HEADS: tl.constexpr = GROUP // PARTS
    part = tl.program_id(0) % PARTS
    g = (tl.program_id(0) // PARTS % G).to(tl.int64)
    first = tl.program_id(0) // (PARTS * G) * BLOCK_N
    keys = first + tl.arange(0, BLOCK_N)
    last = tl.minimum(first + BLOCK_N, N) - 1
    end = tl.load(end_ptr + tl.minimum(keys, last))
    high = tl.load(end_ptr + last)
    inner_low, inner_high = last, tl.load(end_ptr + first)
    k = load_rows(k_ptr + g * k_head_stride, first, k_row_stride, N, K, BLOCK_N, BLOCK_K)
    v = load_rows(v_ptr + g * v_head_stride, first, v_row_stride, N, K, BLOCK_N, BLOCK_K)
    dk = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    head, row = g * GROUP + part * HEADS, first
    for _ in range(HEADS * tl.cdiv(high - first, BLOCK_M)):
        q = load_rows(q_ptr + head * q_head_stride, row, q_row_stride, N, K, BLOCK_M, BLOCK_K)
        dout = load_rows(
            dout_ptr + head * dout_head_stride, row, dout_row_stride, N, K, BLOCK_M, BLOCK_K
        )
        lse, delta = unpack_floats(
            tl.load(stats_ptr + head * stats_head_stride + row + tl.arange(0, BLOCK_M))
        )
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - lse[None, :])
        if (row < inner_low) | (row + BLOCK_M > inner_high):
            rows = row + tl.arange(0, BLOCK_M)
            p = tl.where((keys[:, None] <= rows[None, :]) & (rows[None, :] < end[:, None]), p, 0.0)
            delta = tl.where(rows < N, delta, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        through = (
            row + BLOCK_M >= high
        )  # on to the next head, by selects: a branch would keep loads from running ahead
        row = tl.where(through, first, row + BLOCK_M)
        head += through.to(tl.int64)
    dk_ptr += part.to(tl.int64) * part_stride + g * dk_head_stride
    dv_ptr += part.to(tl.int64) * part_stride + g * dv_head_stride
    store_rows(dk_ptr, dk * scale, first, dk_row_stride, N, K, BLOCK_N, BLOCK_K)
    store_rows(dv_ptr, dv, first, dv_row_stride, N, K, BLOCK_N, BLOCK_K)


@triton.jit
def _attention_sum(
    parts_ptr,
    dk_ptr,
    dv_ptr,
    dk_row_stride,
    dk_head_stride,
    dv_row_stride,
    dv_head_stride,
    part_stride,
    N,
    G,
    PARTS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dk, dv (N, G, K) = the sums of parts (2, PARTS, N, G, K): BLOCK_M rows of one head."""
    g = (tl.program_id(0) % G).to(tl.int64)
    first = tl.program_id(0) // G * BLOCK_M
    parts_ptr += g * K
    dk_ptr += g * dk_head_stride
    dv_ptr += g * dv_head_stride
    total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for i in tl.static_range(2 * PARTS):
        total += load_rows(parts_ptr, first, G * K, N, K, BLOCK_M, BLOCK_K)
        parts_ptr += part_stride
        if i == PARTS - 1:
            store_rows(dk_ptr, total, first, dk_row_stride, N, K, BLOCK_M, BLOCK_K)
            total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    store_rows(dv_ptr, total, first, dv_row_stride, N, K, BLOCK_M, BLOCK_K)


# For packed.py's choose_block_sizes: (BLOCK_M, BLOCK_N, warps, stages[, registers]) for dq, (BLOCK_N, BLOCK_M, ...) for dk and
# dv. Fastest of 15 on an H200, November 2026, bf16; ms at 2 x 2048 and 1 x 8192 (32 heads, 8 of keys, K = 128): dq
# 0.215 and 1.50, dk and dv 0.259 and 1.85; torch's variable-length flash 0.80 and 4.81 for all three.
DQ_BLOCK_SIZES = {
    128: ((128, 32, 8, 3, 128), (128, 32, 8, 3, 128)),
    64: ((64, 64, 4, 3), (64, 64, 4, 3)),
}
DKDV_BLOCK_SIZES = {
    128: ((64, 64, 4, 2), (64, 64, 4, 2)),
    64: ((64, 64, 4, 4), (64, 64, 4, 4)),
}
MIN_PROGRAMS = 264  # two on each of an H200's 132 multiprocessors


def parts_of_a_group(blocks: int, G: int, GROUP: int) -> int:
    """Into how many programs to split the heads of a group: as many as it takes to fill the GPU.

    Splitting costs a kernel more, and the parts in float32 in memory.
    """
    divisors = [parts for parts in range(1, GROUP + 1) if GROUP % parts == 0]
    return next((parts for parts in divisors if blocks * G * parts >= MIN_PROGRAMS), GROUP)


def launch_dq(dout, q, k, v, out, lse, stats, dq, start, scale: float, tile: dict) -> None:
    """Fills stats too. `tile` as choose_block_sizes gives it; the tensors have been checked."""
    (N, H, K), tile = q.shape, dict(tile)
    BLOCK_M, BLOCK_N = tile.pop("BLOCK_OUTER"), tile.pop("BLOCK_INNER")
    strides = [stride for x in (dout, q, k, v, out, dq) for stride in x.stride()[:2]]
    shape = {"GROUP": H // k.shape[1], "K": K, "BLOCK_K": max(power_of_two(K), 16)}
    _attention_dq[(cdiv(N, BLOCK_M) * H,)](
        dout, q, k, v, out, lse, stats, dq, start, *strides, stats.stride(0), N, H, scale, scale * math.log2(math.e),
        **shape, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, **tile,
    )  # fmt: skip


def launch_dkdv(dout, q, k, v, stats, dk, dv, end, scale: float, tile: dict, parts: int) -> None:
    """`tile` as choose_block_sizes gives it; `parts` divides the size of a group."""
    (N, H, K), G, tile = q.shape, k.shape[1], dict(tile)
    BLOCK_N, BLOCK_M = tile.pop("BLOCK_OUTER"), tile.pop("BLOCK_INNER")
    shape = {"K": K, "PARTS": parts, "BLOCK_K": max(power_of_two(K), 16)}
    to = (
        (dk, dv)
        if parts == 1
        else torch.empty((2, parts, N, G, K), dtype=torch.float32, device=q.device)
    )
    part_stride = N * G * K
    strides = [stride for x in (dout, q, k, v) for stride in x.stride()[:2]]
    strides += [stride for x in to for stride in x.stride()[-3:-1]]
    _attention_dkdv[(cdiv(N, BLOCK_N) * G * parts,)](
        dout, q, k, v, stats, *to, end, *strides, stats.stride(0), part_stride, N, G, scale, scale * math.log2(math.e),
        **shape, GROUP=H // G, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, **tile,
    )  # fmt: skip
    if parts > 1:
        strides = (*dk.stride()[:2], *dv.stride()[:2])
        _attention_sum[(cdiv(N, 16) * G,)](
            to, dk, dv, *strides, part_stride, N, G, **shape, BLOCK_M=16, num_warps=4
        )


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    scale: float,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    uniform_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq (N, H, K), dk (N, G, K), dv (N, G, K)) for dout (N, H, K), from what `attention` took and returned.

    dq, dk, dv: where to put the results, with rows and heads as far apart as the caller likes.
    max_seqlen, uniform_seqlen: as in `attention`; out and lse may come from cuDNN or not. The kernels of this file repeat bit for
    bit. cuDNN's need not, and are left alone under torch.use_deterministic_algorithms.
    ValueError where a shape, stride or dtype does not fit.
    """
    check_packed(q, k, v, start, end, dout=dout, out=out)
    (N, H, K), G = q.shape, k.shape[1]
    if lse.shape != (H, N) or not lse.is_contiguous():
        raise ValueError(
            f"lse is {tuple(lse.shape)}; q {tuple(q.shape)} has a contiguous one of {(H, N)}"
        )
    for name, buffer, like in (("dq", dq, q), ("dk", dk, k), ("dv", dv, v)):
        check_buffer(name, buffer, like)
    repeatable = torch.are_deterministic_algorithms_enabled()
    if uniform_seqlen is not None and cudnn_supports(q, k, v, uniform_seqlen) and not repeatable:
        return cudnn_attention_backward(dout, q, k, v, out, lse, uniform_seqlen, scale, dq, dk, dv)
    if not backend.use_triton(q):
        results = attention_backward_reference(dout, q, k, v, out, lse, start, end, scale)
        return tuple(
            copy_into(buffer, result) for buffer, result in zip((dq, dk, dv), results, strict=True)
        )
    dq, dk, dv = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if buffer is None else buffer
        for buffer, x in ((dq, q), (dk, k), (dv, v))
    )
    if N:
        max_seqlen, shared = (
            max_seqlen or uniform_seqlen or N,
            backend.shared_memory_limit(q.device),
        )
        tile, keys_tile = (
            choose_block_sizes(tiles, 2, K, q.element_size(), max_seqlen, shared)
            for tiles in (DQ_BLOCK_SIZES, DKDV_BLOCK_SIZES)
        )
        stats = torch.empty((H, cdiv(N, 16) * 16 + MAX_BLOCK), dtype=torch.int64, device=q.device)
        launch_dq(dout, q, k, v, out, lse, stats, dq, start, scale, tile)
        parts = parts_of_a_group(cdiv(N, keys_tile["BLOCK_OUTER"]), G, H // G)
        launch_dkdv(dout, q, k, v, stats, dk, dv, end, scale, keys_tile, parts)
    return dq, dk, dv
