"""The precision of the passes: no autocast, float32 sums of float16 products, scaled gradients.

float16 holds numbers up to 65504. Below 6.1e-5 it loses digits, and below 3e-8 a number becomes 0.
Gradients of activations are that small, so they are multiplied by a power of two:

    the trainer          the loss of every token by one scale (training/loss_scale.py)
    a user's own loop    the gradient of each layer by one that suits its largest element,
                         and that of the logits by one that suits its largest row
"""

import contextlib
import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from minitune.device import is_bfloat16_supported

# Factor of a token's loss in float16. On SmolLM2-135M the gradients have the same error at all
# factors from 2^-4 to 2^10. Of six steps one overflows at 2^11, and all at 2^12 (November 2026).
TOKEN_SCALE = 2.0**6
# Bound of the largest element of a layer's gradient in a user's own loop. Inside of the layer
# elements grow up to 75 times as large (SmolLM2-135M), and 65504 is 8000 times as large.
LAYER_PEAK = 8.0
SMALLEST_PEAK = 2.0**-100  # of a gradient that is scaled to LAYER_PEAK
# Settings of torch.backends.cuda.matmul that let cuBLAS sum float16 products in float16.
FLOAT16_SUMS = ("allow_fp16_accumulation", "allow_fp16_reduced_precision_reduction")
SPLIT_K = "allow_fp16_reduced_precision_reduction_split_k"  # newer versions of torch have it

_lock = threading.Lock()
_running = 0  # blocks of `_summed_in_float32`, in all threads
_user_settings: dict[str, bool | tuple[bool, bool]] = {}


@contextlib.contextmanager
def own_precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Ignore autocast during the block; in float16 also sum products in float32."""
    sums = _summed_in_float32() if dtype == torch.float16 else contextlib.nullcontext()
    with torch.autocast(device.type, enabled=False), sums:
        yield


@contextlib.contextmanager
def _summed_in_float32() -> Iterator[None]:
    """Forbid cuBLAS to sum float16 products in float16 during the block.

    The settings belong to the process. Blocks of several threads may overlap: the last one to end
    restores the user's settings. A change of them by another thread during a block is lost.
    """
    global _running
    with _lock:
        _running += 1
        if _running == 1:
            _forbid_float16_sums()
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if _running == 0:
                for name, value in _user_settings.items():
                    setattr(torch.backends.cuda.matmul, name, value)


def _forbid_float16_sums() -> None:
    """Remember the user's settings, and turn them off."""
    matmul = torch.backends.cuda.matmul
    split_k = getattr(matmul, SPLIT_K, None)
    for name in FLOAT16_SUMS:
        value = getattr(matmul, name)
        off = False
        if split_k is not None and name == FLOAT16_SUMS[1]:
            value, off = (value, split_k), (False, split_k)
        _user_settings[name] = value
        setattr(matmul, name, off)


def wider_dtypes(device: torch.device) -> str:
    """Return the settings of `from_pretrained` with which numbers beyond 65504 are finite."""
    wider = "dtype='float32'"
    return f"dtype='bfloat16' or {wider}" if is_bfloat16_supported(device) else wider


def layer_scale(dy: Tensor) -> Tensor:
    """Return the power of two, 0-dim, that brings the largest |dy| to LAYER_PEAK, half at least.

    dy: float32, of any shape. The scale is NaN if dy is not finite.
    """
    peak = torch.linalg.vector_norm(dy, math.inf).clamp(min=SMALLEST_PEAK)
    return LAYER_PEAK * (torch.frexp(peak).mantissa / peak)


def logits_scale(dlogits: Tensor) -> Tensor:
    """Return the power of two, 0-dim, that suits the product of dlogits (N, V) and the head.

    It brings the largest sum of a row's |dlogits| to TOKEN_SCALE, half at least: a gradient of all
    logits, such as that of a squared error, can add up to V times its largest element.

    dlogits: float32. The scale is NaN if dlogits is not finite.
    """
    row_sums = torch.linalg.vector_norm(dlogits, 1, dim=-1)  # (N,)
    return layer_scale(row_sums) * (TOKEN_SCALE / LAYER_PEAK)
