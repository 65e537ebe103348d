"""Byte layouts of the levels and of the 6-bit scales in blocks of the K types.

A block holds 256 levels. A byte takes the low bits of 2 or 4 levels that are 32 or 64 apart, so a
SIMD load of 32 bytes unpacks to runs of 32 levels. All functions take and return uint8.

Levels are packed eight at a time as int64: no shift moves a bit into the next byte, as long as
the levels have at most 8 bits together.
"""

import torch
from torch import Tensor

RUN = 4  # int64 words of 32 levels
LOW_TWO_BITS = 0x0303030303030303
LOW_FOUR_BITS = 0x0F0F0F0F0F0F0F0F
LOW_BITS = 0x0101010101010101


def _runs(levels: Tensor) -> Tensor:
    """Return levels (blocks, 256) as words (blocks, 8, RUN): runs of 32 levels."""
    return levels.view(torch.int64).view(-1, 8, RUN)


def _bytes(words: Tensor) -> Tensor:
    """Return words (blocks, ..., RUN) as bytes (blocks, bytes of a block)."""
    return words.reshape(len(words), -1).view(torch.uint8)


def _pack_pairs(first: Tensor, second: Tensor) -> Tensor:
    """Return words with 4 bits of `first` below 4 bits of `second`."""
    return first | second << 4


def _pack_quarters(runs: Tensor) -> Tensor:
    """Return words (blocks, 2, RUN) with 2 bits of runs j, j + 1, j + 2, j + 3 for j = 0 and 4."""
    halves = runs.view(-1, 2, 4, RUN)
    packed = halves[:, :, 0] | halves[:, :, 1] << 2
    return packed | halves[:, :, 2] << 4 | halves[:, :, 3] << 6


def _pack_bits(runs: Tensor) -> Tensor:
    """Return words (blocks, RUN) whose bit j is the bit of run j."""
    packed = runs[:, 0].clone()
    for run in range(1, 8):
        packed |= runs[:, run] << run
    return packed


def pack_two_bits(levels: Tensor) -> Tensor:
    """Return the 64 bytes of 2-bit levels (blocks, 256) of Q2_K."""
    return _bytes(_pack_quarters(_runs(levels)))


def pack_three_bits(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return 32 bytes of high bits and 64 bytes of low two bits of levels (blocks, 256) of Q3_K."""
    runs = _runs(levels)
    high = _pack_bits(runs >> 2 & LOW_BITS)
    return _bytes(high), _bytes(_pack_quarters(runs & LOW_TWO_BITS))


def pack_four_bits(levels: Tensor) -> Tensor:
    """Return the 128 bytes of 4-bit levels (blocks, 256) of Q4_K: run 2 j below run 2 j + 1."""
    runs = _runs(levels)
    return _bytes(_pack_pairs(runs[:, 0::2], runs[:, 1::2]))


def pack_five_bits(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return 32 bytes of high bits and 128 bytes of low four bits of levels of Q5_K."""
    high = _pack_bits(_runs(levels) >> 4 & LOW_BITS)
    return _bytes(high), pack_four_bits(levels & 15)


def pack_six_bits(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return 128 bytes of low four bits and 64 bytes of high two bits of levels of Q6_K."""
    runs = _runs(levels)
    low = (runs & LOW_FOUR_BITS).view(-1, 2, 2, 2, RUN)  # half, run pair of a nibble, run
    high = _pack_quarters(runs >> 4 & LOW_TWO_BITS)
    return _bytes(_pack_pairs(low[:, :, 0], low[:, :, 1])), _bytes(high)


def pack_scales_and_minimums(scales: Tensor, minimums: Tensor) -> Tensor:
    """Return the 12 bytes of 8 scales and 8 minimums of 6 bits (blocks, 8) of Q4_K and Q5_K.

    Bytes 0 to 3: scale j, above it the high two bits of scale j + 4.
    Bytes 4 to 7: minimum j, above it the high two bits of minimum j + 4.
    Bytes 8 to 11: the low four bits of scale j + 4, above them those of minimum j + 4.
    """
    first = [part[:, :4] | part[:, 4:] >> 4 << 6 for part in (scales, minimums)]
    last = scales[:, 4:] & 15 | (minimums[:, 4:] & 15) << 4
    return torch.cat([*first, last], 1)


def pack_scales(scales: Tensor) -> Tensor:
    """Return the 12 bytes of 16 scales of 6 bits (blocks, 16) of Q3_K.

    Bytes 0 to 7: the low four bits of scale j, above them those of scale j + 8.
    Bytes 8 to 11: the high two bits of scales j, j + 4, j + 8, j + 12 for j = 0 to 3.
    """
    low = scales[:, :8] & 15 | (scales[:, 8:] & 15) << 4
    high = (scales >> 4).view(-1, 4, 4)
    high = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
    return torch.cat([low, high], 1)
