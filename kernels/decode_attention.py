"""Attention of a decode step: one query row a sequence over keys and values in pages.

Row r sees the keys first <= j < lengths[r], its own among them; first is 0, or with a sliding
window max(lengths[r] - window, 0). Query head h reads key/value head h // (H / G):

    s = scale q k^T, or softcap tanh(scale q k^T / softcap) with a soft cap (Gemma 2)
    out = softmax(s) v

q, out (rows, H, K) and keys, values (pages, PAGE, G, K) in one dtype. Key j of row r lies in page
page_table[r, j // PAGE], at place j % PAGE. All keys and values of a row are read once, which is
the cost: 4 G K bytes a key in 16 bit.

The keys of a row are cut into splits, so that one row alone keeps a GPU busy. A program computes
one split for the query heads of a group, padded to the 16 rows of a tensor core:

    m = max s,  l = sum 2^(s - m),  acc = sum 2^(s - m) v

A second kernel adds the splits of each head, in their order. A row of few keys has one split, and
its program writes out = acc / l. If no row can have more keys, there is no second launch.

    M = max m,  out = sum 2^(m - M) acc / sum 2^(m - M) l

The borders of the splits depend on the row's length and window only. Therefore the bits of a row
depend on its own q, keys, values and length, and not on other rows, on their number, or on the
width of the page table.

The last key and value of a row may come beside the pages. The program of the last split then writes
them into their page before it reads its keys.
"""

import torch

from . import backend
from .attention_common import cap_scores, check_heads, check_scores, head_strides, score_factors
from .backend import (
    accumulator,
    cdiv,
    copy_into,
    empty_contiguous_like,
    power_of_two,
    tl,
    triton,
)
from .key_value_pages import (
    check_pages,
    check_tables,
    copy_if,
    load_keys,
    store_keys_values,
    store_last_reference,
    tokens_of,
)

__all__ = ["decode_attention", "store_keys_values"]

PROFILE_GROUP = "attention"

WHOLE = 64  # most keys of a row that is not split
SPLIT = 64  # keys of a split, while there are at most MAX_SPLITS
MAX_SPLITS = 64  # bounds the partial results; the splits of a longer row have several SPLITs
SPLITS_AT_ONCE = 8  # that the second kernel adds before it goes on
ENOUGH_PROGRAMS = 4096  # more programs would not make a GPU busier; each then takes several splits
NO_WINDOW = 2**31 - 1


def decode_attention_reference(
    q, keys, values, page_table, lengths, scale, softcap=0.0, window=None
):
    """Return out in PyTorch, row by row; a CPU decodes with it."""
    (rows, H, K), (_, PAGE, G, _) = q.shape, keys.shape
    acc_dtype = accumulator(q.dtype)
    out = q.new_empty((rows, G, H // G, K), dtype=acc_dtype)
    grouped = (q.to(acc_dtype) * scale).unflatten(1, (G, H // G))
    for row, (length, pages) in enumerate(zip(lengths.tolist(), page_table.tolist(), strict=True)):
        pages = pages[: cdiv(length, PAGE)]
        first = 0 if window is None else max(length - window, 0)
        k, v = (tokens_of(x, pages, first, length).to(acc_dtype) for x in (keys, values))
        scores = torch.bmm(grouped[row], k.permute(1, 2, 0))  # (G, H / G, keys)
        if softcap:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        torch.bmm(scores.softmax(-1), v.transpose(0, 1), out=out[row])
    return out.view(rows, H, K).to(q.dtype)


@triton.jit
def row_splits(length, window, WHOLE: tl.constexpr, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Return a row's first seen key, the keys of a split, and the number of splits, at least 1."""
    first = tl.maximum(length - window, 0)
    keys = length - first
    span = tl.where(keys <= WHOLE, WHOLE, tl.cdiv(keys, SPLIT * MAX_SPLITS) * SPLIT)
    return first, span, tl.maximum(tl.cdiv(keys, span), 1)


@triton.jit
def _decode_attention(
    q_ptr,
    k_ptr,
    v_ptr,
    page_table_ptr,
    lengths_ptr,
    new_k_ptr,
    new_v_ptr,
    out_ptr,
    acc_ptr,
    sums_ptr,
    q_row_stride,
    q_head_stride,
    new_k_row_stride,
    new_k_head_stride,
    new_v_row_stride,
    new_v_head_stride,
    out_row_stride,
    out_head_stride,
    page_table_row_stride,
    splits_stride,
    window,
    scale_log2,
    TANH_SCALE: tl.constexpr,
    HAS_NEW: tl.constexpr,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    PAGE: tl.constexpr,
    WHOLE: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute some splits of a row for up to BLOCK_M query heads of one group per program."""
    BLOCKS: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M  # of heads in a group
    row = tl.program_id(2).to(tl.int64)
    kv_head = tl.program_id(1) // BLOCKS
    in_group = tl.program_id(1) % BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    heads = kv_head * GROUP + in_group
    length = tl.load(lengths_ptr + row)
    first, span, splits = row_splits(length, window, WHOLE, SPLIT, MAX_SPLITS)
    i = tl.arange(0, BLOCK_K)
    is_element = (in_group[:, None] < GROUP) & (i[None, :] < K)
    q_at = q_ptr + row * q_row_stride + heads[:, None] * q_head_stride + i[None, :]
    q = tl.load(q_at, mask=is_element, other=0.0)
    page_table_ptr += row * page_table_row_stride
    k_ptr += kv_head * K
    v_ptr += kv_head * K
    if HAS_NEW:
        new_k_ptr += row * new_k_row_stride + kv_head * new_k_head_stride
        new_v_ptr += row * new_v_row_stride + kv_head * new_v_head_stride
        reads_last = (length > 0) & ((splits - 1) % tl.num_programs(0) == tl.program_id(0))
        page_ptr, place = page_table_ptr + (length - 1) // PAGE, (length - 1) % PAGE
        copy_if(
            reads_last, new_k_ptr, new_v_ptr, k_ptr, v_ptr, page_ptr, place, PAGE, G, K, BLOCK_K
        )
        tl.debug_barrier()  # other threads of this program read what one wrote
    for split in range(tl.program_id(0), splits, tl.num_programs(0)):
        start = first + split * span
        end = tl.minimum(start + span, length)
        acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        row_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for key in range(start, end, BLOCK_N):
            index = key + tl.arange(0, BLOCK_N)
            seen = index < end
            page = tl.load(page_table_ptr + index // PAGE, mask=seen, other=0)
            tokens = page.to(tl.int64) * PAGE + index % PAGE
            k = load_keys(k_ptr, tokens, seen, G * K, K, BLOCK_K)
            v = load_keys(v_ptr, tokens, seen, G * K, K, BLOCK_K)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            scores, _ = cap_scores(scores, TANH_SCALE)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            new = tl.maximum(row_max, tl.max(scores, axis=1))
            p = tl.exp2((scores - new[:, None]) * scale_log2)
            shrink = tl.exp2((row_max - new) * scale_log2)
            total = total * shrink + tl.sum(p, axis=1)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            row_max = new
        if splits == 1:
            out = acc / tl.where(total == 0, 1.0, total)[:, None]
            out_at = out_ptr + row * out_row_stride + heads[:, None] * out_head_stride + i[None, :]
            tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=is_element)
        else:
            at = (row * G * GROUP + heads) * splits_stride + split
            tl.store(acc_ptr + at[:, None] * K + i[None, :], acc, mask=is_element)
            tl.store(sums_ptr + at * 2, row_max * scale_log2, mask=in_group < GROUP)
            tl.store(sums_ptr + at * 2 + 1, total, mask=in_group < GROUP)


@triton.jit
def _add_splits(
    acc_ptr,
    sums_ptr,
    out_ptr,
    lengths_ptr,
    out_row_stride,
    out_head_stride,
    splits_stride,
    window,
    K: tl.constexpr,
    WHOLE: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add the splits of one head of one row per program, if there are several."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    _, _, splits = row_splits(tl.load(lengths_ptr + row), window, WHOLE, SPLIT, MAX_SPLITS)
    if splits > 1:
        first = (row * tl.num_programs(0) + head) * splits_stride
        i = tl.arange(0, BLOCK_K)
        acc = tl.zeros((BLOCK_K,), dtype=tl.float32)
        row_max, total = float("-inf"), 0.0
        for split in range(0, splits, AT_ONCE):
            index = split + tl.arange(0, AT_ONCE)
            at, is_split = first + index, index < splits
            m = tl.load(sums_ptr + at * 2, mask=is_split, other=float("-inf"))
            sums = tl.load(sums_ptr + at * 2 + 1, mask=is_split, other=0.0)
            element = is_split[:, None] & (i[None, :] < K)
            part = tl.load(acc_ptr + at[:, None] * K + i[None, :], mask=element, other=0.0)
            new = tl.maximum(row_max, tl.max(m, axis=0))
            weight = tl.exp2(m - new)
            shrink = tl.exp2(row_max - new)
            total = total * shrink + tl.sum(weight * sums, axis=0)
            acc = acc * shrink + tl.sum(weight[:, None] * part, axis=0)
            row_max = new
        out_ptr += row * out_row_stride + head * out_head_stride
        tl.store(out_ptr + i, (acc / total).to(out_ptr.dtype.element_ty), mask=i < K)


def decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int | None = None,
    out: torch.Tensor | None = None,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return out (rows, H, K) in q's dtype; a row of no keys gets zeros.

    q: (rows, H, K); K a multiple of 8 up to 256.
    keys, values: (pages, PAGE, G, K) contiguous; H a multiple of G.
    page_table: (rows, max_pages) int32, the pages of each row in order. Entries past a row's length
        are not read.
    lengths: (rows,) int32, the keys of each row, its own included. The values of both tables are
        not checked, because that would wait for the GPU.
    scale: factor of the scores, above 0.
    softcap: bound on the scores; 0 for none.
    window: the last keys that a row sees, its own among them; None for all.
    out: destination (rows, H, K), rows and heads may be strided; by default a new tensor.
    new: the last key and the last value of each row, (rows, G, K), rows and heads may be strided.
        They are written into their page, without a launch of their own. None if they are there.

    Raises: ValueError if a shape, stride, dtype or device does not fit, or a number is out of
        range.
    """
    check_pages(q, keys, values)
    check_heads(q, q.dtype, q=q, out=out)
    check_tables(q, page_table, lengths)
    check_scores(scale, softcap)
    if window is not None and window < 1:
        raise ValueError(f"window {window}; expected at least 1 key, or None")
    if new:
        check_heads(q[:, : keys.shape[2]], q.dtype, new_keys=new[0], new_values=new[1])
    if not backend.use_triton(q):
        if new:
            store_last_reference(*new, keys, values, page_table, lengths)
        options = {"scale": scale, "softcap": softcap, "window": window}
        result = decode_attention_reference(q, keys, values, page_table, lengths, **options)
        return copy_into(out, result)
    out = empty_contiguous_like(q) if out is None else out
    if len(q):
        pages = keys, values, page_table
        _launch(q, *pages, lengths, new, out, scale, softcap, window or NO_WINDOW)
    return out


def _launch(q, keys, values, page_table, lengths, new, out, scale, softcap, window) -> None:
    """Fill out; the tensors are checked."""
    (rows, H, K), (_, PAGE, G, _) = q.shape, keys.shape
    GROUP, BLOCK_K = H // G, max(power_of_two(K), 16)
    BLOCK_N, options = _block_sizes(q)
    most_keys = min(page_table.shape[1] * PAGE, window)
    splits = 1 if most_keys <= WHOLE else min(cdiv(most_keys, SPLIT), MAX_SPLITS)
    # Triton compiles anew if a stride becomes a multiple of 16, or 1. So it is always a multiple.
    splits_stride = cdiv(splits, 16) * 16
    acc = torch.empty((rows, H, splits_stride, K), dtype=torch.float32, device=q.device)
    sums = torch.empty((rows, H, splits_stride, 2), dtype=torch.float32, device=q.device)
    scale_log2, TANH_SCALE = score_factors(scale, softcap)
    shared = {"K": K, "WHOLE": WHOLE, "SPLIT": SPLIT, "MAX_SPLITS": MAX_SPLITS, "BLOCK_K": BLOCK_K}
    programs = G * cdiv(GROUP, 16), rows
    _decode_attention[(min(splits, cdiv(ENOUGH_PROGRAMS, programs[0] * rows)), *programs)](
        q,
        keys,
        values,
        page_table,
        lengths,
        *(new or (None, None)),
        out,
        acc,
        sums,
        *head_strides(q),
        *(head_strides(*new) if new else (0, 0, 0, 0)),
        *head_strides(out),
        page_table.stride(0),
        splits_stride,
        window,
        scale_log2,
        TANH_SCALE=TANH_SCALE,
        HAS_NEW=new is not None,
        G=G,
        GROUP=GROUP,
        PAGE=PAGE,
        BLOCK_M=16,
        BLOCK_N=BLOCK_N,
        **shared,
        **options,
    )
    if splits > 1:
        tensors = acc, sums, out, lengths
        strides = *head_strides(out), splits_stride
        _add_splits[(H, rows)](
            *tensors, *strides, window, AT_ONCE=SPLITS_AT_ONCE, num_warps=2, **shared
        )


def _block_sizes(q: torch.Tensor) -> tuple[int, dict[str, int]]:
    """Return the keys of a block, and the launch options.

    Shared memory holds a block of keys and one of values, and q. GPUs without tensor-core kernels
    keep q in float32 there.
    """
    K, itemsize = q.shape[2], q.element_size()
    row_bytes = max(power_of_two(K), 16) * itemsize
    BLOCK_N = 64
    while 2 * BLOCK_N * row_bytes + 16 * row_bytes * 4 // itemsize > 48 * 1024 and BLOCK_N > 16:
        BLOCK_N //= 2
    return BLOCK_N, {"num_warps": 4, "num_stages": 1}
