"""The lookup of NF4 values by byte permutations, as PTX for inline assembly.

A 64-element block has one scale, so at most 16 different values in 16 bit:

    value[c] = dtype(code[c] * scale)              multiplied in float32, rounded once, c < 16

`table_text` computes these 16 values of a block. It returns them as 8 registers of 4 bytes: first
the low bytes of the values 0 to 15, then the high bytes. `lookup_text` turns a word of 8 codes into
4 pairs of values. `prmt` picks 4 of 8 bytes by 4 selectors of 4 bits, which are the codes
themselves: their lower 3 bits pick from the values 0 to 7 and from the values 8 to 15, and the
fourth bit picks one of both results.

A value costs 2.6 instructions, and the table of a block 40. Loading the values from memory instead
takes 13 times as long on an H100, and shuffles between the threads of a warp 1.2 times.
"""

import struct

import torch

from .backend import tl, triton

TABLE_CONSTRAINTS = ",".join(["=&r"] * 8 + ["f"])
LOOKUP_CONSTRAINTS = ",".join(["=&r"] * 4 + ["r"] * 9)


def _rounded_pair(target: str, low: str, high: str, dtype: torch.dtype) -> list[str]:
    """Return the PTX that rounds two float32 registers into the halves of a register."""
    if dtype == torch.bfloat16:
        return [f"cvt.rn.bf16x2.f32 {target}, {high}, {low};"]
    halves = [f"cvt.rn.f16.f32 lo, {low};", f"cvt.rn.f16.f32 hi, {high};"]
    return [*halves, f"mov.b32 {target}, {{lo, hi}};"]


def table_text(code: tuple[float, ...], dtype: torch.dtype) -> str:
    """Return PTX that maps a scale ($8) to the bytes of its 16 values ($0 to $7).

    code: the 16 values of the codes, exact in float32.
    dtype: bfloat16 or float16.
    """
    lines = [".reg .f32 f<16>;", ".reg .b32 p<8>;", ".reg .b16 lo, hi;"]
    for i, value in enumerate(code):
        bits = struct.unpack("<I", struct.pack("<f", value))[0]
        lines.append(f"mul.rn.f32 f{i}, $8, 0f{bits:08X};")
    for i in range(8):
        lines += _rounded_pair(f"p{i}", f"f{2 * i}", f"f{2 * i + 1}", dtype)
    for i in range(4):
        lines.append(f"prmt.b32 ${i}, p{2 * i}, p{2 * i + 1}, 0x6420;")  # low bytes
        lines.append(f"prmt.b32 ${4 + i}, p{2 * i}, p{2 * i + 1}, 0x7531;")  # high bytes
    return "\n".join(["{", *lines, "}"])


def lookup_text() -> str:
    """Return PTX that maps a word of 8 codes ($4) and a table ($5 to $12) to 4 pairs ($0 to $3).

    The even element of a byte has the high nibble, so each pair is swapped on the way out.
    """
    lines = [".reg .b32 codes, upper, a, b, low, high;"]
    lines.append("and.b32 codes, $4, 0x77777777;")
    lines.append("shr.u32 upper, $4, 1;")
    lines.append("lop3.b32 upper, upper, 0x44444444, 0x32103210, 0xEA;")  # (upper & 4..) | 3210..
    for half in range(2):
        if half:
            lines += ["shr.u32 codes, codes, 16;", "shr.u32 upper, upper, 16;"]
        for target, first in (("low", 5), ("high", 9)):
            lines.append(f"prmt.b32 a, ${first}, ${first + 1}, codes;")
            lines.append(f"prmt.b32 b, ${first + 2}, ${first + 3}, codes;")
            lines.append(f"prmt.b32 {target}, a, b, upper;")
        lines.append(f"prmt.b32 ${2 * half}, low, high, 0x4051;")
        lines.append(f"prmt.b32 ${2 * half + 1}, low, high, 0x6273;")
    return "\n".join(["{", *lines, "}"])


@triton.jit
def _pairs_to_rows(p0, p1, p2, p3):
    """Return the elements of four neighbouring pairs as one last dimension of four."""
    return tl.join(tl.join(p0, p2), tl.join(p1, p3))


@triton.jit
def values_of_words(
    word,
    scale,
    code_ptr,
    DTYPE: tl.constexpr,
    TABLE: tl.constexpr,
    TABLE_ARGS: tl.constexpr,
    LOOKUP: tl.constexpr,
    LOOKUP_ARGS: tl.constexpr,
):
    """Return the even and the odd elements of words of 8 codes, each (..., words, 2, 2) in DTYPE.

    TABLE, LOOKUP: the PTX above; without it the values are loaded from code_ptr.
    """
    if TABLE != "":
        t0, t1, t2, t3, t4, t5, t6, t7 = tl.inline_asm_elementwise(
            TABLE,
            TABLE_ARGS,
            [scale],
            dtype=(
                tl.uint32,
                tl.uint32,
                tl.uint32,
                tl.uint32,
                tl.uint32,
                tl.uint32,
                tl.uint32,
                tl.uint32,
            ),
            is_pure=True,
            pack=1,
        )
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            LOOKUP,
            LOOKUP_ARGS,
            [word, t0, t1, t2, t3, t4, t5, t6, t7],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
        pair = _pairs_to_rows(p0, p1, p2, p3)
        even = (pair & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
        odd = (pair >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
    else:
        byte = _pairs_to_rows(word & 255, (word >> 8) & 255, (word >> 16) & 255, word >> 24)
        wide = scale[:, :, :, None, None]
        even = (tl.load(code_ptr + (byte >> 4).to(tl.int32)) * wide).to(DTYPE)
        odd = (tl.load(code_ptr + (byte & 15).to(tl.int32)) * wide).to(DTYPE)
    return even, odd
