"""Weights in the block types of GGUF files, as llama.cpp stores them.

A row of a weight is cut into blocks of 32 or 256 values. A block holds levels of 2 to 8 bits, and
their scales (kernels/ggml_reference.py has the layouts). No block reaches into another row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minitune.kernels.dequantize_ggml import GgmlStorage, dequantize_ggml, embed_ggml
from minitune.kernels.ggml_reference import BLOCK_SIZES
from minitune.model.quantized_weight import QuantizedWeight

# Type -> the halves of a block that are its scale d and its minimum m or dmin
SCALE_COLUMNS = {
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 1),
    "Q5_0": (0,),
    "Q5_1": (0, 1),
    "Q2_K": (40, 41),
    "Q3_K": (54,),
    "Q4_K": (0, 1),
    "Q5_K": (0, 1),
    "Q6_K": (104,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


class GgmlWeight(GgmlStorage, QuantizedWeight):
    """A weight (out_features, in_features) in a type of GGUF files."""

    @classmethod
    def of(cls, blocks: Tensor, type: str) -> "GgmlWeight":
        """Return a weight from the bytes of its rows, uint8 (out_features, bytes of a row).

        type: name of the type, such as "Q4_K".
        """
        width, size = BLOCK_SIZES[type]
        return cls(blocks, type, (len(blocks), blocks.shape[1] // size * width))

    @classmethod
    def empty(cls, shape: tuple[int, int], device: torch.device, type: str) -> "GgmlWeight":
        """Return a weight on the device with any values."""
        width, size = BLOCK_SIZES[type]
        row_bytes = shape[1] // width * size
        blocks = torch.empty((shape[0], row_bytes), dtype=torch.uint8, device=device)
        return cls(blocks, type, shape)

    @property
    def format(self) -> str:
        """Return the name of the type."""
        return self.type

    @property
    def nbytes(self) -> int:
        """Return the bytes of the blocks."""
        return self.blocks.nbytes

    def empty_like(self, device: torch.device) -> "GgmlWeight":
        """Return a weight of this type and shape on the device, with any values."""
        return self.empty(self.shape, device, self.type)

    def scales(self) -> list[Tensor]:
        """Return the 16-bit scales and minima of all blocks, one tensor for each kind."""
        halves = self.blocks.view(torch.float16).view(-1, BLOCK_SIZES[self.type][1] // 2)
        return [halves[:, column].contiguous() for column in SCALE_COLUMNS[self.type]]

    @classmethod
    def dequantize_stacked(
        cls, weights: Sequence["GgmlWeight"], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """Return weights one below the other in dtype, written into `out` if given."""
        with torch.cuda.device_of(weights[0].blocks):  # Triton launches on the current device
            return dequantize_ggml(weights, dtype, out)

    def rows(self, ids: Tensor, dtype: torch.dtype, multiplier: float = 1.0) -> Tensor:
        """Return the rows (N, in_features) of ids (N,) times the multiplier, in dtype."""
        return embed_ggml(ids, self, dtype, multiplier)
