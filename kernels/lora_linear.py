"""A frozen linear with its LoRA branch in one matmul, forward and backward.

    forward     y = x W^T + s (x A^T) B^T                 x (N, in), W (out, in), A (R, in), B (out, R), y (N, out)
    backward    dx = dy W + s (dy B) A
                dA = s (dy B)^T x      dB = dy^T (s x A^T)                            W is frozen: no dW

Both products of a line become one when the operands stand side by side:

    extended weight      in   R          y  = [x | s x A^T] [W | B]^T
                  out [  W    B  ]       dx = [dy | s dy B] [W ; A]
                  R   [  A    0  ]

One buffer serves both directions: the forward multiplies by its first `out` rows, the backward by its first `in`
columns. x and dy arrive in buffers with R columns to spare, and `fill_lora_columns_` fills these. So y and dx are accumulated in
float32 to the end, rounded once, and never read back. Several linears that share an input (q, k, v; gate, up) are one
such weight: their W's and A's one below the other, their B's in columns of their own, zeros beside them.

The matmuls are cuBLAS's. On an H200 in November 2026, all seven linears of 32 layers of an 8B Llama, r = 16, bf16,
forward, dx, dA and dB of 4096 rows (960 rows): 180 ms (45 ms); the frozen matmuls alone 164 (39); as matmul and
`addmm_`, which is what PEFT does, 190 (50); with a Triton matmul that adds the adapter in its epilogue 196 (57).
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

from . import backend
from .backend import add_matmul_, cdiv, matmul_accumulated, power_of_two, require, tl, triton

# Columns to spare come in multiples of this. On a GPU rows of 16 bit then begin at 128-byte lines (with 16, an 8B step
# on an H200: 330 ms instead of 322); a CPU would only have more to do (with 64, a small model takes 13% longer).
ALIGN = {"cuda": 64, "cpu": 16}


def padded_rank(rank: int, device_type: str = "cuda") -> int:
    """R of the extended weight for linears whose ranks add up to `rank`."""
    return cdiv(rank, ALIGN[device_type]) * ALIGN[device_type]


def write_adapters_reference(weight, adapters, out_features, in_features):
    row = rank = 0
    for a, b, rows in adapters:
        if a is not None:
            ranks = slice(out_features + rank, out_features + rank + len(a))
            weight[ranks, :in_features] = a
            weight[row : row + rows, in_features + rank : in_features + rank + len(a)] = b
            rank += len(a)
        row += rows


@triton.jit
def _write_adapter(
    pid,
    weight_ptr,
    a_ptr,
    b_ptr,
    weight_row_stride,
    out_features,
    in_features,
    first_row,
    first_rank,
    rows_b,
    R,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of one A, or BLOCK rows of its B."""
    programs_a = tl.cdiv(in_features, BLOCK)
    rank = tl.arange(0, BLOCK_R)
    dtype = weight_ptr.dtype.element_ty
    if pid < programs_a:
        column = pid * BLOCK + tl.arange(0, BLOCK)
        live_a = (rank < R)[:, None] & (column < in_features)[None, :]
        a = tl.load(a_ptr + rank[:, None] * in_features + column[None, :], mask=live_a)
        to_a = (out_features + first_rank + rank).to(tl.int64)[
            :, None
        ] * weight_row_stride + column[None, :]
        tl.store(weight_ptr + to_a, a.to(dtype), mask=live_a)
    else:
        row = (pid - programs_a) * BLOCK + tl.arange(0, BLOCK)
        live_b = (row < rows_b)[:, None] & (rank < R)[None, :]
        b = tl.load(b_ptr + row[:, None] * R + rank[None, :], mask=live_b)
        to_b = (
            (first_row + row).to(tl.int64)[:, None] * weight_row_stride
            + in_features
            + first_rank
            + rank[None, :]
        )
        tl.store(weight_ptr + to_b, b.to(dtype), mask=live_b)


@triton.jit
def _write_adapters(
    weight_ptrs,
    a_ptrs,
    b_ptrs,
    ranks,
    rows,
    first_ranks,
    first_rows,
    weight_row_strides,
    out_features,
    in_features,
    first_programs,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adapter i of PARTS belongs to the programs from first_programs[i] to first_programs[i + 1]."""
    pid = tl.program_id(0)
    for i in tl.static_range(PARTS):
        if (pid >= first_programs[i]) & (pid < first_programs[i + 1]):
            _write_adapter(
                pid - first_programs[i],
                weight_ptrs[i],
                a_ptrs[i],
                b_ptrs[i],
                weight_row_strides[i],
                out_features[i],
                in_features[i],
                first_rows[i],
                first_ranks[i],
                rows[i],
                ranks[i],
                BLOCK_R,
                BLOCK,
            )


Adapters = Sequence[tuple[torch.Tensor | None, torch.Tensor | None, int]]


def write_adapters_(targets: Sequence[tuple[torch.Tensor, Adapters, int, int]]) -> None:
    """Write the adapters of several extended weights, in one backend.

    A target is (weight, adapters, out_features, in_features): weight (out_features + R, in_features + R), R what is to
    spare; adapters (A (R, in), B (out, R), out) of each linear in turn, (None, None, out) for one without an adapter.
    ValueError where a shape does not fit.
    """
    parts = [part for target in targets for part in _parts(*target)]
    if not parts or not backend.use_triton(targets[0][0]):
        for target in targets:
            write_adapters_reference(*target)
        return
    BLOCK_R = power_of_two(max(len(a) for _, a, *_ in parts))
    BLOCK = max(4096 // BLOCK_R, 16)
    programs = [cdiv(a.shape[1], BLOCK) + cdiv(len(b), BLOCK) for _, a, b, *_ in parts]
    _write_adapters[(sum(programs),)](
        *zip(*parts, strict=True),
        (0, *accumulate(programs)),
        PARTS=len(parts),
        BLOCK_R=BLOCK_R,
        BLOCK=BLOCK,
        num_warps=4,
    )


def _parts(
    weight: torch.Tensor, adapters: Adapters, out_features: int, in_features: int
) -> list[tuple]:
    """The first arguments of `_write_adapters` for each adapter of a weight."""
    require(
        weight.stride(1) == 1,
        f"the rows of weight have stride {weight.stride(1)}; expected contiguous rows",
    )
    total = sum(rows for _, _, rows in adapters)
    require(
        total == out_features,
        f"linears of {total} rows in all; the extended weight has {out_features}",
    )
    parts, row, rank = [], 0, 0
    for a, b, rows in adapters:
        if a is not None:
            R = len(a)
            fits = (
                a.shape == (R, in_features)
                and b.shape == (rows, R)
                and a.is_contiguous()
                and b.is_contiguous()
            )
            wanted = f"contiguous ({R}, {in_features}) and ({rows}, {R})"
            require(fits, f"a {tuple(a.shape)} and b {tuple(b.shape)}; expected {wanted}")
            parts.append(
                (weight, a, b, R, rows, rank, row, weight.stride(0), out_features, in_features)
            )
            rank += R
        row += rows
    spare = (weight.shape[0] - out_features, weight.shape[1] - in_features)
    require(
        min(spare) >= rank,
        f"the weight has {spare} rows and columns to spare; the ranks add up to {rank}",
    )
    return parts


def fill_lora_columns_(x: torch.Tensor, thin: torch.Tensor, scaling: float) -> None:
    """Fill the last R columns of x (N, width + R) with scaling * x[:, :width] thin^T, for a thin (R, width)."""
    R, width = thin.shape
    require(
        x.shape[1] == width + R,
        f"x is {tuple(x.shape)}; a thin matrix {tuple(thin.shape)} needs {width + R} columns",
    )
    x[:, width:].addmm_(x[:, :width], thin.t(), beta=0, alpha=scaling)


def lora_linear_(
    x: torch.Tensor,
    weight: torch.Tensor,
    out_features: int,
    scaling: float,
    out: torch.Tensor | None = None,
    add_to: torch.Tensor | None = None,
    lora_activation: torch.Tensor | None = None,
) -> torch.Tensor:
    """y (N, out_features) = x W^T + scaling (x A^T) B^T, for the extended weight (out + R, in + R).

    x (N, in + R) with x in its first columns; the others are filled here, with `lora_activation` (N, R) if that is known to be
    scaling * x A^T. y goes into `out` where that is given, or is added to `add_to` (N, out_features), which is in the
    accumulator's dtype and returned. ValueError where a shape does not fit.
    """
    R = weight.shape[0] - out_features
    require(
        x.shape[1:] == weight.shape[1:],
        f"x is {tuple(x.shape)}; an extended weight {tuple(weight.shape)}",
    )
    if lora_activation is not None:
        x[:, x.shape[1] - R :].copy_(lora_activation)
    elif R:
        fill_lora_columns_(x, weight[out_features:, : weight.shape[1] - R], scaling)
    if add_to is not None:
        return add_matmul_(add_to, x, weight[:out_features].t())
    return torch.mm(x, weight[:out_features].t(), out=out)


def lora_linear_backward_(
    dy: torch.Tensor,
    weight: torch.Tensor,
    in_features: int,
    scaling: float,
    out: torch.Tensor | None = None,
    need_dx: bool = True,
) -> torch.Tensor | None:
    """dx (N, in_features) = dy W + scaling (dy B) A, for the extended weight (out + R, in + R).

    dy (N, out + R) with dy in its first columns; the others are filled here, also with need_dx=False: `lora_gradients`
    wants them. ValueError where a shape does not fit.
    """
    R = weight.shape[1] - in_features
    require(
        dy.shape[1] == weight.shape[0],
        f"dy is {tuple(dy.shape)}; an extended weight {tuple(weight.shape)}",
    )
    if R:
        fill_lora_columns_(dy, weight[: weight.shape[0] - R, in_features:].t(), scaling)
    return torch.mm(dy, weight[:, :in_features], out=out) if need_dx else None


def lora_gradients(
    dy: torch.Tensor, x: torch.Tensor, splits: list[tuple[int, int]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(dA (R, in), dB (out, R)), in float32 (float64 for float64), of each of the linears that share x.

    dy and x are the buffers of `lora_linear_backward_` and `lora_linear_` with their last columns filled; splits holds
    (out, R) of each linear, R = 0 for one without an adapter, which has no entry in the result.
    """
    out_features, ranks = (sum(column) for column in zip(*splits, strict=True))
    spare = dy.shape[1] - out_features
    in_features = x.shape[1] - spare
    fits = dy.shape[0] == x.shape[0] and spare >= ranks and in_features > 0
    require(
        fits, f"dy {tuple(dy.shape)} and x {tuple(x.shape)} do not fit linears of (out, R) {splits}"
    )
    dA = matmul_accumulated(dy[:, out_features : out_features + ranks].t(), x[:, :in_features])
    gradients, row, rank = [], 0, 0
    for out, R in splits:
        if R:
            columns = slice(in_features + rank, in_features + rank + R)
            gradients.append(
                (dA[rank : rank + R], matmul_accumulated(dy[:, row : row + out].t(), x[:, columns]))
            )
        row, rank = row + out, rank + R
    return gradients
