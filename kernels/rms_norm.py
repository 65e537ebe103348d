"""RMSNorm of a row or of a sum of two rows, and its backward.

    forward     rstd = 1 / sqrt(mean(x^2) + eps)        one a row, float32
                y = x * rstd * (weight + offset)        in float32, rounded once
    backward    g = dy * (weight + offset)
                xhat = x * rstd
                dx = rstd * (g - xhat * mean(g * xhat)) + dresidual

x, y, dy, dx, addend, residual and dresidual are (N, D), rows may be strided; weight (D,); rstd
(N,). With an addend, x stands for x + addend, which is not rounded. Saved for backward: x, addend
and rstd. The weight is frozen and gets no gradient. The offset is 1 in Gemma and otherwise 0.

A program holds a whole row, so each tensor is read once and written once. `out` may be a range of
columns of a wider tensor, which a matmul reads next. In backward it may be dresidual itself.

The residual stream of a model is in the accumulator's dtype, float32. Therefore `rms_norm` and its
backward take an x that is wider than y, and `add_rms_norm_` adds the addend to the residual stream
in the same pass.
"""

import torch

from . import backend
from .backend import (
    accumulator,
    check_rows,
    copy_into,
    empty_contiguous_like,
    load_row,
    offset_weight,
    power_of_two,
    row_stride,
    store_row,
    tl,
    triton,
)

PROFILE_GROUP = "elementwise"


def rms_norm_reference(x, weight, eps, offset=0.0):
    """Return (y, rstd) in PyTorch."""
    x_acc = x.to(accumulator(x.dtype))
    rstd = torch.rsqrt(x_acc.square().mean(dim=-1) + eps)
    return (x_acc * rstd[:, None] * offset_weight(weight, offset)).to(x.dtype), rstd


def add_rms_norm_reference_(x, addend, weight, eps, residual=None, offset=0.0):
    """Add the addend to the residual in place and return (y, rstd) in PyTorch."""
    if residual is not None:
        residual += addend
    y, rstd = rms_norm_reference(x.to(accumulator(x.dtype)) + addend, weight, eps, offset)
    return y.to(x.dtype), rstd


def rms_norm_backward_reference(dy, x, weight, rstd, dresidual=None, addend=None, offset=0.0):
    """Return dx in PyTorch."""
    acc_dtype = accumulator(x.dtype)
    x = x.to(acc_dtype) if addend is None else x.to(acc_dtype) + addend
    xhat = x * rstd[:, None]
    g = dy.to(acc_dtype) * offset_weight(weight, offset)
    dx = rstd[:, None] * (g - xhat * (g * xhat).mean(dim=-1, keepdim=True))
    return (dx if dresidual is None else dx + dresidual).to(dy.dtype)


@triton.jit
def _load_weight(weight_ptr, columns, mask, OFFSET: tl.constexpr):
    """Return the weight plus OFFSET in float32."""
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if OFFSET != 0.0:
        weight += OFFSET
    return weight


@triton.jit
def _rms_norm_fwd(
    x_ptr,
    addend_ptr,
    weight_ptr,
    residual_ptr,
    y_ptr,
    rstd_ptr,
    x_row_stride,
    addend_row_stride,
    residual_row_stride,
    y_row_stride,
    D,
    eps,
    OFFSET: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Normalise one row per program; addend_ptr and residual_ptr may be None."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    mask = columns < D
    x = load_row(x_ptr, row, x_row_stride, columns, mask)
    if addend_ptr is not None:
        addend = load_row(addend_ptr, row, addend_row_stride, columns, mask)
        x += addend
        if residual_ptr is not None:
            residual = load_row(residual_ptr, row, residual_row_stride, columns, mask)
            store_row(residual_ptr, row, residual_row_stride, columns, residual + addend, mask)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / D + eps)
    tl.store(rstd_ptr + row, rstd)
    weight = _load_weight(weight_ptr, columns, mask, OFFSET)
    store_row(y_ptr, row, y_row_stride, columns, x * rstd * weight, mask)


@triton.jit
def _rms_norm_bwd(
    dy_ptr,
    x_ptr,
    addend_ptr,
    weight_ptr,
    rstd_ptr,
    dresidual_ptr,
    dx_ptr,
    dy_row_stride,
    x_row_stride,
    addend_row_stride,
    dresidual_row_stride,
    dx_row_stride,
    D,
    OFFSET: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute dx of one row per program; addend_ptr and dresidual_ptr may be None."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    mask = columns < D
    dy = load_row(dy_ptr, row, dy_row_stride, columns, mask)
    x = load_row(x_ptr, row, x_row_stride, columns, mask)
    if addend_ptr is not None:
        x += load_row(addend_ptr, row, addend_row_stride, columns, mask)
    g = dy * _load_weight(weight_ptr, columns, mask, OFFSET)
    rstd = tl.load(rstd_ptr + row)
    xhat = x * rstd
    dx = rstd * (g - xhat * (tl.sum(g * xhat, axis=0) / D))
    if dresidual_ptr is not None:
        dx += load_row(dresidual_ptr, row, dresidual_row_stride, columns, mask)
    store_row(dx_ptr, row, dx_row_stride, columns, dx, mask)


def _blocks(D: int) -> dict[str, int]:
    """Return the block size: a row a program, a warp for every 512 elements.

    A thread then holds 16 elements of each tensor.
    """
    BLOCK_D = power_of_two(D)
    return {"BLOCK_D": BLOCK_D, "num_warps": min(max(BLOCK_D // 512, 1), 16)}


def _check(weight, dtype, x, narrow: dict, wide: dict) -> None:
    """Check the shapes of all rows, `narrow` ones in dtype, `wide` ones also in its accumulator."""
    if x.dim() != 2:
        raise ValueError(f"x is {tuple(x.shape)}; expected (rows, width)")
    if weight.shape != x.shape[1:] or not weight.is_contiguous():
        raise ValueError(
            f"weight is {tuple(weight.shape)} with stride {weight.stride()}; "
            f"rows of x hold {x.shape[1]} elements and need as many contiguous weights"
        )
    check_rows(x, (dtype,), **narrow)
    check_rows(x, (dtype, accumulator(dtype)), **wide)


def _forward(x, weight, eps, out, offset, addend=None, residual=None):
    N, D = x.shape
    y = empty_contiguous_like(x) if out is None else out
    rstd = torch.empty(N, dtype=torch.float32, device=x.device)
    if x.numel():
        strides = map(row_stride, (x, addend, residual, y))
        tensors = x, addend, weight, residual, y, rstd
        _rms_norm_fwd[(N,)](*tensors, *strides, D, eps, OFFSET=float(offset), **_blocks(D))
    return y, rstd


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (y, rstd): y (N, D) in the dtype of `out`, and rstd (N,) in float32 for backward.

    x: (N, D) in the dtype of `out` or its accumulator's.
    weight: (D,).
    out: destination of y (N, D); by default a new tensor in x's dtype.
    offset: added to the weight in float32.

    Raises: ValueError if a shape, dtype or device does not fit, or a row is not contiguous.
    """
    dtype = x.dtype if out is None else out.dtype
    _check(weight, dtype, x, {"out": out}, {"x": x})
    if not backend.use_triton(x):
        y, rstd = rms_norm_reference(x, weight, eps, offset)
        return copy_into(out, y), rstd
    return _forward(x, weight, eps, out, offset)


def add_rms_norm_(
    x: torch.Tensor,
    addend: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (y, rstd) of x + addend, and add the addend to the residual stream in place.

    x, addend: (N, D) in one dtype; their sum is not rounded.
    weight: (D,).
    residual: residual stream (N, D) in that dtype or its accumulator's; None if there is none.
    out: destination of y (N, D); by default a new tensor.
    offset: added to the weight in float32.

    Raises: ValueError if a shape, dtype or device does not fit, or a row is not contiguous.
    """
    _check(weight, x.dtype, x, {"x": x, "addend": addend, "out": out}, {"residual": residual})
    if not backend.use_triton(x):
        y, rstd = add_rms_norm_reference_(x, addend, weight, eps, residual, offset)
        return copy_into(out, y), rstd
    return _forward(x, weight, eps, out, offset, addend, residual)


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    dresidual: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    offset: float = 0.0,
) -> torch.Tensor:
    """Return dx (N, D) in the dtype of dy, the gradient of x and of the addend.

    dy: gradient of y (N, D).
    x, weight, rstd, offset: inputs and rstd of the forward; x in the dtype of dy or its
        accumulator's.
    dresidual: gradient (N, D) that reaches x past the norm, added to dx; None if there is none.
    addend: as in `add_rms_norm_`, None for `rms_norm`.
    out: destination of dx (N, D), possibly dresidual; by default a new tensor.

    Raises: ValueError if a shape, dtype or device does not fit, or a row is not contiguous.
    """
    narrow = {"dy": dy, "dresidual": dresidual, "out": out}
    _check(weight, dy.dtype, x, narrow, {"x": x, "addend": addend})
    if rstd.shape != x.shape[:1] or not rstd.is_contiguous():
        raise ValueError(f"rstd is {tuple(rstd.shape)}; expected contiguous ({x.shape[0]},)")
    if not backend.use_triton(x):
        inputs = dy, x, weight, rstd, dresidual, addend, offset
        return copy_into(out, rms_norm_backward_reference(*inputs))
    N, D = x.shape
    dx = empty_contiguous_like(dy) if out is None else out
    if x.numel():
        strides = map(row_stride, (dy, x, addend, dresidual, dx))
        tensors = dy, x, addend, weight, rstd, dresidual, dx
        _rms_norm_bwd[(N,)](*tensors, *strides, D, OFFSET=float(offset), **_blocks(D))
    return dx
