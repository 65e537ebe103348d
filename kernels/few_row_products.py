"""The first launch of few_row_linear.py: x times W and A, in float32 sums of a few splits.

A program takes TILE rows of one weight and a range of `in`. It turns a block of NF4 into 16 bit in
registers (nf4_lookup.py), or reads 16 bit, and multiplies on the tensor cores. x is the second
operand, padded to 16, 32 or 64 rows. Each sum adds its products in an order that depends on the
shape of the weight alone.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

from . import backend
from .backend import cdiv, power_of_two, tl, triton
from .dequantize_nf4 import NF4Storage
from .few_row_weights import BLOCKSIZE, TILE, FewRowWeight
from .nf4_lookup import (
    LOOKUP_CONSTRAINTS,
    TABLE_CONSTRAINTS,
    lookup_text,
    table_text,
    values_of_words,
)

PROFILE_GROUP = "base matmuls"

# Elements of `in` a pass, for up to 16 rows. With more rows a pass of 64 leaves room for a second
# program, because x takes the shared memory.
WIDE_BLOCK = 128
STAGES = 3
# With at most 102 registers a thread, a multiprocessor has room for five programs instead of four.
NARROW_REGISTERS = 96


@triton.jit
def choose(values, first_tiles, tile, COUNT: tl.constexpr):
    """Return the value of the part that a tile belongs to."""
    value = values[0]
    for i in tl.static_range(1, COUNT):
        value = tl.where(tile >= first_tiles[i], values[i], value)
    return value


@triton.jit
def _multiply_nf4(
    x_at,
    row_mask,
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    code_ptr,
    row,
    rows_of_weight,
    begin,
    end,
    IN: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    TABLE: tl.constexpr,
    TABLE_ARGS: tl.constexpr,
    LOOKUP: tl.constexpr,
    LOOKUP_ARGS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Return the product (TILE, ROWS) of rows of an NF4 weight and x, over begin <= k < end."""
    BLOCKS: tl.constexpr = BLOCK // 64
    block = tl.arange(0, BLOCKS)[None, :, None]
    row = row[:, None, None]
    words_ptr = packed_ptr.to(tl.pointer_type(tl.uint32))
    word_at = words_ptr + row * (IN // 8) + (begin // 8 + block * 8)
    word_at += tl.arange(0, 8)[None, None, :]
    # The scale of the next block is loaded one pass ahead.
    last_block = rows_of_weight * (IN // 64) - 1
    at = tl.minimum(row * (IN // 64) + begin // 64 + block, last_block)  # a split may be empty
    absmax = tl.load(absmax_ptr + at)
    if NESTED_BLOCKSIZE:
        offset = tl.load(nested_offset_ptr)
        nested = tl.load(nested_absmax_ptr + at // NESTED_BLOCKSIZE)
    acc = tl.zeros((TILE, ROWS), tl.float32)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    for _ in tl.range(begin, end, BLOCK, num_stages=STAGES):
        at = tl.minimum(at + BLOCKS, last_block)
        if NESTED_BLOCKSIZE:
            scale = tl.load(nested_code_ptr + absmax.to(tl.int32)) * nested + offset
            nested = tl.load(nested_absmax_ptr + at // NESTED_BLOCKSIZE)
        else:
            scale = absmax
        absmax = tl.load(absmax_ptr + at)
        even, odd = values_of_words(
            tl.load(word_at),
            scale,
            code_ptr,
            x_at.dtype.element_ty,
            TABLE,
            TABLE_ARGS,
            LOOKUP,
            LOOKUP_ARGS,
        )
        w = tl.reshape(tl.join(even, odd), (TILE, BLOCK))
        x = tl.load(x_at, mask=row_mask, other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        word_at += BLOCK // 8
        x_at += BLOCK
    return acc


@triton.jit
def _multiply_dense(
    x_at,
    row_mask,
    w_ptr,
    row,
    begin,
    end,
    IN: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Return the product (TILE, ROWS) of rows of a weight and x, over begin <= k < end."""
    w_at = w_ptr + row[:, None].to(tl.int64) * IN + (begin + tl.arange(0, BLOCK))[None, :]
    acc = tl.zeros((TILE, ROWS), tl.float32)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    for _ in tl.range(begin, end, BLOCK, num_stages=STAGES):
        w = tl.load(w_at).to(x_at.dtype.element_ty)
        x = tl.load(x_at, mask=row_mask, other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        w_at += BLOCK
        x_at += BLOCK
    return acc


@triton.jit
def _few_row_products(
    x_ptr,
    packed_ptrs,
    absmax_ptrs,
    nested_absmax_ptrs,
    nested_code_ptrs,
    nested_offset_ptrs,
    code_ptr,
    dense_ptrs,
    sums_ptr,
    sizes,
    first_rows,
    first_tiles,
    N,
    x_row_stride,
    width,
    split_size,
    factor,
    IN: tl.constexpr,
    NF4_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    TABLE: tl.constexpr,
    TABLE_ARGS: tl.constexpr,
    LOOKUP: tl.constexpr,
    LOOKUP_ARGS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    DENSE_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    DENSE_STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Multiply x by TILE rows of one part over one split. The NF4 parts come first.

    DEPENDENT: the launch begins before the one before it ends, so x is read after `gdc_wait`.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    # The last parts go first: the tiles of A have few programs, which would end late.
    tile, split = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    size = choose(sizes, first_tiles, tile, PARTS)
    first_tile = choose(first_tiles, first_tiles, tile, PARTS)
    local = (tile - first_tile) * TILE + tl.arange(0, TILE)
    row = tl.minimum(local, size - 1)  # rows past the end repeat the last one and are not stored
    begin = tl.multiple_of(split * split_size, 64)  # so words are loaded four at a time
    end = tl.minimum(begin + split_size, IN)
    n = tl.arange(0, ROWS)[None, :]
    row_mask = n < N
    acc = tl.zeros((TILE, ROWS), tl.float32)
    if NF4_PARTS:  # noqa: SIM102 - decided at compilation
        if tile < first_tiles[NF4_PARTS]:
            acc = _multiply_nf4(
                x_ptr + n * x_row_stride + (begin + tl.arange(0, BLOCK))[:, None],
                row_mask,
                choose(packed_ptrs, first_tiles, tile, NF4_PARTS),
                choose(absmax_ptrs, first_tiles, tile, NF4_PARTS),
                choose(nested_absmax_ptrs, first_tiles, tile, NF4_PARTS),
                choose(nested_code_ptrs, first_tiles, tile, NF4_PARTS),
                choose(nested_offset_ptrs, first_tiles, tile, NF4_PARTS),
                code_ptr,
                row,
                size,
                begin,
                end,
                IN,
                NESTED_BLOCKSIZE,
                TABLE,
                TABLE_ARGS,
                LOOKUP,
                LOOKUP_ARGS,
                ROWS,
                TILE,
                BLOCK,
                STAGES,
                DEPENDENT,
            )
    if NF4_PARTS < PARTS:  # noqa: SIM102 - decided at compilation
        if tile >= first_tiles[NF4_PARTS]:
            w_ptr = dense_ptrs[0]
            for i in tl.static_range(NF4_PARTS + 1, PARTS):
                w_ptr = tl.where(tile >= first_tiles[i], dense_ptrs[i - NF4_PARTS], w_ptr)
            acc = _multiply_dense(
                x_ptr + n * x_row_stride + (begin + tl.arange(0, DENSE_BLOCK))[:, None],
                row_mask,
                w_ptr,
                row,
                begin,
                end,
                IN,
                ROWS,
                TILE,
                DENSE_BLOCK,
                DENSE_STAGES,
                DEPENDENT,
            )
    column = choose(first_rows, first_tiles, tile, PARTS) + local
    to = sums_ptr + (split * N + n).to(tl.int64) * width + column[:, None]
    tl.store(to, acc * factor, mask=row_mask & (local < size)[:, None])


def places_of_parts(sizes: Sequence[int], tile: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the first row of each part, and its first tile; the total stands behind them."""
    first_rows = (0, *accumulate(sizes))
    first_tiles = (0, *accumulate(cdiv(size, tile) for size in sizes))
    return first_rows, first_tiles


def _nested_scales(weight: NF4Storage) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the tensors of nested scales; other tensors, which are not read, without them."""
    if weight.nested_absmax is None:
        return (weight.absmax,) * 3
    return weight.nested_absmax, weight.nested_code, weight.nested_offset


def few_row_products(
    x: torch.Tensor,
    weight: FewRowWeight,
    lora_a: torch.Tensor | None,
    sums: torch.Tensor,
    factor: float,
) -> None:
    """Fill sums (splits, N, out + L) with factor x W^T and factor x A^T."""
    in_order = [*weight.parts] if lora_a is None else [*weight.parts, lora_a]
    starts = accumulate((part.shape[0] for part in in_order), initial=0)
    placed = list(zip(in_order, starts, strict=False))
    nf4 = [part for part, _ in placed if isinstance(part, NF4Storage)]
    dense = [part for part, _ in placed if not isinstance(part, NF4Storage)]
    placed.sort(key=lambda pair: not isinstance(pair[0], NF4Storage))  # NF4 first
    sizes = [part.shape[0] for part, _ in placed]
    _, first_tiles = places_of_parts(sizes, TILE)
    in_features, splits = x.shape[1], len(sums)
    rows = max(power_of_two(len(x)), 16)
    wide = in_features % WIDE_BLOCK == 0
    block = WIDE_BLOCK if wide and (rows == 16 or not nf4) else BLOCKSIZE
    step = WIDE_BLOCK if wide else BLOCKSIZE
    split_size = cdiv(cdiv(in_features, step), splits) * step
    nested = bool(nf4) and nf4[0].nested_absmax is not None
    permutes = bool(nf4) and x.element_size() == 2 and x.device.type != "cpu"
    dependent = backend.has_dependent_launches(x.device)
    pointers = [(w.packed, w.absmax, *_nested_scales(w)) for w in nf4] or [(x,) * 5]
    _few_row_products[(first_tiles[-1], splits)](
        x,
        *zip(*pointers, strict=True),
        nf4[0].code if nf4 else x,
        tuple(dense) or (x,),
        sums,
        tuple(sizes),
        tuple(start for _, start in placed),
        first_tiles,
        len(x),
        x.stride(0),
        sums.shape[2],
        split_size,
        factor,
        IN=in_features,
        NF4_PARTS=len(nf4),
        PARTS=len(placed),
        NESTED_BLOCKSIZE=nf4[0].nested_blocksize if nested else 0,
        TABLE=table_text(weight.code, x.dtype) if permutes else "",
        TABLE_ARGS=TABLE_CONSTRAINTS,
        LOOKUP=lookup_text(),
        LOOKUP_ARGS=LOOKUP_CONSTRAINTS,
        ROWS=rows,
        TILE=TILE,
        BLOCK=block,
        DENSE_BLOCK=BLOCKSIZE if nf4 else block,
        STAGES=STAGES,
        DENSE_STAGES=2 if nf4 else STAGES,
        DEPENDENT=dependent,
        num_warps=4,
        num_stages=STAGES,
        enable_fp_fusion=False,
        **({"maxnreg": NARROW_REGISTERS} if permutes and rows == 16 else {}),
        **({"launch_pdl": True} if dependent else {}),
    )
