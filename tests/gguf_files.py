"""Readers of GGUF files for the tests, through gguf-py."""

from pathlib import Path

import torch
from gguf import GGUFReader

from minitune.gguf.writer import Content, MetadataValue, TensorInfo, write_gguf

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def tensors_of(path: Path) -> dict:
    """Return the file's tensors by name."""
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def metadata_of(path: Path) -> dict:
    """Return the file's keys and their values."""
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def copy_with_keys(source: Path, target: Path, metadata: dict[str, MetadataValue]) -> Path:
    """Write a copy of a file without quantised tensors that has other keys, and return its path."""
    tensors = GGUFReader(source).tensors
    infos = [TensorInfo(x.name, tuple(x.shape[::-1].tolist()), x.tensor_type) for x in tensors]
    values = [torch.from_numpy(x.data.copy()) for x in tensors]
    keys = {key: value for key, value in metadata.items() if not key.startswith("GGUF.")}
    write_gguf({target: Content(keys, infos)}, values)
    return target
