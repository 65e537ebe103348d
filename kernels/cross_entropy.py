"""The head and the loss together, so that the logits of all rows never exist at once.

    logits = hidden W^T                                         (N, V), rounded to the dtype of hidden
    loss = sum over rows of (logsumexp(logits) - logits[target]) / denominator
    dhidden = (softmax(logits) - onehot(target)) / denominator  W

hidden (N, D), W (V, D) frozen, targets (N,) with -100 for rows that do not count: no loss, zero gradient.

Rows are taken in tiles of at most 256 MiB of logits (1046 rows at V = 128256 in bf16; the whole (4096, V) would be
1.05 GB, three times over in a plain softmax). torch.mm fills the tile; one program a row then reads it for the
logsumexp and once more to overwrite it with softmax - onehot, not yet divided: in float16, quotients by a few thousand
tokens would vanish. torch.mm with W leaves dhidden in float32, where it is divided and rounded once.
Logits move 3 times (written, then 2 reads and a write). Without need_grad there is no second pass and no dhidden.
"""

import torch

from . import backend
from .backend import accumulator, matmul_accumulated, power_of_two, require, tl, triton

IGNORE_INDEX = -100
TILE_BYTES = 256 << 20


def logits_tile_rows(V: int, itemsize: int) -> int:
    """Rows of a tile of logits of so many bytes each."""
    return max(TILE_BYTES // (V * itemsize), 1)


def cross_entropy_reference_(logits, targets, need_grad):
    """The loss of each row (in at least float32); logits (rows, V) become softmax - onehot where need_grad."""
    wide = logits.to(accumulator(logits.dtype))
    counted = targets != IGNORE_INDEX
    target = torch.where(counted, targets, 0).long()[:, None]
    lse = torch.logsumexp(wide, dim=-1, keepdim=True)
    losses = torch.where(counted, (lse - wide.gather(1, target))[:, 0], 0.0)
    if need_grad:
        p = wide.sub(lse).exp_()
        p.scatter_add_(1, target, torch.full_like(lse, -1.0))
        logits.copy_(p.masked_fill_(~counted[:, None], 0.0))
    return losses


@triton.jit
def _cross_entropy(
    logits_ptr,
    targets_ptr,
    losses_ptr,
    logits_row_stride,
    V,
    IGNORE_INDEX: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program: one row of logits, which becomes its own gradient."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_row_stride
    target = tl.load(targets_ptr + row).to(tl.int32)
    at = tl.arange(0, BLOCK_V)
    if target == IGNORE_INDEX:
        tl.store(losses_ptr + row, 0.0)
        if NEED_GRAD:
            zero = tl.zeros((BLOCK_V,), dtype=logits_ptr.dtype.element_ty)
            for first in range(0, V, BLOCK_V):
                tl.store(row_ptr + first + at, zero, mask=first + at < V)
    else:
        # Each lane keeps its own maximum and sum, and they are joined once at the end of the row.
        highest = tl.full((BLOCK_V,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_V,), dtype=tl.float32)
        chosen = tl.zeros((BLOCK_V,), dtype=tl.float32)
        for first in range(0, V, BLOCK_V):
            x = tl.load(row_ptr + first + at, mask=first + at < V, other=float("-inf")).to(
                tl.float32
            )
            new = tl.maximum(highest, x)
            base = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp(highest - base) + tl.exp(x - base)
            chosen += tl.where(first + at == target, x, 0.0)
            highest = new
        top = tl.max(highest, axis=0)
        lse = top + tl.log(tl.sum(total * tl.exp(highest - top), axis=0))
        tl.store(losses_ptr + row, lse - tl.sum(chosen, axis=0))
        if NEED_GRAD:
            for first in range(0, V, BLOCK_V):
                x = tl.load(row_ptr + first + at, mask=first + at < V, other=float("-inf")).to(
                    tl.float32
                )
                p = tl.exp(x - lse)
                p = tl.where(first + at == target, p - 1.0, p)
                tl.store(
                    row_ptr + first + at, p.to(logits_ptr.dtype.element_ty), mask=first + at < V
                )


def _cross_entropy_(logits, targets, losses, need_grad):
    """Fills losses with the loss of each row; logits become softmax - onehot where need_grad."""
    if not backend.use_triton(logits):
        losses.copy_(cross_entropy_reference_(logits, targets, need_grad))
    elif logits.numel():
        V = logits.shape[1]
        # 4096 logits a step, 16 a thread: wide loads, and the three running values of a lane stay in registers.
        BLOCK_V = min(power_of_two(V), 4096)
        _cross_entropy[(logits.shape[0],)](
            logits,
            targets,
            losses,
            logits.stride(0),
            V,
            IGNORE_INDEX=IGNORE_INDEX,
            NEED_GRAD=need_grad,
            BLOCK_V=BLOCK_V,
            num_warps=min(max(BLOCK_V // 512, 1), 8),
        )


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    denominator: int | float | torch.Tensor,
    tile_rows: int | None = None,
    need_grad: bool = True,
    logits_buffer: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(loss, dhidden): the 0-dim float32 loss, sum of the rows' losses / denominator, and its gradient (N, D).

    hidden (N, D) and weight (V, D) in one dtype; targets (N,) integers in [0, V), or -100 where a row does not count;
    denominator a number or a 0-dim tensor, as a rule the number of targets of the whole optimizer step. dhidden is in
    the dtype of hidden, None without need_grad. tile_rows: rows of logits that exist at once; or logits_buffer, (rows, V) in
    that dtype: where they do.
    ValueError where shapes do not fit, and on the CPU for a target outside the vocabulary (a GPU is not waited for).
    """
    fits = (
        hidden.dim() == weight.dim() == 2
        and hidden.shape[1] == weight.shape[1]
        and hidden.dtype == weight.dtype
    )
    require(
        fits,
        f"hidden {tuple(hidden.shape)} {hidden.dtype} does not fit weight {tuple(weight.shape)} {weight.dtype}",
    )
    (N, D), V, wide = hidden.shape, weight.shape[0], accumulator(hidden.dtype)
    require(targets.shape == (N,), f"targets are {tuple(targets.shape)}; hidden has {N} rows")
    if targets.device.type == "cpu" and N:
        wrong = targets[(targets != IGNORE_INDEX) & ((targets < 0) | (targets >= V))]
        require(
            not len(wrong),
            f"target {wrong[:1].tolist()} is outside the vocabulary of {V}, and not {IGNORE_INDEX}",
        )
    if logits_buffer is None:
        step = tile_rows or logits_tile_rows(V, hidden.element_size())
        logits_buffer = torch.empty((min(step, N), V), dtype=hidden.dtype, device=hidden.device)
    fits = (
        logits_buffer.shape[1:] == (V,)
        and logits_buffer.dtype == hidden.dtype
        and len(logits_buffer) >= min(N, 1)
    )
    require(
        fits,
        f"logits_buffer is {tuple(logits_buffer.shape)} {logits_buffer.dtype}; expected (rows, {V}) {hidden.dtype}",
    )
    step = max(len(logits_buffer), 1)
    if not isinstance(denominator, torch.Tensor):
        denominator = torch.full((), float(denominator), dtype=wide, device=hidden.device)
    share = denominator.to(wide).reciprocal()
    targets = targets.contiguous()

    losses = torch.empty(N, dtype=wide, device=hidden.device)
    dhidden = torch.empty((N, D), dtype=hidden.dtype, device=hidden.device) if need_grad else None
    for first in range(0, N, step):
        rows = slice(first, first + step)
        logits = torch.mm(hidden[rows], weight.t(), out=logits_buffer[: min(step, N - first)])
        _cross_entropy_(logits, targets[rows], losses[rows], need_grad)
        if need_grad:
            torch.mul(matmul_accumulated(logits, weight), share, out=dhidden[rows])
    return losses.sum() * share, dhidden
