"""Rows of the embedding table by token id, read from GPU memory or from pinned host memory.

    y[i] = table[ids[i]]                     table (V, D), ids (N,), y (N, D)

A GPU reads a table in pinned host memory directly over PCIe. Only the requested rows travel, and a
CUDA graph replays the launch like any other. Each row is read once and written once. There is no
backward, because the table is frozen.
"""

import torch

from . import backend
from .backend import cdiv, power_of_two, tl, triton

PROFILE_GROUP = "elementwise"


def embed_reference(ids, table, dtype):
    """Return the rows in PyTorch."""
    return table[ids.to(table.device)].to(ids.device, dtype)


@triton.jit
def _embed(ids_ptr, table_ptr, y_ptr, D, BLOCK_D: tl.constexpr):
    """Copy BLOCK_D elements of one row per program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    table_row = tl.load(ids_ptr + row).to(tl.int64)
    x = tl.load(table_ptr + table_row * D + columns, mask=columns < D, other=0.0)
    tl.store(y_ptr + row * D + columns, x.to(y_ptr.dtype.element_ty), mask=columns < D)


def embed(ids: torch.Tensor, table: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the table's rows (N, D) in dtype, on the device of ids.

    ids: token ids (N,), integers in [0, V); not checked, because that would wait for the GPU.
    table: (V, D) contiguous, on the device of ids or in pinned host memory.

    Raises: ValueError if a shape does not fit or the table is not contiguous.
    """
    if ids.dim() != 1 or table.dim() != 2:
        raise ValueError(
            f"ids {tuple(ids.shape)} and table {tuple(table.shape)}; "
            "expected (rows,) and (vocabulary, width)"
        )
    if not table.is_contiguous():
        raise ValueError(f"the table has strides {table.stride()}; expected contiguous rows")
    if not backend.use_triton(ids):
        return embed_reference(ids, table, dtype)
    N, D = len(ids), table.shape[1]
    y = torch.empty((N, D), dtype=dtype, device=ids.device)
    if y.numel():
        BLOCK_D = min(power_of_two(D), 2048)
        _embed[(N, cdiv(D, BLOCK_D))](ids, table, y, D, BLOCK_D=BLOCK_D, num_warps=4)
    return y
