"""A reader of GGUF files: the keys, and the tensors as bytes or as float32 values.

The format is in writer.py. The reader parses the head in one pass over its bytes. gguf-py's reader
makes an array object of each token, so it takes 10 s and 0.6 GB for a vocabulary of 128,000 tokens;
the tests compare both.
"""

import math
import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFValueType
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

from minitune.gguf.quantization.quantize import dequantize
from minitune.read_files import require_regular_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # their little-endian files have the same layout
DEFAULT_ALIGNMENT = 32  # bytes
MAX_DIMS = 4
MAX_ENTRIES = 1 << 24  # of an array; vocabularies have less than a million
SCALAR_TYPES = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file.

    shape: in PyTorch's order, so the last axis is stored without gaps.
    position: of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    position: int

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row: of all values along the last axis."""
        block, size = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * size

    @property
    def nbytes(self) -> int:
        """Return the bytes of the data, without padding."""
        return math.prod(self.shape[:-1]) * self.row_bytes


class GgufReader:
    """An open GGUF file.

    metadata: key -> value; arrays are lists.
    tensors: name -> tensor, in the order of the file.

    Raises: ValueError that names the file if it is not a whole GGUF file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        require_regular_file(path)
        try:
            with self.path.open("rb") as file:
                self.size = self.path.stat().st_size
                if not self.size:
                    raise self._error("is empty; fetch the file again")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    self.metadata, self.tensors = self._parse(_Cursor(content))
        except EOFError:
            raise self._error("ends within its head; fetch the file again") from None
        except OSError as error:
            raise self._error(f"could not be read ({error.strerror or error})") from None
        for tensor in self.tensors.values():
            if tensor.position + tensor.nbytes > self.size:
                raise self._error(f"ends within the tensor {tensor.name}; fetch the file again")

    def data(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Return the bytes of some rows of a tensor, uint8 (rows, bytes of a row), on the CPU.

        A tensor with one axis is one row.
        """
        tensor = self.tensors[name]
        count = math.prod(tensor.shape[:-1])
        start, stop, _ = rows.indices(count)
        with self.path.open("rb") as file:
            file.seek(tensor.position + start * tensor.row_bytes)
            content = np.fromfile(file, np.uint8, (stop - start) * tensor.row_bytes)
        return torch.from_numpy(content).view(stop - start, tensor.row_bytes)

    def load(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Return the values of a tensor in its shape, float32, on the device."""
        tensor = self.tensors[name]
        return dequantize(self.data(name).to(device), tensor.type).view(tensor.shape)

    def _parse(self, cursor: "_Cursor") -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        """Return the keys and the tensors of a head."""
        if cursor.take(4) != MAGIC:
            raise self._error(
                "is not a GGUF file, which begins with the bytes GGUF; fetch the file again"
            )
        version, tensors, keys = cursor.unpack("<IQQ")
        if version not in VERSIONS:
            raise self._error(
                f"has version {version} of the format; expected 2 or 3, little-endian"
            )
        try:
            pairs = [(cursor.text(), cursor.value()) for _ in range(keys)]
            infos = [cursor.tensor() for _ in range(tensors)]
            metadata, found = _unique(pairs), _unique((info.name, info) for info in infos)
            alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
            return metadata, _placed(found, cursor.position, alignment)
        except (ValueError, KeyError) as error:
            raise self._error(f"has a head that cannot be read ({error})") from None

    def _error(self, reason: str) -> ValueError:
        return ValueError(f"{self.path}: {reason}")


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return a dict of pairs. Raise ValueError if a key or a tensor occurs twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} occurs twice")
        found[name] = value
    return found


def _placed(
    tensors: dict[str, StoredTensor], head_end: int, alignment: Any
) -> dict[str, StoredTensor]:
    """Return tensors whose positions count from the start of the file.

    As in llama.cpp, the data of a tensor starts at the first aligned byte behind the tensor before.

    tensors: their positions count from the start of the data.
    head_end: bytes of the head.

    Raises: ValueError if the alignment is no power of two, or a tensor has another position.
    """
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment {alignment!r}; expected a power of two")

    def aligned(position: int) -> int:
        return -(-position // alignment) * alignment

    start, expected, placed = aligned(head_end), 0, {}
    for name, tensor in tensors.items():
        if tensor.position != expected:
            raise ValueError(f"tensor {name!r} at {tensor.position}; expected {expected}")
        placed[name] = replace(tensor, position=start + tensor.position)
        expected = aligned(expected + tensor.nbytes)
    return placed


class _Cursor:
    """A position in the bytes of a file. Reading beyond them raises EOFError."""

    def __init__(self, content: mmap.mmap):
        self.content = content
        self.position = 0

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        end = self.position + count
        if count < 0 or end > len(self.content):
            raise EOFError
        taken = self.content[self.position : end]
        self.position = end
        return taken

    def unpack(self, form: str) -> tuple:
        """Return the next values in a format of `struct`."""
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def text(self) -> str:
        """Return the next string."""
        return self.take(self.unpack("<Q")[0]).decode()

    def value(self) -> Any:
        """Return the next value, with its type before it."""
        kind = GGUFValueType(self.unpack("<I")[0])
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            return self._numbers(kind, 1)[0]
        kind, count = GGUFValueType(self.unpack("<I")[0]), self.unpack("<Q")[0]
        if count > MAX_ENTRIES:
            raise ValueError(f"array of {count} entries")
        if kind == GGUFValueType.STRING:
            return [self.text() for _ in range(count)]
        return self._numbers(kind, count)

    def tensor(self) -> StoredTensor:
        """Return the next tensor; its position counts from the start of the data."""
        name, (dims,) = self.text(), self.unpack("<I")
        if not 1 <= dims <= MAX_DIMS:
            raise ValueError(f"tensor {name!r} with {dims} axes")
        sizes = self.unpack(f"<{dims}Q")
        kind, offset = self.unpack("<IQ")
        kind = GGMLType(kind)
        if min(sizes) < 1 or sizes[0] % GGML_QUANT_SIZES[kind][0]:
            raise ValueError(f"tensor {name!r} of type {kind.name} with the sizes {sizes}")
        return StoredTensor(name, sizes[::-1], kind, offset)

    def _numbers(self, kind: GGUFValueType, count: int) -> list:
        """Return the next `count` numbers of a type."""
        dtype = np.dtype(SCALAR_TYPES[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
