"""Triton functions that turn the blocks of GGUF types into float32 values.

The layouts of the blocks are in ggml_reference.py. A part is eight neighbouring values of a block,
so that a thread writes 16 bytes in 16 bit. The levels of a part stand in one 64-bit number, a byte
each and the first one lowest. Bits of all eight levels are cut out and put together at once.

Each type has a function from a part's block to

    levels    uint64 (T,), the levels of the T parts
    scale     float32 (T,), which multiplies a level
    minimum   float32 (T,), which is added to the product, or subtracted from it (K types); 0.0 if
              the type has none

All addresses of a load of 2, 4 or 8 bytes are multiples of 2, 4 or 8 if the blocks begin at a
multiple of 8 bytes.
"""

from .backend import tl, triton

# Numbers that are subtracted from the levels, which are not negative. The other types have minima.
OFFSETS = {
    "Q8_0": 128,
    "Q4_0": 8,
    "Q5_0": 16,
    "Q3_K": 4,
    "Q6_K": 32,
}


@triton.jit
def block_values(block_ptr, part, table_ptr, TYPE: tl.constexpr, OFFSET: tl.constexpr):
    """Return the values (T, 8) of parts, float32.

    block_ptr: address (T,) of each part's block.
    part: number (T,) of the part within its block.
    table_ptr: the 16 values of IQ4_NL and IQ4_XS, float32; not read for other types.
    TYPE: name of the blocks' type.
    OFFSET: the type's number in OFFSETS, otherwise 0.
    """
    if TYPE == "Q8_0":
        levels, scale, minimum = _q8_0(block_ptr, part)
    elif TYPE == "Q4_0" or TYPE == "IQ4_NL":
        levels, scale, minimum = _q4_0(block_ptr, part)
    elif TYPE == "Q4_1":
        levels, scale, minimum = _q4_1(block_ptr, part)
    elif TYPE == "Q5_0":
        levels, scale, minimum = _q5_0(block_ptr, part)
    elif TYPE == "Q5_1":
        levels, scale, minimum = _q5_1(block_ptr, part)
    elif TYPE == "Q2_K":
        levels, scale, minimum = _q2_k(block_ptr, part)
    elif TYPE == "Q3_K":
        levels, scale, minimum = _q3_k(block_ptr, part)
    elif TYPE == "Q4_K":
        levels, scale, minimum = _q4_k(block_ptr, part)
    elif TYPE == "Q5_K":
        levels, scale, minimum = _q5_k(block_ptr, part)
    elif TYPE == "Q6_K":
        levels, scale, minimum = _q6_k(block_ptr, part)
    else:
        tl.static_assert(TYPE == "IQ4_XS")
        levels, scale, minimum = _iq4_xs(block_ptr, part)

    level = (levels[:, None] >> (8 * tl.arange(0, 8)[None, :])) & 255
    if TYPE == "IQ4_NL" or TYPE == "IQ4_XS":
        value = tl.load(table_ptr + level.to(tl.int32)) * scale[:, None]
    else:
        value = (level.to(tl.int32) - OFFSET).to(tl.float32) * scale[:, None]
    # A negated minimum of 0 would add +0, and change the sign of a product of -0.
    if TYPE == "Q4_1" or TYPE == "Q5_1":
        value += minimum[:, None]
    elif TYPE == "Q2_K" or TYPE == "Q4_K" or TYPE == "Q5_K":
        value -= minimum[:, None]
    return value


@triton.jit
def _q8_0(block_ptr, part):
    SIGN_BITS: tl.constexpr = 0x8080808080808080  # their inversion adds 128
    levels = _eight_bytes(block_ptr + 2 + 8 * part, 2) ^ SIGN_BITS
    return levels, _float16(block_ptr), 0.0


@triton.jit
def _q4_0(block_ptr, part):
    """Return the parts of Q4_0 and IQ4_NL."""
    return _nibbles_of_16(block_ptr + 2, part, 2), _float16(block_ptr), 0.0


@triton.jit
def _q4_1(block_ptr, part):
    levels = _nibbles_of_16(block_ptr + 4, part, 4)
    return levels, _float16(block_ptr), _float16(block_ptr + 2)


@triton.jit
def _q5_0(block_ptr, part):
    levels = _nibbles_of_16(block_ptr + 6, part, 2) | _fifth_bits(block_ptr + 2, part)
    return levels, _float16(block_ptr), 0.0


@triton.jit
def _q5_1(block_ptr, part):
    levels = _nibbles_of_16(block_ptr + 8, part, 8) | _fifth_bits(block_ptr + 4, part)
    return levels, _float16(block_ptr), _float16(block_ptr + 2)


@triton.jit
def _q2_k(block_ptr, part):
    levels = _pairs(block_ptr + 16, part, 4)
    scale = _byte(block_ptr + (part >> 1))
    minimum = _float16(block_ptr + 82) * (scale >> 4).to(tl.float32)
    return levels, _float16(block_ptr + 80) * (scale & 15).to(tl.float32), minimum


@triton.jit
def _q3_k(block_ptr, part):
    third = _fields(_eight_bytes_inside(block_ptr + 8 * (part & 3)), part >> 2, 1)
    sub = part >> 1  # sub-block of 16 values
    low = _byte(block_ptr + 96 + (sub & 7)) >> (sub >> 3 << 2)
    high = _byte(block_ptr + 104 + (sub & 3)) >> (sub >> 2 << 1)
    scale = ((low & 15) | ((high & 3) << 4)) - 32
    levels = _pairs(block_ptr + 32, part, 0) | (third << 2)
    return levels, _float16(block_ptr + 108) * scale.to(tl.float32), 0.0


@triton.jit
def _q4_k(block_ptr, part):
    scale, minimum = _scale_and_minimum(block_ptr, part >> 2)
    return _nibbles_of_32(block_ptr + 16, part), scale, minimum


@triton.jit
def _q5_k(block_ptr, part):
    scale, minimum = _scale_and_minimum(block_ptr, part >> 2)
    fifth = _fields(_eight_bytes(block_ptr + 16 + 8 * (part & 3), 8), part >> 2, 1)
    return _nibbles_of_32(block_ptr + 48, part) | (fifth << 4), scale, minimum


@triton.jit
def _q6_k(block_ptr, part):
    at = 64 * (part >> 4) + 8 * (part & 7)
    low = _fields(_eight_bytes_inside(block_ptr + at), (part >> 3 & 1) << 2, 15)
    levels = low | (_pairs(block_ptr + 128, part, 0) << 4)
    scale = tl.load(block_ptr + 192 + (part >> 1)).to(tl.int8, bitcast=True)
    return levels, _float16(block_ptr + 208) * scale.to(tl.float32), 0.0


@triton.jit
def _iq4_xs(block_ptr, part):
    sub = part >> 2  # sub-block of 32 values
    low = _byte(block_ptr + 4 + (sub >> 1)) >> ((sub & 1) << 2)
    high = _byte(block_ptr + 2 + (sub >> 2)) >> ((sub & 3) << 1)
    scale = ((low & 15) | ((high & 3) << 4)) - 32
    levels = _nibbles_of_16(block_ptr + 8 + 16 * sub, part & 3, 8)
    return levels, _float16(block_ptr) * scale.to(tl.float32), 0.0


@triton.jit
def _scale_and_minimum(block_ptr, sub):
    """Return d s and dmin m of the sub-blocks of 32 values of Q4_K and Q5_K."""
    j = sub & 3
    first = _byte(block_ptr + 4 + j)
    second = _byte(block_ptr + 8 + j)
    third = _byte(block_ptr + 12 + j)
    scale = tl.where(sub < 4, first & 63, (third & 15) | ((first >> 2) & 48))
    minimum = tl.where(sub < 4, second & 63, (third >> 4) | ((second >> 2) & 48))
    scale = _float16(block_ptr) * scale.to(tl.float32)
    return scale, _float16(block_ptr + 2) * minimum.to(tl.float32)


@triton.jit
def _nibbles_of_16(ptr, part, ALIGNMENT: tl.constexpr):
    """Return levels of four bits of a run of 32, whose second half is in the high nibbles."""
    return _fields(_eight_bytes(ptr + 8 * (part & 1), ALIGNMENT), (part >> 1) << 2, 15)


@triton.jit
def _nibbles_of_32(ptr, part):
    """Return levels of four bits of runs of 64, whose second half is in the high nibbles."""
    at = 32 * (part >> 3) + 8 * (part & 3)
    return _fields(_eight_bytes(ptr + at, 8), part & 4, 15)


@triton.jit
def _pairs(ptr, part, ALIGNMENT: tl.constexpr):
    """Return levels of two bits of runs of 128, whose quarters lie one above the other."""
    at = 32 * (part >> 4) + 8 * (part & 3)
    if ALIGNMENT == 0:
        word = _eight_bytes_inside(ptr + at)
    else:
        word = _eight_bytes(ptr + at, ALIGNMENT)
    return _fields(word, (part >> 2 & 3) << 1, 3)


@triton.jit
def _fifth_bits(ptr, part):
    """Return bit k of a part's byte as bit 4 of byte k."""
    FIRST_BITS: tl.constexpr = 0x0101010101010101
    DIAGONAL_BITS: tl.constexpr = 0x8040201008040201  # bit k of byte k
    SEVEN_BITS: tl.constexpr = 0x7F7F7F7F7F7F7F7F
    # Loads of two bytes: neighbouring addresses of bytes would change the layout of all tensors.
    two_bytes = tl.load((ptr + 2 * (part >> 1)).to(tl.pointer_type(tl.uint16))).to(tl.uint32)
    byte = (two_bytes >> (8 * (part & 1))) & 255
    bits = byte.to(tl.uint64) * FIRST_BITS & DIAGONAL_BITS
    # A byte that is not zero carries into its bit 7.
    return _fields(bits + SEVEN_BITS, 7, 1) << 4


@triton.jit
def _fields(word, shift, MASK: tl.constexpr):
    """Return the bits of MASK of every byte of uint64 numbers, from bit `shift` of the byte on."""
    FIRST_BITS: tl.constexpr = 0x0101010101010101
    return (word >> shift) & (MASK * FIRST_BITS)


@triton.jit
def _eight_bytes(ptr, ALIGNMENT: tl.constexpr):
    """Return the eight bytes at each address as a uint64, the first byte lowest.

    ALIGNMENT: divides the addresses; the bytes of a load.
    """
    if ALIGNMENT == 8:
        word = tl.load(ptr.to(tl.pointer_type(tl.uint64)))
    elif ALIGNMENT == 4:
        words_ptr = ptr.to(tl.pointer_type(tl.uint32))
        word = tl.load(words_ptr).to(tl.uint64) | (tl.load(words_ptr + 1).to(tl.uint64) << 32)
    else:
        halves_ptr = ptr.to(tl.pointer_type(tl.uint16))
        low = tl.load(halves_ptr).to(tl.uint32) | (tl.load(halves_ptr + 1).to(tl.uint32) << 16)
        high = tl.load(halves_ptr + 2).to(tl.uint32) | (tl.load(halves_ptr + 3).to(tl.uint32) << 16)
        word = low.to(tl.uint64) | (high.to(tl.uint64) << 32)
    return word


@triton.jit
def _eight_bytes_inside(ptr):
    """Return the eight bytes at each even address as a uint64, the first byte lowest.

    Up to four bytes behind them are loaded too, so they must lie inside of the block. Three loads
    of four bytes are faster than four of two.
    """
    before = (ptr.to(tl.uint64) & 2).to(tl.int32)  # bytes that are loaded and not returned
    words_ptr = (ptr - before).to(tl.pointer_type(tl.uint32))
    shift = (8 * before).to(tl.uint32)
    first, second, third = tl.load(words_ptr), tl.load(words_ptr + 1), tl.load(words_ptr + 2)
    low = (first >> shift) | ((second << 1) << (31 - shift))
    high = (second >> shift) | ((third << 1) << (31 - shift))
    return low.to(tl.uint64) | (high.to(tl.uint64) << 32)


@triton.jit
def _float16(ptr):
    """Return the float16 at each address, as float32."""
    return tl.load(ptr.to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def _byte(ptr):
    """Return the byte at each address, as int32."""
    return tl.load(ptr).to(tl.int32)
