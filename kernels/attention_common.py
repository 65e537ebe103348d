"""Packed samples, as the attention kernels see them: which blocks of keys a block of rows has to look at.

Samples lie one behind the other in N rows. start[i] is the first row of the sample of row i, end[i] one past its last
row, and row i sees the keys start[i] <= j <= i; so key j is seen by the rows j <= i < end[j]. A program keeps the rows
[first, last] and walks over the keys from start[first] to last, or keeps keys and walks over the rows that see them:

              start[first]         start[last]            first                 last
    keys      | border            | inner: every row sees | border: the diagonal |

              first                last                   end[first]             end[last]
    rows      | border: diagonal  | inner: see every key  | border               |

Only border blocks are masked. Here are parts of kernels, the choice of tiles, and the checks of what callers pass.
"""

import torch

from .backend import power_of_two, tl, triton

MAX_BLOCK = 128  # rows of the largest tile; offsets within one are 32 bit
SHORT_SEQUENCE_ROWS = (
    2048  # rows of the longest sample, up to which it is of medium length, and long beyond
)

# Where shared memory is small. float32 has no tensor cores: its products unroll into one instruction an element, so
# tiles are small and warps many.
FALLBACK_BLOCK_SIZES = ((64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (16, 16, 4, 1))
FLOAT32_BLOCK_SIZES = ((32, 32, 8, 2), (32, 16, 8, 2), (16, 16, 8, 1))


@triton.jit
def load_rows(
    x_ptr, first, row_stride, N, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Head vectors of the rows from `first` on, (ROWS, BLOCK_K), zero past K. Rows past N are the last one again, for
    the mask to drop."""
    i = tl.arange(0, BLOCK_K)
    row = tl.minimum(tl.arange(0, ROWS), N - 1 - first)
    at = x_ptr + first.to(tl.int64) * row_stride + (row[:, None] * row_stride + i[None, :])
    if K == BLOCK_K:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=i[None, :] < K, other=0.0)
    return x


@triton.jit
def store_rows(
    x_ptr, x, first, row_stride, N, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The inverse, cast to the dtype of x_ptr; rows past N and elements past K are dropped."""
    i = tl.arange(0, BLOCK_K)
    row = tl.arange(0, ROWS)
    at = x_ptr + first.to(tl.int64) * row_stride + (row[:, None] * row_stride + i[None, :])
    tl.store(at, x.to(x_ptr.dtype.element_ty), mask=(row[:, None] < N - first) & (i[None, :] < K))


@triton.jit
def pack_floats(low, high):
    """Two float32 in the halves of an int64, so that both travel in one load."""
    low = low.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return (high.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low


@triton.jit
def unpack_floats(x):
    return x.to(tl.int32).to(tl.float32, bitcast=True), (x >> 32).to(tl.int32).to(
        tl.float32, bitcast=True
    )


def seqlen_bound(max_seqlen: int) -> int | None:
    """The bound that samples of up to `max_seqlen` rows choose their tiles by; None where there is no such bound."""
    return SHORT_SEQUENCE_ROWS if max_seqlen <= SHORT_SEQUENCE_ROWS else None


def choose_block_sizes(
    tiles: dict, kept: int, K: int, itemsize: int, max_seqlen: int, shared_memory: int
) -> dict:
    """What `tiles` has for samples of up to `max_seqlen` rows and heads of width K, if shared memory can hold it.

    A tile is (KEEP, PASS, warps, stages[, registers a thread]): KEEP rows of `kept` tensors stay with a program while
    blocks of PASS rows of two others pass by, `stages` of them in shared memory at a time, those at work and those on
    their way. tiles: by the width of heads up to which they hold, for samples of medium length and long ones.
    """
    row = max(power_of_two(K), 16) * itemsize
    candidates = FLOAT32_BLOCK_SIZES if itemsize == 4 else FALLBACK_BLOCK_SIZES
    if itemsize == 2 and max(tiles) >= K:
        measured = tiles[min(width for width in tiles if width >= K)]
        candidates = (
            measured[(SHORT_SEQUENCE_ROWS, None).index(seqlen_bound(max_seqlen))],
            *candidates,
        )
    for KEEP, PASS, warps, stages, *registers in candidates:  # noqa: B007
        if (KEEP * kept + 2 * PASS * stages) * row <= shared_memory:
            break
    tile = {"BLOCK_OUTER": KEEP, "BLOCK_INNER": PASS, "num_warps": warps, "num_stages": stages}
    return tile | ({"maxnreg": registers[0]} if registers else {})


def samples(start: torch.Tensor) -> list[tuple[int, int]]:
    """(first row, one past the last) of each sample, for the references (waits for a GPU)."""
    firsts = sorted(set(start.tolist()))
    return list(zip(firsts, [*firsts[1:], start.numel()], strict=False))


def check_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    **like_q: torch.Tensor,
) -> None:
    """ValueError unless q (N, H, K), k, v (N, G, K), start, end (N,) and whatever is shaped like q fit together.

    It runs before every launch, so messages are only put together when one is needed: that is most of its time.
    """
    if not q.dim() == k.dim() == 3:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}; expected (rows, heads, head width)"
        )
    (N, H, K), G = q.shape, k.shape[1]
    if not k.shape == v.shape == (N, G, K):
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit q {tuple(q.shape)}")
    if G == 0 or H % G:
        raise ValueError(f"{H} query heads are not a multiple of {G} key/value heads")
    if K % 8 or not 0 < K <= 256:
        raise ValueError(f"head width {K}; expected a multiple of 8 up to 256")
    for name, x in (("start", start), ("end", end)):
        if x.shape != (N,) or x.dtype != torch.int32 or not x.is_contiguous():
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype}; expected contiguous ({N},) torch.int32"
            )
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_rows(name, x, q)
    for name, x in like_q.items():
        check_buffer(name, x, q)


def check_buffer(name: str, x: torch.Tensor | None, like: torch.Tensor) -> None:
    """ValueError unless x, if there is one, can hold what `like` can."""
    if x is None:
        return
    if x.shape != like.shape:
        raise ValueError(f"{name} is {tuple(x.shape)}; expected {tuple(like.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}; expected {like.device}")
    _check_rows(name, x, like)


def _check_rows(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    if x.dtype != q.dtype:
        raise ValueError(f"{name} is {x.dtype}; expected {q.dtype}")
    if x.stride(2) != 1:
        raise ValueError(
            f"the head vectors of {name} have stride {x.stride(2)}; expected contiguous ones"
        )
    if x.stride(0) >= 2**31 // MAX_BLOCK:
        raise ValueError(
            f"rows of {name} are {x.stride(0)} elements apart; expected less than {2**31 // MAX_BLOCK}"
        )
