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
from typing import NamedTuple

import torch
from torch import Tensor

from minitune.atomic_files import write_json
from minitune.checkpoints.safetensors_folder import INDEX, TORCH_DTYPES
from minitune.progress import ProgressBar

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
ALIGNMENT = 8  # bytes; the data begins on a multiple of this


class TensorSpec(NamedTuple):
    """The shape and dtype of a tensor that will be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Return the size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


Specs = dict[str, TensorSpec]  # by tensor name, in the order of the tensors


def specs_of_dtype(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> Specs:
    """Return the specs of tensors that share a dtype."""
    return {name: TensorSpec(shape, dtype) for name, shape in shapes.items()}


def total_bytes(specs: Specs) -> int:
    """Return the size of all tensors together, in bytes."""
    return sum(spec.nbytes for spec in specs.values())


def counted(
    tensors: Iterator[tuple[str, Tensor]], specs: Specs, label: str, progress: bool | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors and count their bytes in a bar.

    label, progress: the bar's label, and when to show it, as in progress.py.
    """
    with ProgressBar(label, total_bytes(specs), show=progress) as bar:
        for name, tensor in tensors:
            bar.update(specs[name].nbytes)
            yield name, tensor


def write_model_files(
    folder: Path,
    specs: Specs,
    tensors: Iterator[tuple[str, Tensor]],
    metadata: dict[str, str],
    shard_bytes: float,
) -> None:
    """Write the tensors into a folder: one model.safetensors, or shards and their index.

    specs: names, shapes and dtypes of all tensors.
    tensors: (name, tensor on the CPU) in the order of `specs`.
    metadata: texts that every file's header gets.
    shard_bytes: limit of the tensors of one file, in bytes.
    """
    files = plan_shards(specs, shard_bytes)
    for file, names in files.items():
        part = {name: specs[name] for name in names}
        write_safetensors(folder / file, part, tensors, metadata)
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        size = {"total_size": total_bytes(specs)}
        write_json(folder / INDEX, {"metadata": size, "weight_map": weight_map})


def plan_shards(specs: Specs, shard_bytes: float) -> dict[str, list[str]]:
    """Return file name -> names of its tensors.

    A shard holds as many tensors as fit into `shard_bytes`, and at least one.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": names for i, names in enumerate(shards, 1)}


def write_safetensors(
    path: Path,
    specs: Specs,
    tensors: Iterator[tuple[str, Tensor]],
    metadata: dict[str, str],
) -> None:
    """Write one file of the tensors that `specs` names.

    They are the next tensors of the iterator, which may hold more for another file.
    """
    with path.open("wb") as file:
        file.write(_header(specs, metadata))
        for name, spec in specs.items():
            found, tensor = next(tensors)
            assert (found, tuple(tensor.shape), tensor.dtype) == (name, *spec), (
                f"{found} {tuple(tensor.shape)} {tensor.dtype} instead of {name} {spec}"
            )
            file.write(tensor_bytes(tensor))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor, in row-major order."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _header(specs: Specs, metadata: dict[str, str]) -> bytes:
    """Return the header of a file, with its length before it."""
    header: dict[str, dict] = {"__metadata__": metadata}
    start = 0
    for name, spec in specs.items():
        end = start + spec.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
