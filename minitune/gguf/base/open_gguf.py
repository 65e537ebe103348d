"""The door to a GGUF file as a model: every refusal of a file that cannot be trained on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitune.config.model_config import ModelConfig
from minitune.gguf.base.check_tensors import check_tensors
from minitune.gguf.base.config_from_metadata import config_from_metadata, supported_architecture
from minitune.gguf.base.rope_from_metadata import ROPE_TENSORS
from minitune.gguf.quantization.quantize import FLOAT_DTYPES
from minitune.gguf.reader import GgufReader
from minitune.kernels.ggml_reference import BLOCK_DEQUANTIZERS

READ_TYPES = (*(kind.name for kind in FLOAT_DTYPES), *BLOCK_DEQUANTIZERS)
# general.type -> what the file is, and the remedy
OTHER_KINDS = {
    "adapter": "an adapter; give the file of the model that it was trained on",
    "mmproj": "the projector of a multimodal model; give the file of the text model",
    "imatrix": "an importance matrix; give the file of the model that it was measured on",
}
PROJECTOR = "clip"  # general.architecture of projectors, whose older files have no general.type


def open_gguf(path: str | Path) -> GgufReader:
    """Return a reader of a GGUF file that holds a whole model of a supported architecture.

    Raises: ValueError that names the file, what is wrong with it, and the remedy.
    """
    reader = GgufReader(path)
    with named(reader.path):
        _check_kind(reader)
        supported_architecture(reader.metadata)
        _check_types(reader)
    return reader


def read_config(reader: GgufReader) -> dict:
    """Return the content of config.json, after a check of the tensors against it.

    Raises: ValueError that names the file if its keys or tensors are not those of a model that this
        code runs.
    """
    with named(reader.path):
        found = [name for name in ROPE_TENSORS if name in reader.tensors]
        divisors = {name: reader.load(name) for name in found}
        config = config_from_metadata(reader.metadata, reader.tensors, divisors)
        shapes = {name: tuple(values.shape) for name, values in divisors.items()}
        check_tensors(reader, ModelConfig.from_dict(config), shapes)
    return config


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Put the name of a file before the errors of the block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_kind(reader: GgufReader) -> None:
    """Raise ValueError if the file is not a whole model."""
    metadata = reader.metadata
    parts = metadata.get("split.count", 0)
    if parts not in (0, 1):
        raise ValueError(
            f"is one of {parts} parts of a model; join them with "
            "llama-gguf-split --merge FIRST-PART MODEL.gguf"
        )
    kind = metadata.get("general.type", "model")
    if metadata.get("general.architecture") == PROJECTOR:
        kind = "mmproj"
    if kind != "model":
        found = OTHER_KINDS.get(str(kind), f"of general.type {kind!r}; expected model")
        raise ValueError(f"is {found}")
    if not reader.tensors:
        raise ValueError("holds no tensors, only a vocabulary; give the file of the whole model")


def _check_types(reader: GgufReader) -> None:
    """Raise ValueError if a tensor has a type that is not read."""
    for name, tensor in reader.tensors.items():
        if tensor.type.name not in READ_TYPES:
            raise ValueError(
                f"the tensor {name} has the type {tensor.type.name}, which is not read; read are "
                f"{', '.join(READ_TYPES)}; take a file of such a type, or make one with "
                "llama-quantize from the F16 file"
            )
