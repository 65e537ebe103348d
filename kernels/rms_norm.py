"""RMSNorm, alone and with the residual addition in front of it. The weight is frozen: its gradient is never wanted.

    forward     s = x + residual                        rounded to the dtype: it is the next residual
                rstd = 1 / sqrt(mean(s^2) + eps)        one a row, float32, saved for backward
                y = s * rstd * weight                   in float32, rounded once
    backward    g = dy * weight
                dx = rstd * (g - xhat * mean(g * xhat)) + dresidual      xhat = x * rstd

x, residual, y, dy, dx are (N, D), rows may be strided; weight (D,); rstd (N,). A program holds a whole row, so each
tensor is read once and written once: 2 (rms_norm), 4 (add_rms_norm), 3 or 4 (backward) passes over (N, D). y and dx go
into `out` where that is given: a range of columns of a wider tensor, as the matmul that reads them wants it. s may take
the place of x, and dx that of dresidual.
"""

import torch

from . import launch
from .launch import accumulator, into, power_of_two, require, tl, triton


def rms_norm_reference(x, weight, eps):
    wide = x.to(accumulator(x.dtype))
    rstd = torch.rsqrt(wide.square().mean(dim=-1) + eps)
    return (wide * rstd[:, None] * weight).to(x.dtype), rstd


def add_rms_norm_reference(x, residual, weight, eps):
    s = x + residual
    return s, *rms_norm_reference(s, weight, eps)


def rms_norm_backward_reference(dy, x, weight, rstd, dresidual=None):
    wide = accumulator(x.dtype)
    xhat = x.to(wide) * rstd[:, None]
    g = dy.to(wide) * weight
    dx = rstd[:, None] * (g - xhat * (g * xhat).mean(dim=-1, keepdim=True))
    return (dx if dresidual is None else dx + dresidual).to(x.dtype)


@triton.jit
def _rms_norm_fwd(
    x_ptr,
    residual_ptr,
    weight_ptr,
    s_ptr,
    y_ptr,
    rstd_ptr,
    x_row_stride,
    residual_row_stride,
    s_row_stride,
    y_row_stride,
    D,
    eps,
    ADD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK_D)
    live = at < D
    x = tl.load(x_ptr + row * x_row_stride + at, mask=live, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + row * residual_row_stride + at, mask=live, other=0.0).to(tl.float32)
        s = x.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + row * s_row_stride + at, s, mask=live)
        x = s.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / D + eps)
    tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + at, mask=live, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * y_row_stride + at, (x * rstd * weight).to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def _rms_norm_bwd(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dresidual_ptr,
    dx_ptr,
    dy_row_stride,
    x_row_stride,
    dresidual_row_stride,
    dx_row_stride,
    D,
    ADD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK_D)
    live = at < D
    dy = tl.load(dy_ptr + row * dy_row_stride + at, mask=live, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_row_stride + at, mask=live, other=0.0).to(tl.float32)
    g = dy * tl.load(weight_ptr + at, mask=live, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    xhat = x * rstd
    dx = rstd * (g - xhat * (tl.sum(g * xhat, axis=0) / D))
    if ADD:
        dx += tl.load(dresidual_ptr + row * dresidual_row_stride + at, mask=live, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * dx_row_stride + at, dx.to(dx_ptr.dtype.element_ty), mask=live)


def _blocks(D: int) -> dict:
    """A row a program; a warp for every 512 elements, so that a thread holds 16 of each tensor."""
    BLOCK_D = power_of_two(D)
    return {"BLOCK_D": BLOCK_D, "num_warps": min(max(BLOCK_D // 512, 1), 16)}


def _check(x, weight, **others):
    require(x.dim() == 2, f"x is {tuple(x.shape)}; expected (rows, width)")
    require(weight.shape == x.shape[1:], f"weight is {tuple(weight.shape)}; rows of x hold {x.shape[1]} elements")
    for name, other in {"x": x, **others}.items():
        if other is not None:
            same = other.shape == x.shape and other.dtype == x.dtype
            require(same, f"{name} is {tuple(other.shape)} {other.dtype}; x is {tuple(x.shape)} {x.dtype}")
            require(other.stride(1) == 1, f"the rows of {name} have stride {other.stride(1)}; expected contiguous rows")


def _forward(x, residual, weight, eps, out, s):
    N, D = x.shape
    y = torch.empty((N, D), dtype=x.dtype, device=x.device) if out is None else out
    rstd = torch.empty(N, dtype=torch.float32, device=x.device)
    if x.numel():
        _rms_norm_fwd[(N,)](
            x,
            residual,
            weight,
            s,
            y,
            rstd,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            0 if residual is None else s.stride(0),
            y.stride(0),
            D,
            eps,
            ADD=residual is not None,
            **_blocks(D),
        )
    return y, rstd


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, rstd) for x (N, D) and weight (D,): y (N, D) in x's dtype, rstd (N,) float32 for the backward.

    ValueError where shapes do not fit or a row is not contiguous.
    """
    _check(x, weight, out=out)
    if not launch.use_triton(x):
        y, rstd = rms_norm_reference(x, weight, eps)
        return into(out, y), rstd
    return _forward(x, None, weight, eps, out, None)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(s, y, rstd): s = x + residual in their dtype, and y, rstd = rms_norm(s); all (N, D) but rstd (N,).

    y goes into `out` and s into `total` where they are given.
    """
    _check(x, weight, residual=residual, out=out, total=total)
    if not launch.use_triton(x):
        s, y, rstd = add_rms_norm_reference(x, residual, weight, eps)
        return into(total, s), into(out, y), rstd
    s = torch.empty_like(x) if total is None else total
    return s, *_forward(x, residual, weight, eps, out, s)


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    dresidual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """dx (N, D) of y = rms_norm(x), plus dresidual, the gradient that reaches x past the norm, if there is one.

    x is what was normalised: for add_rms_norm, its s; dx is then the gradient of both x and residual.
    """
    _check(x, weight, dy=dy, dresidual=dresidual, out=out)
    require(rstd.shape == x.shape[:1], f"rstd is {tuple(rstd.shape)}; expected ({x.shape[0]},)")
    if not launch.use_triton(x):
        return into(out, rms_norm_backward_reference(dy, x, weight, rstd, dresidual))
    N, D = x.shape
    dx = torch.empty((N, D), dtype=x.dtype, device=x.device) if out is None else out
    if x.numel():
        _rms_norm_bwd[(N,)](
            dy,
            x,
            weight,
            rstd,
            dresidual,
            dx,
            dy.stride(0),
            x.stride(0),
            0 if dresidual is None else dresidual.stride(0),
            dx.stride(0),
            D,
            ADD=dresidual is not None,
            **_blocks(D),
        )
    return dx
