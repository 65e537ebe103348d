"""Rows of the embedding table by token id, from the GPU's memory or, where that is short, from the host's.

    y[i] = table[ids[i]]                     table (V, D), ids (N,), y (N, D)

A table in pinned host memory is read by the GPU itself, over PCIe: only the rows that are wanted travel, and a CUDA
graph replays it like any other kernel. Each row is read and written once.
"""

import torch

from . import backend
from .backend import cdiv, power_of_two, require, tl, triton


def embed_reference(ids, table, dtype):
    return table[ids.to(table.device)].to(ids.device, dtype)


@triton.jit
def _embed(ids_ptr, table_ptr, out_ptr, D, BLOCK_D: tl.constexpr):
    """One program: BLOCK_D elements of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    from_row = tl.load(ids_ptr + row).to(tl.int64)
    x = tl.load(table_ptr + from_row * D + at, mask=at < D, other=0.0)
    tl.store(out_ptr + row * D + at, x.to(out_ptr.dtype.element_ty), mask=at < D)


def embed(ids: torch.Tensor, table: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(N, D) in dtype, on the device of ids (N,), which are not checked. table (V, D): there, or pinned on the host.

    ValueError where a shape does not fit.
    """
    shapes = f"ids {tuple(ids.shape)}, table {tuple(table.shape)}"
    require(
        ids.dim() == 1 and table.dim() == 2, f"{shapes}; expected (rows,) and (vocabulary, width)"
    )
    require(
        table.is_contiguous(), f"the table's strides are {table.stride()}; expected contiguous rows"
    )
    if not backend.use_triton(ids):
        return embed_reference(ids, table, dtype)
    N, D = len(ids), table.shape[1]
    out = torch.empty((N, D), dtype=dtype, device=ids.device)
    if out.numel():
        BLOCK_D = min(power_of_two(D), 2048)
        _embed[(N, cdiv(D, BLOCK_D))](ids, table, out, D, BLOCK_D=BLOCK_D, num_warps=4)
    return out
