"""NF4 with double quantisation: 4.127 bits a parameter, in the layout of bitsandbytes (QLoRA, arXiv 2305.14314).

The weight is flattened row by row and cut into blocks of 64 values. A block is its largest magnitude (`absmax`) and,
for each value, the index of the nearest of 16 code values in value / absmax; the code holds the quantiles of a normal
distribution, so every index is about equally likely for trained weights. Two indices share a byte, the even element
in the high nibble.

One fp32 scale per 64 values would cost another half bit, so the scales are quantised in turn: their mean is
subtracted (`nested_offset`), and blocks of 256 of them become 8-bit indices into the *dynamic map*, a signed code
with as many decimal exponents as it can afford, times the largest magnitude of the block (`nested_absmax`).

    value = CODE[nibble] * (DYNAMIC[absmax8[b]] * nested_absmax[b // 256] + nested_offset)       b = element // 64

Ties go to the lower index, as in bitsandbytes; the values are bit for bit those it dequantises.
"""

from functools import cache

import torch
from torch import Tensor

from minitune.kernels.dequantize import QuantizedWeight, dequantize_nf4

# fmt: off
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
BLOCKSIZE = 64
NESTED_BLOCKSIZE = 256


@cache
def nf4_code(device: torch.device) -> Tensor:
    """The 16 code values, fp32 (16,)."""
    return torch.tensor(CODE, dtype=torch.float32, device=device)


@cache
def dynamic_map(device: torch.device, signed: bool = True) -> Tensor:
    """The 8-bit dynamic map, ascending, fp32 (256,) (arXiv 1511.04561, as bitsandbytes lays it out).

    Decade i of seven, from 1e-6 to 1, is cut linearly into 2**i cells between 0.1 and 1; their middles, with both
    signs, make 254 values; 0 and 1 complete the map. Without signs there are twice the cells instead.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float32)
        middles = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist() + ((-middles).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def _nearest(values: Tensor, code: Tensor) -> Tensor:
    """Index of the nearest entry of an ascending code, ties to the lower one; uint8, shaped like values."""
    return torch.bucketize(values, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)


class NF4(QuantizedWeight):
    """A quantised (out_features, in_features) weight. With `nested_absmax` None the scales are plain fp32."""

    @classmethod
    def quantize(cls, weight: Tensor) -> "NF4":
        """Quantise a 2-D weight where it is, from its values as stored. Costs a few fp32 copies of this one weight.

        Raises ValueError where the number of elements is not a multiple of 64.
        """
        if weight.numel() % BLOCKSIZE:
            raise ValueError(
                f"a weight of shape {tuple(weight.shape)} does not divide into blocks of {BLOCKSIZE}"
            )
        code, dynamic = nf4_code(weight.device), dynamic_map(weight.device)
        blocks = weight.reshape(-1, BLOCKSIZE).float()
        absmax = blocks.abs().amax(1)
        # the reciprocal first, as bitsandbytes does: a division rounds differently and moves values across a tie
        nibbles = _nearest(
            (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1), code
        ).view(-1, 2)
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

    @property
    def nbytes(self) -> int:
        tensors = (self.packed, self.absmax, self.nested_absmax)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The weight in `dtype` (out_features, in_features), written into `out` where that is given."""
        with torch.cuda.device_of(self.packed):  # Triton launches on the current device
            return dequantize_nf4(self, dtype, out)


def _quantize_scales(scales: Tensor, dynamic: Tensor) -> tuple[Tensor, Tensor]:
    """Centred fp32 scales (n,) -> 8-bit codes (n,) and the largest magnitude of each block of 256."""
    n = scales.numel()
    blocks = torch.nn.functional.pad(scales, (0, -n % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    absmax = blocks.abs().amax(1)
    codes = _nearest(blocks * (1.0 / absmax.clamp(min=1e-38))[:, None], dynamic)
    return codes.view(-1)[:n].contiguous(), absmax
