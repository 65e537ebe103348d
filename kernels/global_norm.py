"""Euclidean norm of a flat vector, for gradient clipping.

    norm = sqrt(sum(x^2))                   x (P,) float32, norm a 0-dim float32 tensor

One kernel sums the squares of fixed parts of x in float32, a second one sums the parts in float64.
The order is fixed, so the norm repeats bit for bit. It stays on the device. x is read once: 4 bytes
an element.
"""

import torch

from . import backend
from .backend import cdiv, tl, triton

PROFILE_GROUP = "optimizer"


def global_norm_reference(x):
    """Return the norm of the norms of parts of x.

    One float32 sum over tens of millions of squares is off in the fourth digit on a CPU.
    """
    return torch.nn.utils.get_total_norm(x.split(65536))


@triton.jit
def _square_sums(x_ptr, sums_ptr, P, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the squares of PARTS * BLOCK elements per program."""
    first = tl.program_id(0).to(tl.int64) * (PARTS * BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        at = first + part * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < P, other=0.0)
        total += x * x
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _root_of_sum(sums_ptr, norm_ptr, count, BLOCK: tl.constexpr):
    """Store the root of the sum of all partial sums, in one program, summed in float64."""
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + at, mask=at < count, other=0.0).to(tl.float64)
    tl.store(norm_ptr, tl.sqrt(tl.sum(total, axis=0)).to(tl.float32))


def global_norm(x: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean norm of x, a 0-dim float32 tensor on the device of x.

    x: (P,) float32, contiguous.

    Raises: ValueError if x does not fit.
    """
    if x.dim() != 1 or not x.numel() or not x.is_contiguous() or x.dtype != torch.float32:
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype}; "
            "expected a contiguous vector of torch.float32 with at least one element"
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
