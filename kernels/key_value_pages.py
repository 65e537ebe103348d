"""Keys and values of all sequences in pages, and the writing of new tokens into them.

keys, values (pages, PAGE, G, K) in one dtype. Key j of row r lies in page page_table[r, j // PAGE],
at place j % PAGE. `store_keys_values` copies k and v (N, G, K) to their places, in one launch:

    keys[place // PAGE, place % PAGE] = k,  values[place // PAGE, place % PAGE] = v
"""

import torch

from . import backend
from .attention_common import check_heads, head_strides
from .backend import cdiv, power_of_two, tl, triton

PROFILE_GROUP = "attention"

COPY_BLOCK = 1024  # elements of k and of v that a program of store_keys_values copies


def store_keys_values_reference(k, v, keys, values, places):
    """Write into the pages in PyTorch."""
    kept = places >= 0
    if not kept.all():
        k, v, places = k[kept], v[kept], places[kept]
    for x, pages in ((k, keys), (v, values)):
        pages.view(-1, *k.shape[1:]).index_copy_(0, places, x)


def store_last_reference(k, v, keys, values, page_table, lengths):
    """Write the last key and value of each row into its page in PyTorch."""
    last, PAGE = lengths - 1, keys.shape[1]
    pages = page_table.gather(1, (last // PAGE).clamp(min=0).long()[:, None])[:, 0].long()
    places = torch.where(last < 0, -1, pages * PAGE + last % PAGE)
    store_keys_values_reference(k, v, keys, values, places)


def tokens_of(x: torch.Tensor, pages: list[int], first: int, last: int) -> torch.Tensor:
    """Return the tokens first .. last - 1 of some pages: a view if the pages follow each other."""
    G, K = x.shape[2:]
    if pages and pages == list(range(pages[0], pages[0] + len(pages))):
        start = pages[0] * x.shape[1]
        return x.view(-1, G, K)[start + first : start + last]
    return x[pages].view(-1, G, K)[first:last]


@triton.jit
def load_keys(x_ptr, tokens, seen, token_stride, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the head vectors of tokens (BLOCK_N,) in the pages, zero if not seen or past K."""
    i = tl.arange(0, BLOCK_K)
    at = x_ptr + tokens[:, None] * token_stride + i[None, :]
    return tl.load(at, mask=seen[:, None] & (i[None, :] < K), other=0.0)


@triton.jit
def copy_if(
    condition,
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    page_ptr,
    place,
    PAGE: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Copy a head vector of k and of v to a place in the page at page_ptr, on a condition."""
    if condition:
        i = tl.arange(0, BLOCK_K)
        at = (tl.load(page_ptr).to(tl.int64) * PAGE + place) * (G * K) + i
        k, v = tl.load(k_ptr + i, mask=i < K), tl.load(v_ptr + i, mask=i < K)
        tl.store(keys_ptr + at, k, mask=i < K)
        tl.store(values_ptr + at, v, mask=i < K)


@triton.jit
def _store_keys_values(
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    places_ptr,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy BLOCK elements of k and of v of one token per program."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(places_ptr + row)
    head, column, mask = i // K, i % K, i < WIDTH
    if place >= 0:
        k = tl.load(k_ptr + row * k_row_stride + head * k_head_stride + column, mask=mask)
        v = tl.load(v_ptr + row * v_row_stride + head * v_head_stride + column, mask=mask)
        tl.store(keys_ptr + place * WIDTH + i, k, mask=mask)
        tl.store(values_ptr + place * WIDTH + i, v, mask=mask)


def store_keys_values(
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
) -> None:
    """Write the keys and values of N tokens into their pages.

    k, v: (N, G, K), rows and heads may be strided.
    keys, values: (pages, PAGE, G, K) contiguous, in the dtype of k.
    places: (N,) int64, page * PAGE + place in the page; a negative one skips the token. Places of
        tokens differ. Their values are not checked on a GPU, because that would wait for it.

    Raises: ValueError if a shape, stride, dtype or device does not fit.
    """
    check_pages(k, keys, values)
    check_heads(k, k.dtype, k=k, v=v)
    N, G, K = k.shape
    if keys.shape[2] != G or places.shape != (N,) or places.dtype != torch.int64:
        raise ValueError(
            f"k is {tuple(k.shape)}, keys {tuple(keys.shape)} and places {tuple(places.shape)} "
            f"{places.dtype}; expected (N, G, K), (pages, PAGE, G, K) and (N,) torch.int64"
        )
    if not backend.use_triton(k):
        store_keys_values_reference(k, v, keys, values, places)
    elif N:
        BLOCK = min(power_of_two(G * K), COPY_BLOCK)
        tensors = k, v, keys, values, places.contiguous()
        _store_keys_values[(N, cdiv(G * K, BLOCK))](
            *tensors, *head_strides(k, v), WIDTH=G * K, K=K, BLOCK=BLOCK, num_warps=4
        )


def check_pages(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Check pages of keys and values, and that heads (rows, heads, K) fit to them.

    Raises: ValueError if a shape, dtype, device or stride does not fit.
    """
    if q.dim() != 3 or keys.dim() != 4 or keys.shape[3] != q.shape[2]:
        raise ValueError(
            f"heads {tuple(q.shape)} and keys {tuple(keys.shape)}; "
            "expected (rows, heads, head width) and (pages, PAGE, G, head width)"
        )
    H, K, G = *q.shape[1:], keys.shape[2]
    if G == 0 or H % G:
        raise ValueError(f"{H} query heads are not a multiple of {G} key/value heads")
    if K % 8 or not 0 < K <= 256:
        raise ValueError(f"head width {K}; expected a multiple of 8 up to 256")
    for name, x in (("keys", keys), ("values", values)):
        fits = x.shape == keys.shape and x.dtype == q.dtype and x.device == q.device
        if not fits or not x.is_contiguous():
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype} on {x.device} with strides {x.stride()}; "
                f"expected contiguous {tuple(keys.shape)} {q.dtype} on {q.device}"
            )


def check_tables(q: torch.Tensor, page_table: torch.Tensor, lengths: torch.Tensor) -> None:
    """Check the pages and the length of each row of q.

    Raises: ValueError if a shape, dtype, device or stride does not fit.
    """
    rows = len(q)
    for name, x, shape in (
        ("page_table", page_table, (rows, *page_table.shape[1:2])),
        ("lengths", lengths, (rows,)),
    ):
        fits = x.shape == shape and x.dtype == torch.int32 and x.device == q.device
        if not fits or (x.numel() and x.stride(-1) != 1) or x.dim() != len(shape):
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype} on {x.device} with strides {x.stride()}; "
                f"expected torch.int32 on {q.device} with contiguous rows, one for each of {rows}"
            )
