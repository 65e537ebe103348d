"""Rotary position embedding of queries and keys, in place, one launch for both.

The head's two halves are the coordinates: element i pairs with i + K/2, as in Hugging Face's Llama,

    x1' = x1 cos - x2 sin
    x2' = x2 cos + x1 sin          cos, sin = table[position of the row], float32

A rotation is orthogonal, so the backward is the rotation by the opposite angle (inverse=True), on the gradients.
q (N, H, K) and k (N, G, K) may be views of one fused projection; cos, sin (P, K/2); positions (N,), which restart at
each packed sample. Reads and writes q and k once; the tables stay in cache.
"""

import torch

from . import backend
from .backend import accumulator, power_of_two, require, tl, triton


def rope_reference_(q, k, cos, sin, positions, inverse=False):
    cos, sin = cos[positions][:, None], sin[positions][:, None]  # (N, 1, K/2)
    if inverse:
        sin = -sin
    for x in (q, k):
        x1, x2 = x.to(accumulator(x.dtype)).chunk(2, dim=-1)
        x.copy_(torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1))


@triton.jit
def _rotate(
    x_ptr,
    cos,
    sin,
    heads,
    head_stride,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Rotates the heads of one row, which begins at x_ptr."""
    head = tl.arange(0, BLOCK_H)[:, None]
    i = tl.arange(0, BLOCK_HALF)[None, :]
    live = (head < heads) & (i < HALF)
    x1_ptr = x_ptr + head * head_stride + i
    x2_ptr = x1_ptr + HALF
    x1 = tl.load(x1_ptr, mask=live, other=0.0).to(tl.float32)
    x2 = tl.load(x2_ptr, mask=live, other=0.0).to(tl.float32)
    tl.store(x1_ptr, (x1 * cos - x2 * sin).to(x_ptr.dtype.element_ty), mask=live)
    tl.store(x2_ptr, (x2 * cos + x1 * sin).to(x_ptr.dtype.element_ty), mask=live)


@triton.jit
def _rope(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    H,
    G,
    INVERSE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """One program: all heads of one row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_HALF)
    at = tl.load(positions_ptr + row).to(tl.int64) * HALF + i
    cos = tl.load(cos_ptr + at, mask=i < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + at, mask=i < HALF, other=0.0)[None, :]
    if INVERSE:
        sin = -sin
    _rotate(q_ptr + row * q_row_stride, cos, sin, H, q_head_stride, HALF, BLOCK_H, BLOCK_HALF)
    _rotate(k_ptr + row * k_row_stride, cos, sin, G, k_head_stride, HALF, BLOCK_G, BLOCK_HALF)


def rope_(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    inverse: bool = False,
) -> None:
    """Rotates q (N, H, K) and k (N, G, K) in place by the angles of positions (N,); inverse=True rotates back.

    The last dimension is contiguous, rows and heads may be strided; cos and sin are (P, K/2), float32, contiguous, with
    P above every position (not checked: that would wait for the GPU). ValueError where shapes do not fit.
    """
    for name, x in (("q", q), ("k", k)):
        require(x.dim() == 3, f"{name} is {tuple(x.shape)}; expected (rows, heads, head width)")
        require(
            x.stride(2) == 1,
            f"the head vectors of {name} have stride {x.stride(2)}; expected contiguous ones",
        )
    (N, H, K), G = q.shape, k.shape[1]
    same = k.shape == (N, G, K) and k.dtype == q.dtype and positions.shape == (N,)
    require(
        same,
        f"q {tuple(q.shape)}, k {tuple(k.shape)}, positions {tuple(positions.shape)} do not belong together",
    )
    tables = cos.shape == sin.shape and cos.dim() == 2 and 2 * cos.shape[1] == K
    require(
        tables,
        f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)}; a head width of {K} needs (positions, {K // 2})",
    )
    if not backend.use_triton(q):
        rope_reference_(q, k, cos, sin, positions, inverse)
    elif N:
        contiguous = cos.is_contiguous() and sin.is_contiguous() and positions.is_contiguous()
        require(contiguous, "cos, sin and positions must be contiguous")
        tile = power_of_two(H) * power_of_two(K // 2)
        _rope[(N,)](
            q,
            k,
            cos,
            sin,
            positions,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            H,
            G,
            INVERSE=inverse,
            HALF=K // 2,
            BLOCK_H=power_of_two(H),
            BLOCK_G=power_of_two(G),
            BLOCK_HALF=power_of_two(K // 2),
            num_warps=min(max(tile // 512, 1), 8),  # a thread holds 16 pairs of q
        )
