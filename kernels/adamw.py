"""AdamW over flat vectors, with clipping to a global norm inside: float32 moments, or 8-bit ones in blocks of 256.

    g <- g * min(1, max_grad_norm / (norm + 1e-6))                      only where max_grad_norm is positive
    m <- b1 m + (1 - b1) g            v <- b2 v + (1 - b2) g^2
    w <- (1 - lr decay) w - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

That is torch.optim.AdamW after clip_grad_norm_, but for g, which is scaled on its way and stays as it was in memory.
Everything is (P,) float32 and contiguous. `global_norm` reads 4 bytes a parameter; `adamw_` moves 28 (w, m and v in and
out, g in) in one backend. What changes from step to step arrives as float arguments: nothing is compiled again.

`adamw_8bit_` moves 16 and keeps each moment as bitsandbytes' blockwise optimizers do: for every 256 consecutive
parameters a float32 scale, for each of them the number of a value in a table of 256:

    m = SIGNED[code] * absmax[block]        v = UNSIGNED[code] * absmax[block]          2 + 8/256 bytes instead of 8

w is updated from m and v before they are rounded. The tables are dynamic maps: decade i of seven, up to 10^(i - 6), is
cut into 2^i equal cells, twice as many where there are no signs, and a cell stands for its middle; 0 and 1 complete
them. So in the positive half cell k of decade i is number 2^i + k (unsigned: 2 * 2^i + k - 1), which makes the search
for the nearest value a few comparisons and one look at a table.

The norm is a sum of fixed parts in a fixed order: the same bits every time.
"""

import math

import torch

from . import backend
from .backend import cdiv, require, tl, triton

MOMENT_BLOCKSIZE = 256


def global_norm_reference(x):
    """A norm of norms: one float32 sum over tens of millions of squares is off in the fourth digit on a CPU."""
    return torch.nn.utils.get_total_norm(x.split(65536))


def adamw_reference_(
    values, grads, exp_avg, exp_avg_sq, norm, b1, g1, b2, g2, rate, eps, keep, max_grad_norm
):
    if max_grad_norm > 0:
        grads = grads * (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    exp_avg.mul_(b1).add_(grads, alpha=g1)
    exp_avg_sq.mul_(b2).addcmul_(grads, grads, value=g2)
    values.mul_(keep).addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(eps), value=-rate)


def adamw_8bit_reference_(
    values, grads, exp_avg, exp_avg_sq, absmax, absmax_sq, tables, norm, *scalars
):
    m = dequantize_moment(exp_avg, absmax, tables[0])
    v = dequantize_moment(exp_avg_sq, absmax_sq, tables[2])
    adamw_reference_(values, grads, m, v, norm, *scalars)
    for x, codes, scales, borders in (
        (m, exp_avg, absmax, tables[1]),
        (v, exp_avg_sq, absmax_sq, tables[3]),
    ):
        blocks = torch.nn.functional.pad(x, (0, -len(x) % MOMENT_BLOCKSIZE)).view(
            -1, MOMENT_BLOCKSIZE
        )
        scales.copy_(blocks.abs().amax(1))
        nearest = torch.bucketize(
            blocks * (1.0 / scales.clamp(min=1e-38))[:, None], borders[:-1], out_int32=True
        )
        codes.copy_(nearest.view(-1)[: len(x)])


def dequantize_moment(
    codes: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """The float32 moment (P,) of its codes (P,) and scales (P / 256, rounded up)."""
    return table[codes.int()] * absmax.repeat_interleave(MOMENT_BLOCKSIZE)[: len(codes)]


@triton.jit
def _square_sums(x_ptr, sums_ptr, P, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * (PARTS * BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        at = first + part * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < P, other=0.0)
        total += x * x
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _root_of_sum(sums_ptr, norm_ptr, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + at, mask=at < count, other=0.0).to(tl.float64)
    tl.store(norm_ptr, tl.sqrt(tl.sum(total, axis=0)).to(tl.float32))


@triton.jit
def _update(
    w, g, m, v, norm_ptr, b1, g1, b2, g2, rate, eps, keep, max_grad_norm, CLIP: tl.constexpr
):
    if CLIP:
        scale = max_grad_norm / (tl.load(norm_ptr) + 1e-6)
        g *= tl.where(
            scale >= 1.0, 1.0, scale
        )  # a norm of NaN makes everything NaN, as in clip_grad_norm_
    m = b1 * m + g1 * g
    v = b2 * v + g2 * (g * g)
    w = keep * w - rate * tl.div_rn(m, tl.sqrt_rn(v) + eps)
    return w, m, v


@triton.jit
def _adamw(
    w_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    norm_ptr,
    P,
    b1,
    g1,
    b2,
    g2,
    rate,
    eps,
    keep,
    max_grad_norm,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < P
    w = tl.load(w_ptr + at, mask=live, other=0.0)
    g = tl.load(g_ptr + at, mask=live, other=0.0)
    m = tl.load(m_ptr + at, mask=live, other=0.0)
    v = tl.load(v_ptr + at, mask=live, other=0.0)
    w, m, v = _update(w, g, m, v, norm_ptr, b1, g1, b2, g2, rate, eps, keep, max_grad_norm, CLIP)
    tl.store(w_ptr + at, w, mask=live)
    tl.store(m_ptr + at, m, mask=live)
    tl.store(v_ptr + at, v, mask=live)


@triton.jit
def _quantize(x, borders_ptr, SIGNED: tl.constexpr):
    """(codes, absmax) of one block x (256,): how many of the table's ascending borders x / absmax exceeds.

    The cell that is half a cell width below |x / absmax| is that of the nearest value or the one before it, also where
    cells change their width, and whatever rounding does; which of the two, the border between them tells.
    """
    # The largest magnitude as the largest integer: their order is the same, and NaN is above all numbers.
    absmax = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0).to(tl.float32, bitcast=True)
    x *= 1.0 / tl.maximum(absmax, 1e-38)
    y = tl.abs(x)
    cells = tl.full(x.shape, 64.0 if SIGNED else 128.0, tl.float32)
    for _ in tl.static_range(6):
        lower = y < 0.1
        y = tl.where(lower, y * 10.0, y)
        cells = tl.where(lower, cells * 0.5, cells)
    below = (cells + tl.floor((y - 0.1) * cells * (1 / 0.9) - 0.5)).to(tl.int32)
    if SIGNED:
        below = tl.where(x < 0.0, 126 - below, 127 + below)
    else:
        below -= 1
    below = tl.minimum(tl.maximum(below, 0), 255)
    return (below + (x > tl.load(borders_ptr + below)).to(tl.int32)).to(tl.uint8), absmax


@triton.jit
def _adamw_8bit(
    w_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    m_absmax_ptr,
    v_absmax_ptr,
    tables_ptr,
    norm_ptr,
    P,
    b1,
    g1,
    b2,
    g2,
    rate,
    eps,
    keep,
    max_grad_norm,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    live = at < P
    w = tl.load(w_ptr + at, mask=live, other=0.0)
    g = tl.load(g_ptr + at, mask=live, other=0.0)
    m_code = tl.load(m_ptr + at, mask=live, other=127).to(tl.int32)  # these are the codes of 0
    v_code = tl.load(v_ptr + at, mask=live, other=0).to(tl.int32)
    m = tl.load(tables_ptr + m_code) * tl.load(m_absmax_ptr + block)
    v = tl.load(tables_ptr + 512 + v_code) * tl.load(v_absmax_ptr + block)
    w, m, v = _update(w, g, m, v, norm_ptr, b1, g1, b2, g2, rate, eps, keep, max_grad_norm, CLIP)
    tl.store(w_ptr + at, w, mask=live)
    m_code, m_absmax = _quantize(m, tables_ptr + 256, True)
    v_code, v_absmax = _quantize(v, tables_ptr + 768, False)
    tl.store(m_ptr + at, m_code, mask=live)
    tl.store(v_ptr + at, v_code, mask=live)
    tl.store(m_absmax_ptr + block, m_absmax)
    tl.store(v_absmax_ptr + block, v_absmax)


def _scalars(lr, step, betas, eps, weight_decay, max_grad_norm) -> tuple[float, ...]:
    """What kernels and references take. Floats all of them: Triton compiles anew for some integers, never for floats.

    1 - b is rounded to float32 only here; subtracted in float32, 1 - 0.999 would be off by 5e-5. The correction of v is
    moved out of the root, to rate and eps.
    """
    b1, b2 = (float(b) for b in betas)
    root = math.sqrt(1 - b2**step)
    rate, keep = lr * root / (1 - b1**step), 1 - lr * weight_decay
    return b1, 1 - b1, b2, 1 - b2, float(rate), float(eps * root), float(keep), float(max_grad_norm)


def _check(values, norm, step, **others):
    require(
        values.dim() == 1 and values.numel(),
        f"values is {tuple(values.shape)}; expected a flat vector, not empty",
    )
    require(
        norm.numel() == 1,
        f"norm is {tuple(norm.shape)}; expected one number, of global_norm(grads)",
    )
    require(step >= 1, f"step is {step}; the first update is step 1")
    for name, (x, count, dtype) in {
        "values": (values, values.numel(), torch.float32),
        **others,
    }.items():
        fits = (
            x.shape == (count,)
            and x.dtype == dtype
            and x.is_contiguous()
            and x.device == values.device
        )
        found = f"{tuple(x.shape)} {x.dtype} on {x.device}"
        require(
            fits, f"{name} is {found}; expected ({count},) {dtype} on {values.device}, contiguous"
        )


def global_norm(x: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm of x (P,) float32, 0-dim float32 on its device. ValueError for anything else."""
    flat = x.dim() == 1 and x.numel() and x.is_contiguous() and x.dtype == torch.float32
    require(
        flat,
        f"x is {tuple(x.shape)} {x.dtype}; expected a contiguous vector of torch.float32, not empty",
    )
    if not backend.use_triton(x):
        return global_norm_reference(x)
    PARTS, BLOCK = 4, 4096
    count = cdiv(len(x), PARTS * BLOCK)
    sums = torch.empty(count, dtype=torch.float32, device=x.device)
    norm = torch.empty((), dtype=torch.float32, device=x.device)
    _square_sums[(count,)](x, sums, len(x), PARTS=PARTS, BLOCK=BLOCK, num_warps=8)
    _root_of_sum[(1,)](sums, norm, count, BLOCK=4096, num_warps=8)
    return norm


def adamw_(
    values: torch.Tensor,
    grads: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    norm: torch.Tensor,
    *,
    lr: float,
    step: int,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
) -> None:
    """Update number `step` (from 1) of values, exp_avg (m) and exp_avg_sq (v), in place; all (P,) float32.

    norm is global_norm(grads), or over more than these, still on the device; max_grad_norm 0 turns clipping off.
    Nothing waits for the device. ValueError where shapes, dtypes or devices do not fit.
    """
    P = values.numel()
    moments = {"exp_avg": (exp_avg, P, torch.float32), "exp_avg_sq": (exp_avg_sq, P, torch.float32)}
    _check(values, norm, step, grads=(grads, P, torch.float32), **moments)
    scalars = _scalars(lr, step, betas, eps, weight_decay, max_grad_norm)
    tensors = values, grads, exp_avg, exp_avg_sq, norm
    if not backend.use_triton(values):
        adamw_reference_(*tensors, *scalars)
        return
    BLOCK = 1024
    _adamw[(cdiv(P, BLOCK),)](
        *tensors, P, *scalars, CLIP=max_grad_norm > 0, BLOCK=BLOCK, num_warps=4
    )


def adamw_8bit_(
    values: torch.Tensor,
    grads: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_absmax: torch.Tensor,
    exp_avg_sq_absmax: torch.Tensor,
    tables: torch.Tensor,
    norm: torch.Tensor,
    *,
    lr: float,
    step: int,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
) -> None:
    """As adamw_, with moments of uint8 codes (P,) and float32 scales (P / 256, rounded up); zeros are zero moments.

    tables is (4, 256) float32: the signed dynamic map, the borders between its values, then the same for the unsigned
    map; a value on a border goes to the lower code. A block that meets a NaN has a scale of NaN from then on.
    """
    P, blocks = values.numel(), cdiv(values.numel(), MOMENT_BLOCKSIZE)
    codes = {"exp_avg": (exp_avg, P, torch.uint8), "exp_avg_sq": (exp_avg_sq, P, torch.uint8)}
    scales = {
        "exp_avg_absmax": (exp_avg_absmax, blocks, torch.float32),
        "exp_avg_sq_absmax": (exp_avg_sq_absmax, blocks, torch.float32),
    }
    _check(values, norm, step, grads=(grads, P, torch.float32), **codes, **scales)
    fits = tables.shape == (4, 256) and tables.is_contiguous()
    require(fits, f"tables is {tuple(tables.shape)}; expected (4, 256), contiguous")
    scalars = _scalars(lr, step, betas, eps, weight_decay, max_grad_norm)
    tensors = values, grads, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, tables, norm
    if not backend.use_triton(values):
        adamw_8bit_reference_(*tensors, *scalars)
        return
    # A warp finds the maximum of its block without shared memory.
    _adamw_8bit[(blocks,)](
        *tensors, P, *scalars, CLIP=max_grad_norm > 0, BLOCK=MOMENT_BLOCKSIZE, num_warps=1
    )
