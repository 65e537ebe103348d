"""Safetensors files and their index, written tensor by tensor.

The header fixes every size, so it is written first and the tensors stream after it: writing needs
memory for one tensor, not for a model. A file is

    u64      length of the header in bytes, little-endian
    header   JSON: name -> dtype, shape and byte range; "__metadata__" -> texts; padded with spaces
    data     the tensors' bytes, without gaps
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from minitune.atomic_files import write_json
from minitune.checkpoints.safetensors_folder import INDEX, TORCH_DTYPES

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
ALIGNMENT = 8  # bytes; the data begins on a multiple of this

Shapes = dict[str, tuple[int, ...]]  # by tensor name, in the order of the tensors


def total_bytes(shapes: Shapes, dtype: torch.dtype) -> int:
    """Return the size of all tensors together, in bytes."""
    return sum(math.prod(shape) * dtype.itemsize for shape in shapes.values())


def write_model_files(
    folder: Path,
    shapes: Shapes,
    dtype: torch.dtype,
    tensors: Iterator[tuple[str, Tensor]],
    metadata: dict[str, str],
    shard_bytes: float,
) -> None:
    """Write the tensors into a folder: one model.safetensors, or shards and their index.

    shapes: names and shapes of all tensors.
    tensors: (name, tensor of `dtype` on the CPU) in the order of `shapes`.
    metadata: texts that every file's header gets.
    shard_bytes: limit of the tensors of one file, in bytes.
    """
    files = plan_shards(shapes, dtype, shard_bytes)
    for file, names in files.items():
        part = {name: shapes[name] for name in names}
        write_safetensors(folder / file, part, dtype, tensors, metadata)
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        size = {"total_size": total_bytes(shapes, dtype)}
        write_json(folder / INDEX, {"metadata": size, "weight_map": weight_map})


def plan_shards(shapes: Shapes, dtype: torch.dtype, shard_bytes: float) -> dict[str, list[str]]:
    """Return file name -> names of its tensors.

    A shard holds as many tensors as fit into `shard_bytes`, and at least one.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": names for i, names in enumerate(shards, 1)}


def write_safetensors(
    path: Path,
    shapes: Shapes,
    dtype: torch.dtype,
    tensors: Iterator[tuple[str, Tensor]],
    metadata: dict[str, str],
) -> None:
    """Write one file of the tensors that `shapes` names.

    They are the next tensors of the iterator, which may hold more for another file.
    """
    with path.open("wb") as file:
        file.write(_header(shapes, dtype, metadata))
        for name, shape in shapes.items():
            found, tensor = next(tensors)
            assert (found, tuple(tensor.shape), tensor.dtype) == (name, shape, dtype), (
                f"{found} {tuple(tensor.shape)} {tensor.dtype} instead of {name} {shape} {dtype}"
            )
            file.write(tensor_bytes(tensor))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor, in row-major order."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _header(shapes: Shapes, dtype: torch.dtype, metadata: dict[str, str]) -> bytes:
    """Return the header of a file, with its length before it."""
    header: dict[str, dict] = {"__metadata__": metadata}
    start = 0
    for name, shape in shapes.items():
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
