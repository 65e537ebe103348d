"""Causal attention within each packed sample, grouped-query, in one pass over the keys; the scores stay in registers.

Row i sees the keys start[i] <= j <= i of its sample; query head h reads key/value head h // (H / G):

    out = softmax(scale q k^T) v            lse = logsumexp(scale q k^T)

q, out (N, H, K); k, v (N, G, K), rows and heads may be strided, nothing is expanded; start, end (N,) int32;
lse (H, N) float32. Saved for the backward (attention_bwd.py): out and lse.

A program keeps BLOCK_M rows of one head and walks over their keys with a running maximum m and sum l of each row:

    m' = max(m, s)      l' = l 2^(m - m') + sum 2^(s - m')      acc' = acc 2^(m - m') + 2^(s - m') v

with scores in base 2, log2(e) folded into the scale, since the hardware has 2^x. Key blocks that no row sees are never
visited, and only those at a sample's border or on the diagonal are masked (packed.py). A sample of T rows costs
2 K T^2 FLOPs a head, and reads k and v T / BLOCK_M times, mostly from L2.
"""

import math

import torch

from . import launch
from .attention_bwd import attention_backward
from .launch import accumulator, cdiv, power_of_two, tl, triton
from .packed import block_at, check_packed, keys_of_rows, load_rows, samples, store_rows

__all__ = ["attention", "attention_backward"]


def attention_reference(q, k, v, start, end, scale):
    dtype, wide, (N, H, K), G = q.dtype, accumulator(q.dtype), q.shape, k.shape[1]
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty((H, N), dtype=wide)
    for a, b in samples(start):
        T = b - a
        # The query heads of a group one below the other, (G, H/G * T, K), so that its keys serve them all.
        qs = q[a:b].to(wide).transpose(0, 1).reshape(G, H // G * T, K)
        ks, vs = k[a:b].to(wide).transpose(0, 1), v[a:b].to(wide).transpose(0, 1)
        unseen = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        scores = (qs @ ks.mT).mul_(scale).view(G, H // G, T, T).masked_fill_(unseen, -math.inf).view(G, -1, T)
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
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1)
    rows = first + tl.arange(0, BLOCK_M)
    start = tl.load(start_ptr + rows, mask=rows < N, other=0)
    k_ptr += head // GROUP * k_head_stride
    v_ptr += head // GROUP * v_head_stride
    q = load_rows(q_ptr + head * q_head_stride, rows, q_row_stride, N, K, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    low, inner_low, inner_high, borders = keys_of_rows(start_ptr, first, N, BLOCK_M, BLOCK_N)
    for BORDER in tl.static_range(2):
        blocks = borders if BORDER else (inner_high - inner_low) // BLOCK_N
        for t in range(blocks):
            keys = block_at(t, low, inner_low, inner_high, BORDER, BLOCK_N) + tl.arange(0, BLOCK_N)
            k = load_rows(k_ptr, keys, k_row_stride, N, K, BLOCK_K)
            v = load_rows(v_ptr, keys, v_row_stride, N, K, BLOCK_K)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            if BORDER:
                seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] >= start[:, None])
                scores = tl.where(seen, scores, float("-inf"))
            new = tl.maximum(top, tl.max(scores, axis=1))
            base = tl.where(new == float("-inf"), 0.0, new)  # -inf: a row that has seen no key yet
            p = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(p, axis=1)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            top = new
    store_rows(out_ptr + head * K, acc / total[:, None], rows, H * K, N, K, BLOCK_K)
    LN_2: tl.constexpr = 0.6931471805599453
    tl.store(lse_ptr + head.to(tl.int64) * N + rows, (top + tl.log2(total)) * LN_2, mask=rows < N)


def _blocks(K: int, itemsize: int, shared_memory: int) -> dict:
    """128 rows by 64 keys at 16 bit, and a pipeline of up to 3 blocks of keys, as far as shared memory holds them.

    On an H200 in November 2026, K = 128, H = 32, G = 8, bf16: 355 TFLOP/s at T = 2048 (64 x 64: 333, 128 x 128: 313),
    67 at T = 150 (64 x 64: 81). float32 has no tensor cores: its products unroll into one instruction an element, so
    tiles are small and warps many.
    """
    BLOCK_M, BLOCK_N = (128, 64) if itemsize == 2 else (32, 32)
    row = max(power_of_two(K), 16) * itemsize
    while (BLOCK_M + 2 * BLOCK_N) * row > shared_memory // 2 and BLOCK_M > 32:
        BLOCK_M, BLOCK_N = BLOCK_M // 2, max(BLOCK_N // 2, 16)
    stages = (shared_memory - BLOCK_M * row) // (2 * BLOCK_N * row)
    return {
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": max(power_of_two(K), 16),
        "num_warps": 8 if itemsize == 4 or (BLOCK_M == 128 and K > 64) else 4,
        "num_stages": min(max(stages, 1), 3),
    }


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor, end: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (N, H, K) in q's dtype, lse (H, N) float32, the natural logarithm, for the backward).

    q (N, H, K), k and v (N, G, K) with contiguous head vectors, H a multiple of G, K a multiple of 8 up to 256;
    start, end (N,) int32, consistent with each other (not checked: that would wait for the GPU).
    ValueError where a shape, stride or dtype does not fit.
    """
    check_packed(q, k, v, start, end)
    if not launch.use_triton(q):
        return attention_reference(q, k, v, start, end, scale)
    (N, H, K), G = q.shape, k.shape[1]
    out = torch.empty((N, H, K), dtype=q.dtype, device=q.device)
    lse = torch.empty((H, N), dtype=torch.float32, device=q.device)
    if N:
        blocks = _blocks(K, q.element_size(), launch.shared_memory_limit(q.device))
        _attention_fwd[(cdiv(N, blocks["BLOCK_M"]), H)](
            q,
            k,
            v,
            out,
            lse,
            start,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            N,
            H,
            scale * math.log2(math.e),
            GROUP=H // G,
            K=K,
            **blocks,
        )
    return out, lse
