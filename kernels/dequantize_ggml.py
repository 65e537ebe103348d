"""Dequantisation of the GGUF block types to 16 or 32 bit.

A row of a weight is a row of blocks. The values equal gguf-py's in float32 bit for bit, and are
then rounded once. There is no backward, because the weight is frozen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import backend
from .ggml_reference import BLOCK_DEQUANTIZERS, BLOCK_SIZES

PROFILE_GROUP = "dequantisation"

# Values that the reference dequantises at a time. Their float32 values stay in the CPU's cache.
CHUNK_VALUES = 1 << 18


@dataclass
class GgmlStorage:
    """Storage of one weight (out_features, in_features) in blocks of a GGUF type.

    blocks: uint8 (out_features, bytes of a row), contiguous.
    type: name of the type, such as "Q4_K".
    shape: (out_features, in_features).
    """

    blocks: torch.Tensor
    type: str
    shape: tuple[int, int]

    def check(self) -> None:
        """Check that the blocks fit the type and the shape.

        Raises: ValueError if they do not.
        """
        if self.type not in BLOCK_SIZES:
            raise ValueError(f"type is {self.type}; expected one of {', '.join(BLOCK_SIZES)}")
        rows, in_features = self.shape
        width, block_bytes = BLOCK_SIZES[self.type]
        if in_features % width:
            raise ValueError(
                f"in_features is {in_features}; {self.type} needs a multiple of {width}"
            )
        blocks, shape = self.blocks, (rows, in_features // width * block_bytes)
        if blocks.dtype != torch.uint8 or blocks.shape != shape:
            raise ValueError(
                f"blocks are {tuple(blocks.shape)} {blocks.dtype}; "
                f"shape {self.shape} in {self.type} needs {shape} torch.uint8"
            )
        if not blocks.is_contiguous():
            raise ValueError(f"blocks have strides {blocks.stride()}; expected contiguous rows")


def dequantize_ggml_reference(weight, dtype):
    """Return the weight in PyTorch."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.blocks.device)
    width, block_bytes = BLOCK_SIZES[weight.type]
    blocks, values = weight.blocks.view(-1, block_bytes), out.view(-1, width)
    step = CHUNK_VALUES // width
    for part, target in zip(blocks.split(step), values.split(step), strict=True):
        target.copy_(BLOCK_DEQUANTIZERS[weight.type](part))
    return out


def embed_ggml_reference(ids, weight, dtype, multiplier=1.0):
    """Return the rows in PyTorch."""
    blocks = weight.blocks[ids.to(weight.blocks.device)]
    rows = GgmlStorage(blocks, weight.type, (len(ids), weight.shape[1]))
    values = dequantize_ggml_reference(rows, backend.accumulator(dtype))
    if multiplier != 1.0:
        values *= multiplier
    return values.to(ids.device, dtype)


def dequantize_ggml(
    weights: GgmlStorage | Sequence[GgmlStorage],
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return weights of equal in_features one below the other, (sum of out_features, in_features).

    weights: one weight or several.
    dtype: float32, float16 or bfloat16.
    out: destination, possibly a range of columns of wider rows; by default a new tensor.

    Raises: ValueError if a size or dtype does not fit.
    """
    weights = [weights] if isinstance(weights, GgmlStorage) else list(weights)
    for weight in weights:
        weight.check()
    shapes = [weight.shape for weight in weights]
    out, outs = backend.rows_of_weights(shapes, dtype, weights[0].blocks.device, out)
    for weight, part in zip(weights, outs, strict=True):
        part.copy_(dequantize_ggml_reference(weight, dtype))
    return out


def embed_ggml(
    ids: torch.Tensor, weight: GgmlStorage, dtype: torch.dtype, multiplier: float = 1.0
) -> torch.Tensor:
    """Return the weight's rows (N, D) times the multiplier in dtype, on the device of ids.

    ids: token ids (N,), integers in [0, V); not checked, because that would wait for the GPU.
    weight: (V, D), on the device of ids or in pinned host memory.
    multiplier: factor of every element, in float32 before the rounding to dtype.

    Raises: ValueError if a shape does not fit.
    """
    weight.check()
    if ids.dim() != 1:
        raise ValueError(f"ids {tuple(ids.shape)}; expected (rows,)")
    return embed_ggml_reference(ids, weight, dtype, multiplier)
