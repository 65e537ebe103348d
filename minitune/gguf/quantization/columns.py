"""Reductions of columns with ggml's rounding: values (n, S) hold a block or sub-block a column.

ggml adds the values of a block one after another, and a search takes the first of equal results, so
the last bit of a sum decides between candidates. Columns make the order of a sum known, and all
operations run over contiguous memory.
"""

import torch
from torch import Tensor

SMALLEST_PEAK = 1e-15  # blocks below are zero to the searches
SUMMED_IN_ORDER = 16  # rows that PyTorch's sum over the rows adds one after another on a CPU


def column_sums(values: Tensor) -> Tensor:
    """Return the sums (S,) of the columns, added from the top down. Overwrites `values`."""
    total = values[:SUMMED_IN_ORDER].sum(0)
    for start in range(SUMMED_IN_ORDER, len(values), SUMMED_IN_ORDER):
        values[start] += total
        total = values[start : start + SUMMED_IN_ORDER].sum(0)
    return total


def signed_peak(values: Tensor) -> Tensor:
    """Return the value (S,) of the largest magnitude of each column, the first of equal ones.

    The number of rows is a power of two.
    """
    while len(values) > 1:
        first, second = values[0::2], values[1::2]
        values = torch.where(second.abs() > first.abs(), second, first)
    return values[0]


def rounded_sqrt(values: Tensor) -> Tensor:
    """Return correctly rounded square roots of float32 values.

    PyTorch's own float32 roots on a CPU differ in a fifth of all values, by the last bit.
    """
    return values.double().sqrt_().float()
