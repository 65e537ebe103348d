"""A quick reader of GGUF files; gguf-py's takes a minute for a vocabulary of 128,000 tokens."""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gguf import GGUFValueType, quant_shape_to_byte_shape
from gguf.constants import GGMLQuantizationType

FORMS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
ALIGNMENT = 32


class Value(NamedTuple):
    """The value of a key: its types (an array has two) and content."""

    types: tuple[GGUFValueType, ...]
    content: Any


class StoredTensor(NamedTuple):
    """A tensor: sizes from the fastest axis on, type and bytes."""

    name: str
    sizes: tuple[int, ...]
    type: GGMLQuantizationType
    data: bytes


@dataclass
class GGUFContent:
    """The keys of a GGUF file by name, and its tensors in order."""

    keys: dict[str, Value]
    tensors: list[StoredTensor]


class _Cursor:
    """A place in the bytes of a file, which reading moves on."""

    def __init__(self, data: mmap.mmap):
        self.data, self.place = data, 0

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.place)
        self.place += struct.calcsize(form)
        return value

    def text(self) -> str:
        size = self.number("<Q")
        self.place += size
        return self.data[self.place - size : self.place].decode()

    def value(self) -> Value:
        kind = GGUFValueType(self.number("<I"))
        if kind != GGUFValueType.ARRAY:
            return Value((kind,), self._scalar(kind))
        inner, count = GGUFValueType(self.number("<I")), self.number("<Q")
        if inner == GGUFValueType.STRING:
            return Value((kind, inner), [self.text() for _ in range(count)])
        form = f"<{count}{FORMS[inner][1]}"
        values = list(struct.unpack_from(form, self.data, self.place))
        self.place += struct.calcsize(form)
        return Value((kind, inner), values)

    def _scalar(self, kind: GGUFValueType) -> Any:
        return self.text() if kind == GGUFValueType.STRING else self.number(FORMS[kind])


def read_gguf(path: Path) -> GGUFContent:
    """Return the keys and the tensors of a little-endian GGUF file of version 2 or 3."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data)
        assert cursor.number("<I") == int.from_bytes(b"GGUF", "little"), f"{path}: no GGUF file"
        cursor.number("<I")
        tensors, keys = cursor.number("<Q"), cursor.number("<Q")
        values = {cursor.text(): cursor.value() for _ in range(keys)}
        infos = []
        for _ in range(tensors):
            name, axes = cursor.text(), cursor.number("<I")
            sizes = tuple(cursor.number("<Q") for _ in range(axes))
            infos.append((name, sizes, cursor.number("<I"), cursor.number("<Q")))
        start = cursor.place + -cursor.place % ALIGNMENT
        found = []
        for name, sizes, type, offset in infos:
            kind = GGMLQuantizationType(type)
            size = math.prod(quant_shape_to_byte_shape(sizes[::-1], kind))
            stored = data[start + offset : start + offset + size]
            found.append(StoredTensor(name, sizes, kind, stored))
    return GGUFContent(values, found)
