"""Dequantisers of the GGUF block types in PyTorch.

They turn bytes (N, bytes of a block) into float32 values (N, values of a block). The results equal
gguf-py's to the bit: d is multiplied by the sub-block's scale, then by the level, and the minimum
is subtracted last.

Levels of a few bits lie in groups: byte j of a group holds value j of several runs of values, the
first run in its lowest bits. `unpack` reads eight bytes at a time.

    type           bytes of a block, in their order
    Q8_0           d, 32 signed levels
    Q4_0, IQ4_NL   d, 16 bytes of levels
    Q4_1           d, m, 16 bytes of levels
    Q5_0           d, 4 bytes of fifth bits, 16 bytes of low bits
    Q5_1           d, m, 4 bytes of fifth bits, 16 bytes of low bits
    Q2_K           16 scales and minima of 4 bits, 64 bytes of levels, d, dmin
    Q3_K           32 bytes of third bits, 64 bytes of low bits, 12 bytes of scales, d
    Q4_K           d, dmin, 12 bytes of scales and minima, 128 bytes of levels
    Q5_K           d, dmin, 12 bytes of scales and minima, 32 bytes of fifth bits, 128 of low bits
    Q6_K           128 bytes of low bits, 64 bytes of high bits, 16 signed scales, d
    IQ4_XS         d, 2 bytes of high bits of scales, 4 bytes of low bits, 128 bytes of levels
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

BLOCK_SIZES = {  # type -> (values, bytes) of a block
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
}

FIRST_BITS = 0x0101010101010101  # bit 0 of each of eight bytes
DIAGONAL_BITS = 0x8040201008040201 - (1 << 64)  # bit j of byte j, as a signed number
SEVEN_BITS = 0x7F7F7F7F7F7F7F7F
PAIRS = (0, 2, 4, 6)  # shifts of fields of two bits
NIBBLES = (0, 4)
# IQ4_NL and IQ4_XS store the index of a value of this table.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def dequantize_q8_0(blocks: Tensor) -> Tensor:
    """Return d q."""
    return blocks[:, 2:].view(torch.int8).float().mul_(float16(blocks, 0))


def dequantize_symmetric(blocks: Tensor, bits: int) -> Tensor:
    """Return d (q - 2^(bits - 1)) of Q4_0 or Q5_0."""
    levels = _simple_levels(blocks[:, 2:], bits).view(torch.int8).sub_(1 << (bits - 1))
    return levels.float().mul_(float16(blocks, 0))


def dequantize_with_minimum(blocks: Tensor, bits: int) -> Tensor:
    """Return d q + m of Q4_1 or Q5_1."""
    levels = _simple_levels(blocks[:, 4:], bits).float()
    return levels.mul_(float16(blocks, 0)).add_(float16(blocks, 2))


def _simple_levels(data: Tensor, bits: int) -> Tensor:
    """Return the levels (N, 32) of the bytes behind the scales of a simple type."""
    if bits == 4:
        return unpack(data, 16, NIBBLES)
    fifth = data[:, :4].long().mul_(FIRST_BITS).bitwise_and_(DIAGONAL_BITS)
    # Each byte is zero or has one bit, which the addition carries to bit 7 of the same byte.
    fifth.add_(SEVEN_BITS).bitwise_right_shift_(7).bitwise_and_(FIRST_BITS)
    return unpack(data[:, 4:], 16, NIBBLES) | (fifth << 4).view(torch.uint8)


def dequantize_q2_k(blocks: Tensor) -> Tensor:
    """Return d s q - dmin m."""
    scales = float16(blocks, 80) * (blocks[:, :16] & 15).float()
    minima = float16(blocks, 82) * (blocks[:, :16] >> 4).float()
    return _affine(unpack(blocks[:, 16:80], 32, PAIRS), scales, minima)


def dequantize_q3_k(blocks: Tensor) -> Tensor:
    """Return d (s - 32) (q - 4)."""
    third = unpack(blocks[:, :32], 32, range(8))
    levels = (unpack(blocks[:, 32:96], 32, PAIRS) | (third << 2)).view(torch.int8).sub_(4)
    scales = unpack(blocks[:, 96:104], 8, NIBBLES)
    scales |= unpack(blocks[:, 104:108], 4, PAIRS) << 4
    return _scaled(levels, float16(blocks, 108) * scales.view(torch.int8).sub_(32).float())


def dequantize_q4_k(blocks: Tensor) -> Tensor:
    """Return d s q - dmin m."""
    return _affine(unpack(blocks[:, 16:], 32, NIBBLES), *_scales_and_minima(blocks))


def dequantize_q5_k(blocks: Tensor) -> Tensor:
    """Return d s q - dmin m."""
    fifth = unpack(blocks[:, 16:48], 32, range(8))
    levels = unpack(blocks[:, 48:], 32, NIBBLES) | (fifth << 4)
    return _affine(levels, *_scales_and_minima(blocks))


def dequantize_q6_k(blocks: Tensor) -> Tensor:
    """Return d s (q - 32)."""
    high = unpack(blocks[:, 128:192], 32, PAIRS)
    levels = (unpack(blocks[:, :128], 64, NIBBLES) | (high << 4)).view(torch.int8).sub_(32)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return _scaled(levels, float16(blocks, 208) * scales)


def dequantize_iq4_nl(blocks: Tensor) -> Tensor:
    """Return d v[q], with v = IQ4_VALUES."""
    return _iq4_values(unpack(blocks[:, 2:], 16, NIBBLES)).mul_(float16(blocks, 0))


def dequantize_iq4_xs(blocks: Tensor) -> Tensor:
    """Return d (s - 32) v[q], with v = IQ4_VALUES."""
    scales = unpack(blocks[:, 4:8], 1, NIBBLES) | (unpack(blocks[:, 2:4], 1, PAIRS) << 4)
    scales = float16(blocks, 0) * scales.view(torch.int8).sub_(32).float()
    return _scaled(_iq4_values(unpack(blocks[:, 8:], 16, NIBBLES)), scales)


def _iq4_values(levels: Tensor) -> Tensor:
    """Return the values of IQ4_VALUES at the indices `levels`, float32."""
    table = torch.tensor(IQ4_VALUES, dtype=torch.float32, device=levels.device)
    return table[levels.int()]


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return d s and dmin m (N, 8) of Q4_K or Q5_K.

    Bytes 0-3 have s, bytes 4-7 have m of the sub-blocks 0-3 in their low six bits. Byte 8 + j has
    the low four bits of s and m of sub-block 4 + j; the high two bits of bytes j and 4 + j complete
    them.
    """
    first, second, third = blocks[:, 4:16].split(4, 1)
    scales = torch.cat([first & 63, (third & 15) | ((first >> 2) & 48)], 1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 2) & 48)], 1)
    return float16(blocks, 0) * scales.float(), float16(blocks, 2) * minima.float()


def _scaled(levels: Tensor, scales: Tensor) -> Tensor:
    """Return levels (N, 256) times the scales (N, S) of their S sub-blocks."""
    parts = levels.view(*scales.shape, -1).float()
    return parts.mul_(scales[:, :, None]).view(levels.shape)


def _affine(levels: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    """Return levels (N, 256) times the scales (N, S), less the minima (N, S)."""
    parts = _scaled(levels, scales).view(*scales.shape, -1)
    return parts.sub_(minima[:, :, None]).view(levels.shape)


def float16(blocks: Tensor, start: int) -> Tensor:
    """Return the float16 at byte `start` of each block, as float32 (N, 1)."""
    part = blocks[:, start : start + 2].clone(memory_format=torch.contiguous_format)
    return part.view(torch.float16).float()


def unpack(data: Tensor, group: int, shifts: tuple[int, ...] | range) -> Tensor:
    """Return the fields of a few bits in bytes, one a byte.

    data: uint8 (N, B).
    group: bytes of a group. Its fields are returned in the order of the shifts, then of the bytes.
    shifts: positions of the fields, from 0 and equally far apart, that fill a byte.

    Returns: uint8 (N, B len(shifts)).
    """
    word_bytes = min(group, 8)
    mask = int.from_bytes([(1 << (8 // len(shifts))) - 1] * word_bytes, "little")
    word = {1: torch.uint8, 4: torch.int32, 8: torch.int64}[word_bytes]
    # A copy begins at an even address, also if there is one block.
    words = (
        data.clone(memory_format=torch.contiguous_format)
        .view(word)
        .view(len(data), -1, 1, group // word_bytes)
    )
    places = torch.tensor(list(shifts), dtype=word, device=data.device)[:, None]
    return (words >> places).bitwise_and_(mask).view(len(data), -1).view(torch.uint8)


BLOCK_DEQUANTIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": dequantize_q8_0,
    "Q4_0": partial(dequantize_symmetric, bits=4),
    "Q4_1": partial(dequantize_with_minimum, bits=4),
    "Q5_0": partial(dequantize_symmetric, bits=5),
    "Q5_1": partial(dequantize_with_minimum, bits=5),
    "Q2_K": dequantize_q2_k,
    "Q3_K": dequantize_q3_k,
    "Q4_K": dequantize_q4_k,
    "Q5_K": dequantize_q5_k,
    "Q6_K": dequantize_q6_k,
    "IQ4_NL": dequantize_iq4_nl,
    "IQ4_XS": dequantize_iq4_xs,
}
