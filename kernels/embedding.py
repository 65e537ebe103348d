"""Rows of the embedding table by token id, read from GPU memory or from pinned host memory.

    y[i] = multiplier * table[ids[i]]        table (V, D), ids (N,), y (N, D)

A GPU reads a table in pinned host memory directly over PCIe. Only the requested rows travel, and a
CUDA graph replays the launch like any other. Each row is read once and written once. The product
with the multiplier is in float32 and rounded once; a multiplier of 1 is left out. There is no
backward, because the table is frozen.
"""

import torch

from . import backend
from .backend import accumulator, cdiv, power_of_two, tl, triton

PROFILE_GROUP = "elementwise"


def embed_reference(ids, table, dtype, multiplier=1.0):
    """Return the rows in PyTorch."""
    rows = table[ids.to(table.device)]
    if multiplier != 1.0:
        rows = rows.to(accumulator(table.dtype)) * multiplier
    return rows.to(ids.device, dtype)


@triton.jit
def _embed(ids_ptr, table_ptr, y_ptr, D, MULTIPLIER: tl.constexpr, BLOCK_D: tl.constexpr):
    """Copy BLOCK_D elements of one row per program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    table_row = tl.load(ids_ptr + row).to(tl.int64)
    x = tl.load(table_ptr + table_row * D + columns, mask=columns < D, other=0.0)
    if MULTIPLIER != 1.0:
        x = x.to(tl.float32) * MULTIPLIER
    tl.store(y_ptr + row * D + columns, x.to(y_ptr.dtype.element_ty), mask=columns < D)


def embed(
    ids: torch.Tensor, table: torch.Tensor, dtype: torch.dtype, multiplier: float = 1.0
) -> torch.Tensor:
    """Return the table's rows (N, D) times the multiplier in dtype, on the device of ids.

    ids: token ids (N,), integers in [0, V); not checked, because that would wait for the GPU.
    table: (V, D) contiguous, on the device of ids or in pinned host memory.
    multiplier: factor of every element.

    Raises: ValueError if a shape does not fit or the table is not contiguous.
    """
    if ids.dim() != 1 or table.dim() != 2:
        raise ValueError(
            f"ids {tuple(ids.shape)} and table {tuple(table.shape)}; "
            "expected (rows,) and (vocabulary, width)"
        )
    if not table.is_contiguous():
        raise ValueError(f"the table has strides {table.stride()}; expected contiguous rows")
    if not backend.use_triton(ids) or torch.float64 in (table.dtype, dtype):
        return embed_reference(ids, table, dtype, multiplier)
    N, D = len(ids), table.shape[1]
    y = torch.empty((N, D), dtype=dtype, device=ids.device)
    if y.numel():
        BLOCK_D = min(power_of_two(D), 2048)
        _embed[(N, cdiv(D, BLOCK_D))](
            ids, table, y, D, MULTIPLIER=float(multiplier), BLOCK_D=BLOCK_D, num_warps=4
        )
    return y
