"""Causal attention within each packed sample, grouped-query, in one pass over the keys; the scores stay in registers.

Row i sees the keys start[i] <= j <= i of its sample; query head h reads key/value head h // (H / G):

    out = softmax(scale q k^T) v            lse = logsumexp(scale q k^T)

q, out (N, H, K); k, v (N, G, K), rows and heads may be strided, nothing is expanded; start, end (N,) int32;
lse (H, N) float32. Saved for the backward (attention_bwd.py): out and lse.

A program keeps BLOCK_M rows of one head and walks over their keys with a running maximum m and sum l of each row:

    m' = max(m, s)      l' = l 2^(m - m') + sum 2^(s - m')      acc' = acc 2^(m - m') + 2^(s - m') v

The maximum is kept in the units of q k^T, and log2(e) scale enters with the exponent, since the hardware has 2^x and a
fused multiply-add. Key blocks that no row sees are never visited, and only those at a sample's border or on the
diagonal are masked (packed.py). A sample of T rows costs 2 K T^2 FLOPs a head, and reads k and v T / BLOCK_M times,
mostly from L2. Where all samples have one length, attention_cudnn.py may take over: who allows it says that length.
"""

import math

import torch

from . import backend
from .attention_backward import attention_backward
from .attention_common import (
    check_buffer,
    check_packed,
    choose_block_sizes,
    load_rows,
    samples,
    store_rows,
)
from .attention_cudnn import cudnn_attention, cudnn_supports
from .backend import accumulator, cdiv, copy_into, power_of_two, tl, triton

__all__ = ["attention", "attention_backward"]


def attention_reference(q, k, v, start, end, scale):
    dtype, wide, (N, H, K), G = q.dtype, accumulator(q.dtype), q.shape, k.shape[1]
    out, lse = (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty((H, N), dtype=wide),
    )
    for a, b in samples(start):
        T = b - a
        # The query heads of a group one below the other, (G, H/G * T, K), so that its keys serve them all.
        qs = q[a:b].to(wide).transpose(0, 1).reshape(G, H // G * T, K)
        ks, vs = k[a:b].to(wide).transpose(0, 1), v[a:b].to(wide).transpose(0, 1)
        unseen = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        scores = (
            (qs @ ks.mT)
            .mul_(scale)
            .view(G, H // G, T, T)
            .masked_fill_(unseen, -math.inf)
            .view(G, -1, T)
        )
        sums = torch.logsumexp(scores, dim=-1, keepdim=True)
        out[a:b] = (scores.sub_(sums).exp_() @ vs).view(H, T, K).transpose(0, 1).to(dtype)
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
    GROUP: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_M rows of one head. The last rows, which see the most keys, start first."""
    head = (tl.program_id(0) % H).to(tl.int64)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) // H * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    last = tl.minimum(first + BLOCK_M, N) - 1
    start = tl.load(start_ptr + tl.minimum(rows, last))
    low, inner_low, inner_high = tl.load(start_ptr + first), tl.load(start_ptr + last), first + 1
    k_ptr += head // GROUP * k_head_stride
    v_ptr += head // GROUP * v_head_stride
    q = load_rows(q_ptr + head * q_head_stride, first, q_row_stride, N, K, BLOCK_M, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for t in range(tl.cdiv(last + 1 - low, BLOCK_N)):
        key = low + t * BLOCK_N
        k = load_rows(k_ptr, key, k_row_stride, N, K, BLOCK_N, BLOCK_K)
        v = load_rows(v_ptr, key, v_row_stride, N, K, BLOCK_N, BLOCK_K)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if (key < inner_low) | (key + BLOCK_N > inner_high):
            keys = key + tl.arange(0, BLOCK_N)
            seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] >= start[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(
            new == float("-inf"), 0.0, new * scale_log2
        )  # -inf: a row that has seen no key yet
        p = tl.exp2(scores * scale_log2 - base[:, None])
        shrink = tl.exp2(top * scale_log2 - base)
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new
    store_rows(
        out_ptr + head * out_head_stride,
        acc / total[:, None],
        first,
        out_row_stride,
        N,
        K,
        BLOCK_M,
        BLOCK_K,
    )
    LN_2: tl.constexpr = 0.6931471805599453
    tl.store(lse_ptr + head * N + rows, (top * scale_log2 + tl.log2(total)) * LN_2, mask=rows < N)


# For packed.py's choose_block_sizes: (BLOCK_M, BLOCK_N, warps, stages). Fastest of 17 on an H200, November 2026, bf16; TFLOP/s
# at 2 x 2048 and 1 x 8192 (32 heads, 8 of keys, K = 128): 422 and 493; torch's variable-length flash 248 and 322.
BLOCK_SIZES = {
    128: ((64, 64, 4, 3), (128, 128, 8, 3)),
    64: ((64, 64, 4, 4), (128, 64, 8, 3)),
}


def launch_forward(q, k, v, out, lse, start, scale: float, tile: dict) -> None:
    """`tile` as choose_block_sizes gives it; the tensors have been checked."""
    (N, H, K), tile = q.shape, dict(tile)
    BLOCK_M, BLOCK_N = tile.pop("BLOCK_OUTER"), tile.pop("BLOCK_INNER")
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2])
    shape = {"GROUP": H // k.shape[1], "K": K, "BLOCK_K": max(power_of_two(K), 16)}
    _attention_fwd[(cdiv(N, BLOCK_M) * H,)](
        q, k, v, out, lse, start, *strides, N, H, scale * math.log2(math.e), **shape, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        **tile,
    )  # fmt: skip


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (N, H, K) in q's dtype, lse (H, N) float32, the natural logarithm, for the backward).

    q (N, H, K), k and v (N, G, K) with contiguous head vectors, H a multiple of G, K a multiple of 8 up to 256;
    start, end (N,) int32, consistent with each other (not checked: that would wait for the GPU); scale above 0.
    out: where to put the result, with rows and heads as far apart as the caller likes.
    max_seqlen: rows of the longest sample, or a bound on it: only chooses tiles.
    uniform_seqlen: every sample has exactly so many rows, and cuDNN may be used. None: always the kernel of this file.
    ValueError where a shape, stride or dtype does not fit.
    """
    check_packed(q, k, v, start, end)
    if not scale > 0:
        raise ValueError(f"scale {scale}; expected above 0")
    check_buffer("out", out, q)
    if uniform_seqlen is not None and cudnn_supports(q, k, v, uniform_seqlen):
        return cudnn_attention(q, k, v, uniform_seqlen, scale, out)
    if not backend.use_triton(q):
        result, lse = attention_reference(q, k, v, start, end, scale)
        return copy_into(out, result), lse
    N, H, K = q.shape
    out = torch.empty((N, H, K), dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty((H, N), dtype=torch.float32, device=q.device)
    if N:
        shared = backend.shared_memory_limit(q.device)
        tile = choose_block_sizes(
            BLOCK_SIZES, 1, K, q.element_size(), max_seqlen or uniform_seqlen or N, shared
        )
        launch_forward(q, k, v, out, lse, start, scale, tile)
    return out, lse
