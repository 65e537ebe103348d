"""The LM head and the cross-entropy loss together: the logits of all rows never exist at once.

    logits  = multiplier hidden W^T                     (N, V), rounded to the dtype of hidden
    loss    = sum over rows of (logsumexp(logits) - logits[target]) / denominator
    dhidden = (softmax(logits) - onehot(target)) multiplier / denominator W

hidden (N, D), W (V, D) frozen, targets (N,). A row with the target -100 has no loss and a zero
gradient. Forward computes the gradient, so nothing is saved. With the row's maximum m:

    others  = sum over v != target of exp(logits[v] - m)
    total   = others + exp(logits[target] - m)
    loss    = m - logits[target] + log(total)
    p[v]    = exp(logits[v] - m) / total                softmax
    p[target] - 1 = -others / total                     used if p[target] >= 1/2

exp(logits - logsumexp) multiplies the row by the rounding error of logsumexp. logits - m is exact
for the largest logits. -others / total keeps its digits as p[target] approaches 1.

Rows are processed in tiles of at most 256 MiB of logits, 1046 rows at V = 128256 in bf16. The
logits of 4096 rows would take 1.05 GB, and a plain softmax three times as much. For each tile:

- torch.addmm writes the logits, with a factor of 0 for the buffer's old contents;
- one program a row reads them for the logsumexp, reads them again and overwrites them with their
  gradient;
- torch.mm with W returns dhidden in float32, which is divided by the denominator and rounded once.

A soft cap bounds the logits before the softmax, in float32 (Gemma 2):

    capped  = softcap tanh(logits / softcap)
    dlogits = (softmax(capped) - onehot(target)) (1 - tanh(logits / softcap)^2)

The division comes last, because in float16 quotients by a few thousand tokens would underflow to 0.
The kernel reads the logits twice and writes them once. Without `need_grad` it reads them once.
"""

import torch

from . import backend
from .backend import (
    accumulator,
    cdiv,
    matmul,
    matmul_accumulated,
    power_of_two,
    tanh_and_slope,
    tl,
    triton,
)

PROFILE_GROUP = "loss"

IGNORE_INDEX = -100  # the target of rows without a loss
LOGITS_TILE_BYTES = 256 << 20


def logits_tile_rows(V: int, itemsize: int) -> int:
    """Return the rows of a tile of logits for a vocabulary of V and `itemsize` bytes a logit."""
    return max(LOGITS_TILE_BYTES // (V * itemsize), 1)


def logits_columns(V: int) -> int:
    """Return the columns of a buffer of logits: V, rounded up so that 16-bit rows are aligned.

    cuBLAS is slow if rows do not begin at multiples of 16 bytes, as with Granite's V of 49155.
    """
    return cdiv(V, 8) * 8


def cross_entropy_reference_(logits, targets, need_grad, softcap=0.0):
    """Return the loss of each row, and overwrite logits with their gradient if need_grad."""
    logits_acc = logits.to(accumulator(logits.dtype))
    if softcap:
        tanh = torch.tanh(logits_acc / softcap)
        logits_acc = softcap * tanh
    labelled = targets != IGNORE_INDEX
    target = torch.where(labelled, targets, 0).long()[:, None]
    row_max = logits_acc.amax(dim=-1, keepdim=True)
    exps = (logits_acc - row_max).exp_()
    target_exp = exps.gather(1, target)
    others = exps.scatter_(1, target, 0.0).sum(dim=-1, keepdim=True)
    total = others + target_exp
    losses = row_max - logits_acc.gather(1, target) + total.log()
    if need_grad:
        target_p = target_exp / total
        target_gradient = torch.where(target_p < 0.5, target_p - 1.0, -others / total)
        gradient = exps.div_(total).scatter_(1, target, target_gradient)
        if softcap:
            gradient *= 1 - tanh.square()
        logits.copy_(gradient.masked_fill_(~labelled[:, None], 0.0))
    return torch.where(labelled, losses[:, 0], 0.0)


@triton.jit
def _load_logits(logits_ptr, mask, SOFTCAP: tl.constexpr):
    """Return logits in float32, capped if SOFTCAP, and the slope of the cap; -inf if masked."""
    x = tl.load(logits_ptr, mask=mask, other=float("-inf")).to(tl.float32)
    slope = 1.0
    if SOFTCAP > 0.0:
        tanh, slope = tanh_and_slope(x * (1.0 / SOFTCAP))
        x = tl.where(mask, SOFTCAP * tanh, float("-inf"))
    return x, slope


@triton.jit
def _cross_entropy(
    logits_ptr,
    targets_ptr,
    losses_ptr,
    logits_row_stride,
    V,
    IGNORE_INDEX: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Compute the loss of one row per program, and overwrite its logits with their gradient."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_row_stride
    target = tl.load(targets_ptr + row).to(tl.int32)
    dtype = logits_ptr.dtype.element_ty
    columns = tl.arange(0, BLOCK_V)
    if target == IGNORE_INDEX:
        tl.store(losses_ptr + row, 0.0)
        if NEED_GRAD:
            zero = tl.zeros((BLOCK_V,), dtype=dtype)
            for first in range(0, V, BLOCK_V):
                tl.store(row_ptr + first + columns, zero, mask=first + columns < V)
    else:
        # A target outside the vocabulary has a probability of 0, so its loss is infinite.
        valid = (target >= 0) & (target < V)
        target_logit, target_slope = _load_logits(row_ptr + target, valid, SOFTCAP)
        # Each lane keeps its own maximum and sum. They are combined once, at the end of the row.
        lane_max = tl.full((BLOCK_V,), float("-inf"), dtype=tl.float32)
        sums = tl.zeros((BLOCK_V,), dtype=tl.float32)
        for first in range(0, V, BLOCK_V):
            mask = first + columns < V
            x, _ = _load_logits(row_ptr + first + columns, mask, SOFTCAP)
            x = tl.where(first + columns == target, float("-inf"), x)
            new = tl.maximum(lane_max, x)
            base = tl.where(new == float("-inf"), 0.0, new)
            sums = sums * tl.exp(lane_max - base) + tl.exp(x - base)
            lane_max = new
        row_max = tl.maximum(tl.max(lane_max, axis=0), target_logit)
        others = tl.sum(sums * tl.exp(lane_max - row_max), axis=0)
        target_exp = tl.exp(target_logit - row_max)
        total = others + target_exp
        tl.store(losses_ptr + row, row_max - target_logit + tl.log(total))
        if NEED_GRAD:
            inverse = tl.div_rn(1.0, total)
            for first in range(0, V, BLOCK_V):
                at_ptr, mask = row_ptr + first + columns, first + columns < V
                x, slope = _load_logits(at_ptr, mask, SOFTCAP)
                tl.store(at_ptr, (tl.exp(x - row_max) * inverse * slope).to(dtype), mask=mask)
            target_p = target_exp * inverse
            gradient = tl.where(target_p < 0.5, target_p - 1.0, -others * inverse)
            tl.debug_barrier()  # all lanes have stored, so the target's element is overwritten last
            tl.store(row_ptr + target, (gradient * target_slope).to(dtype), mask=valid)


def _cross_entropy_(logits, targets, losses, need_grad, softcap) -> None:
    """Fill the losses; overwrite the logits with their gradient if need_grad."""
    if not backend.use_triton(logits):
        losses.copy_(cross_entropy_reference_(logits, targets, need_grad, softcap))
    elif logits.numel():
        V = logits.shape[1]
        # 4096 logits an iteration, 16 a thread: wide loads, and running values stay in registers.
        BLOCK_V = min(power_of_two(V), 4096)
        _cross_entropy[(len(logits),)](
            logits,
            targets,
            losses,
            logits.stride(0),
            V,
            IGNORE_INDEX=IGNORE_INDEX,
            NEED_GRAD=need_grad,
            SOFTCAP=float(softcap),
            BLOCK_V=BLOCK_V,
            num_warps=min(max(BLOCK_V // 512, 1), 8),
        )


def _check(hidden, weight, targets, softcap) -> None:
    """Raise ValueError if a shape, a dtype, the cap or a target on the CPU does not fit."""
    if not softcap >= 0:
        raise ValueError(f"softcap {softcap}; expected above 0, or 0 for none")
    fits = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
    if not fits or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {tuple(hidden.shape)} {hidden.dtype} and weight {tuple(weight.shape)} "
            f"{weight.dtype}; expected (rows, D) and (vocabulary, D) in one dtype"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets is {tuple(targets.shape)}; hidden has {len(hidden)} rows")
    if targets.device.type == "cpu" and len(targets):
        V = len(weight)
        wrong = targets[(targets != IGNORE_INDEX) & ((targets < 0) | (targets >= V))]
        if len(wrong):
            raise ValueError(
                f"target {wrong[:1].tolist()} is outside the vocabulary of {V}; "
                f"mark rows without a loss by {IGNORE_INDEX}"
            )


def _check_buffer(logits_buffer, hidden, V) -> None:
    """Raise ValueError if the buffer does not fit the logits of `hidden`."""
    shape, dtype = logits_buffer.shape, logits_buffer.dtype
    fits = len(shape) == 2 and shape[0] >= min(len(hidden), 1) and shape[1] >= V
    if not fits or dtype != hidden.dtype:
        raise ValueError(
            f"logits_buffer is {tuple(shape)} {dtype}; "
            f"expected (rows, {V} or more) {hidden.dtype} with at least one row"
        )


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    denominator: int | float | torch.Tensor,
    tile_rows: int | None = None,
    need_grad: bool = True,
    logits_buffer: torch.Tensor | None = None,
    multiplier: float = 1.0,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (loss, dhidden): the 0-dim float32 loss, its gradient (N, D) in hidden's dtype.

    hidden: (N, D).
    weight: the head (V, D), in the dtype of hidden.
    targets: (N,) integers in [0, V), or -100 for a row without a loss.
    denominator: number or 0-dim tensor; usually the number of targets of the whole optimizer step.
    tile_rows: rows of logits that exist at once; by default at most 256 MiB of them.
    need_grad: if False, dhidden is None and the second pass over the logits is left out.
    logits_buffer: memory for a tile of logits (rows, V or more) in hidden's dtype, best with
        `logits_columns(V)` columns; it replaces tile_rows.
    multiplier: factor of the logits, applied by the matmul before the logits are rounded.
    softcap: bound on the logits; 0 for none.

    Targets on a GPU are not checked, because the check would synchronise with the GPU.

    Raises: ValueError if a shape or dtype does not fit, or if a target on the CPU is outside the
        vocabulary.
    """
    _check(hidden, weight, targets, softcap)
    (N, D), V, acc_dtype = hidden.shape, len(weight), accumulator(hidden.dtype)
    if logits_buffer is None:
        rows = min(tile_rows or logits_tile_rows(V, hidden.element_size()), N)
        shape = rows, logits_columns(V)
        logits_buffer = torch.empty(shape, dtype=hidden.dtype, device=hidden.device)
    _check_buffer(logits_buffer, hidden, V)
    if not isinstance(denominator, torch.Tensor):
        denominator = torch.full((), float(denominator), dtype=acc_dtype, device=hidden.device)
    inverse = denominator.to(acc_dtype).reciprocal()
    gradient_scale = inverse if multiplier == 1.0 else inverse * multiplier
    targets = targets.contiguous()

    losses = torch.empty(N, dtype=acc_dtype, device=hidden.device)
    dhidden = torch.empty((N, D), dtype=hidden.dtype, device=hidden.device) if need_grad else None
    step = max(len(logits_buffer), 1)
    for first in range(0, N, step):
        rows = slice(first, first + step)
        logits = logits_buffer[: min(step, N - first), :V]
        matmul(hidden[rows], weight.t(), logits, multiplier)
        _cross_entropy_(logits, targets[rows], losses[rows], need_grad, softcap)
        if need_grad:
            torch.mul(matmul_accumulated(logits, weight), gradient_scale, out=dhidden[rows])
    return losses.sum() * inverse, dhidden
