"""Change a safetensors file by its structure: its length, its header and its values."""

import json
import struct
from random import Random
from typing import Any

from fuzz.byte_mutants import SIZES
from fuzz.json_mutants import JsonMutator, Raw, dump

DTYPES = (
    "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I64", "I32", "I16", "I8",
    "U8", "U16", "U32", "U64", "BOOL", "C64", "", "f32", "F31", 7, None,
)  # fmt: skip
NOT_FINITE = {  # dtype -> bytes of not-a-number, infinity and a huge value
    "F32": (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f"),
    "F16": (b"\x00\x7e", b"\x00\x7c", b"\xff\x7b"),
    "BF16": (b"\xc0\x7f", b"\x80\x7f", b"\x7f\x7f"),
    "F8_E4M3": (b"\x7f", b"\xff", b"\x7e"),
}
DIMENSIONS = (0, 1, 2, 3, -1, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1, 0.5, "1", None)


def parse(content: bytes) -> tuple[dict, bytes]:
    """Return the header and the data."""
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def serialise(header: str | bytes, data: bytes, size: int | None = None) -> bytes:
    """Return a file.

    size: length of the header that the file claims; None: the true one.
    """
    encoded = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded) if size is None else size) + encoded + data


def mutated(content: bytes, rng: Random, mutator: JsonMutator) -> bytes:
    """Return a file with one or two changes."""
    header, data = parse(content)
    for _ in range(rng.randint(1, 2)):
        kind = rng.randrange(12)
        names = [name for name in header if name != "__metadata__"]
        if kind == 0:
            return serialise(dump(header), data, rng.choice(SIZES))
        if kind == 1:
            return serialise(mutator.text(header), data)
        if kind == 2:
            data = data[: rng.randrange(len(data) + 1)] if rng.random() < 0.5 else data + bytes(9)
        elif kind == 3 and len(names) > 1:
            _swap(header, names, rng)
        elif kind in (4, 9, 10) and names:
            data = not_finite(header, data, rng, rng.choice(names))
        elif kind == 5:
            header["__metadata__"] = mutator.value(header.get("__metadata__"))
        elif names:
            _change_entry(header, rng.choice(names), rng, mutator)
    return serialise(dump(header), data)


def not_finite(header: dict, data: bytes, rng: Random, name: str) -> bytes:
    """Return the data with a value of one tensor that is not finite, or huge."""
    entry = header[name]
    if not isinstance(entry, dict) or entry.get("dtype") not in NOT_FINITE:
        return data
    value = rng.choice(NOT_FINITE[entry["dtype"]])
    offsets = entry.get("data_offsets")
    if not isinstance(offsets, list) or [type(place) for place in offsets] != [int, int]:
        return data
    start, end = offsets
    if end - start < len(value):
        return data
    place = start + rng.randrange((end - start) // len(value)) * len(value)
    return data[:place] + value + data[place + len(value) :]


def _swap(header: dict, names: list[str], rng: Random) -> None:
    """Rename a tensor, or exchange two entries."""
    first, second = rng.sample(names, 2)
    kind = rng.randrange(3)
    if kind == 0:
        header[first], header[second] = header[second], header[first]
    elif kind == 1:
        header[first] = header[second]  # the data overlap
    else:
        new = rng.choice(["x", "", first + ".weight", first.replace("0", "1"), "lm_head.weight"])
        header[new] = header.pop(first)


def _change_entry(header: dict, name: str, rng: Random, mutator: JsonMutator) -> None:
    """Change dtype, shape or offsets of one tensor."""
    entry: Any = header[name]
    if not isinstance(entry, dict):
        return
    kind = rng.randrange(5)
    shape = entry.get("shape")
    if kind == 0:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == 1 and isinstance(shape, list):
        changed = [*shape]
        if changed and rng.random() < 0.6:
            changed[rng.randrange(len(changed))] = rng.choice(DIMENSIONS)
        else:
            changed = rng.choice([changed[::-1], [*changed, 1], [], [1] * 2000, changed[:-1]])
        entry["shape"] = changed
    elif kind == 2:
        entry["data_offsets"] = [rng.choice(SIZES), rng.choice(SIZES)]
    elif (kind == 3 and shape == []) or isinstance(shape, Raw):
        entry["shape"] = [1]
    else:
        header[name] = mutator.mutated(entry, 1)


def unpack(content: bytes) -> dict[str, tuple[str, list, bytes]]:
    """Return name -> (dtype, shape, bytes) of an undamaged file."""
    header, data = parse(content)
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def pack(tensors: dict[str, tuple[str, list, bytes]]) -> bytes:
    """Return a file with these tensors."""
    header, parts, place = {}, [], 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(data)]}
        parts.append(data)
        place += len(data)
    return serialise(json.dumps(header), b"".join(parts))


def hostile_values(dtype: str, data: bytes, rng: Random) -> bytes:
    """Return the data of a tensor with values that are not finite, zero, huge or random."""
    if dtype not in NOT_FINITE or rng.random() < 0.3:
        return rng.randbytes(len(data)) if rng.random() < 0.5 else bytes(len(data))
    value = rng.choice(NOT_FINITE[dtype])
    if rng.random() < 0.3:
        return value * (len(data) // len(value))
    place = rng.randrange(max(1, len(data) // len(value))) * len(value)
    return (data[:place] + value + data[place + len(value) :])[: len(data)]
