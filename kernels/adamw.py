"""AdamW over flat vectors with gradient clipping; moments in float32 or in 8 bits.

    g <- g * min(1, max_grad_norm / (norm + 1e-6))          only if max_grad_norm is positive
    m <- b1 m + (1 - b1) g                                  first moment
    v <- b2 v + (1 - b2) g^2                                second moment
    w <- (1 - lr weight_decay) w                            weight decay
         - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

This is torch.optim.AdamW after clip_grad_norm_, except that the gradients in memory stay unscaled.
All vectors are (P,) and contiguous, in float32 unless stated otherwise. Numbers that change from
step to step arrive as float arguments, so nothing is compiled again.

Bytes moved a parameter: 28 by `adamw_` (w, m and v in and out, g in), 16 by `adamw_8bit_`.

8-bit moments have the format of bitsandbytes' blockwise optimizers: 2 + 8/256 bytes a parameter
instead of 8. Each 256 consecutive parameters share a float32 scale, and each parameter stores the
index of a value in a table of 256:

    m = SIGNED[code] * absmax[block]        v = UNSIGNED[code] * absmax[block]

w is updated from m and v before they are rounded. The tables are dynamic maps. Decade i of seven,
up to 10^(i - 6), is divided into 2^i equal cells (2^(i + 1) in the unsigned map), and the middle of
a cell represents it. 0 and 1 complete the map. In the positive half, cell k of decade i has the
index 2^i + k (unsigned: 2^(i + 1) + k - 1). Therefore a few comparisons and one table lookup find
the nearest value.
"""

import math
from typing import NamedTuple

import torch

from . import backend
from .backend import cdiv, check_rows, tl, triton

PROFILE_GROUP = "optimizer"

MOMENT_BLOCKSIZE = 256  # parameters that share the scale of an 8-bit moment


class AdamWScalars(NamedTuple):
    """Numbers of one update.

    All are floats, because Triton compiles anew for some integers and never for floats. 1 - beta is
    subtracted in float64: in float32, 1 - 0.999 would be off by 5e-5.
    """

    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    step_size: float  # lr * sqrt(1 - beta2^t) / (1 - beta1^t); the root is the correction of v
    eps: float  # eps * sqrt(1 - beta2^t)
    decay: float  # 1 - lr * weight_decay
    max_grad_norm: float

    @classmethod
    def of_step(cls, step, lr, betas, eps, weight_decay, max_grad_norm) -> "AdamWScalars":
        """Return the numbers of update `step`, counted from 1."""
        beta1, beta2 = (float(beta) for beta in betas)
        root = math.sqrt(1 - beta2**step)
        return cls(
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            step_size=float(lr * root / (1 - beta1**step)),
            eps=float(eps * root),
            decay=float(1 - lr * weight_decay),
            max_grad_norm=float(max_grad_norm),
        )


def adamw_reference_(values, grads, exp_avg, exp_avg_sq, norm, scalars):
    """Update values and moments in place in PyTorch."""
    if scalars.max_grad_norm > 0:
        grads = grads * (scalars.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    exp_avg.mul_(scalars.beta1).add_(grads, alpha=scalars.one_minus_beta1)
    exp_avg_sq.mul_(scalars.beta2).addcmul_(grads, grads, value=scalars.one_minus_beta2)
    denominator = exp_avg_sq.sqrt().add_(scalars.eps)
    values.mul_(scalars.decay).addcdiv_(exp_avg, denominator, value=-scalars.step_size)


def adamw_8bit_reference_(
    values, grads, exp_avg, exp_avg_sq, absmax, absmax_sq, tables, norm, scalars
):
    """Update values and 8-bit moments in place in PyTorch."""
    m = dequantize_moment(exp_avg, absmax, tables[0])
    v = dequantize_moment(exp_avg_sq, absmax_sq, tables[2])
    adamw_reference_(values, grads, m, v, norm, scalars)
    _quantize_reference_(m, exp_avg, absmax, tables[1])
    _quantize_reference_(v, exp_avg_sq, absmax_sq, tables[3])


def _quantize_reference_(x, codes, absmax, borders):
    """Write the codes (P,) and scales (P / 256, rounded up) of a moment x (P,)."""
    padding = -len(x) % MOMENT_BLOCKSIZE
    blocks = torch.nn.functional.pad(x, (0, padding)).view(-1, MOMENT_BLOCKSIZE)
    absmax.copy_(blocks.abs().amax(1))
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]
    nearest = torch.bucketize(scaled, borders[:-1], out_int32=True)
    codes.copy_(nearest.view(-1)[: len(x)])


def dequantize_moment(
    codes: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """Return a moment (P,) in float32.

    codes: (P,) uint8 indices into the table.
    absmax: (P / 256, rounded up), one scale a block.
    table: (256,) values of the map.
    """
    return table[codes.int()] * absmax.repeat_interleave(MOMENT_BLOCKSIZE)[: len(codes)]


@triton.jit
def _quantize(x, borders_ptr, SIGNED: tl.constexpr):
    """Return (codes, absmax) of one block x (256,).

    A code is the number of the table's ascending borders that x / absmax exceeds. The point half a
    cell width below |x / absmax| lies in the nearest value's cell or in the cell before it. This
    holds between cells of different width too, and for any rounding. The border between the two
    cells decides.
    """
    # As integers, magnitudes have the same order, and NaN is above all numbers.
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
def _adamw(
    w_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    m_absmax_ptr,
    v_absmax_ptr,
    tables_ptr,
    norm_ptr,
    P,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    step_size,
    eps,
    decay,
    max_grad_norm,
    CLIP: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update BLOCK parameters per program; with EIGHT_BIT a program is one block of the moments.

    m_absmax_ptr, v_absmax_ptr and tables_ptr are None without EIGHT_BIT.
    """
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < P
    w = tl.load(w_ptr + at, mask=mask, other=0.0)
    g = tl.load(g_ptr + at, mask=mask, other=0.0)
    if EIGHT_BIT:
        m_code = tl.load(m_ptr + at, mask=mask, other=127).to(tl.int32)  # SIGNED[127] is 0
        v_code = tl.load(v_ptr + at, mask=mask, other=0).to(tl.int32)  # UNSIGNED[0] is 0
        m = tl.load(tables_ptr + m_code) * tl.load(m_absmax_ptr + block)
        v = tl.load(tables_ptr + 512 + v_code) * tl.load(v_absmax_ptr + block)
    else:
        m = tl.load(m_ptr + at, mask=mask, other=0.0)
        v = tl.load(v_ptr + at, mask=mask, other=0.0)

    if CLIP:
        scale = max_grad_norm / (tl.load(norm_ptr) + 1e-6)
        # A norm of NaN makes all parameters NaN, as in clip_grad_norm_.
        g *= tl.where(scale >= 1.0, 1.0, scale)
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * (g * g)
    w = decay * w - step_size * tl.div_rn(m, tl.sqrt_rn(v) + eps)

    tl.store(w_ptr + at, w, mask=mask)
    if EIGHT_BIT:
        m_code, m_absmax = _quantize(m, tables_ptr + 256, True)
        v_code, v_absmax = _quantize(v, tables_ptr + 768, False)
        tl.store(m_ptr + at, m_code, mask=mask)
        tl.store(v_ptr + at, v_code, mask=mask)
        tl.store(m_absmax_ptr + block, m_absmax)
        tl.store(v_absmax_ptr + block, v_absmax)
    else:
        tl.store(m_ptr + at, m, mask=mask)
        tl.store(v_ptr + at, v, mask=mask)


def _check(values, grads, norm, step) -> None:
    if values.dim() != 1 or not values.numel():
        raise ValueError(
            f"values is {tuple(values.shape)}; expected a flat vector with at least one element"
        )
    check_rows(values, (torch.float32,), values=values, grads=grads)
    if norm.numel() != 1:
        raise ValueError(
            f"norm is {tuple(norm.shape)}; expected one number, the result of global_norm(grads)"
        )
    if step < 1:
        raise ValueError(f"step is {step}; the first update is step 1")


def _launch(tensors, scalars: AdamWScalars, *, BLOCK: int, **constants) -> None:
    P, clip = tensors[0].numel(), scalars.max_grad_norm > 0
    _adamw[(cdiv(P, BLOCK),)](*tensors, P, *scalars, CLIP=clip, BLOCK=BLOCK, **constants)


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
    """Update values and moments in place, without waiting for the device.

    values, grads: parameters w and gradients g, (P,) float32.
    exp_avg, exp_avg_sq: moments m and v, (P,) float32.
    norm: global_norm(grads), or the norm over these and further gradients, still on the device.
    step: number of the update, from 1.
    max_grad_norm: 0 turns clipping off.

    Raises: ValueError if a shape, dtype or device does not fit.
    """
    _check(values, grads, norm, step)
    check_rows(values, (torch.float32,), exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    scalars = AdamWScalars.of_step(step, lr, betas, eps, weight_decay, max_grad_norm)
    if not backend.use_triton(values):
        adamw_reference_(values, grads, exp_avg, exp_avg_sq, norm, scalars)
        return
    tensors = values, grads, exp_avg, exp_avg_sq, None, None, None, norm
    _launch(tensors, scalars, EIGHT_BIT=False, BLOCK=1024, num_warps=4)


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
    """Update values and 8-bit moments in place, as `adamw_` does.

    exp_avg, exp_avg_sq: codes of the moments m and v, (P,) uint8.
    exp_avg_absmax, exp_avg_sq_absmax: scales of the codes, (P / 256, rounded up) float32. A scale
        of 0 makes the moments of its block 0.
    tables: (4, 256) float32: signed map, borders of the signed map, unsigned map, borders of it.

    A value on a border gets the lower code. After a NaN in a block, the block's scale stays NaN.

    Raises: ValueError if a shape, dtype or device does not fit.
    """
    _check(values, grads, norm, step)
    check_rows(values, (torch.uint8,), exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    scales = {"exp_avg_absmax": exp_avg_absmax, "exp_avg_sq_absmax": exp_avg_sq_absmax}
    blocks = cdiv(len(values), MOMENT_BLOCKSIZE)
    check_rows(values[:blocks], (torch.float32,), **scales)
    if tables.shape != (4, 256) or not tables.is_contiguous():
        raise ValueError(f"tables is {tuple(tables.shape)}; expected contiguous (4, 256)")
    scalars = AdamWScalars.of_step(step, lr, betas, eps, weight_decay, max_grad_norm)
    tensors = values, grads, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, tables, norm
    if not backend.use_triton(values):
        adamw_8bit_reference_(*tensors, scalars)
        return
    # With one warp, the maximum of a block needs no shared memory.
    _launch(tensors, scalars, EIGHT_BIT=True, BLOCK=MOMENT_BLOCKSIZE, num_warps=1)
