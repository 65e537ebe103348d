"""Packed samples, as the attention kernels see them: which blocks of keys a block of rows has to look at.

Samples lie one behind the other in N rows. start[i] is the first row of the sample of row i, end[i] one past its last
row, and row i sees the keys start[i] <= j <= i. So the rows [first, last] see keys from start[first] to last, and see
these of them whole, without a mask:

              start[first]         start[last]            first                 last
    keys      | border            | inner: every row sees | border: the diagonal |

The functions here are parts of kernels, and the checks that the forward and the backward share.
"""

import torch

from .launch import require, tl, triton


@triton.jit
def load_rows(x_ptr, rows, row_stride, N, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Head vectors of some rows, (rows, BLOCK_K), zero past K. Rows past N read the last one, for the mask to drop."""
    i = tl.arange(0, BLOCK_K)
    at = tl.minimum(rows, N - 1).to(tl.int64)[:, None] * row_stride + i[None, :]
    if K == BLOCK_K:
        x = tl.load(x_ptr + at)
    else:
        x = tl.load(x_ptr + at, mask=i[None, :] < K, other=0.0)
    return x


@triton.jit
def store_rows(x_ptr, x, rows, row_stride, N, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The inverse, cast to the dtype of x_ptr; rows past N and elements past K are dropped."""
    i = tl.arange(0, BLOCK_K)
    at = rows.to(tl.int64)[:, None] * row_stride + i[None, :]
    tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=(rows[:, None] < N) & (i[None, :] < K))


@triton.jit
def keys_of_rows(start_ptr, first, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(low, inner_low, inner_high, borders) for the rows [first, first + BLOCK_M) and keys in blocks of BLOCK_N.

    Keys begin at low; blocks in [inner_low, inner_high) need no mask; `borders` blocks around them do.
    """
    last = tl.minimum(first + BLOCK_M, N) - 1
    low = tl.load(start_ptr + first)
    inner_low = low + tl.cdiv(tl.load(start_ptr + last) - low, BLOCK_N) * BLOCK_N
    inner_high = inner_low + tl.maximum(first + 1 - inner_low, 0) // BLOCK_N * BLOCK_N
    borders = (inner_low - low) // BLOCK_N + tl.cdiv(tl.maximum(last + 1 - inner_high, 0), BLOCK_N)
    return low, inner_low, inner_high, borders


@triton.jit
def rows_of_keys(end_ptr, first, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The same for the keys [first, first + BLOCK_N) and the rows that see them, in blocks of BLOCK_M.

    Key j is seen by the rows [j, end[j]): rows from the block's last key to the end of its first key's sample see all.
    """
    high = tl.load(end_ptr + tl.minimum(first + BLOCK_N, N) - 1)
    diagonal = tl.minimum(tl.cdiv(BLOCK_N, BLOCK_M), tl.cdiv(high - first, BLOCK_M))
    inner_low = first + diagonal * BLOCK_M
    inner_high = inner_low + tl.maximum(tl.load(end_ptr + first) - inner_low, 0) // BLOCK_M * BLOCK_M
    borders = diagonal + tl.cdiv(tl.maximum(high - inner_high, 0), BLOCK_M)
    return first, inner_low, inner_high, borders


@triton.jit
def block_at(t, low, inner_low, inner_high, BORDER: tl.constexpr, BLOCK: tl.constexpr):
    """Where the t-th inner block begins, or the t-th border block: from low on, then from inner_high on."""
    if BORDER:
        at = low + t * BLOCK
        at = tl.where(at < inner_low, at, at - inner_low + inner_high)
    else:
        at = inner_low + t * BLOCK
    return at


def samples(start: torch.Tensor) -> list[tuple[int, int]]:
    """(first row, one past the last) of each sample, for the references (waits for a GPU)."""
    firsts = sorted(set(start.tolist()))
    return list(zip(firsts, [*firsts[1:], start.numel()], strict=False))


def check_packed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor, end: torch.Tensor, **like_q: torch.Tensor
) -> None:
    """ValueError unless q (N, H, K), k, v (N, G, K), start, end (N,) and whatever is shaped like q fit together."""
    require(q.dim() == k.dim() == 3, f"q {tuple(q.shape)}, k {tuple(k.shape)}; expected (rows, heads, head width)")
    (N, H, K), G = q.shape, k.shape[1]
    fits = k.shape == (N, G, K) and v.shape == k.shape
    require(fits, f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit q {tuple(q.shape)}")
    require(G > 0 and H % G == 0, f"{H} query heads are not a multiple of {G} key/value heads")
    require(K % 8 == 0 and 0 < K <= 256, f"head width {K}; expected a multiple of 8 up to 256")
    for name, x in (("start", start), ("end", end)):
        fits = x.shape == (N,) and x.dtype == torch.int32 and x.is_contiguous()
        require(fits, f"{name} is {tuple(x.shape)} {x.dtype}; expected contiguous ({N},) torch.int32")
    for name, x in like_q.items():
        require(x.shape == q.shape, f"{name} is {tuple(x.shape)}; expected the shape of q, {tuple(q.shape)}")
    for name, x in {"q": q, "k": k, "v": v, **like_q}.items():
        require(x.dtype == q.dtype, f"{name} is {x.dtype}; q is {q.dtype}")
        require(x.stride(2) == 1, f"the head vectors of {name} have stride {x.stride(2)}; expected contiguous ones")
