"""The backward of causal attention within packed samples (attention.py has the forward, its shapes and its legend).

    P = exp(scale q k^T - lse)              again, from what the forward saved
    dP = dout v^T                           delta = rowsum(dout * out)
    dS = P * (dP - delta)
    dq = scale dS k                         (N, H, K)
    dk = scale dS^T q      dv = P^T dout    (N, G, K), summed over the query heads of a group

Three kernels: delta; dk and dv, a program for each block of keys, which walks over the rows that see them in every
head of the group; dq, a program for each block of rows, which walks over their keys. The scores are so computed twice,
but no sum crosses programs: no atomics, results repeat bit for bit. 7 K T^2 FLOPs a head for a sample of T rows.
"""

import math

import torch

from . import launch
from .launch import accumulator, cdiv, power_of_two, require, tl, triton
from .packed import block_at, check_packed, keys_of_rows, load_rows, rows_of_keys, samples, store_rows


def attention_backward_reference(dout, q, k, v, out, lse, start, end, scale):
    (_, H, K), G, wide = q.shape, k.shape[1], accumulator(q.dtype)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for a, b in samples(start):
        T, stacked = b - a, (G, H // G * (b - a), -1)  # the heads of a group one below the other, as in the forward
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
def _attention_delta(
    dout_ptr,
    out_ptr,
    delta_ptr,
    dout_row_stride,
    dout_head_stride,
    out_row_stride,
    out_head_stride,
    N,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """delta (H, N) = rowsum(dout * out): BLOCK_M rows of one head."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dout = load_rows(dout_ptr + head * dout_head_stride, rows, dout_row_stride, N, K, BLOCK_K).to(tl.float32)
    out = load_rows(out_ptr + head * out_head_stride, rows, out_row_stride, N, K, BLOCK_K).to(tl.float32)
    tl.store(delta_ptr + head.to(tl.int64) * N + rows, tl.sum(dout * out, axis=1), mask=rows < N)


@triton.jit
def _attention_dkdv(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    start_ptr,
    end_ptr,
    dout_row_stride,
    dout_head_stride,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    N,
    G,
    scale,
    scale_log2,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_N keys of one key/value head. Scores are (keys, rows) here, so that p needs no transpose."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    first = tl.program_id(0) * BLOCK_N
    g = tl.program_id(1)
    keys = first + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr + g * k_head_stride, keys, k_row_stride, N, K, BLOCK_K)
    v = load_rows(v_ptr + g * v_head_stride, keys, v_row_stride, N, K, BLOCK_K)
    dk = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    low, inner_low, inner_high, borders = rows_of_keys(end_ptr, first, N, BLOCK_M, BLOCK_N)
    for head_in_group in range(GROUP):
        head = g * GROUP + head_in_group
        lse_head_ptr = lse_ptr + head.to(tl.int64) * N
        delta_head_ptr = delta_ptr + head.to(tl.int64) * N
        for BORDER in tl.static_range(2):
            blocks = borders if BORDER else (inner_high - inner_low) // BLOCK_M
            for t in range(blocks):
                rows = block_at(t, low, inner_low, inner_high, BORDER, BLOCK_M) + tl.arange(0, BLOCK_M)
                at = tl.minimum(rows, N - 1)
                q = load_rows(q_ptr + head * q_head_stride, rows, q_row_stride, N, K, BLOCK_K)
                dout = load_rows(dout_ptr + head * dout_head_stride, rows, dout_row_stride, N, K, BLOCK_K)
                lse_log2 = tl.load(lse_head_ptr + at) * LOG2_E
                delta = tl.load(delta_head_ptr + at)
                p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - lse_log2[None, :])
                if BORDER:
                    start = tl.load(start_ptr + at)
                    seen = (keys[:, None] <= rows[None, :]) & (keys[:, None] >= start[None, :]) & (rows[None, :] < N)
                    p = tl.where(seen, p, 0.0)
                dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
                dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
                ds = p * (dp - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    store_rows(dk_ptr + g * K, dk * scale, keys, G * K, N, K, BLOCK_K)
    store_rows(dv_ptr + g * K, dv, keys, G * K, N, K, BLOCK_K)


@triton.jit
def _attention_dq(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
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
    """One program: BLOCK_M rows of one head, in the order of the forward."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1)
    rows = first + tl.arange(0, BLOCK_M)
    at = tl.minimum(rows, N - 1)
    start = tl.load(start_ptr + at)
    lse_log2 = tl.load(lse_ptr + head.to(tl.int64) * N + at) * LOG2_E
    delta = tl.load(delta_ptr + head.to(tl.int64) * N + at)
    k_ptr += head // GROUP * k_head_stride
    v_ptr += head // GROUP * v_head_stride
    q = load_rows(q_ptr + head * q_head_stride, rows, q_row_stride, N, K, BLOCK_K)
    dout = load_rows(dout_ptr + head * dout_head_stride, rows, dout_row_stride, N, K, BLOCK_K)
    dq = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    low, inner_low, inner_high, borders = keys_of_rows(start_ptr, first, N, BLOCK_M, BLOCK_N)
    for BORDER in tl.static_range(2):
        blocks = borders if BORDER else (inner_high - inner_low) // BLOCK_N
        for t in range(blocks):
            keys = block_at(t, low, inner_low, inner_high, BORDER, BLOCK_N) + tl.arange(0, BLOCK_N)
            k = load_rows(k_ptr, keys, k_row_stride, N, K, BLOCK_K)
            v = load_rows(v_ptr, keys, v_row_stride, N, K, BLOCK_K)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse_log2[:, None])
            if BORDER:
                p = tl.where((keys[None, :] <= rows[:, None]) & (keys[None, :] >= start[:, None]), p, 0.0)
            ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    store_rows(dq_ptr + head * K, dq * scale, rows, H * K, N, K, BLOCK_K)


def _blocks(K: int, itemsize: int, shared_memory: int) -> dict:
    """`KEEP` rows or keys stay with a program, two tensors each, while blocks of `PASS` keys or rows pass by.

    64 and 64 at 16 bit: on an H200 in November 2026, K = 128, H = 32, G = 8, T = 2048, 268 TFLOP/s; 128 and 64 with 8
    warps 243, 64 and 32 251. Where shared memory is short both are halved until one pipeline stage fits.
    float32 has no tensor cores: its products unroll into one instruction an element, so tiles are small, warps many.
    """
    KEEP, PASS = (64, 64) if itemsize == 2 else (32, 32)
    BLOCK_K = max(power_of_two(K), 16)
    row = 2 * BLOCK_K * itemsize  # both tensors of a row
    while (KEEP + PASS) * row + 2 * KEEP * PASS * itemsize > shared_memory and KEEP > 16:
        KEEP, PASS = KEEP // 2, max(PASS // 2, 16)
    stages = (shared_memory - KEEP * row - 2 * KEEP * PASS * itemsize) // (PASS * row)
    return {
        "KEEP": KEEP,
        "PASS": PASS,
        "BLOCK_K": BLOCK_K,
        "num_warps": 4 if itemsize == 2 else 8,
        "num_stages": min(max(stages, 1), 2),
    }


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq (N, H, K), dk (N, G, K), dv (N, G, K)) for dout (N, H, K), from what `attention` took and returned.

    ValueError where a shape, stride or dtype does not fit.
    """
    check_packed(q, k, v, start, end, dout=dout, out=out)
    (N, H, K), G = q.shape, k.shape[1]
    fits = lse.shape == (H, N) and lse.is_contiguous()
    require(fits, f"lse is {tuple(lse.shape)}; q {tuple(q.shape)} has a contiguous one of {(H, N)}")
    if not launch.use_triton(q):
        return attention_backward_reference(dout, q, k, v, out, lse, start, end, scale)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not N:
        return dq, dk, dv
    blocks = _blocks(K, q.element_size(), launch.shared_memory_limit(q.device))
    KEEP, PASS = blocks.pop("KEEP"), blocks.pop("PASS")
    BLOCK_K = blocks["BLOCK_K"]
    delta = torch.empty((H, N), dtype=torch.float32, device=q.device)
    _attention_delta[(cdiv(N, 32), H)](
        dout, out, delta, *dout.stride()[:2], *out.stride()[:2], N, K=K, BLOCK_M=32, BLOCK_K=BLOCK_K, num_warps=4
    )
    strides = (*dout.stride()[:2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    scales = (scale, scale * math.log2(math.e))
    shape = {"GROUP": H // G, "K": K}
    _attention_dkdv[(cdiv(N, KEEP), G)](
        dout, q, k, v, lse, delta, dk, dv, start, end, *strides, N, G, *scales, **shape, **blocks,
        BLOCK_M=PASS, BLOCK_N=KEEP,
    )  # fmt: skip
    _attention_dq[(cdiv(N, KEEP), H)](
        dout, q, k, v, lse, delta, dq, start, *strides, N, H, *scales, **shape, **blocks, BLOCK_M=KEEP, BLOCK_N=PASS
    )
    return dq, dk, dv
