"""A frozen linear with LoRA branches for few rows, straight from NF4 or from 16 bit.

    y = multiplier (x W^T + z B^T)          z = dtype(scaling x A^T)

x (N, in) with N up to 64, W (out, in) frozen, y (N, out). Each row has an adapter of its own, or
none. The values of W, A and B are those of training: NF4 is dequantised to 16 bit in registers, A
and B are in 16 bit, sums are in float32. There is no backward: these are the products of a decode
step.

The first launch multiplies x by W and by the A of all adapters. A program takes 64 rows of W and a
range of `in`, one of `splits`, and writes float32 sums

    sums (splits, N, out + L)                      L = adapters * linears * rank

The second launch adds the splits, and z B^T of the row's own adapter. Several linears that share x
(q, k, v) lie one below the other, as in lora_linear.py.

The order of every sum depends on the shape of W alone, so the bits of a row do not depend on N.

Bytes moved: W once (0.52 a parameter in NF4). The first launches of a step of an 8B model in NF4,
with the head in 16 bit, take 3.88 ms for 1 row and 5.14 ms for 64 rows on an H100 80GB HBM3 (torch
2.11, Triton 3.6, 27 November 2026). Reading the weights at the speed of a copy takes 1.57 ms. For
gate and up, loads alone take 29 us, products without loads 31 us, and both together 50 us.
"""

import torch

from . import backend
from .backend import accumulator, matmul_accumulated, tl, triton
from .dequantize_nf4 import NF4Storage, dequantize_nf4
from .few_row_products import choose, few_row_products, places_of_parts
from .few_row_weights import BLOCKSIZE, FewRowAdapters, FewRowWeight, fits_few_rows

PROFILE_GROUP = "base matmuls"

MAX_ROWS = 64
ADD_BLOCK = 256  # outputs of a program of the second launch


def few_row_linear_reference(x, weight, adapters=None, multiplier=1.0, acc=None):
    """Return y (N, out) in PyTorch, in the dtype `acc`, by default the accumulator's."""
    dtype, acc = x.dtype, acc or accumulator(x.dtype)
    parts = [
        dequantize_nf4(part, dtype) if isinstance(part, NF4Storage) else part.to(dtype)
        for part in weight.parts
    ]
    y = matmul_accumulated(x.to(acc), torch.cat(parts).t().to(acc))
    if adapters is not None:
        rank, sizes = adapters.b.shape[2], [part.shape[0] for part in parts]
        a_of = adapters.a.to(acc).view(len(adapters.b), -1, x.shape[1])  # (adapters, L, in)
        for row, total, index in zip(x.to(acc), y, adapters.of_row.tolist(), strict=False):
            if index >= 0:
                z = (a_of[index] @ row * adapters.scaling[index]).to(dtype).to(acc)
                b_of = adapters.b[index].to(acc).split(sizes)
                for rows, b, part in zip(total.split(sizes), b_of, z.split(rank), strict=True):
                    rows += b @ part
    return multiplier * y


@triton.jit
def _add_few_row_sums(
    sums_ptr,
    b_ptr,
    scaling_ptr,
    adapter_ptr,
    out_ptr,
    rounded_ptr,
    first_rows,
    first_tiles,
    sizes,
    N,
    width,
    out_features,
    out_row_stride,
    rounded_row_stride,
    multiplier,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Write y of BLOCK outputs of one part for one row; ADD adds y to out in place.

    rounded_ptr: receives the same values in its own dtype; it may be None.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tile = tl.program_id(0)
    part = 0
    for i in tl.static_range(1, PARTS):
        part += (tile >= first_tiles[i]).to(tl.int32)
    size = choose(sizes, first_tiles, tile, PARTS)
    local = (tile - choose(first_tiles, first_tiles, tile, PARTS)) * BLOCK + tl.arange(0, BLOCK)
    mask = local < size
    column = choose(first_rows, first_tiles, tile, PARTS) + local
    n = tl.program_id(1)
    y = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        at = sums_ptr + (split * N + n).to(tl.int64) * width
        y += tl.load(at + column, mask=mask, other=0.0)
    if RANK:
        adapter = tl.load(adapter_ptr + n)
        if adapter >= 0:
            rank = tl.arange(0, RANK)
            z = tl.zeros((RANK,), tl.float32)
            for split in tl.static_range(SPLITS):
                at = sums_ptr + (split * N + n).to(tl.int64) * width + out_features
                z += tl.load(at + (adapter * PARTS + part) * RANK + rank)
            z = (z * tl.load(scaling_ptr + adapter)).to(b_ptr.dtype.element_ty).to(tl.float32)
            b_at = b_ptr + (adapter * out_features + column).to(tl.int64)[:, None] * RANK
            b = tl.load(b_at + rank[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
            y += tl.sum(b * z[None, :], axis=1)
    y *= multiplier
    to = out_ptr + n.to(tl.int64) * out_row_stride + column
    if ADD:
        y += tl.load(to, mask=mask, other=0.0)
    tl.store(to, y.to(out_ptr.dtype.element_ty), mask=mask)
    if rounded_ptr is not None:
        to = rounded_ptr + n.to(tl.int64) * rounded_row_stride + column
        tl.store(to, y.to(rounded_ptr.dtype.element_ty), mask=mask)


def _check(x: torch.Tensor, weight: FewRowWeight, adapters: FewRowAdapters | None) -> None:
    """Raise ValueError if shapes, formats or the number of rows do not fit."""
    out_features, in_features = weight.shape
    if x.dim() != 2 or x.shape[1] != in_features or x.stride(1) != 1:
        raise ValueError(f"x is {tuple(x.shape)}; expected contiguous rows of {in_features}")
    if len(x) > MAX_ROWS:
        raise ValueError(f"x has {len(x)} rows; expected at most {MAX_ROWS}")
    for part in weight.parts:
        if not fits_few_rows(part) or part.shape[1] != in_features:
            raise ValueError(
                f"a weight is {tuple(part.shape)}; expected NF4 in blocks of {BLOCKSIZE}, or "
                f"contiguous rows, of {in_features}, a multiple of {BLOCKSIZE}"
            )
    if adapters is None:
        return
    count, rows, rank = adapters.b.shape
    rows_of_a = count * len(weight.parts) * rank
    if adapters.a.shape != (rows_of_a, in_features) or rows != out_features:
        raise ValueError(
            f"a is {tuple(adapters.a.shape)} and b {tuple(adapters.b.shape)}; expected "
            f"({rows_of_a}, {in_features}) and ({count}, {out_features}, {rank})"
        )
    if rank < 16 or rank & (rank - 1) or len(adapters.of_row) < len(x):
        raise ValueError(
            f"the rank is {rank} and of_row has {len(adapters.of_row)} rows; expected a power of "
            f"two from 16 on, and {len(x)} rows"
        )


def few_row_logits(x: torch.Tensor, weight: torch.Tensor, multiplier: float = 1.0) -> torch.Tensor:
    """Return multiplier x W^T (N, V) in float32.

    x: (N, in), N at most 64, in 16 bit; rows may be strided.
    weight: W (V, in), contiguous, in any float dtype.

    Raises: ValueError if a shape does not fit.
    """
    _check(x, FewRowWeight((weight,)), None)
    if not backend.use_triton(x):
        return matmul_accumulated(x, weight.to(x.dtype).t(), multiplier)
    out = torch.empty((1, len(x), len(weight)), dtype=torch.float32, device=x.device)
    few_row_products(x, FewRowWeight((weight,)), None, out, multiplier)
    return out[0]


def few_row_linear(
    x: torch.Tensor,
    weight: FewRowWeight,
    adapters: FewRowAdapters | None = None,
    multiplier: float = 1.0,
    out: torch.Tensor | None = None,
    add_to: torch.Tensor | None = None,
    rounded: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return y (N, out) = multiplier (x W^T + z B^T).

    x: (N, in), N at most 64; rows may be strided. NF4 is fast on a GPU in 16 bit.
    adapters: the LoRA branches; None for none.
    out: destination of y in x's dtype; by default a new tensor.
    add_to: float32 (N, out) that y is added to and that is returned instead.
    rounded: (N, out) that receives the result too, in its own dtype; None for nothing.

    Raises: ValueError if a shape or format does not fit.
    """
    _check(x, weight, adapters)
    if out is None:
        out = add_to
    if out is None:
        out = torch.empty((len(x), weight.shape[0]), dtype=x.dtype, device=x.device)
    if not backend.use_triton(x):
        y = few_row_linear_reference(x, weight, adapters, multiplier)
        out = out.copy_(y) if add_to is None else out.add_(y)
        if rounded is not None:
            rounded.copy_(out)
        return out
    lora_a = None if adapters is None else adapters.a
    width = weight.shape[0] + (0 if lora_a is None else len(lora_a))
    sums = torch.empty((weight.splits, len(x), width), dtype=torch.float32, device=x.device)
    few_row_products(x, weight, lora_a, sums, 1.0)
    sizes = [part.shape[0] for part in weight.parts]
    first_rows, first_tiles = places_of_parts(sizes, ADD_BLOCK)
    none = (None,) * 3
    dependent = backend.has_dependent_launches(x.device)
    _add_few_row_sums[(first_tiles[-1], len(x))](
        sums,
        *(none if adapters is None else (adapters.b, adapters.scaling, adapters.of_row)),
        out,
        rounded,
        first_rows,
        first_tiles,
        tuple(sizes),
        len(x),
        width,
        weight.shape[0],
        out.stride(0),
        backend.row_stride(rounded),
        multiplier,
        SPLITS=len(sums),
        PARTS=len(sizes),
        RANK=0 if adapters is None else adapters.b.shape[2],
        ADD=add_to is not None,
        BLOCK=ADD_BLOCK,
        DEPENDENT=dependent,
        num_warps=4,
        enable_fp_fusion=False,
        **({"launch_pdl": True} if dependent else {}),
    )
    return out
