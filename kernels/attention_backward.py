"""Backward of causal attention within packed sequences. attention.py has the forward.

    P = exp(s - lse)                        s recomputed from q and k, lse saved
    dP = dout v^T
    delta = rowsum(dout * out)
    dS = P * (dP - delta)                   with a soft cap times 1 - tanh(scale q k^T / softcap)^2
    dq = scale dS k                         (N, H, K)
    dk = scale dS^T q                       (N, G, K), summed over the query heads of a group
    dv = P^T dout                           (N, G, K), summed over the query heads of a group

Two kernels share the work. The kernel of this file computes dq of a block of rows: a program walks
over their keys, and stores lse and delta of its rows for the other kernel. The kernel of
attention_dkdv.py computes dk and dv of a block of keys.

The scores are thus computed twice. In return no sum depends on the order of programs: there are no
atomics, and results repeat bit for bit. A sequence of T rows costs 7 K T^2 FLOPs a head, or
14 K T W with a window of W keys.
"""

import torch

from . import backend
from .attention_common import (
    MAX_BLOCK,
    BlockSizes,
    cap_scores,
    check_heads,
    check_packed,
    check_scores,
    choose_block_sizes,
    head_strides,
    hidden_keys,
    load_rows,
    pack_floats,
    query_block,
    score_factors,
    sequence_bounds,
    shape_constants,
    store_rows,
)
from .attention_cudnn import cudnn_attention_backward, cudnn_supports
from .attention_dkdv import launch_dkdv
from .backend import accumulator, cdiv, copy_into, empty_contiguous_like, tl, triton

PROFILE_GROUP = "attention"

# For choose_block_sizes: K -> (BLOCK_M, BLOCK_N, warps, stages[, registers a thread]) for short and
# for long sequences. The fastest of 15 on an H200 in November 2026, bf16: 0.215 ms at 2 x 2048 rows
# and 1.50 ms at 1 x 8192 (32 heads, 8 of keys, K = 128). torch's variable-length flash attention
# takes 0.80 and 4.81 ms for dq, dk and dv.
BLOCK_SIZES = {
    256: ((64, 64, 4, 2), (128, 64, 8, 1)),
    128: ((128, 32, 8, 3, 128), (128, 32, 8, 3, 128)),
    64: ((64, 64, 4, 3), (64, 64, 4, 3)),
}


def attention_backward_reference(dout, q, k, v, out, lse, start, end, scale, softcap=0.0):
    """Return (dq, dk, dv) in PyTorch, sequence by sequence."""
    (_, H, K), G, acc_dtype = q.shape, k.shape[1], accumulator(q.dtype)
    dq, dk, dv = (empty_contiguous_like(x) for x in (q, k, v))
    for a, b in sequence_bounds(start):
        T = b - a
        stacked = G, H // G * T, -1  # the heads of a group one below the other, as in the forward
        qs, douts, outs = (
            x[a:b].to(acc_dtype).transpose(0, 1).reshape(stacked) for x in (q, dout, out)
        )
        ks, vs = (x[a:b].to(acc_dtype).transpose(0, 1) for x in (k, v))
        p = (qs @ ks.mT).mul_(scale)
        if softcap:
            tanh = p.div_(softcap).tanh_()
            p = tanh * softcap
        p.sub_(lse[:, a:b].reshape(stacked)).exp_()
        p.view(G, H // G, T, T).masked_fill_(hidden_keys(start, a, b), 0.0)
        delta = (douts * outs).sum(-1, keepdim=True)
        ds = (douts @ vs.mT).sub_(delta).mul_(p).mul_(scale)
        if softcap:
            ds.mul_(1 - tanh.square())
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
    TANH_SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute dq of BLOCK_M rows of one head per program, in the order of the forward.

    Store (lse in base 2, delta) of each row in stats.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    head, first, rows, last, start, first_key, first_inner_key = query_block(
        start_ptr, N, H, BLOCK_M
    )
    dout_ptr += head * dout_head_stride
    out_ptr += head * out_head_stride
    dout = load_rows(dout_ptr, first, dout_row_stride, N, K, BLOCK_M, BLOCK_K)
    out = load_rows(out_ptr, first, out_row_stride, N, K, BLOCK_M, BLOCK_K)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    lse = tl.load(lse_ptr + head * N + tl.minimum(rows, last)) * LOG2_E
    tl.store(stats_ptr + head * stats_head_stride + rows, pack_floats(lse, delta), mask=rows < N)
    q = load_rows(q_ptr + head * q_head_stride, first, q_row_stride, N, K, BLOCK_M, BLOCK_K)
    k_ptr += head // GROUP * k_head_stride
    v_ptr += head // GROUP * v_head_stride
    dq = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for t in range(tl.cdiv(last + 1 - first_key, BLOCK_N)):
        key = first_key + t * BLOCK_N
        k = load_rows(k_ptr, key, k_row_stride, N, K, BLOCK_N, BLOCK_K)
        v = load_rows(v_ptr, key, v_row_stride, N, K, BLOCK_N, BLOCK_K)
        scores, slope = cap_scores(tl.dot(q, tl.trans(k), input_precision="ieee"), TANH_SCALE)
        p = tl.exp2(scores * scale_log2 - lse[:, None])
        if (key < first_inner_key) | (key + BLOCK_N > first + 1):
            keys = key + tl.arange(0, BLOCK_N)
            seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] >= start[:, None])
            p = tl.where(seen, p, 0.0)
        ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None]) * slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    dq_ptr += head * dq_head_stride
    store_rows(dq_ptr, dq * scale, first, dq_row_stride, N, K, BLOCK_M, BLOCK_K)


def _launch_dq(
    dout, q, k, v, out, lse, stats, dq, start, scale: float, softcap: float, sizes: BlockSizes
) -> None:
    """Fill dq and stats; the tensors are checked."""
    N, H, _ = q.shape
    tensors = dout, q, k, v, out, lse, stats, dq, start
    strides = head_strides(dout, q, k, v, out, dq)
    scale_log2, TANH_SCALE = score_factors(scale, softcap)
    _attention_dq[(cdiv(N, sizes.outer) * H,)](
        *tensors,
        *strides,
        stats.stride(0),
        N,
        H,
        scale,
        scale_log2,
        TANH_SCALE=TANH_SCALE,
        **shape_constants(q, k),
        BLOCK_M=sizes.outer,
        BLOCK_N=sizes.inner,
        **sizes.options,
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
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (dq, dk, dv) with the shapes of q, k and v.

    dout: gradient of out (N, H, K).
    q, k, v, start, end, scale, max_seqlen, uniform_seqlen, softcap: as in `attention`.
    out, lse: results of `attention`, from cuDNN or not.
    dq, dk, dv: destinations, rows and heads may be strided; by default new tensors.

    This file's kernels repeat bit for bit. cuDNN's may not, so they are not used under
    torch.use_deterministic_algorithms.

    Raises: ValueError if a shape, stride, dtype or device does not fit, or a number is out of
        range.
    """
    check_packed(q, k, v, start, end, dout=dout, out=out, dq=dq)
    check_heads(k, q.dtype, dk=dk, dv=dv)
    check_scores(scale, softcap)
    N, H, _ = q.shape
    if lse.shape != (H, N) or not lse.is_contiguous():
        raise ValueError(f"lse is {tuple(lse.shape)}; q {tuple(q.shape)} needs contiguous {H, N}")
    own = softcap or torch.are_deterministic_algorithms_enabled()
    if uniform_seqlen is not None and cudnn_supports(q, k, v, uniform_seqlen) and not own:
        return cudnn_attention_backward(dout, q, k, v, out, lse, uniform_seqlen, scale, dq, dk, dv)
    if not backend.use_triton(q):
        inputs = dout, q, k, v, out, lse, start, end, scale, softcap
        results = attention_backward_reference(*inputs)
        return tuple(map(copy_into, (dq, dk, dv), results))
    dq = empty_contiguous_like(q) if dq is None else dq
    dk = empty_contiguous_like(k) if dk is None else dk
    dv = empty_contiguous_like(v) if dv is None else dv
    if N:
        max_seqlen = max_seqlen or uniform_seqlen or N
        stats = torch.empty((H, cdiv(N, 16) * 16 + MAX_BLOCK), dtype=torch.int64, device=q.device)
        sizes = choose_block_sizes(BLOCK_SIZES, 2, q, max_seqlen)
        _launch_dq(dout, q, k, v, out, lse, stats, dq, start, scale, softcap, sizes)
        launch_dkdv(dout, q, k, v, stats, dk, dv, end, scale, softcap, max_seqlen)
    return dq, dk, dv
