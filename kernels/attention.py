"""Causal attention within packed sequences, grouped-query, in one pass over the keys.

Row i sees the keys start[i] <= j <= i: those of its sequence, or a sliding window of them
(attention_common.py). Query head h reads key/value head h // (H / G):

    s = scale q k^T, or softcap tanh(scale q k^T / softcap) with a soft cap (Gemma 2)
    out = softmax(s) v
    lse = logsumexp(s)

q, out (N, H, K) and k, v (N, G, K) in one dtype; lse (H, N) float32; start, end (N,) int32. Rows
and heads may be strided, and k and v are not expanded. Saved for backward: q, k, v, out and lse.

A program keeps BLOCK_M rows of one head and walks over their keys. Scores s stay in registers. For
each row it updates a running maximum m, a sum l and a weighted sum acc of values:

    m'   = max(m, s)
    l'   = l 2^(m - m') + sum 2^(s - m')
    acc' = acc 2^(m - m') + 2^(s - m') v

The maximum is kept in units of q k^T, or of tanh with a soft cap. The scale or the cap enters with
the exponent, times log2(e), because the hardware has 2^x and a fused multiply-add. Key blocks that
no row sees are never visited. Only blocks at the border of the seen keys or on the diagonal are
masked (attention_common.py).

A sequence of T rows costs 2 K T^2 FLOPs a head, or 4 K T W with a window of W keys. It reads k and
v T / BLOCK_M times, mostly from L2. If the caller passes the one length of all sequences as
uniform_seqlen, attention_cudnn.py may take over.
"""

import math

import torch

from . import backend
from .attention_backward import attention_backward
from .attention_common import (
    BlockSizes,
    cap_scores,
    check_packed,
    check_scores,
    choose_block_sizes,
    head_strides,
    hidden_keys,
    load_rows,
    query_block,
    score_factors,
    sequence_bounds,
    shape_constants,
    store_rows,
)
from .attention_cudnn import cudnn_attention, cudnn_supports
from .backend import (
    accumulator,
    cdiv,
    copy_into,
    empty_contiguous_like,
    tl,
    triton,
)

__all__ = ["attention", "attention_backward"]

PROFILE_GROUP = "attention"

# For choose_block_sizes: K -> (BLOCK_M, BLOCK_N, warps, stages) for short and for long sequences.
# The fastest of 17 on an H200 in November 2026, bf16. TFLOP/s at 2 x 2048 and 1 x 8192 rows (32
# heads, 8 of keys, K = 128): 422 and 493; torch's variable-length flash attention 248 and 322.
BLOCK_SIZES = {
    256: ((64, 64, 4, 2), (128, 64, 8, 2)),
    128: ((64, 64, 4, 3), (128, 128, 8, 3)),
    64: ((64, 64, 4, 4), (128, 64, 8, 3)),
}


def attention_reference(q, k, v, start, end, scale, softcap=0.0):
    """Return (out, lse) in PyTorch, sequence by sequence."""
    (N, H, K), G, acc_dtype = q.shape, k.shape[1], accumulator(q.dtype)
    out = empty_contiguous_like(q)
    lse = q.new_empty((H, N), dtype=acc_dtype)
    for a, b in sequence_bounds(start):
        T = b - a
        # (G, H/G * T, K): the query heads of a group one below the other, with the keys they share
        qs = q[a:b].to(acc_dtype).transpose(0, 1).reshape(G, H // G * T, K)
        ks, vs = (x[a:b].to(acc_dtype).transpose(0, 1) for x in (k, v))
        scores = (qs @ ks.mT).mul_(scale)
        if softcap:
            scores.div_(softcap).tanh_().mul_(softcap)
        scores.view(G, H // G, T, T).masked_fill_(hidden_keys(start, a, b), -math.inf)
        sums = torch.logsumexp(scores, dim=-1, keepdim=True)
        out[a:b] = (scores.sub_(sums).exp_() @ vs).view(H, T, K).transpose(0, 1).to(q.dtype)
        lse[:, a:b] = sums.view(H, T)
    return out, lse


@triton.jit
def _attention_fwd(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    start_ptr,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    out_row_stride,
    out_head_stride,
    N,
    H,
    scale_log2,
    TANH_SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute BLOCK_M rows of one head per program."""
    head, first, rows, last, start, first_key, first_inner_key = query_block(
        start_ptr, N, H, BLOCK_M
    )
    k_ptr += head // GROUP * k_head_stride
    v_ptr += head // GROUP * v_head_stride
    q = load_rows(q_ptr + head * q_head_stride, first, q_row_stride, N, K, BLOCK_M, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for t in range(tl.cdiv(last + 1 - first_key, BLOCK_N)):
        key = first_key + t * BLOCK_N
        k = load_rows(k_ptr, key, k_row_stride, N, K, BLOCK_N, BLOCK_K)
        v = load_rows(v_ptr, key, v_row_stride, N, K, BLOCK_N, BLOCK_K)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores, _ = cap_scores(scores, TANH_SCALE)
        if (key < first_inner_key) | (key + BLOCK_N > first + 1):
            keys = key + tl.arange(0, BLOCK_N)
            seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] >= start[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(row_max, tl.max(scores, axis=1))
        # A maximum of -inf belongs to a row that has seen no key yet.
        base = tl.where(new == float("-inf"), 0.0, new * scale_log2)
        p = tl.exp2(scores * scale_log2 - base[:, None])
        shrink = tl.exp2(row_max * scale_log2 - base)
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        row_max = new
    out = acc / total[:, None]
    out_ptr += head * out_head_stride
    store_rows(out_ptr, out, first, out_row_stride, N, K, BLOCK_M, BLOCK_K)
    LN_2: tl.constexpr = 0.6931471805599453
    tl.store(
        lse_ptr + head * N + rows, (row_max * scale_log2 + tl.log2(total)) * LN_2, mask=rows < N
    )


def _launch_forward(q, k, v, out, lse, start, scale, softcap, sizes: BlockSizes) -> None:
    """Fill out and lse; the tensors are checked."""
    N, H, _ = q.shape
    tensors = q, k, v, out, lse, start
    strides = head_strides(q, k, v, out)
    scale_log2, TANH_SCALE = score_factors(scale, softcap)
    _attention_fwd[(cdiv(N, sizes.outer) * H,)](
        *tensors,
        *strides,
        N,
        H,
        scale_log2,
        TANH_SCALE=TANH_SCALE,
        **shape_constants(q, k),
        BLOCK_M=sizes.outer,
        BLOCK_N=sizes.inner,
        **sizes.options,
    )


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    uniform_seqlen: int | None = None,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, lse): out (N, H, K) in q's dtype, and lse (H, N) in float32 for backward.

    q: (N, H, K); K a multiple of 8 up to 256.
    k, v: (N, G, K); H a multiple of G.
    start, end: (N,) int32. Row i sees the keys start[i] <= j <= i, and key j is seen by the rows
        j <= i < end[j]. Neither falls from one row to the next. Their values are not checked,
        because that would wait for the GPU.
    scale: factor of the scores, above 0.
    out: destination (N, H, K), rows and heads may be strided; by default a new tensor.
    max_seqlen: rows of the longest sequence, or a bound on them; by default N. It only chooses the
        block sizes.
    uniform_seqlen: rows of every sequence, if all are equally long and have no window. It allows
        cuDNN, which then ignores start and end; by default this file's kernel runs.
    softcap: bound on the scores; 0 for none. cuDNN has no such bound.

    Raises: ValueError if a shape, stride, dtype or device does not fit, or a number is out of
        range.
    """
    check_packed(q, k, v, start, end, out=out)
    check_scores(scale, softcap)
    if uniform_seqlen is not None and cudnn_supports(q, k, v, uniform_seqlen) and not softcap:
        return cudnn_attention(q, k, v, uniform_seqlen, scale, out)
    if not backend.use_triton(q):
        result, lse = attention_reference(q, k, v, start, end, scale, softcap)
        return copy_into(out, result), lse
    N, H, _ = q.shape
    out = empty_contiguous_like(q) if out is None else out
    lse = torch.empty((H, N), dtype=torch.float32, device=q.device)
    if N:
        max_seqlen = max_seqlen or uniform_seqlen or N
        sizes = choose_block_sizes(BLOCK_SIZES, 1, q, max_seqlen)
        _launch_forward(q, k, v, out, lse, start, scale, softcap, sizes)
    return out, lse
