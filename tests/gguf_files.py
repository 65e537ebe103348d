"""Readers of GGUF files for the tests, through gguf-py."""

from pathlib import Path

from gguf import GGUFReader

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
