"""The judgement on a kernel's results, against plain PyTorch and the values in float64.

A kernel may err at most twice as much as PyTorch in the same dtype, plus a small slack in case
PyTorch's result is exact by chance. PyTorch itself may err by 16 units of its dtype's precision:
more is a fault of torch on this machine. Errors are parts of the largest value of each result.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minitune.doctor.report import Finding, judged, within

MAX_UNITS, SLACK_UNITS = 16, 0.125  # of the dtype's precision
SLACK = 1e-6


def three_ways(
    run: Callable[..., Sequence[Tensor]],
    kernels: Sequence[Callable[..., Any]],
    references: Sequence[Callable[..., Any]],
    dtype: torch.dtype,
) -> Finding:
    """Compare the results of kernels with those of their references.

    run: called with a dtype and the functions; returns the results in that dtype.
    """
    found, plain = run(dtype, *kernels), run(dtype, *references)
    return compare(found, plain, run(torch.float64, *references))


def compare(found: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> Finding:
    """Judge results by their errors, given those of PyTorch and the values in float64."""
    precision = max(torch.finfo(x.dtype).eps for x in plain)
    errors = []
    for x, p, e in zip(found, plain, exact, strict=True):
        largest = e.abs().max().item() or 1.0
        error, plain_error = ((y.double() - e).abs().max().item() / largest for y in (x, p))
        error = error if math.isfinite(error) else math.inf
        bound = min(2 * plain_error, MAX_UNITS * precision) + SLACK_UNITS * precision + SLACK
        errors.append((error, bound))
    error, bound = max(errors, key=lambda pair: pair[0] / pair[1])
    return within(error, bound, "of the largest value")


def same_bits(found: Tensor, expected: Tensor, text: str) -> Finding:
    """Return a finding that passed if two tensors are equal, and not all zero."""
    different = int((found != expected).sum())
    is_good = torch.equal(found, expected) and bool(found.any())
    return judged(is_good, f"{different:,} of {found.numel():,} {text}", different=different)
