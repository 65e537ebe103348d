"""Reductions of columns with ggml's rounding: values (n, S) hold a block or sub-block a column.

ggml adds the values of a block one after another, and a search takes the first of equal results, so
the last bit of a sum decides between candidates. Columns make the order of a sum known, and all
operations run over contiguous memory.
"""

import torch
from torch import Tensor

SMALLEST_PEAK = 1e-15  # a column without a larger magnitude counts as zero
SUMMED_ROWS = 16  # that PyTorch adds one after the other on the CPU


def columns(values: Tensor, size: int) -> Tensor:
    """Return values of (blocks, width) or (S,) as columns (size, S) of neighbours."""
    return values.reshape(-1, size).t().contiguous()


def column_sums(terms: Tensor) -> Tensor:
    """Return the sums (S,) of the columns, added from the first row to the last.

    Overwrites `terms`. PyTorch's sum on the CPU adds up to 16 rows in order if S is a multiple of
    32, and longer columns in parts. Here the sum of a part is added to the first row of the next.
    """
    if torch.compiler.is_compiling() or terms.device.type != "cpu":
        return terms.sum(0)
    total = terms[:SUMMED_ROWS].sum(0)
    for start in range(SUMMED_ROWS, len(terms), SUMMED_ROWS):
        terms[start] += total
        total = terms[start : start + SUMMED_ROWS].sum(0)
    return total


def signed_peak(values: Tensor) -> Tensor:
    """Return the value (S,) of the largest magnitude of each column, the first of equals.

    The number of rows is a power of two, and the values are finite.
    """
    while len(values) > 1:
        first, second = values[0::2], values[1::2]
        # With a float mask, `lerp` selects four times as fast as `where` on the CPU.
        values = torch.lerp(first, second, second.abs().gt_(first.abs()))
    return values[0]


def rounded_sqrt(values: Tensor) -> Tensor:
    """Return correctly rounded square roots of float32 values.

    PyTorch's own float32 roots on a CPU differ in a fifth of all values, by the last bit.
    """
    return values.double().sqrt_().float()
