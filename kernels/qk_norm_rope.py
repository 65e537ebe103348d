"""RMSNorm of each query and key head, then RoPE, in one launch (Qwen3, Gemma 3).

    rstd = 1 / sqrt(mean(x^2) + eps)          x: the K elements of a head
    n = x * rstd * (weight + offset)          weight (K,): one of the queries, one of the keys
    y = rotate(n)                             as in rope.py

    g = rotate(dy, opposite angle) * (weight + offset)
    xhat = x * rstd
    dx = rstd * (g - xhat * mean(g * xhat))   mean over the head

x (N, H + G, K) holds the H query heads and behind them the G key heads: the first columns of the
fused projection. y is a new tensor, because backward needs x. A rounded y could not give x back:
the rotation mixes two elements whose weights may differ by orders of magnitude. rstd is computed
again in backward, and dx replaces dy in place. The weights are frozen and get no gradient.

All sums are in float32. Forward reads x and writes y, backward reads x and dy and writes dx. A
program takes a few heads of one row.
"""

import torch

from . import backend
from .backend import (
    accumulator,
    cdiv,
    check_rows,
    copy_into,
    offset_weight,
    power_of_two,
    tl,
    triton,
)
from .rope import check_tables, rotate_reference

PROFILE_GROUP = "elementwise"
PAIRS = 1024  # elements i and i + K/2 of a program, 16 pairs a thread


def _head_weights(x, H, q_weight, k_weight, offset):
    """Return the weight plus offset of each head (H + G, K) in the accumulator's dtype."""
    weights = [q_weight.expand(H, -1), k_weight.expand(x.shape[1] - H, -1)]
    return offset_weight(torch.cat(weights).to(accumulator(x.dtype)), offset)


def qk_norm_rope_reference(x, H, q_weight, k_weight, eps, cos, sin, positions, offset=0.0):
    """Return y (N, H + G, K) in PyTorch."""
    x_acc = x.to(accumulator(x.dtype))
    rstd = torch.rsqrt(x_acc.square().mean(dim=-1, keepdim=True) + eps)
    n = x_acc * rstd * _head_weights(x, H, q_weight, k_weight, offset)
    return rotate_reference(n, cos, sin, positions).to(x.dtype)


def qk_norm_rope_backward_reference(
    dy, x, H, q_weight, k_weight, eps, cos, sin, positions, offset=0.0
):
    """Return dx (N, H + G, K) in PyTorch."""
    x_acc = x.to(accumulator(x.dtype))
    rstd = torch.rsqrt(x_acc.square().mean(dim=-1, keepdim=True) + eps)
    dn = rotate_reference(dy, cos, sin, positions, inverse=True)
    g = dn * _head_weights(x, H, q_weight, k_weight, offset)
    xhat = x_acc * rstd
    return (rstd * (g - xhat * (g * xhat).mean(dim=-1, keepdim=True))).to(dy.dtype)


@triton.jit
def _weights_of_heads(q_weight_ptr, k_weight_ptr, head, H, i, mask, OFFSET: tl.constexpr):
    """Load elements i of the weight of each head plus OFFSET in float32."""
    q_weight = tl.load(q_weight_ptr + i, mask=mask & (head < H), other=0.0).to(tl.float32)
    k_weight = tl.load(k_weight_ptr + i, mask=mask & (head >= H), other=0.0).to(tl.float32)
    weight = q_weight + k_weight
    if OFFSET != 0.0:
        weight += OFFSET
    return weight


@triton.jit
def _qk_norm_rope(
    x_ptr,
    out_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    x_row_stride,
    x_head_stride,
    out_row_stride,
    out_head_stride,
    H,
    heads,
    eps,
    OFFSET: tl.constexpr,
    BACKWARD: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Write y of some heads of a row to out_ptr; in backward, replace dy at out_ptr by dx."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    i = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (head < heads) & (i < HALF)
    at = tl.load(positions_ptr + row).to(tl.int64) * HALF + i
    cos = tl.load(cos_ptr + at, mask=i < HALF, other=0.0)
    sin = tl.load(sin_ptr + at, mask=i < HALF, other=0.0)
    w1 = _weights_of_heads(q_weight_ptr, k_weight_ptr, head, H, i, mask, OFFSET)
    w2 = _weights_of_heads(q_weight_ptr, k_weight_ptr, head, H, i + HALF, mask, OFFSET)

    x1_ptr = x_ptr + row * x_row_stride + head * x_head_stride + i
    x1 = tl.load(x1_ptr, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x1_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    mean_square = tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * HALF)
    rstd = (1.0 / tl.sqrt(mean_square + eps))[:, None]
    x1 *= rstd
    x2 *= rstd
    out_ptr += row * out_row_stride + head * out_head_stride + i
    if BACKWARD:
        dy1 = tl.load(out_ptr, mask=mask, other=0.0).to(tl.float32)
        dy2 = tl.load(out_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
        g1 = (dy1 * cos + dy2 * sin) * w1
        g2 = (dy2 * cos - dy1 * sin) * w2
        mean = (tl.sum(g1 * x1 + g2 * x2, axis=1) / (2 * HALF))[:, None]
        out1 = rstd * (g1 - x1 * mean)
        out2 = rstd * (g2 - x2 * mean)
    else:
        out1 = x1 * w1 * cos - x2 * w2 * sin
        out2 = x2 * w2 * cos + x1 * w1 * sin
    tl.store(out_ptr, out1.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + HALF, out2.to(out_ptr.dtype.element_ty), mask=mask)


def _check(x, H, q_weight, k_weight, cos, sin, positions, **others) -> None:
    check_tables(x, cos, sin, positions)
    check_rows(x, (x.dtype,), x=x, **others)
    if not 0 < H <= x.shape[1]:
        raise ValueError(f"H is {H}; x {tuple(x.shape)} has {x.shape[1]} heads")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.shape != x.shape[2:] or not weight.is_contiguous():
            raise ValueError(
                f"{name} is {tuple(weight.shape)}; heads of width {x.shape[2]} need as many "
                "contiguous weights"
            )


def _launch(x, out, H, weights, eps, tables, offset: float, is_backward: bool) -> None:
    N, heads, K = x.shape
    if not N:
        return
    BLOCK_HALF = power_of_two(K // 2)
    BLOCK_HEADS = min(power_of_two(heads), max(PAIRS // BLOCK_HALF, 1))
    _qk_norm_rope[(N, cdiv(heads, BLOCK_HEADS))](
        x,
        out,
        *weights,
        *tables,
        *x.stride()[:2],
        *out.stride()[:2],
        H,
        heads,
        eps,
        OFFSET=float(offset),
        BACKWARD=is_backward,
        HALF=K // 2,
        BLOCK_HEADS=BLOCK_HEADS,
        BLOCK_HALF=BLOCK_HALF,
        num_warps=max(BLOCK_HEADS * BLOCK_HALF // 512, 1),
    )


def qk_norm_rope(
    x: torch.Tensor,
    H: int,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    offset: float = 0.0,
) -> torch.Tensor:
    """Return the normalised and rotated heads (N, H + G, K), contiguous.

    x: (N, H + G, K), the query heads and then the key heads; rows and heads may be strided.
    H: number of query heads.
    q_weight, k_weight: (K,), the weights of both norms.
    cos, sin, positions: as in `rope_`.
    offset: added to both weights in float32.

    Raises: ValueError if a shape, dtype, device or stride does not fit.
    """
    _check(x, H, q_weight, k_weight, cos, sin, positions)
    weights, tables = (q_weight, k_weight), (cos, sin, positions)
    if not backend.use_triton(x):
        return qk_norm_rope_reference(x, H, *weights, eps, *tables, offset)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, y, H, weights, eps, tables, offset, is_backward=False)
    return y


def qk_norm_rope_backward_(
    dy: torch.Tensor,
    x: torch.Tensor,
    H: int,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    offset: float = 0.0,
) -> None:
    """Replace dy (N, H + G, K) in place by dx, the gradient of `qk_norm_rope`'s x.

    dy: gradient of y; rows and heads may be strided.
    The other arguments are those of the forward.

    Raises: ValueError if a shape, dtype, device or stride does not fit.
    """
    _check(x, H, q_weight, k_weight, cos, sin, positions, dy=dy)
    weights, tables = (q_weight, k_weight), (cos, sin, positions)
    if not backend.use_triton(x):
        inputs = dy, x, H, *weights, eps, *tables, offset
        copy_into(dy, qk_norm_rope_backward_reference(*inputs))
        return
    _launch(x, dy, H, weights, eps, tables, offset, is_backward=True)
