"""Change a GGUF file by its structure: head, keys, tensor infos, alignment and data.

    "GGUF", version u32, tensors u64, keys u64
    keys x { name, type u32, value }       an array: element type u32, count u64, values
    tensors x { name, dimensions u32, size u64 each, type u32, offset u64 }
    padding to general.alignment, data

A name is its length u64 and its bytes.
"""

import struct
from random import Random
from typing import Any

from fuzz.byte_mutants import SIZES

FORMATS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
FLOATS = (float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e30, 1e-30)
TEXTS = (
    b" ",
    "▁▁".encode(),
    b"<|im_end|>",
    b"a b",
    b"<0x41>",
    b"",
    b"\xff\xfe",
    b"\x00",
    b"llama",
    b"gemma3",
    b"gpt2",
    b"qwen2",
    b"x" * 3000,
    b"{{",
    b"no_vocab",
)


class Gguf:
    """The parts of a file.

    keys: [name, type, value]; the value of an array is (element type, list).
    tensors: [name, sizes, type, offset].
    """

    def __init__(self, content: bytes):
        self._content, self._place = content, 0
        self.magic, self.version, tensors, keys = self._numbers("<4sIQQ")
        self.claimed = [tensors, keys]
        self.keys = [self._key() for _ in range(keys)]
        self.tensors = [self._tensor() for _ in range(tensors)]
        self.alignment = 32
        self.data = content[self._place + -self._place % self.alignment :]

    def _numbers(self, form: str) -> tuple:
        found = struct.unpack_from(form, self._content, self._place)
        self._place += struct.calcsize(form)
        return found

    def _text(self) -> bytes:
        (size,) = self._numbers("<Q")
        self._place += size
        return self._content[self._place - size : self._place]

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind == ARRAY:
            element, count = self._numbers("<IQ")
            return element, [self._value(element) for _ in range(count)]
        return self._numbers("<" + FORMATS[kind])[0]

    def _key(self) -> list:
        name = self._text()
        (kind,) = self._numbers("<I")
        return [name, kind, self._value(kind)]

    def _tensor(self) -> list:
        name = self._text()
        (dimensions,) = self._numbers("<I")
        sizes = list(self._numbers(f"<{dimensions}Q"))
        return [name, sizes, *self._numbers("<IQ")]

    def serialise(self) -> bytes:
        """Return the file."""
        parts = [struct.pack("<4sIQQ", self.magic, self.version, *self.claimed)]
        for name, kind, value in self.keys:
            parts += [_text(name), struct.pack("<I", kind & 0xFFFFFFFF), _value(kind, value)]
        for name, sizes, kind, offset in self.tensors:
            sizes = [size % (1 << 64) for size in sizes]
            parts += [_text(name), struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)]
            parts.append(struct.pack("<IQ", kind & 0xFFFFFFFF, offset % (1 << 64)))
        head = b"".join(parts)
        return head + bytes(-len(head) % self.alignment) + self.data


def _text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def _value(kind: int, value: Any) -> bytes:
    """Return a value in bytes; another type than the value's is written as far as it goes."""
    if isinstance(value, bytes):
        return _text(value)
    if isinstance(value, tuple):
        element, items = value
        head = struct.pack("<IQ", element, len(items))
        return head + b"".join(_value(element, item) for item in items)
    form = "<" + FORMATS.get(kind, "Q")
    if form[1] in "fd":
        return struct.pack(form, value)
    bits = 8 * struct.calcsize(form)
    value = int(value) if value == value and abs(value) != float("inf") else 0
    unsigned = value % (1 << bits)
    return unsigned.to_bytes(bits // 8, "little")


def mutated(content: bytes, rng: Random) -> bytes:
    """Return a file with one or two changes."""
    file = Gguf(content)
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.randrange(12)
        if kind == 0:
            _change_head(file, rng)
        elif kind < 8 and file.keys:
            _change_keys(file, rng)
        elif kind < 10 and file.tensors:
            _change_tensors(file, rng)
        else:
            _change_data(file, rng)
    return file.serialise()


def _change_head(file: Gguf, rng: Random) -> None:
    kind = rng.randrange(4)
    if kind == 0:
        file.version = rng.choice((0, 1, 2, 4, 0x03000000, 0xFFFFFFFF))
    elif kind == 1:
        file.claimed[rng.randrange(2)] = rng.choice(SIZES)
    elif kind == 2:
        file.magic = rng.choice((b"GGML", b"FUGG", b"\0\0\0\0", b"PK\3\4"))
    else:
        file.alignment = rng.choice((1, 8, 64, 4096))
        file.keys.append([b"general.alignment", 4, rng.choice((0, 1, 7, 64, 1 << 31, 4096))])
        file.claimed[1] += 1


def _change_keys(file: Gguf, rng: Random) -> None:
    key = rng.choice(file.keys)
    kind = rng.choice((*range(6), *[6] * 12))  # most changes keep the type
    if kind == 0:
        file.keys.remove(key)
        file.claimed[1] -= 1
    elif kind == 1:
        file.keys.append([key[0], *rng.choice(file.keys)[1:]])
        file.claimed[1] += 1
    elif kind == 2:
        other = rng.choice(file.keys)
        key[1:], other[1:] = other[1:], key[1:]
    elif kind == 3:
        key[0] = rng.choice((*TEXTS, key[0] + b"_", key[0].replace(b"llama", b"qwen2")))
    elif kind == 4 and not isinstance(key[2], bytes | tuple):
        key[1] = rng.choice(list(FORMATS))
    elif kind == 5:
        key[1] = rng.choice((13, 99, 0xFFFFFFFF, *FORMATS))
    else:
        key[2] = _other_value(key, rng)


def _other_value(key: list, rng: Random) -> Any:
    """Return another value of the type of a key."""
    value = key[2]
    if isinstance(value, bytes):
        return rng.choice((*TEXTS, value[:-1], value * 2, value[::-1]))
    if isinstance(value, tuple):
        element, items = value
        changed = list(items)
        kind = rng.choice((0, 0, 0, 0, 1, 2, 3, 4))
        if kind == 0 and changed:
            place = rng.randrange(len(changed))
            changed[place] = _other_value([b"", element, changed[place]], rng)
        elif kind == 1:
            changed = changed[: rng.randrange(len(changed) + 1)]
        elif kind == 2 and changed:
            changed.append(rng.choice(changed))
        elif kind == 3:
            return rng.choice((4, 5, 6, 8, 0)), [b"a", b"b"]
        else:
            rng.shuffle(changed)
        return element, changed
    if key[1] in (6, 12):
        return rng.choice(FLOATS)
    return rng.choice((rng.choice(SIZES), value + 1, value - 1, value * 2, value // 2, 0, 1, 7))


def _change_tensors(file: Gguf, rng: Random) -> None:
    tensor = rng.choice(file.tensors)
    kind = rng.randrange(7)
    if kind == 0:
        file.tensors.remove(tensor)
        file.claimed[0] -= 1
    elif kind == 1:
        file.tensors.append(list(tensor))
        file.claimed[0] += 1
    elif kind == 2:
        tensor[2] = rng.choice((*range(42), 99, 0xFFFFFFFF))
    elif kind == 3:
        tensor[3] = rng.choice((*SIZES, tensor[3] + 32, tensor[3] + 1, 0))
    elif kind == 4 and tensor[1]:
        tensor[1][rng.randrange(len(tensor[1]))] = rng.choice((*SIZES, 2, 31, 33, 64))
    elif kind == 5:
        tensor[1] = rng.choice([tensor[1][::-1], [*tensor[1], 1], [], [1] * 5, [0]])
    else:
        tensor[0] = rng.choice((*TEXTS, rng.choice(file.tensors)[0], tensor[0] + b".x"))


def _change_data(file: Gguf, rng: Random) -> None:
    kind = rng.randrange(3)
    if kind == 0 and rng.random() < 0.3:
        file.data = file.data[: rng.randrange(len(file.data) + 1)]
    elif kind < 2:
        place = rng.randrange(max(1, len(file.data) - 4))
        # In float16 and bfloat16, 0xFFFF is not a number; in float32, 0xFFFFFFFF.
        file.data = file.data[:place] + b"\xff\xff\xff\xff" + file.data[place + 4 :]
    else:
        file.data = file.data + rng.randbytes(40)


def legacy_imatrix(content: bytes, rng: Random) -> bytes:
    """Return an importance matrix of the older form with one change that keeps its layout."""
    place, fields = 4, []  # (place, form) of the numbers
    for _ in range(struct.unpack_from("<i", content)[0]):
        (length,) = struct.unpack_from("<i", content, place)
        place += 4 + length
        values = struct.unpack_from("<i", content, place + 4)[0]
        fields += [(place, "<i"), (place + 4, "<i")]
        fields += [(place + 8 + 4 * i, "<f") for i in range(values)]
        place += 8 + 4 * values
    fields += [(place, "<i"), (0, "<i")]
    place, form = rng.choice(fields[:2] + fields[-2:] + rng.sample(fields, 6))
    number = rng.choice(FLOATS) if form == "<f" else rng.choice((0, -1, 1, 2**31 - 1, -(2**31), 7))
    return content[:place] + struct.pack(form, number) + content[place + 4 :]
