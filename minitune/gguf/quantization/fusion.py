"""The choice between eager and compiled steps of the searches (k_searches.py).

torch.compile fuses the operations of a step into two loops. Measured on two cores of an AMD EPYC
with AVX2, November 2026, two runs, in million values a second:

                eager     compiled   seconds to compile, the first and any other time
    Q4_K     8.9, 5.0   15.2, 10.1   11, 3
    Q6_K   16.4, 17.5   17.2, 17.9   4, 1

Compiling pays for models of about a billion parameters on two cores. More cores save less time.
"""

import os
import shutil
from collections.abc import Mapping

import torch
from gguf import GGMLQuantizationType as GGMLType

from minitune.gguf.quantization import quantize as door
from minitune.gguf.quantization.k_quants import K_QUANTIZERS
from minitune.gguf.quantization.k_searches import EAGER_STEPS, Steps, compiled_steps

VALUES_A_THREAD = 1 << 28  # from which compiling pays
TRIAL_WIDTH = 256  # values of a row


def choose_steps(
    counts: Mapping[GGMLType, int], device: torch.device, with_importance: bool
) -> Steps:
    """Return compiled steps if they save time, otherwise eager ones.

    counts: number of values to quantise, by type.
    device: the device that quantises. A GPU keeps eager steps.
    with_importance: True if some values have an importance.

    Each type is compiled here, by quantising two chunks. Without a working C++ compiler, the steps
    are eager.
    """
    counts = {kind: count for kind, count in counts.items() if kind in K_QUANTIZERS}
    enough = sum(counts.values()) >= VALUES_A_THREAD * torch.get_num_threads()
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if device.type != "cpu" or not enough or compiler is None:
        return EAGER_STEPS
    steps = compiled_steps()
    trial = torch.linspace(-1, 1, 2 * door.CPU_CHUNK).view(-1, TRIAL_WIDTH)
    weights = (None, torch.ones(TRIAL_WIDTH)) if with_importance else (None,)
    try:
        for kind in counts:
            for importance in weights:
                door.quantize(trial, kind, importance, steps)
    except RuntimeError:  # of torch.compile: the compiler is not able to build the code
        return EAGER_STEPS
    return steps
