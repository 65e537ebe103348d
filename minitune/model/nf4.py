"""NF4 with double quantisation: 4.127 bits per parameter (QLoRA, arXiv 2305.14314).

The layout is that of bitsandbytes. The weight is flattened row by row and cut into blocks of 64
values. A block stores its largest magnitude, `absmax`, and for each value the index of the nearest
of 16 code values to value / absmax. The code values are quantiles of a normal distribution, so all
indices are about equally likely for trained weights. Two indices share a byte, with the even
element in the high nibble.

A float32 scale per 64 values would cost another half bit. So the scales are quantised in turn:
their mean, `nested_offset`, is subtracted, and blocks of 256 scales store 8-bit indices into the
dynamic map and their largest magnitude, `nested_absmax`. The dynamic map is a signed code that
covers seven decades.

    value = CODE[nibble] * scale[b]                                       b = element // 64
    scale[b] = DYNAMIC[absmax8[b]] * nested_absmax[b // 256] + nested_offset

A value in the middle of two code values takes the lower index, as in bitsandbytes. The dequantised
values equal those of bitsandbytes bit for bit.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from minitune.kernels.backend import cdiv
from minitune.kernels.dequantize_nf4 import NF4Storage, dequantize_nf4
from minitune.model.quantized_weight import QuantizedWeight

# fmt: off
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
BLOCKSIZE = 64
NESTED_BLOCKSIZE = 256


# The smallest absmax that is divided by, so that a block of zeros gives no NaN.
MIN_ABSMAX = 1e-38


@cache
def nf4_code(device: torch.device) -> Tensor:
    """Return the 16 code values, float32 (16,)."""
    return torch.tensor(CODE, dtype=torch.float32, device=device)


@cache
def dynamic_map(device: torch.device, signed: bool = True) -> Tensor:
    """Return the 8-bit dynamic map in ascending order, float32 (256,).

    The map covers seven decades, from 1e-6 to 1. Decade i is cut between 0.1 and 1 of its upper end
    into 2**i equal cells. The middles of all cells with both signs are 254 values; 0 and 1 complete
    the map (arXiv 1511.04561, in the layout of bitsandbytes).

    signed: False cuts each decade into twice as many cells and has no negative values.
    """
    values = [0.0, 1.0]
    for i in range(7):
        cells = 2**i if signed else 2 ** (i + 1)
        edges = torch.linspace(0.1, 1, cells + 1, dtype=torch.float32)
        middles = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist()
        if signed:
            values += (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def _nearest(values: Tensor, code: Tensor) -> Tensor:
    """Return the index of the nearest entry of an ascending code, uint8, shaped like values.

    A value in the middle of two entries takes the lower index.
    """
    return torch.bucketize(values, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)


class NF4(NF4Storage, QuantizedWeight):
    """A quantised weight (out_features, in_features).

    If `nested_absmax` is None, the scales are plain float32.
    """

    @classmethod
    def quantize(cls, weight: Tensor) -> "NF4":
        """Quantise a 2-D weight on its device. It costs a few float32 copies of this weight.

        Raises: ValueError if the number of elements is not a multiple of 64.
        """
        if weight.numel() % BLOCKSIZE:
            raise ValueError(
                f"a weight of shape {tuple(weight.shape)} does not divide into blocks of "
                f"{BLOCKSIZE}; load the model with load_in_4bit=False"
            )
        code, dynamic = nf4_code(weight.device), dynamic_map(weight.device)
        blocks = weight.reshape(-1, BLOCKSIZE).float()
        absmax = blocks.abs().amax(1)
        # Multiply by the reciprocal, as bitsandbytes does: a division rounds differently and moves
        # values across the middle of two code values.
        scaled = blocks * (1.0 / absmax.clamp(min=MIN_ABSMAX))[:, None]
        nibbles = _nearest(scaled.clamp_(-1, 1), code).view(-1, 2)
        offset = absmax.mean()
        absmax8, nested_absmax = _quantize_scales(absmax - offset, dynamic)
        return cls(
            packed=(nibbles[:, 0] << 4) | nibbles[:, 1],
            absmax=absmax8,
            code=code,
            shape=tuple(weight.shape),
            nested_absmax=nested_absmax,
            nested_code=dynamic,
            nested_offset=offset,
        )

    @classmethod
    def empty(cls, shape: tuple[int, int], device: torch.device) -> "NF4":
        """Return a weight on the device with any values."""
        blocks = cdiv(shape[0] * shape[1], BLOCKSIZE)
        return cls(
            packed=torch.empty(blocks * BLOCKSIZE // 2, dtype=torch.uint8, device=device),
            absmax=torch.empty(blocks, dtype=torch.uint8, device=device),
            code=torch.empty(len(CODE), device=device),
            shape=shape,
            nested_absmax=torch.empty(cdiv(blocks, NESTED_BLOCKSIZE), device=device),
            nested_code=torch.empty(256, device=device),
            nested_offset=torch.empty((), device=device),
        )

    @property
    def format(self) -> str:
        """Return the name of the format."""
        return "NF4"

    @property
    def nbytes(self) -> int:
        """Return the bytes of the indices and scales."""
        tensors = (self.packed, self.absmax, self.nested_absmax)
        return sum(t.nbytes for t in tensors if t is not None)

    def empty_like(self, device: torch.device) -> "NF4":
        """Return a weight of this shape on the device, with any values."""
        return self.empty(self.shape, device)

    @classmethod
    def dequantize_stacked(
        cls, weights: Sequence["NF4"], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """Return weights one below the other in dtype, written into `out` if given."""
        with torch.cuda.device_of(weights[0].packed):  # Triton launches on the current device
            return dequantize_nf4(weights, dtype, out)


def _quantize_scales(scales: Tensor, dynamic: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 8-bit indices (n,) of centred float32 scales (n,), and the blocks' absmax."""
    n = scales.numel()
    padded = torch.nn.functional.pad(scales, (0, -n % NESTED_BLOCKSIZE))
    blocks = padded.view(-1, NESTED_BLOCKSIZE)
    absmax = blocks.abs().amax(1)
    indices = _nearest(blocks * (1.0 / absmax.clamp(min=MIN_ABSMAX))[:, None], dynamic)
    return indices.view(-1)[:n].contiguous(), absmax
