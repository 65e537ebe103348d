"""Rotary position embedding (RoPE) of queries and keys, in place, one launch for both.

Element i of a head pairs with element i + K/2, as in Hugging Face's Llama:

    x1' = x1 cos - x2 sin          x1, x2: the first and second half of the head
    x2' = x2 cos + x1 sin          cos, sin = table[position of the row], float32

A rotation is orthogonal, so backward rotates the gradients by the opposite angle (`inverse=True`).
Nothing is saved. q may also have a factor at each position (Ministral 3), in both directions.

q (N, H, K) and k (N, G, K) may be views of one fused projection; cos, sin (P, K/2); positions (N,).
If only the first columns of a head are rotated, q and k are views of these columns.
Positions restart at 0 in each packed sequence. The kernel reads and writes q and k once, in float32
in between; the tables stay in cache.
"""

import torch

from . import backend
from .backend import accumulator, check_rows, power_of_two, tl, triton

PROFILE_GROUP = "elementwise"


def rotate_reference(x, cos, sin, positions, inverse=False):
    """Return the heads x (N, heads, K) rotated in PyTorch, in the accumulator's dtype."""
    cos, sin = cos[positions][:, None], sin[positions][:, None]  # (N, 1, K/2)
    if inverse:
        sin = -sin
    x1, x2 = x.to(accumulator(x.dtype)).chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def rope_reference_(q, k, cos, sin, positions, inverse=False, query_scale=None):
    """Rotate q and k in place in PyTorch."""
    k.copy_(rotate_reference(k, cos, sin, positions, inverse))
    rotated = rotate_reference(q, cos, sin, positions, inverse)
    if query_scale is not None:
        rotated = rotated * query_scale[positions][:, None, None]
    q.copy_(rotated)


@triton.jit
def _rotate(
    x_ptr,
    cos,
    sin,
    heads,
    x_head_stride,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Rotate the heads of the row at x_ptr."""
    head = tl.arange(0, BLOCK_H)[:, None]
    i = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (head < heads) & (i < HALF)
    x1_ptr = x_ptr + head * x_head_stride + i
    x2_ptr = x1_ptr + HALF
    x1 = tl.load(x1_ptr, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x2_ptr, mask=mask, other=0.0).to(tl.float32)
    tl.store(x1_ptr, (x1 * cos - x2 * sin).to(x_ptr.dtype.element_ty), mask=mask)
    tl.store(x2_ptr, (x2 * cos + x1 * sin).to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rope(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    query_scale_ptr,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    H,
    G,
    INVERSE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Rotate all heads of one row per program."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_HALF)
    position = tl.load(positions_ptr + row).to(tl.int64)
    at = position * HALF + i
    cos = tl.load(cos_ptr + at, mask=i < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + at, mask=i < HALF, other=0.0)[None, :]
    if INVERSE:
        sin = -sin
    _rotate(k_ptr + row * k_row_stride, cos, sin, G, k_head_stride, HALF, BLOCK_G, BLOCK_HALF)
    if HAS_SCALE:
        scale = tl.load(query_scale_ptr + position)
        cos *= scale
        sin *= scale
    _rotate(q_ptr + row * q_row_stride, cos, sin, H, q_head_stride, HALF, BLOCK_H, BLOCK_HALF)


def _check(q, k, cos, sin, positions) -> None:
    if q.dim() != 3 or k.dim() != 3:
        raise ValueError(
            f"q is {tuple(q.shape)} and k is {tuple(k.shape)}; expected (rows, heads, head width)"
        )
    check_rows(q, (q.dtype,), q=q)
    check_rows(k, (q.dtype,), k=k)
    (N, _, K), G = q.shape, k.shape[1]
    if k.shape != (N, G, K):
        raise ValueError(f"k is {tuple(k.shape)}; q {tuple(q.shape)} needs ({N}, heads, {K})")
    check_tables(q, cos, sin, positions)


def check_tables(x, cos, sin, positions) -> None:
    """Check the tables and positions of heads x (N, heads, K).

    Raises: ValueError if a shape does not fit, or one of them is not contiguous.
    """
    if x.dim() != 3 or positions.shape != x.shape[:1]:
        raise ValueError(
            f"x is {tuple(x.shape)} and positions {tuple(positions.shape)}; "
            "expected (rows, heads, head width) and (rows,)"
        )
    K = x.shape[2]
    if cos.shape != sin.shape or cos.shape[1:] != (K // 2,) or K % 2:
        raise ValueError(
            f"cos is {tuple(cos.shape)} and sin {tuple(sin.shape)}; "
            f"a head width of {K} needs (positions, {K // 2})"
        )
    if not (cos.is_contiguous() and sin.is_contiguous() and positions.is_contiguous()):
        raise ValueError("cos, sin and positions must be contiguous; call .contiguous() first")


def rope_(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    inverse: bool = False,
    query_scale: torch.Tensor | None = None,
) -> None:
    """Rotate q and k in place by the angles of their positions.

    q, k: (N, H, K) and (N, G, K); rows and heads may be strided.
    cos, sin: tables (P, K/2) in float32, contiguous.
    positions: (N,) integers below P; not checked, because that would wait for the GPU.
    inverse: rotate back, by the opposite angles.
    query_scale: factor of q at each position (P,) in float32, contiguous; None for no factor.

    Raises: ValueError if a shape, dtype, device or stride does not fit.
    """
    _check(q, k, cos, sin, positions)
    if query_scale is not None and query_scale.shape != cos.shape[:1]:
        raise ValueError(
            f"query_scale is {tuple(query_scale.shape)}; expected {tuple(cos.shape[:1])}"
        )
    if not backend.use_triton(q):
        rope_reference_(q, k, cos, sin, positions, inverse, query_scale)
        return
    N, H, K = q.shape
    if not N:
        return
    pairs = power_of_two(H) * power_of_two(K // 2)
    _rope[(N,)](
        q,
        k,
        cos,
        sin,
        positions,
        query_scale,
        *q.stride()[:2],
        *k.stride()[:2],
        H,
        k.shape[1],
        INVERSE=inverse,
        HAS_SCALE=query_scale is not None,
        HALF=K // 2,
        BLOCK_H=power_of_two(H),
        BLOCK_G=power_of_two(k.shape[1]),
        BLOCK_HALF=power_of_two(K // 2),
        num_warps=min(max(pairs // 512, 1), 8),  # a thread holds 16 pairs of q
    )
