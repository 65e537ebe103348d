"""A frozen linear with its LoRA branch in one matmul, forward and backward.

    forward     y = x W^T + s (x A^T) B^T
    backward    dx = dy W + s (dy B) A
                dA = s (dy B)^T x
                dB = dy^T (s x A^T)

x (N, in), W (out, in) frozen, A (R, in), B (out, R), y (N, out); s is the scaling. An output may
have a factor (Granite's residual multiplier), which every matmul applies to its sums. The two
products of y become one matmul if the operands are concatenated in an extended weight. The same
holds for dx:

                   in   R          y  = [x | s x A^T] [W | B]^T
           out [   W    B  ]       dx = [dy | s dy B] [W ; A]
           R   [   A    0  ]

One buffer serves both directions: forward multiplies by its first `out` rows, backward by its first
`in` columns. x and dy arrive in buffers with R more columns, the LoRA columns, which are filled
here. So y and dx are accumulated in float32 to the end, rounded once, and never read back. Backward
needs x with its LoRA columns.

Several linears that share an input (q, k, v; gate, up) form one extended weight. W and A are
stacked by rows. Each B has its own columns; the other rows of these columns are zero.

The matmuls are cuBLAS's. Time of forward, dx, dA and dB of all seven linears of 32 layers of an 8B
Llama on an H200 in November 2026, r = 16, bf16:

                                                        4096 rows    960 rows
    this file                                           180 ms       45 ms
    the frozen matmuls alone                            164 ms       39 ms
    matmul and `addmm_`, as in PEFT                     190 ms       50 ms
    a Triton matmul that adds the adapter at the end    196 ms       57 ms
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

from . import backend
from .backend import add_matmul_, cdiv, matmul, matmul_accumulated, power_of_two, tl, triton

PROFILE_GROUP = "LoRA"

# The number of LoRA columns is a multiple of this. On a GPU, rows in 16 bit then begin at 128-byte
# lines: for an 8B step on an H200, a multiple of 16 gives 330 ms and 64 gives 322 ms. On a CPU
# padding only adds work: with 64 a small model takes 13% longer.
RANK_MULTIPLE = {"cuda": 64, "meta": 64, "cpu": 16}

# (A (R, in), B (out, R), out) of each linear in turn, or (None, None, out) without an adapter.
Adapters = Sequence[tuple[torch.Tensor | None, torch.Tensor | None, int]]


def padded_rank(rank: int, device_type: str = "cuda") -> int:
    """Return the LoRA columns R of an extended weight for linears whose ranks add up to `rank`."""
    return cdiv(rank, RANK_MULTIPLE[device_type]) * RANK_MULTIPLE[device_type]


def write_adapters_reference_(weight, adapters, out_features, in_features):
    """Write the adapters of one extended weight in place in PyTorch."""
    row = rank = 0
    for a, b, rows in adapters:
        if a is not None:
            lora_rows = slice(out_features + rank, out_features + rank + len(a))
            lora_columns = slice(in_features + rank, in_features + rank + len(a))
            weight[lora_rows, :in_features] = a
            weight[row : row + rows, lora_columns] = b
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
    b_rows,
    R,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write BLOCK columns of one A, or BLOCK rows of its B."""
    a_programs = tl.cdiv(in_features, BLOCK)
    rank = tl.arange(0, BLOCK_R)
    dtype = weight_ptr.dtype.element_ty
    if pid < a_programs:
        column = pid * BLOCK + tl.arange(0, BLOCK)
        a_mask = (rank < R)[:, None] & (column < in_features)[None, :]
        a = tl.load(a_ptr + rank[:, None] * in_features + column[None, :], mask=a_mask)
        lora_row = (out_features + first_rank + rank).to(tl.int64)
        to_a = lora_row[:, None] * weight_row_stride + column[None, :]
        tl.store(weight_ptr + to_a, a.to(dtype), mask=a_mask)
    else:
        row = (pid - a_programs) * BLOCK + tl.arange(0, BLOCK)
        b_mask = (row < b_rows)[:, None] & (rank < R)[None, :]
        b = tl.load(b_ptr + row[:, None] * R + rank[None, :], mask=b_mask)
        weight_row = (first_row + row).to(tl.int64)
        to_b = weight_row[:, None] * weight_row_stride + in_features + first_rank + rank[None, :]
        tl.store(weight_ptr + to_b, b.to(dtype), mask=b_mask)


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
    ADAPTERS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write several adapters: adapter i by the programs from first_programs[i] to [i + 1]."""
    pid = tl.program_id(0)
    for i in tl.static_range(ADAPTERS):
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


def write_adapters_(targets: Sequence[tuple[torch.Tensor, Adapters, int, int]]) -> None:
    """Write the adapters of several extended weights in one launch.

    targets: (weight, adapters, out_features, in_features) of each extended weight, which is
        (out + R, in + R).

    Raises: ValueError if a shape or stride does not fit.
    """
    adapters = [adapter for target in targets for adapter in _adapter_arguments(*target)]
    if not adapters or not backend.use_triton(targets[0][0]):
        for target in targets:
            write_adapters_reference_(*target)
        return
    BLOCK_R = power_of_two(max(len(a) for _, a, *_ in adapters))
    BLOCK = max(4096 // BLOCK_R, 16)
    programs = [cdiv(a.shape[1], BLOCK) + cdiv(len(b), BLOCK) for _, a, b, *_ in adapters]
    _write_adapters[(sum(programs),)](
        *zip(*adapters, strict=True),
        (0, *accumulate(programs)),
        ADAPTERS=len(adapters),
        BLOCK_R=BLOCK_R,
        BLOCK=BLOCK,
        num_warps=4,
    )


def _adapter_arguments(
    weight: torch.Tensor, adapters: Adapters, out_features: int, in_features: int
) -> list[tuple]:
    """Check one extended weight and return the arguments of `_write_adapters` for each adapter."""
    if weight.stride(1) != 1:
        raise ValueError(f"the rows of weight have stride {weight.stride(1)}; expected 1")
    total = sum(rows for _, _, rows in adapters)
    if total != out_features:
        raise ValueError(
            f"the linears have {total} rows in all; the extended weight has {out_features}"
        )
    arguments, row, rank = [], 0, 0
    for a, b, rows in adapters:
        if a is not None:
            R = len(a)
            contiguous = a.is_contiguous() and b.is_contiguous()
            if a.shape != (R, in_features) or b.shape != (rows, R) or not contiguous:
                raise ValueError(
                    f"a is {tuple(a.shape)} and b {tuple(b.shape)}; "
                    f"expected contiguous ({R}, {in_features}) and ({rows}, {R})"
                )
            bounds = R, rows, rank, row, weight.stride(0), out_features, in_features
            arguments.append((weight, a, b, *bounds))
            rank += R
        row += rows
    lora_space = weight.shape[0] - out_features, weight.shape[1] - in_features
    if min(lora_space) < rank:
        raise ValueError(
            f"the extended weight has {lora_space} LoRA rows and columns; "
            f"the ranks add up to {rank}"
        )
    return arguments


def fill_lora_columns_(x: torch.Tensor, a: torch.Tensor, scaling: float) -> None:
    """Fill the last R columns of x with scaling * x[:, :in] a^T.

    x: (N, in + R).
    a: (R, in).

    Raises: ValueError if the shapes do not fit.
    """
    R, in_features = a.shape
    if x.shape[1] != in_features + R:
        raise ValueError(
            f"x is {tuple(x.shape)}; a {tuple(a.shape)} needs {in_features + R} columns"
        )
    x[:, in_features:].addmm_(x[:, :in_features], a.t(), beta=0, alpha=scaling)


def lora_linear_(
    x: torch.Tensor,
    weight: torch.Tensor,
    out_features: int,
    scaling: float,
    out: torch.Tensor | None = None,
    add_to: torch.Tensor | None = None,
    lora_activation: torch.Tensor | None = None,
    multiplier: float = 1.0,
) -> torch.Tensor:
    """Return y (N, out_features) = multiplier (x W^T + scaling (x A^T) B^T).

    The LoRA columns of x are filled.

    x: (N, in + R), the input in its first columns.
    weight: extended weight (out + R, in + R).
    out: destination of y; by default a new tensor.
    add_to: tensor (N, out) in the accumulator's dtype to add y to and to return instead.
    lora_activation: scaling * x A^T (N, R) if already computed; by default computed here.
    multiplier: factor of y.

    Raises: ValueError if a shape does not fit.
    """
    if x.shape[1:] != weight.shape[1:]:
        raise ValueError(
            f"x is {tuple(x.shape)}; the extended weight is {tuple(weight.shape)} "
            f"and needs {weight.shape[1]} columns"
        )
    R = len(weight) - out_features
    in_features = weight.shape[1] - R
    if lora_activation is not None:
        x[:, in_features:].copy_(lora_activation)
    elif R:
        fill_lora_columns_(x, weight[out_features:, :in_features], scaling)
    if add_to is not None:
        return add_matmul_(add_to, x, weight[:out_features].t(), multiplier)
    return matmul(x, weight[:out_features].t(), out, multiplier)


def lora_linear_backward_(
    dy: torch.Tensor,
    weight: torch.Tensor,
    in_features: int,
    scaling: float,
    out: torch.Tensor | None = None,
    need_dx: bool = True,
    multiplier: float = 1.0,
) -> torch.Tensor | None:
    """Return dx (N, in_features) = multiplier (dy W + scaling (dy B) A).

    The LoRA columns of dy are filled with scaling * dy B.

    dy: (N, out + R), the gradient in its first columns.
    weight: extended weight (out + R, in + R).
    out: destination of dx; by default a new tensor.
    need_dx: if False, only fill the LoRA columns, which `lora_gradients` reads, and return None.
    multiplier: that of the forward.

    Raises: ValueError if a shape does not fit.
    """
    if dy.shape[1:] != weight.shape[:1]:
        raise ValueError(
            f"dy is {tuple(dy.shape)}; the extended weight is {tuple(weight.shape)} "
            f"and needs {len(weight)} columns"
        )
    R = weight.shape[1] - in_features
    if R:
        b = weight[: len(weight) - R, in_features:]
        fill_lora_columns_(dy, b.t(), scaling)
    return matmul(dy, weight[:, :in_features], out, multiplier) if need_dx else None


def lora_gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    splits: list[tuple[int, int]],
    multiplier: float = 1.0,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (dA (R, in), dB (out, R)) of each linear with an adapter, in the accumulator's dtype.

    dy, x: buffers of `lora_linear_backward_` and `lora_linear_`, their LoRA columns filled.
    splits: (out, R) of each linear that shares x; R is 0 for a linear without an adapter.
    multiplier: that of the forward.

    Raises: ValueError if a shape does not fit.
    """
    out_features, ranks = (sum(column) for column in zip(*splits, strict=True))
    lora_columns = dy.shape[1] - out_features
    in_features = x.shape[1] - lora_columns
    if dy.shape[0] != x.shape[0] or lora_columns < ranks or in_features <= 0:
        raise ValueError(
            f"dy {tuple(dy.shape)} and x {tuple(x.shape)} do not fit linears of (out, R) {splits}"
        )
    dA = matmul_accumulated(
        dy[:, out_features : out_features + ranks].t(), x[:, :in_features], multiplier
    )
    gradients, row, rank = [], 0, 0
    for out, R in splits:
        if R:
            columns = slice(in_features + rank, in_features + rank + R)
            dB = matmul_accumulated(dy[:, row : row + out].t(), x[:, columns], multiplier)
            gradients.append((dA[rank : rank + R], dB))
        row, rank = row + out, rank + R
    return gradients
