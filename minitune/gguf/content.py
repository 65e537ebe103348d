"""The content of a GGUF file without the values of its tensors: the keys, and names and types.

The keys come from general_metadata.py, model_metadata.py and tokenizer_metadata.py, and the types
of the tensors from mixtures.py.
"""

import math

from minitune.config.model_config import ModelConfig
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.general_metadata import sampling_metadata, size_label
from minitune.gguf.importance.importance import ImportanceMatrix
from minitune.gguf.mixtures import QUANTIZATION_METHODS, tensor_types
from minitune.gguf.model_metadata import (
    additional_tensors,
    check_expressible,
    gguf_name,
    model_metadata,
)
from minitune.gguf.tokenizer.tokenizer_check import check_tokenizer
from minitune.gguf.tokenizer.tokenizer_metadata import tokenizer_metadata
from minitune.gguf.writer import Content, MetadataValue, TensorInfo

QUANTIZATION_VERSION = 2  # of GGML's quantised types


def file_content(
    config: ModelConfig,
    method: str,
    name: str,
    origin: dict[str, MetadataValue],
    metadata: dict[str, MetadataValue],
    importance: ImportanceMatrix | None,
) -> Content:
    """Return the keys and the tensors of one file.

    name: general.name.
    origin: the keys that name the base model.
    metadata: the keys of `content_metadata`.
    """
    model_shapes = config.tensor_shapes()
    family = config.architecture
    shapes = {name: tuple(x.shape) for name, x in additional_tensors(config).items()}
    shapes |= {gguf_name(name, family): shape for name, shape in model_shapes.items()}
    types = tensor_types(config, shapes, method, importance is not None)
    keys = {
        "general.architecture": family.gguf.name,
        "general.type": "model",
        "general.name": name,
        **origin,
        "general.size_label": size_label(sum(map(math.prod, model_shapes.values()))),
        "general.file_type": int(QUANTIZATION_METHODS[method]),
        "general.quantization_version": QUANTIZATION_VERSION,
        **metadata,
        **(importance.metadata() if importance else {}),
    }
    return Content(keys, [TensorInfo(name, shape, types[name]) for name, shape in shapes.items()])


def content_metadata(
    config: ModelConfig, tokenizer: Tokenizer, name: str
) -> dict[str, MetadataValue]:
    """Return the keys of sampling, architecture and tokenizer.

    name: general.name.

    Raises: ValueError if GGUF cannot express the model, or llama.cpp would cut texts into other
        tokens than the tokenizer.
    """
    check_expressible(config)
    metadata = sampling_metadata(tokenizer) | model_metadata(config)
    metadata |= tokenizer_metadata(tokenizer, config.vocab_size, name)
    check_tokenizer({"general.name": name} | metadata, tokenizer)
    return metadata
