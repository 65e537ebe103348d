"""The GGUF file format, version 3, little-endian: a writer that takes tensor after tensor.

    "GGUF", u32 version, i64 tensors, i64 keys
    keys x    { string key, i32 type, value }
    tensors x { string name, u32 dims, i64 size[dims], i32 type, u64 offset }
    zeros up to a multiple of 32
    tensors x { data, zeros up to a multiple of 32 }

A string is its u64 length and its UTF-8 bytes. A tensor's sizes begin with the fastest axis.

Shapes and types fix every offset, so everything before the data is written first and the tensors
stream after it: writing needs memory for one tensor, not for a model.

Q8_0 stores 32 values as one float16 scale d = max|x| / 127 and 32 signed bytes round(x / d): 8.5
bits a weight.

The file is written under a temporary name. Its head and the first bytes of each tensor are read
back and compared. Then it is flushed to disk and renamed.
"""

import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from gguf import GGMLQuantizationType as GGMLType
from gguf import GGUFValueType, quant_shape_to_byte_shape, quants
from torch import Tensor

from minitune.atomic_files import atomic_file, require_space

VERSION = 3
ALIGNMENT = 32  # bytes
MAX_NAME_BYTES = 63  # of a tensor, in ggml
CHUNK_VALUES = 1 << 22  # converted at a time: 16 MiB in float32, a few times that for Q8_0
CHECKED_BYTES = 64  # of each tensor, compared after writing
FLOAT_TYPES = (GGMLType.F32, GGMLType.F16)

MetadataValue = str | bool | int | float | np.int32 | list
# (Python type, GGUF type, struct format). The first matching Python type is used.
# A single int is unsigned; the ints of a list are signed.
SCALARS = (
    (bool, GGUFValueType.BOOL, "<?"),
    (np.int32, GGUFValueType.INT32, "<i"),
    (int, GGUFValueType.UINT32, "<I"),
    (float, GGUFValueType.FLOAT32, "<f"),
)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the file: name, shape in PyTorch's order, storage type."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType

    @property
    def nbytes(self) -> int:
        """Return the size of the data, without padding."""
        if self.type in FLOAT_TYPES:
            return math.prod(self.shape) * (4 if self.type == GGMLType.F32 else 2)
        return math.prod(quant_shape_to_byte_shape(self.shape, self.type))


def write_gguf(
    path: Path,
    metadata: dict[str, MetadataValue],
    infos: list[TensorInfo],
    tensors: Iterable[Tensor],
) -> None:
    """Write a GGUF file.

    metadata: the keys, in the order of the file.
    infos: names, shapes and types of the tensors, in the order of the file.
    tensors: the values, in the order of `infos`.

    Raises: ValueError if the disk has no room, the file cannot be written, or a value overflows
        float16.
    """
    head = _head(metadata, infos)
    require_space(path, len(head) + sum(_padded(info.nbytes) for info in infos))
    with atomic_file(path) as partial:
        with partial.open("wb") as file:
            file.write(head)
            starts = [
                _write_tensor(file, info, tensor)
                for info, tensor in zip(infos, tensors, strict=True)
            ]
        _check(partial, head, infos, starts)


def _head(metadata: dict[str, MetadataValue], infos: list[TensorInfo]) -> bytes:
    """Return everything before the data, padded."""
    parts = [b"GGUF", struct.pack("<Iqq", VERSION, len(infos), len(metadata))]
    parts += [_string(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for info in infos:
        name_bytes = len(info.name.encode())
        assert name_bytes <= MAX_NAME_BYTES, f"{info.name}: {name_bytes} bytes, ggml takes 63"
        sizes = info.shape[::-1]
        count = len(sizes)
        parts.append(_string(info.name))
        parts.append(struct.pack(f"<I{count}qiQ", count, *sizes, info.type, offset))
        offset += _padded(info.nbytes)
    head = b"".join(parts)
    return head.ljust(_padded(len(head)), b"\0")


def _value(value: MetadataValue) -> bytes:
    """Return the type and the bytes of a metadata value."""
    if isinstance(value, str):
        return struct.pack("<i", GGUFValueType.STRING) + _string(value)
    if isinstance(value, list):
        return _array(value)
    gguf_type, form = next(
        (gguf_type, form) for python, gguf_type, form in SCALARS if isinstance(value, python)
    )
    return struct.pack("<i", gguf_type) + struct.pack(form, value)


def _array(values: list) -> bytes:
    """Return the type and the bytes of an array of strings, bools, floats or ints."""
    head = struct.pack("<i", GGUFValueType.ARRAY)
    count = len(values)
    if not values or isinstance(values[0], str):
        strings = b"".join(_string(value) for value in values)
        return head + struct.pack("<iQ", GGUFValueType.STRING, count) + strings
    if isinstance(values[0], bool):
        return head + struct.pack(f"<iQ{count}?", GGUFValueType.BOOL, count, *values)
    if isinstance(values[0], float):
        return head + struct.pack(f"<iQ{count}f", GGUFValueType.FLOAT32, count, *values)
    return head + struct.pack(f"<iQ{count}i", GGUFValueType.INT32, count, *values)


def _string(text: str) -> bytes:
    """Return the length and the UTF-8 bytes of a text."""
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _padded(size: int) -> int:
    """Return `size` rounded up to a multiple of ALIGNMENT."""
    return size + -size % ALIGNMENT


def _write_tensor(file: BinaryIO, info: TensorInfo, tensor: Tensor) -> bytes:
    """Append one tensor's data and padding, and return the first bytes of the data."""
    assert tuple(tensor.shape) == info.shape, (
        f"{info.name}: {tuple(tensor.shape)} instead of {info.shape}"
    )
    start, written = b"", 0
    for block in _encoded(info, tensor):
        start = start or block.tobytes()[:CHECKED_BYTES]
        written += file.write(memoryview(np.ascontiguousarray(block)).cast("B"))
    assert written == info.nbytes, f"{info.name}: {written} bytes instead of {info.nbytes}"
    file.write(bytes(-written % ALIGNMENT))
    return start


def _encoded(info: TensorInfo, tensor: Tensor) -> Iterator[np.ndarray]:
    """Yield the tensor's data in blocks of some rows."""
    tensor = tensor.detach().cpu()
    rows = max(1, CHUNK_VALUES // (tensor[0].numel() or 1))
    for part in tensor.split(rows):
        if info.type == GGMLType.BF16 and part.dtype == torch.bfloat16:
            yield part.contiguous().view(torch.uint8).numpy()  # bit for bit
            continue
        values = part.float()
        if info.type == GGMLType.F16 and values.abs().max() > torch.finfo(torch.float16).max:
            raise ValueError(
                f"{info.name}: {values.abs().max():g} does not fit into float16; export as bf16"
            )
        yield quants.quantize(values.contiguous().numpy(), info.type)


def _check(path: Path, head: bytes, infos: list[TensorInfo], starts: list[bytes]) -> None:
    """Compare the head, the first bytes of each tensor and the size with those written.

    Raises: ValueError if any of them differs.
    """
    with path.open("rb") as file:
        same = file.read(len(head)) == head
        for info, start in zip(infos, starts, strict=True):
            position = file.tell()
            same = same and file.read(len(start)) == start
            file.seek(position + _padded(info.nbytes))
        same = same and file.tell() == path.stat().st_size
    if not same:
        raise ValueError(
            f"{path}: reads back differently than it was written; the disk may be faulty"
        )
