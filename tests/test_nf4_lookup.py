"""The PTX of the NF4 lookup gives the rounded products: an emulator runs its instructions."""

import re
import struct

import pytest
import torch

from minitune.kernels.nf4_lookup import lookup_text, table_text
from minitune.model.nf4 import CODE


def permuted(a: int, b: int, selectors: int) -> int:
    """Return the four bytes of (b, a) that the low three bits of each selector name."""
    pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    chosen = [selectors >> 4 * i & 15 for i in range(4)]
    assert max(chosen) < 8, "the fourth bit would repeat a sign"
    return int.from_bytes(bytes(pool[i] for i in chosen), "little")


def rounded(value: float, dtype: torch.dtype) -> int:
    """Return the bits of a float32 value, rounded to dtype."""
    return torch.tensor(value, dtype=torch.float32).to(dtype).view(torch.int16).item() & 0xFFFF


def emulate(text: str, inputs: dict[str, int | float]) -> dict[str, int | float]:
    """Return all registers after straight-line PTX."""
    r = dict(inputs)

    def read(operand):
        if operand.startswith("0f"):
            return struct.unpack("<f", int(operand[2:], 16).to_bytes(4, "little"))[0]
        return r[operand] if operand in r else int(operand, 0)

    for line in text.strip("{}\n").split("\n"):
        name, rest = line.rstrip(";").split(None, 1)
        if name == ".reg":
            continue
        to, *operands = (x.strip(" {}") for x in re.split(",", rest))
        if name == "mov.b32":  # of two halves
            r[to] = read(operands[0]) | read(operands[1]) << 16
            continue
        x = [read(operand) for operand in operands]
        if name == "mul.rn.f32":
            r[to] = (torch.tensor(x[0], dtype=torch.float32) * torch.tensor(x[1])).item()
        elif name == "cvt.rn.bf16x2.f32":
            r[to] = rounded(x[0], torch.bfloat16) << 16 | rounded(x[1], torch.bfloat16)
        elif name == "cvt.rn.f16.f32":
            r[to] = rounded(x[0], torch.float16)
        elif name == "prmt.b32":
            r[to] = permuted(x[0], x[1], x[2] & 0xFFFF)
        elif name == "and.b32":
            r[to] = x[0] & x[1]
        elif name == "shr.u32":
            r[to] = x[0] >> x[1]
        else:
            assert (name, operands[-1]) == ("lop3.b32", "0xEA"), line
            r[to] = x[0] & x[1] | x[2]
    return r


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [0.0371, -1.75])
def test_a_word_of_codes_becomes_the_rounded_products(dtype, scale):
    code = tuple(torch.tensor(CODE, dtype=torch.float32).tolist())
    scale = torch.tensor(scale, dtype=torch.float32).item()
    table = emulate(table_text(code, dtype), {"$8": scale})
    values = (torch.tensor(code) * torch.tensor(scale)).to(dtype).view(torch.int16).tolist()
    for data in (bytes(range(0x10, 0x100, 0x3C)), b"\x01\x23\x45\x67", b"\x89\xab\xcd\xef"):
        inputs = {"$4": int.from_bytes(data[:4], "little")}
        inputs |= {f"${5 + i}": table[f"${i}"] for i in range(8)}
        pairs = emulate(lookup_text(), inputs)
        found = [pairs[f"${i}"] >> shift & 0xFFFF for i in range(4) for shift in (0, 16)]
        codes = [nibble for byte in data[:4] for nibble in (byte >> 4, byte & 15)]
        assert found == [values[index] & 0xFFFF for index in codes]
