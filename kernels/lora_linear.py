"""A linear layer with its LoRA branch in one matmul, and its backward.

    forward     y = x W^T + bias + s (x A^T) B^T
    backward    dx = dy W + s (dy B) A
                dA = s (dy B)^T x          (R, in)      W is frozen: no dW
                dB = s dy^T (x A^T)        (out, R)

x (N, in), W (out, in), A (R, in), B (out, R), y, dy (N, out). Nothing is saved but x. The thin products s x A^T and
s dy B, both (N, R), leave torch.addmm in the dtype of x; the kernel adds their product with B^T or A to its float32
accumulator as further steps of the same loop, so y is rounded once and never read back. PyTorch's way, a matmul and an
`addmm_`, reads and writes y once more.

The same kernel serves both directions: dy W is x W^T with W's strides exchanged. dA and dB leave in float32.
"""

import torch

from . import launch
from .launch import cdiv, matmul_accumulated, power_of_two, require, tl, triton


def lora_linear_reference(x, weight, bias=None, a=None, b=None, scaling=1.0):
    y = torch.nn.functional.linear(x, weight, bias)
    if a is not None:
        y = torch.addmm(y, _thin(x, a.t(), scaling), b.t())
    return y


def lora_linear_backward_reference(dy, x, weight, a=None, b=None, scaling=1.0, dx=None, need_dx=True):
    if need_dx:
        dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
    if a is None:
        return dx, None, None
    dyb = _thin(dy, b, scaling)
    if need_dx:
        dx.addmm_(dyb, a)
    return dx, *_adapter_gradients(dy, x, dyb, a, scaling)


def _thin(x, thin, scaling):
    """s x @ thin, (N, R), scaled before it is rounded."""
    return torch.addmm(x.new_empty(()), x, thin, beta=0, alpha=scaling)


def _adapter_gradients(dy, x, dyb, a, scaling):
    return matmul_accumulated(dyb.t(), x), matmul_accumulated(dy.t(), _thin(x, a.t(), scaling))


@triton.jit
def _matmul_add(
    x_ptr,
    w_ptr,
    left_ptr,
    right_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    R,
    x_row_stride,
    w_k_stride,
    w_n_stride,
    left_row_stride,
    right_r_stride,
    right_n_stride,
    y_row_stride,
    BIAS: tl.constexpr,
    LOW_RANK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y (M, N) = x (M, K) w (K, N) + left (M, R) right (R, N) + bias (N,) [+ y]; one program a tile of y."""
    # Programs that run together share GROUP_M row tiles: their tiles of x and w are still in L2.
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    m = ((group * GROUP_M + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (within // height * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_in = tl.where(m < M, m, 0)  # rows past the end read the first one, and their results are dropped at the store

    k = tl.arange(0, BLOCK_K)
    x_tile_ptr = x_ptr + m_in[:, None] * x_row_stride + k[None, :]
    w_tile_ptr = w_ptr + k[:, None] * w_k_stride + n[None, :] * w_n_stride
    n_live = (n < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        x = tl.load(x_tile_ptr, mask=k[None, :] < K - first, other=0.0)
        w = tl.load(w_tile_ptr, mask=(k[:, None] < K - first) & n_live, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_tile_ptr += BLOCK_K
        w_tile_ptr += BLOCK_K * w_k_stride
    if LOW_RANK:
        for first in range(0, R, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R)
            left = tl.load(left_ptr + m_in[:, None] * left_row_stride + r[None, :], mask=r[None, :] < R, other=0.0)
            right_at = r[:, None] * right_r_stride + n[None, :] * right_n_stride
            right = tl.load(right_ptr + right_at, mask=(r[:, None] < R) & n_live, other=0.0)
            acc = tl.dot(left, right, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y_tile_ptr = y_ptr + m[:, None] * y_row_stride + n[None, :]
    live = (m[:, None] < M) & n_live
    if ACCUMULATE:
        acc += tl.load(y_tile_ptr, mask=live, other=0.0).to(tl.float32)
    tl.store(y_tile_ptr, acc.to(y_ptr.dtype.element_ty), mask=live)


def _blocks(M: int, N: int, R: int, itemsize: int, shared_memory: int) -> dict:
    """Tiles of 128 x 128, 64 deep at 16 bit; the pipeline takes as many stages, at most 4, as shared memory holds.

    Where that is plenty (sm_80, sm_90) and there are tiles for every multiprocessor, 128 x 256: on an H200 in November
    2026, 635 TFLOP/s against 558 at (4096, 4096) x (4096, 14336), R = 16, bf16; torch.mm without adapter 781.
    Few rows (decoding) get a flat tile, and a small product small tiles, or most multiprocessors would be idle.
    """
    BLOCK_M = min(max(power_of_two(M), 16), 128)
    BLOCK_N = 128
    tiles = cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)
    if itemsize == 4 or tiles < 128:
        BLOCK_M, BLOCK_N = min(BLOCK_M, 64), 64
    elif tiles >= 512 and shared_memory >= 160 * 1024:
        BLOCK_N = 256
    BLOCK_K = 64 if itemsize == 2 else 32
    stage = (BLOCK_M + BLOCK_N) * BLOCK_K * itemsize
    return {
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": BLOCK_K,
        "BLOCK_R": min(max(power_of_two(R), 16), BLOCK_K),
        "GROUP_M": 8,
        "num_warps": 8 if BLOCK_M * BLOCK_N >= 128 * 128 else 4,
        "num_stages": min(max(shared_memory // stage, 1), 4),
    }


def _matmul(x, w, left, right, bias, y, accumulate):
    """Launches the kernel on x (M, K) and w (K, N), whose strides are free."""
    (M, K), N = x.shape, w.shape[1]
    R = 0 if left is None else left.shape[1]
    if not M * N:
        return
    blocks = _blocks(M, N, R, x.element_size(), launch.shared_memory_limit(x.device))
    _matmul_add[(cdiv(M, blocks["BLOCK_M"]) * cdiv(N, blocks["BLOCK_N"]),)](
        x,
        w,
        left,
        right,
        bias,
        y,
        M,
        N,
        K,
        R,
        x.stride(0),
        w.stride(0),
        w.stride(1),
        0 if left is None else left.stride(0),
        0 if right is None else right.stride(0),
        0 if right is None else right.stride(1),
        y.stride(0),
        BIAS=bias is not None,
        LOW_RANK=left is not None,
        ACCUMULATE=accumulate,
        **blocks,
    )


def _check(rows, width, x, weight, a, b):
    """`rows` of x are `width` ("in" or "out") wide; everything has one dtype."""
    require(x.dim() == 2 and weight.dim() == 2, f"{rows} {tuple(x.shape)} and weight {tuple(weight.shape)} must be 2-D")
    wanted = weight.shape[1 if width == "in" else 0]
    require(x.shape[1] == wanted, f"{rows} is {tuple(x.shape)}; weight {tuple(weight.shape)} expects rows of {wanted}")
    require(x.stride(1) == 1, f"the rows of {rows} have stride {x.stride(1)}; expected contiguous rows")
    require((a is None) == (b is None), "an adapter is both a and b, or neither")
    if a is not None:
        R, (out_features, in_features) = a.shape[0], weight.shape
        fits = a.shape == (R, in_features) and b.shape == (out_features, R)
        require(fits, f"a {tuple(a.shape)} and b {tuple(b.shape)} do not fit weight {tuple(weight.shape)}")
    for name, other in (("weight", weight), ("a", a), ("b", b)):
        same = other is None or other.dtype == x.dtype
        require(same, f"{name} is {None if other is None else other.dtype}; {rows} is {x.dtype}")


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    scaling: float = 1.0,
) -> torch.Tensor:
    """y (N, out) = x W^T + bias + scaling (x A^T) B^T, in the dtype that all share; without a and b no adapter.

    x (N, in) with contiguous rows, weight (out, in), bias (out,), a (R, in), b (out, R). ValueError where they differ.
    """
    _check("x", "in", x, weight, a, b)
    require(bias is None or bias.shape == weight.shape[:1], f"bias does not fit weight {tuple(weight.shape)}")
    if not launch.use_triton(x):
        return lora_linear_reference(x, weight, bias, a, b, scaling)
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    left, right = (None, None) if a is None else (_thin(x, a.t(), scaling), b.t())
    _matmul(x, weight.t(), left, right, bias, y, accumulate=False)
    return y


def lora_linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    scaling: float = 1.0,
    dx: torch.Tensor | None = None,
    need_dx: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dx, da, db): dx (N, in) in x's dtype; da (R, in) and db (out, R) in float32, None without an adapter.

    A given dx is added onto, in place, and returned: several linears that share an input sum their gradients so. With
    need_dx=False it is left alone. x is only read where there is an adapter. ValueError where shapes do not fit.
    """
    _check("dy", "out", dy, weight, a, b)
    if a is not None:
        _check("x", "in", x, weight, a, b)
        require(x.shape[0] == dy.shape[0], f"dy has {dy.shape[0]} rows, x {x.shape[0]}")
    if dx is not None:
        fits = dx.shape == (dy.shape[0], weight.shape[1]) and dx.dtype == dy.dtype and dx.stride(1) == 1
        require(fits, f"dx is {tuple(dx.shape)} {dx.dtype}; expected ({dy.shape[0]}, {weight.shape[1]}) {dy.dtype}")
    if not launch.use_triton(dy):
        return lora_linear_backward_reference(dy, x, weight, a, b, scaling, dx, need_dx)
    dyb = None if a is None else _thin(dy, b, scaling)
    if need_dx:
        accumulate = dx is not None
        if dx is None:
            dx = torch.empty((dy.shape[0], weight.shape[1]), dtype=dy.dtype, device=dy.device)
        _matmul(dy, weight, dyb, a, None, dx, accumulate)
    return dx, *((None, None) if a is None else _adapter_gradients(dy, x, dyb, a, scaling))
