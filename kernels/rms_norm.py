"""RMSNorm, of a row alone and of the sum of two, and its backward. The weight is frozen: no gradient of it is wanted.

    forward     rstd = 1 / sqrt(mean(x^2) + eps)        one a row, float32, saved for backward
                y = x * rstd * weight                   in float32, rounded once
    backward    g = dy * weight
                dx = rstd * (g - xhat * mean(g * xhat)) + dresidual      xhat = x * rstd

x, y, dy, dx and all others are (N, D), rows may be strided; weight (D,); rstd (N,). A program holds a whole row, so
each tensor is read once and written once. y and dx go into `out` where that is given: a range of columns of a wider
tensor, as the matmul that reads them wants it. dx may take the place of dresidual.

The residual stream of a model is in its accumulator's dtype, float32: `rms_norm` and its backward take an x that is
wider than y, and `add_rms_norm_` adds to the stream on the way.
"""

import torch

from . import backend
from .backend import accumulator, copy_into, power_of_two, require, tl, triton


def rms_norm_reference(x, weight, eps):
    wide = x.to(accumulator(x.dtype))
    rstd = torch.rsqrt(wide.square().mean(dim=-1) + eps)
    return (wide * rstd[:, None] * weight).to(x.dtype), rstd


def add_rms_norm_reference_(x, addend, weight, eps, residual=None):
    if residual is not None:
        residual += addend
    y, rstd = rms_norm_reference(x.to(accumulator(x.dtype)) + addend, weight, eps)
    return y.to(x.dtype), rstd


def rms_norm_backward_reference(dy, x, weight, rstd, dresidual=None, addend=None):
    wide = accumulator(x.dtype)
    x = x.to(wide) if addend is None else x.to(wide) + addend
    xhat = x * rstd[:, None]
    g = dy.to(wide) * weight
    dx = rstd[:, None] * (g - xhat * (g * xhat).mean(dim=-1, keepdim=True))
    return (dx if dresidual is None else dx + dresidual).to(dy.dtype)


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
    ADD: tl.constexpr,
    ADD_RESIDUAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK_D)
    live = at < D
    x = tl.load(x_ptr + row * x_row_stride + at, mask=live, other=0.0).to(tl.float32)
    if ADD:
        addend = tl.load(addend_ptr + row * addend_row_stride + at, mask=live, other=0.0).to(
            tl.float32
        )
        x += addend
        if ADD_RESIDUAL:
            s = residual_ptr + row * residual_row_stride + at
            tl.store(s, tl.load(s, mask=live, other=0.0) + addend, mask=live)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / D + eps)
    tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + at, mask=live, other=0.0).to(tl.float32)
    tl.store(
        y_ptr + row * y_row_stride + at, (x * rstd * weight).to(y_ptr.dtype.element_ty), mask=live
    )


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
    ADD: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK_D)
    live = at < D
    dy = tl.load(dy_ptr + row * dy_row_stride + at, mask=live, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_row_stride + at, mask=live, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(addend_ptr + row * addend_row_stride + at, mask=live, other=0.0).to(tl.float32)
    g = dy * tl.load(weight_ptr + at, mask=live, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    xhat = x * rstd
    dx = rstd * (g - xhat * (tl.sum(g * xhat, axis=0) / D))
    if RESIDUAL:
        dx += tl.load(dresidual_ptr + row * dresidual_row_stride + at, mask=live, other=0.0).to(
            tl.float32
        )
    tl.store(dx_ptr + row * dx_row_stride + at, dx.to(dx_ptr.dtype.element_ty), mask=live)


def _blocks(D: int) -> dict:
    """A row a program; a warp for every 512 elements, so that a thread holds 16 of each tensor."""
    BLOCK_D = power_of_two(D)
    return {"BLOCK_D": BLOCK_D, "num_warps": min(max(BLOCK_D // 512, 1), 16)}


def _check(weight, narrow, wide):
    """That all are (N, D), those of `narrow` in one dtype, and those of `wide` in that or in its accumulator's."""
    tensors = {name: t for name, t in (narrow | wide).items() if t is not None}
    first, like = next(iter(tensors.items()))
    dtype = next((t.dtype for t in narrow.values() if t is not None), like.dtype)
    require(like.dim() == 2, f"{first} is {tuple(like.shape)}; expected (rows, width)")
    width = like.shape[1]
    require(
        weight.shape == (width,),
        f"weight is {tuple(weight.shape)}; rows of {first} hold {width} elements",
    )
    for name, t in tensors.items():
        allowed = (dtype, accumulator(dtype)) if name in wide else (dtype,)
        same = t.shape == like.shape and t.dtype in allowed
        require(
            same,
            f"{name} is {tuple(t.shape)} {t.dtype}; {first} is {tuple(like.shape)} {like.dtype}",
        )
        require(
            t.stride(1) == 1,
            f"the rows of {name} have stride {t.stride(1)}; expected contiguous rows",
        )


def _row_stride(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _empty(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _forward(x, weight, eps, y, addend=None, residual=None):
    N, D = x.shape
    rstd = torch.empty(N, dtype=torch.float32, device=x.device)
    if x.numel():
        _rms_norm_fwd[(N,)](
            x,
            addend,
            weight,
            residual,
            y,
            rstd,
            *map(_row_stride, (x, addend, residual, y)),
            D,
            eps,
            ADD=addend is not None,
            ADD_RESIDUAL=residual is not None,
            **_blocks(D),
        )
    return y, rstd


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, rstd) for x (N, D) and weight (D,): y (N, D) in `out` or in x's dtype, rstd (N,) float32 for the backward.

    ValueError where shapes do not fit or a row is not contiguous.
    """
    _check(weight, {"out": out}, {"x": x})
    if not backend.use_triton(x):
        y, rstd = rms_norm_reference(x, weight, eps)
        return copy_into(out, y), rstd
    return _forward(x, weight, eps, _empty(x) if out is None else out)


def add_rms_norm_(
    x: torch.Tensor,
    addend: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """rms_norm of x + addend, whose sum is not rounded; both (N, D). residual (N, D) in the accumulator's dtype gets
    addend added."""
    _check(weight, {"x": x, "addend": addend, "out": out}, {"residual": residual})
    if not backend.use_triton(x):
        y, rstd = add_rms_norm_reference_(x, addend, weight, eps, residual)
        return copy_into(out, y), rstd
    y = _empty(x) if out is None else out
    return _forward(x, weight, eps, y, addend=addend, residual=residual)


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    dresidual: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """dx (N, D) of y = rms_norm(x), plus dresidual, the gradient that reaches x past the norm, if there is one.

    With an addend, of y = add_rms_norm_(x, addend): dx is the gradient of both.
    """
    _check(weight, {"dy": dy, "dresidual": dresidual, "out": out}, {"x": x, "addend": addend})
    require(rstd.shape == x.shape[:1], f"rstd is {tuple(rstd.shape)}; expected ({x.shape[0]},)")
    if not backend.use_triton(x):
        return copy_into(out, rms_norm_backward_reference(dy, x, weight, rstd, dresidual, addend))
    N, D = x.shape
    dx = _empty(dy) if out is None else out
    if x.numel():
        _rms_norm_bwd[(N,)](
            dy,
            x,
            addend,
            weight,
            rstd,
            dresidual,
            dx,
            *map(_row_stride, (dy, x, addend, dresidual, dx)),
            D,
            ADD=addend is not None,
            RESIDUAL=dresidual is not None,
            **_blocks(D),
        )
    return dx
