"""Parts shared by the attention kernels: blocks of packed sequences, block sizes, argument checks.

Packed sequences lie one after the other in N rows. Row i sees the keys start[i] <= j <= i, and key
j is seen by the rows j <= i < end[j]. Neither bound ever falls from one row to the next:

- plain sequences: start[i] is the first row of row i's sequence, end[i] is one past its last row;
- a sliding window of W keys: start[i] is at least i - W + 1, and end[j] at most j + W.

A program keeps a block of rows [first, last] and walks over the keys from start[first] to last. Or
it keeps a block of keys [first, last] and walks over the rows that see them:

              start[first]         start[last]            first                 last
    keys      | border            | inner: every row sees | border: the diagonal |

              first                last                   end[first]             end[last]
    rows      | border: diagonal  | inner: see every key  | border               |

Only border blocks are masked.
"""

import math
from typing import NamedTuple

import torch

from . import backend
from .backend import check_rows, power_of_two, tanh_and_slope, tl, triton

MAX_BLOCK = 128  # rows of the largest block; offsets within a block are 32 bit
MAX_ROW_STRIDE = 2**31 // MAX_BLOCK - 1  # elements
SHORT_SEQUENCE_ROWS = 2048  # a sequence of up to this many rows is short, a longer one long

# (outer, inner, warps, stages) for choose_block_sizes if shared memory is small.
FALLBACK_BLOCK_SIZES = ((64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (16, 16, 4, 1))
# Products without tensor cores unroll into one instruction an element. So blocks are small and
# warps many. In float16 on sm_75, dq at K = 64 then has 1,408 instructions and spills no register.
# With the blocks that are fastest on an H200 it has 13,200, of which 4,900 move spilled registers.
FMA_BLOCK_SIZES = ((32, 32, 8, 2), (32, 16, 8, 2), (16, 16, 8, 1), (8, 16, 8, 1))
# Four warps are faster in 16 bit if a program keeps few numbers a row. Kernels lowered for sm_75 on
# an H100 in November 2026, 2 x 1024 rows, eight and four warps: forward 0.46 and 0.30 ms at K = 64,
# 2.8 and 1.8 ms at K = 128; dq spills at K = 128 and takes 11 and 29 ms with dk and dv.
FMA_FEW_NUMBERS, FMA_FOUR_WARPS = 128, (32, 32, 4, 1)


@triton.jit
def query_block(start_ptr, N, H, BLOCK_M: tl.constexpr):
    """Return this program's head and block of rows, and the borders of the keys they see.

    The last rows, which see the most keys, belong to the first programs. The results are:

    head: query head, int64.
    first: first row of the block.
    rows: the rows of the block (BLOCK_M,).
    last: last row of the block.
    start: the first key that each row sees (BLOCK_M,).
    first_key: the first key that any row sees.
    first_inner_key: the first key from which on every row sees all keys up to `first`.
    """
    head = (tl.program_id(0) % H).to(tl.int64)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) // H * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    last = tl.minimum(first + BLOCK_M, N) - 1
    start = tl.load(start_ptr + tl.minimum(rows, last))
    return head, first, rows, last, start, tl.load(start_ptr + first), tl.load(start_ptr + last)


@triton.jit
def load_rows(
    x_ptr, first, x_row_stride, N, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Return the head vectors of ROWS rows from `first` on, (ROWS, BLOCK_K), zero past K.

    Rows past N repeat the last row; the caller masks them.
    """
    i = tl.arange(0, BLOCK_K)
    row = tl.minimum(tl.arange(0, ROWS), N - 1 - first)
    at = x_ptr + first.to(tl.int64) * x_row_stride + (row[:, None] * x_row_stride + i[None, :])
    if K == BLOCK_K:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=i[None, :] < K, other=0.0)
    return x


@triton.jit
def store_rows(
    x_ptr, x, first, x_row_stride, N, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Store head vectors x (ROWS, BLOCK_K) in the dtype of x_ptr, up to row N and element K."""
    i = tl.arange(0, BLOCK_K)
    row = tl.arange(0, ROWS)
    at = x_ptr + first.to(tl.int64) * x_row_stride + (row[:, None] * x_row_stride + i[None, :])
    tl.store(at, x.to(x_ptr.dtype.element_ty), mask=(row[:, None] < N - first) & (i[None, :] < K))


@triton.jit
def cap_scores(scores, TANH_SCALE: tl.constexpr):
    """Return tanh(TANH_SCALE scores) and its slope; the scores and 1 if TANH_SCALE is 0."""
    slope = 1.0
    if TANH_SCALE > 0.0:
        scores, slope = tanh_and_slope(scores * TANH_SCALE)
    return scores, slope


@triton.jit
def pack_floats(low, high):
    """Return two float32 in the halves of an int64, so that one load fetches both."""
    low = low.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return (high.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low


@triton.jit
def unpack_floats(x):
    """Return the two float32 of an int64 from `pack_floats`."""
    low = x.to(tl.int32).to(tl.float32, bitcast=True)
    return low, (x >> 32).to(tl.int32).to(tl.float32, bitcast=True)


def seqlen_bound(max_seqlen: int) -> int | None:
    """Return the bound that stands for max_seqlen when block sizes are chosen, None if long."""
    return SHORT_SEQUENCE_ROWS if max_seqlen <= SHORT_SEQUENCE_ROWS else None


class BlockSizes(NamedTuple):
    """Block sizes and launch options of an attention kernel."""

    outer: int  # rows that a program keeps
    inner: int  # rows of the blocks that it walks over
    options: dict[str, int]  # num_warps, num_stages and possibly maxnreg


def choose_block_sizes(
    measured: dict, outer_tensors: int, q: torch.Tensor, max_seqlen: int
) -> BlockSizes:
    """Return the best block sizes that fit into the shared memory of q's device.

    A program keeps `outer` rows of `outer_tensors` tensors. It walks over two other tensors in
    blocks of `inner` rows, `num_stages` of which are in shared memory at a time. GPUs without
    tensor-core kernels have one stage. They keep the outer rows in float32, and pass the scores
    through shared memory.

    measured: head width K -> block sizes for short and for long sequences, valid up to that K in
        16 bit on tensor cores. Block sizes are (outer, inner, warps, stages[, registers a thread]).
    q: (N, H, K).
    max_seqlen: rows of the longest sequence, or a bound on them.
    """
    K, itemsize = q.shape[2], q.element_size()
    row_bytes = max(power_of_two(K), 16) * itemsize
    shared_memory = backend.shared_memory_limit(q.device)
    is_pipelined = backend.has_tensor_core_kernels(q.device)
    on_tensor_cores = itemsize == 2 and is_pipelined
    candidates = FALLBACK_BLOCK_SIZES if on_tensor_cores else FMA_BLOCK_SIZES
    if on_tensor_cores and max(measured) >= K:
        short, long = measured[min(width for width in measured if width >= K)]
        candidates = (short if max_seqlen <= SHORT_SEQUENCE_ROWS else long, *candidates)
    elif itemsize == 2 and outer_tensors * power_of_two(K) <= FMA_FEW_NUMBERS:
        candidates = (FMA_FOUR_WARPS, *candidates)
    for candidate in candidates:
        outer, inner, warps, stages, *registers = candidate
        if is_pipelined:
            needed = (outer * outer_tensors + 2 * inner * stages) * row_bytes
        else:
            outer_bytes = outer * outer_tensors * row_bytes * 4 // itemsize
            needed = outer_bytes + 2 * inner * row_bytes + outer * inner * 4
        if needed <= shared_memory:
            break
    options = {"num_warps": warps, "num_stages": stages}
    if registers:
        options["maxnreg"] = registers[0]
    return BlockSizes(outer, inner, options)


def shape_constants(q: torch.Tensor, k: torch.Tensor) -> dict[str, int]:
    """Return the constexprs that follow from the shapes of q (N, H, K) and k (N, G, K)."""
    K = q.shape[2]
    return {"GROUP": q.shape[1] // k.shape[1], "K": K, "BLOCK_K": max(power_of_two(K), 16)}


def score_factors(scale: float, softcap: float) -> tuple[float, float]:
    """Return (scale_log2, TANH_SCALE) for the kernels.

    The scores in base 2 are scale_log2 q k^T, or scale_log2 tanh(TANH_SCALE q k^T) with a soft cap.
    TANH_SCALE is 0 without a cap.
    """
    if softcap:
        return softcap * math.log2(math.e), scale / softcap
    return scale * math.log2(math.e), 0.0


def head_strides(*tensors: torch.Tensor) -> list[int]:
    """Return the row stride and the head stride of each tensor (..., rows, heads, K)."""
    return [stride for x in tensors for stride in x.stride()[-3:-1]]


def sequence_bounds(start: torch.Tensor) -> list[tuple[int, int]]:
    """Return (first row, one past the last row) of each sequence; wait for the GPU.

    A sequence begins at a row that sees only itself, because start never falls after that row.
    """
    index = torch.arange(len(start), dtype=start.dtype, device=start.device)
    firsts = (start == index).nonzero()[:, 0].tolist()
    return list(zip(firsts, [*firsts[1:], len(start)], strict=False))


def hidden_keys(start: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Return the mask (T, T) of the keys that each of T rows does not see.

    start: (N,), the first key that each row sees.
    first, last: first row of the sequence, and one past its last row.
    """
    row = torch.arange(first, last, dtype=start.dtype, device=start.device)
    return (row > row[:, None]) | (row < start[first:last, None])


def check_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    **like_q: torch.Tensor | None,
) -> None:
    """Check that q (N, H, K), k, v (N, G, K), start, end (N,) and `like_q` tensors fit together.

    Raises: ValueError if a shape, dtype, device or stride does not fit.
    """
    if q.dim() != 3 or k.dim() != 3:
        raise ValueError(
            f"q is {tuple(q.shape)} and k {tuple(k.shape)}; expected (rows, heads, head width)"
        )
    (N, H, K), G = q.shape, k.shape[1]
    if k.shape != (N, G, K):
        raise ValueError(f"k {tuple(k.shape)} does not fit q {tuple(q.shape)}")
    if G == 0 or H % G:
        raise ValueError(f"{H} query heads are not a multiple of {G} key/value heads")
    if K % 8 or not 0 < K <= 256:
        raise ValueError(f"head width {K}; expected a multiple of 8 up to 256")
    for name, x in (("start", start), ("end", end)):
        if x.shape != (N,) or x.dtype != torch.int32 or not x.is_contiguous():
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype}; expected contiguous ({N},) torch.int32"
            )
    check_rows(q, (q.dtype,), MAX_ROW_STRIDE, q=q, **like_q)
    check_rows(k, (q.dtype,), MAX_ROW_STRIDE, k=k, v=v)


def check_scores(scale: float, softcap: float) -> None:
    """Check the scale and the soft cap of the scores.

    Raises: ValueError if one is out of range.
    """
    if not scale > 0:
        raise ValueError(f"scale {scale}; expected above 0")
    if not softcap >= 0:
        raise ValueError(f"softcap {softcap}; expected above 0, or 0 for none")


def check_heads(like: torch.Tensor, dtype: torch.dtype, **tensors: torch.Tensor | None) -> None:
    """Check tensors (rows, heads, K) against `like`, and that offsets within a block fit 32 bits.

    Raises: ValueError if a tensor does not fit.
    """
    check_rows(like, (dtype,), MAX_ROW_STRIDE, **tensors)
