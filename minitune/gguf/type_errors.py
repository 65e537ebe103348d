"""The rounding error that a GGUF type is known to have on given values.

A quantised type stores a value as one of n steps between the extremes of its block of w values. The
error is then spread evenly over a step, which gives the mean square

    step^2 / 12        step = (extremes of the block) / n

Three things add to it:

- The K types and IQ4_XS quantise the steps themselves: the blocks of 256 values share one step of
  the steps. A block's step is wrong by up to largest step / (2 levels), and a value at the far end
  by n times as much.
- A type without an offset has one value less on one side of 0, so a value at that end is clipped.
- The float16 of a scale has no digits below 2^-24.

A good quantiser stays below the sum, because it searches steps with a smaller error. A wrong layout
of bits, scales or rows is far above it.
"""

from typing import NamedTuple

import torch
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

SUPER_BLOCK = 256
SMALLEST_SCALE = 2.0**-24  # in float16
MAX_STEPS = 256  # that a scale is multiplied with
# Measured mean squares are at most 1.2 times the expected ones, on twelve kinds of values from
# normal to two-valued, with and without an importance matrix.
SLACK = 1.5


class Steps(NamedTuple):
    """The steps of a type.

    width: values of a block that share a step.
    count: steps between the extremes.
    symmetric: the extremes are plus and minus the largest magnitude, otherwise the smallest value
        (at most 0) and the largest.
    levels: of a step within its super-block; 0 if each block stores its step in float16.
    """

    width: int
    count: int
    symmetric: bool
    levels: int = 0


STEPS = {
    GGMLType.Q8_0: Steps(32, 254, True),
    GGMLType.Q4_0: Steps(32, 16, True),
    GGMLType.Q4_1: Steps(32, 15, False),
    GGMLType.Q5_0: Steps(32, 32, True),
    GGMLType.Q5_1: Steps(32, 31, False),
    GGMLType.Q2_K: Steps(16, 3, False, 15),
    GGMLType.Q3_K: Steps(16, 8, True, 31),
    GGMLType.Q4_K: Steps(32, 15, False, 63),
    GGMLType.Q5_K: Steps(32, 31, False, 63),
    GGMLType.Q6_K: Steps(16, 64, True, 127),
    GGMLType.IQ4_NL: Steps(32, 15, True),
    GGMLType.IQ4_XS: Steps(32, 15, True, 31),
}


def error_limit(values: Tensor, kind: GGMLType) -> Tensor:
    """Return the largest mean square error that `kind` may have on values, a float64 scalar.

    values: float32 (rows, width), as they were before quantisation; width is a multiple of the
        type's block.
    """
    steps = STEPS[kind]
    blocks = values.view(-1, steps.width)
    if steps.symmetric:
        extent = 2 * blocks.abs().amax(1)
    else:
        extent = blocks.amax(1).clamp(min=0) - blocks.amin(1).clamp(max=0)
    step = extent / steps.count  # (blocks,)
    expected = _mean_square(step) / 12
    if steps.symmetric:
        reach = extent / 2 - step  # on the shorter side
        expected = expected + _mean_square((blocks.abs() - reach[:, None]).clamp_(min=0))
    if steps.levels:
        largest = step.view(-1, SUPER_BLOCK // steps.width).amax(1)
        farthest = largest / (2 * steps.levels) * steps.count
        expected = expected + _mean_square(farthest) / 12
    underflow = SMALLEST_SCALE * MAX_STEPS * max(1, steps.levels)
    return SLACK * expected + underflow**2


def _mean_square(values: Tensor) -> Tensor:
    return values.square().mean(dtype=torch.float64)
