"""dk and dv of causal attention within packed sequences. attention_backward.py has the formulas.

A program computes dk and dv of a block of keys of one key/value head. It walks over the rows that
see these keys, in every query head of the group, as one loop. If that makes too few programs for
the GPU, the heads of a group are split over several programs. These leave partial sums in float32,
and a second kernel adds them.
"""

import torch

from .attention_common import (
    cap_scores,
    choose_block_sizes,
    head_strides,
    load_rows,
    score_factors,
    shape_constants,
    store_rows,
    unpack_floats,
)
from .backend import cdiv, tl, triton

PROFILE_GROUP = "attention"

# For choose_block_sizes: K -> (BLOCK_N, BLOCK_M, warps, stages) for short and for long sequences.
# The fastest of 15 on an H200 in November 2026, bf16: 0.259 ms at 2 x 2048 rows and 1.85 ms at
# 1 x 8192 (32 heads, 8 of keys, K = 128). Heads of 256 (8, 4 of keys): dq, dk and dv take 3.04 ms
# at 1 x 8192, with 4 warps 4.37.
BLOCK_SIZES = {
    256: ((64, 64, 8, 2), (64, 64, 8, 2)),
    128: ((64, 64, 4, 2), (64, 64, 4, 2)),
    64: ((64, 64, 4, 4), (64, 64, 4, 4)),
}
MIN_PROGRAMS = 264  # two on each of an H200's 132 multiprocessors


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
    split_stride,
    N,
    G,
    scale,
    scale_log2,
    TANH_SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute dk and dv of BLOCK_N keys of one key/value head per program.

    A program sums over GROUP / SPLITS of the query heads, one after the other. Scores are
    (keys, rows) here, so that p needs no transpose. stats must be readable BLOCK_M rows past N.
    """
    HEADS: tl.constexpr = GROUP // SPLITS
    split = tl.program_id(0) % SPLITS
    g = (tl.program_id(0) // SPLITS % G).to(tl.int64)
    first = tl.program_id(0) // (SPLITS * G) * BLOCK_N
    keys = first + tl.arange(0, BLOCK_N)
    last = tl.minimum(first + BLOCK_N, N) - 1
    end = tl.load(end_ptr + tl.minimum(keys, last))
    end_row = tl.load(end_ptr + last)  # one past the last row that sees any of the keys
    end_inner_row = tl.load(end_ptr + first)  # one past the last row that sees all of the keys
    k = load_rows(k_ptr + g * k_head_stride, first, k_row_stride, N, K, BLOCK_N, BLOCK_K)
    v = load_rows(v_ptr + g * v_head_stride, first, v_row_stride, N, K, BLOCK_N, BLOCK_K)
    dk = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    head, row = g * GROUP + split * HEADS, first
    for _ in range(HEADS * tl.cdiv(end_row - first, BLOCK_M)):
        q = load_rows(q_ptr + head * q_head_stride, row, q_row_stride, N, K, BLOCK_M, BLOCK_K)
        head_dout_ptr = dout_ptr + head * dout_head_stride
        dout = load_rows(head_dout_ptr, row, dout_row_stride, N, K, BLOCK_M, BLOCK_K)
        row_stats_ptr = stats_ptr + head * stats_head_stride + row
        lse, delta = unpack_floats(tl.load(row_stats_ptr + tl.arange(0, BLOCK_M)))
        scores, slope = cap_scores(tl.dot(k, tl.trans(q), input_precision="ieee"), TANH_SCALE)
        p = tl.exp2(scores * scale_log2 - lse[None, :])
        if (row < last) | (row + BLOCK_M > end_inner_row):
            rows = row + tl.arange(0, BLOCK_M)
            seen = (keys[:, None] <= rows[None, :]) & (rows[None, :] < end[:, None])
            p = tl.where(seen, p, 0.0)
            delta = tl.where(rows < N, delta, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :]) * slope
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        # Go on to the next head by selects: a branch would keep loads from running ahead.
        through = row + BLOCK_M >= end_row
        row = tl.where(through, first, row + BLOCK_M)
        head += through.to(tl.int64)
    dk_ptr += split.to(tl.int64) * split_stride + g * dk_head_stride
    dv_ptr += split.to(tl.int64) * split_stride + g * dv_head_stride
    store_rows(dk_ptr, dk * scale, first, dk_row_stride, N, K, BLOCK_N, BLOCK_K)
    store_rows(dv_ptr, dv, first, dv_row_stride, N, K, BLOCK_N, BLOCK_K)


@triton.jit
def _attention_sum(
    partial_ptr,
    dk_ptr,
    dv_ptr,
    dk_row_stride,
    dk_head_stride,
    dv_row_stride,
    dv_head_stride,
    split_stride,
    N,
    G,
    SPLITS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum the partial dk and dv (2, SPLITS, N, G, K) over the splits, BLOCK_M rows a program."""
    g = (tl.program_id(0) % G).to(tl.int64)
    first = tl.program_id(0) // G * BLOCK_M
    partial_ptr += g * K
    dk_ptr += g * dk_head_stride
    dv_ptr += g * dv_head_stride
    total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for i in tl.static_range(2 * SPLITS):
        total += load_rows(partial_ptr, first, G * K, N, K, BLOCK_M, BLOCK_K)
        partial_ptr += split_stride
        if i == SPLITS - 1:
            store_rows(dk_ptr, total, first, dk_row_stride, N, K, BLOCK_M, BLOCK_K)
            total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    store_rows(dv_ptr, total, first, dv_row_stride, N, K, BLOCK_M, BLOCK_K)


def num_splits(blocks: int, G: int, GROUP: int) -> int:
    """Return how many programs share the heads of a group: as many as it takes to fill the GPU.

    Splitting costs one more kernel, and memory for the partial sums in float32.

    blocks: blocks of keys.
    G: key/value heads.
    GROUP: query heads a key/value head.
    """
    divisors = [n for n in range(1, GROUP + 1) if GROUP % n == 0]
    return next((n for n in divisors if blocks * G * n >= MIN_PROGRAMS), GROUP)


def planned_splits(N: int, H: int, G: int, K: int) -> int:
    """Return the splits of a launch in 16 bit on a GPU whose shared memory holds BLOCK_SIZES.

    N: rows.
    H, G: query heads and key/value heads.
    K: head width.
    """
    widths = [width for width in BLOCK_SIZES if width >= K]
    short, _ = BLOCK_SIZES[min(widths, default=max(BLOCK_SIZES))]
    return num_splits(cdiv(N, short[0]), G, H // G)


def launch_dkdv(
    dout, q, k, v, stats, dk, dv, end, scale: float, softcap: float, max_seqlen: int
) -> None:
    """Fill dk and dv (N, G, K) of at least one row; the tensors are checked.

    dout, q, k, v, end, scale, softcap: as in `attention_backward`.
    stats: (lse in base 2, delta) of each head and row as the dq kernel stores them, (H, at least
        N + MAX_BLOCK) int64.
    max_seqlen: rows of the longest sequence, or a bound on them.
    """
    (N, H, K), G = q.shape, k.shape[1]
    sizes = choose_block_sizes(BLOCK_SIZES, 2, q, max_seqlen)
    blocks = cdiv(N, sizes.outer)
    splits = num_splits(blocks, G, H // G)
    targets = dk, dv
    if splits > 1:
        targets = torch.empty((2, splits, N, G, K), dtype=torch.float32, device=q.device)
    split_stride = N * G * K
    shape = shape_constants(q, k)
    strides = head_strides(dout, q, k, v, *targets)
    scale_log2, TANH_SCALE = score_factors(scale, softcap)
    _attention_dkdv[(blocks * G * splits,)](
        dout,
        q,
        k,
        v,
        stats,
        *targets,
        end,
        *strides,
        stats.stride(0),
        split_stride,
        N,
        G,
        scale,
        scale_log2,
        TANH_SCALE=TANH_SCALE,
        **shape,
        SPLITS=splits,
        BLOCK_M=sizes.inner,
        BLOCK_N=sizes.outer,
        **sizes.options,
    )
    if splits > 1:
        _attention_sum[(cdiv(N, 16) * G,)](
            targets,
            dk,
            dv,
            *head_strides(dk, dv),
            split_stride,
            N,
            G,
            SPLITS=splits,
            K=K,
            BLOCK_M=16,
            BLOCK_K=shape["BLOCK_K"],
            num_warps=4,
        )
