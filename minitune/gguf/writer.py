"""The GGUF file format, version 3, little-endian: writing one, tensor by tensor.

    "GGUF", u32 version, i64 tensors, i64 keys
    keys x    { string key, i32 type, value }              string: u64 length, UTF-8 bytes
    tensors x { string name, u32 dims, i64 size[dims], i32 type, u64 offset }      sizes from the fastest axis on
    zeros up to a multiple of 32, then the tensors' data, each padded to a multiple of 32

Shapes and types fix every offset, so all that comes before the data is written first and the tensors stream after it:
memory for one tensor, not for a model. Q8_0 keeps 32 values as one float16 scale d = max|x| / 127 and 32 signed bytes
round(x / d): 8.5 bits a weight.

The file is written under a temporary name, flushed to disk, compared in places, and renamed: under its name there is a
whole file or none.
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

ALIGNMENT = 32
CHUNK = 1 << 22  # values converted at a time; Q8_0 takes a few times their 16 MiB in float32
CHECKED = 64  # bytes of each tensor that are compared after writing

MetadataValue = str | bool | int | float | np.int32 | list[str] | list[int] | list[float]
_SCALARS = (  # the first that a Python value is an instance of; int is u32 on its own, i32 in a list
    (bool, GGUFValueType.BOOL, "<?"),
    (np.int32, GGUFValueType.INT32, "<i"),
    (int, GGUFValueType.UINT32, "<I"),
    (float, GGUFValueType.FLOAT32, "<f"),
)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the file: its name, its shape as PyTorch has it, how its values are stored."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType

    @property
    def nbytes(self) -> int:
        if self.type in (GGMLType.F32, GGMLType.F16):
            return math.prod(self.shape) * (4 if self.type == GGMLType.F32 else 2)
        return math.prod(quant_shape_to_byte_shape(self.shape, self.type))


def write_gguf(
    path: Path,
    metadata: dict[str, MetadataValue],
    infos: list[TensorInfo],
    tensors: Iterable[Tensor],
) -> None:
    """Write a new GGUF file at `path` from tensors in the order of `infos`.

    Raises ValueError where there is no room or the file cannot be written, and where a value overflows float16.
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
    """Everything before the data, padded."""
    parts = [b"GGUF", struct.pack("<Iqq", 3, len(infos), len(metadata))]
    parts += [_string(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for info in infos:
        assert len(info.name.encode()) < 64, f"tensor name {info.name} is too long for ggml"
        sizes = info.shape[::-1]
        parts.append(
            _string(info.name)
            + struct.pack(f"<I{len(sizes)}qiQ", len(sizes), *sizes, info.type, offset)
        )
        offset += _padded(info.nbytes)
    head = b"".join(parts)
    return head.ljust(_padded(len(head)), b"\0")


def _value(value: MetadataValue) -> bytes:
    """The type and the bytes of a metadata value."""
    if isinstance(value, str):
        return struct.pack("<i", GGUFValueType.STRING) + _string(value)
    if not isinstance(value, list):
        kind, form = next(
            (kind, form) for python, kind, form in _SCALARS if isinstance(value, python)
        )
        return struct.pack("<i", kind) + struct.pack(form, value)
    head = struct.pack("<i", GGUFValueType.ARRAY)
    if not value or isinstance(value[0], str):
        return (
            head
            + struct.pack("<iQ", GGUFValueType.STRING, len(value))
            + b"".join(map(_string, value))
        )
    kind, form = (
        (GGUFValueType.FLOAT32, "f") if isinstance(value[0], float) else (GGUFValueType.INT32, "i")
    )
    return head + struct.pack(f"<iQ{len(value)}{form}", kind, len(value), *value)


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _padded(size: int) -> int:
    return size + -size % ALIGNMENT


def _write_tensor(file: BinaryIO, info: TensorInfo, tensor: Tensor) -> bytes:
    """Append one tensor's data and padding; its first bytes."""
    assert tuple(tensor.shape) == info.shape, (
        f"{info.name}: {tuple(tensor.shape)} instead of {info.shape}"
    )
    start, written = b"", 0
    for block in _encoded(info, tensor):
        start = start or block.tobytes()[:CHECKED]
        written += file.write(memoryview(np.ascontiguousarray(block)).cast("B"))
    assert written == info.nbytes, f"{info.name}: {written} bytes instead of {info.nbytes}"
    file.write(bytes(-written % ALIGNMENT))
    return start


def _encoded(info: TensorInfo, tensor: Tensor) -> Iterator[np.ndarray]:
    """The tensor's bytes, some rows at a time."""
    tensor = tensor.detach().cpu()
    rows = max(1, CHUNK // (tensor[0].numel() or 1))
    for part in tensor.split(rows):
        if info.type == GGMLType.BF16 and part.dtype == torch.bfloat16:
            yield part.contiguous().view(torch.uint8).numpy()  # as it is, and bit for bit
            continue
        values = part.float()
        if info.type == GGMLType.F16 and values.abs().max() > torch.finfo(torch.float16).max:
            raise ValueError(
                f"{info.name}: {values.abs().max():g} does not fit into float16; export as bf16"
            )
        yield quants.quantize(values.contiguous().numpy(), info.type)


def _check(path: Path, head: bytes, infos: list[TensorInfo], starts: list[bytes]) -> None:
    """Read the head and where each tensor's data begins, and compare with what was written."""
    with path.open("rb") as file:
        whole = file.read(len(head)) == head
        for info, start in zip(infos, starts, strict=True):
            at = file.tell()
            whole = whole and file.read(len(start)) == start
            file.seek(at + _padded(info.nbytes))
        whole = whole and file.tell() == path.stat().st_size
    if not whole:
        raise ValueError(
            f"{path}: reads back differently than it was written; the disk may be faulty"
        )
