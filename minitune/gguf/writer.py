"""The GGUF file format, version 3, little-endian: a writer that takes tensor after tensor.

    "GGUF", u32 version, i64 tensors, i64 keys
    keys x    { string key, i32 type, value }
    tensors x { string name, u32 dims, i64 size[dims], i32 type, u64 offset }
    zeros up to a multiple of 32
    tensors x { data, zeros up to a multiple of 32 }

A string is its u64 length and its UTF-8 bytes. A tensor's sizes begin with the fastest axis.

Shapes and types fix every offset, so everything before the data is written first and the tensors
stream after it: writing needs memory for one tensor, not for a model.

Several files of one model are written in one pass. Each tensor is quantised once for each of its
types, on the tensor's device, and the bytes go to every file that has the tensor in this type.
"""

import contextlib
import functools
import itertools
import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFValueType
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

from minitune.gguf.quantization.fusion import choose_steps
from minitune.gguf.quantization.k_searches import Steps
from minitune.gguf.quantization.quantize import quantize
from minitune.progress import ProgressBar

VERSION = 3
ALIGNMENT = 32  # bytes
MAX_NAME_BYTES = 63  # of a tensor, in ggml
CPU = torch.device("cpu")
CHUNK_VALUES = 1 << 24  # quantised and written at a time: 32 MiB in 16 bit

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
        block, size = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size


@dataclass(frozen=True)
class Content:
    """The content of a GGUF file, except the values of its tensors.

    metadata: the keys, in the order of the file.
    infos: names, shapes and types of the tensors, in the order of the file.
    """

    metadata: dict[str, MetadataValue]
    infos: list[TensorInfo]

    @functools.cached_property
    def head(self) -> bytes:
        """Return everything before the data, padded."""
        return _head(self.metadata, self.infos)

    @property
    def nbytes(self) -> int:
        """Return the size of the file."""
        return len(self.head) + sum(_padded(info.nbytes) for info in self.infos)


def write_gguf(
    files: Mapping[Path, Content],
    tensors: Iterable[Tensor],
    importance: Mapping[str, Tensor] | None = None,
    progress: bool | None = None,
    device: torch.device = CPU,
) -> None:
    """Write GGUF files that hold the same tensors in different types. Not atomic.

    files: path -> content. All files have the same tensors in the same order.
    tensors: the values, in the order of the files.
    importance: mean squares of a linear's inputs, float32 (width,), by the tensor's name.
    progress: show a bar in bytes, as in progress.py.
    device: the device of the tensors, which quantises.

    Raises: ValueError if a value is not finite or overflows its type; OSError if a file cannot be
        written.
    """
    columns = zip(*(content.infos for content in files.values()), strict=True)
    total = sum(content.nbytes for content in files.values())
    steps = choose_steps(_values_by_type(files.values()), device, bool(importance))
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(path.open("wb")) for path in files]
        bar = stack.enter_context(ProgressBar("writing", total, show=progress))
        thread = stack.enter_context(_WritingThread(bar))
        for file, content in zip(opened, files.values(), strict=True):
            thread.write(file, content.head)
        for infos, tensor in zip(columns, tensors, strict=True):
            weights = (importance or {}).get(infos[0].name)
            _write_tensor(thread, opened, infos, tensor, weights, steps)
        thread.wait()


def _values_by_type(contents: Iterable[Content]) -> dict[GGMLType, int]:
    """Return the number of values of each type in some files."""
    counts: Counter[GGMLType] = Counter()
    for content in contents:
        for info in content.infos:
            counts[info.type] += math.prod(info.shape)
    return counts


class _WritingThread(contextlib.AbstractContextManager):
    """A thread that writes a block of bytes while the next block is quantised.

    bar: progress bar that shows the bytes that were written.
    """

    def __init__(self, bar: ProgressBar):
        self._bar, self._pool, self._pending = bar, ThreadPoolExecutor(1), None

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        """Wait until the block before is written, and have this one written."""
        self.wait()
        self._pending = self._pool.submit(file.write, data)

    def wait(self) -> None:
        """Wait until the last block is written.

        Raises: OSError if it could not be written.
        """
        if self._pending is not None:
            self._bar.update(self._pending.result())
            self._pending = None

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()


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
        # A vocabulary has 400,000 strings, for which a call each would take longer than the rest.
        encoded = [value.encode() for value in values]
        lengths = map(struct.Struct("<Q").pack, map(len, encoded))
        strings = b"".join(itertools.chain.from_iterable(zip(lengths, encoded, strict=True)))
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


def _write_tensor(
    thread: _WritingThread,
    files: Sequence[BinaryIO],
    infos: Sequence[TensorInfo],
    tensor: Tensor,
    importance: Tensor | None,
    steps: Steps,
) -> None:
    """Append one tensor's data and padding to each file.

    infos: the tensor's description in each file.
    """
    name, shape = infos[0].name, infos[0].shape
    assert tuple(tensor.shape) == shape, f"{name}: {tuple(tensor.shape)} instead of {shape}"
    rows = tensor.detach().reshape(-1, shape[-1])
    importance = None if importance is None else importance.to(rows.device)
    for part in rows.split(max(1, CHUNK_VALUES // shape[-1])):
        for kind in dict.fromkeys(info.type for info in infos):
            data = _quantized(name, part, kind, importance, steps)
            for file, info in zip(files, infos, strict=True):
                if info.type == kind:
                    thread.write(file, data)
    for file, info in zip(files, infos, strict=True):
        thread.write(file, bytes(-info.nbytes % ALIGNMENT))


def _quantized(
    name: str, rows: Tensor, kind: GGMLType, importance: Tensor | None, steps: Steps
) -> memoryview:
    """Return the bytes of some rows of a tensor in a type."""
    try:
        data = quantize(rows, kind, importance, steps)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return memoryview(data.cpu().numpy()).cast("B")
