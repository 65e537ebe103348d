"""Fill a model from a GGUF file. Every tensor stays in the type that it has in the file.

The blocks of quantised linears go to the device as they are, with the rows of q and k in Hugging
Face's order. So the model that is trained is the model that llama.cpp serves from the same file.
"""

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from minitune.checkpoints.finite_check import FiniteCheck
from minitune.checkpoints.load_weights import open_model_folder
from minitune.checkpoints.resolve_model import is_gguf
from minitune.checkpoints.safetensors_folder import SafetensorsFolder
from minitune.config.model_config import EMBEDDING, HEAD, ModelConfig
from minitune.gguf.base.model_files import model_files
from minitune.gguf.base.open_gguf import open_gguf
from minitune.gguf.file_weights import FileWeights
from minitune.gguf.quantization.quantize import FLOAT_DTYPES
from minitune.memory.stored_weights import StoredWeights
from minitune.model.causal_lm import CausalLM
from minitune.model.ggml_weight import GgmlWeight
from minitune.model.quantized_weight import (
    QuantizedWeight,
    set_frozen_weight,
    share_frozen_weight,
)
from minitune.progress import ProgressBar

META = torch.device("meta")


def open_base(base: Path) -> tuple[ModelConfig, SafetensorsFolder | FileWeights]:
    """Return the shape and the weights of a model in a folder or a GGUF file.

    Raises: ValueError that names the file, and the field or the tensor at fault.
    """
    if not is_gguf(base):
        return open_model_folder(base)
    config = ModelConfig.from_folder(model_files(base))
    return config, FileWeights(open_gguf(base), config)


def embedding_dtype(weights: SafetensorsFolder | FileWeights) -> torch.dtype | None:
    """Return the dtype of the embedding, or None if it is stored in few bits."""
    if isinstance(weights, FileWeights):
        return FLOAT_DTYPES.get(weights.type_of(EMBEDDING))
    return weights.dtype(EMBEDDING)


def load_file_weights(
    model: CausalLM, weights: FileWeights, device: torch.device, progress: bool | None = None
) -> None:
    """Fill the modules of a model that has no weights yet.

    progress: show a bar in bytes, as in progress.py.

    Raises: ValueError that names the tensor if it holds NaN or infinite values.
    """
    finite = FiniteCheck()
    shapes = model.config.tensor_shapes()
    with ProgressBar("loading", sum(map(weights.nbytes, shapes)), show=progress) as bar:
        for name in shapes:
            module_name, _, kind = name.rpartition(".")
            module, weight = model.get_submodule(module_name), _load(weights, name, device)
            finite.add(name, *_value_parts(weight))
            if kind == "weight":
                set_frozen_weight(module, weight)
            else:
                setattr(module, kind, nn.Parameter(weight, requires_grad=False))
            bar.update(weights.nbytes(name))
    if model.config.tie_word_embeddings:
        share_frozen_weight(model.lm_head, model.model.embed_tokens)
    finite.require(weights.error, "get the file again, or another one")


def stored_weight(
    weights: FileWeights, name: str, shape: tuple[int, ...]
) -> Tensor | QuantizedWeight:
    """Return an empty weight on the meta device, in the type that a tensor has in the file."""
    kind = weights.type_of(name)
    if kind in FLOAT_DTYPES:
        return torch.empty(shape, dtype=FLOAT_DTYPES[kind], device=META)
    return GgmlWeight.empty(shape, META, kind.name)


def file_bytes(weights: FileWeights, dtype: torch.dtype) -> StoredWeights:
    """Return the bytes of a model's weights as they are in the file.

    dtype: the compute dtype.
    """
    config = weights.config
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    types = Counter()
    for name, shape in config.tensor_shapes().items():
        if name not in (EMBEDDING, HEAD) and len(shape) == 2:
            types[weights.type_of(name).name] += weights.nbytes(name)
    return StoredWeights.of(
        config,
        lambda name, _: weights.nbytes(name),
        tuple(name for name, _ in types.most_common()),
        converts_head=FLOAT_DTYPES.get(weights.type_of(head)) != dtype,
    )


def _value_parts(weight: Tensor | QuantizedWeight) -> list[Tensor]:
    """Return the floating-point numbers that a weight is computed from."""
    return weight.scales() if isinstance(weight, GgmlWeight) else [weight]


def _load(weights: FileWeights, name: str, device: torch.device) -> Tensor | QuantizedWeight:
    """Return a tensor on the device, in its type."""
    kind = weights.type_of(name)
    if kind in FLOAT_DTYPES:
        return weights.load(name, device).to(FLOAT_DTYPES[kind])
    return GgmlWeight.of(weights.blocks(name).to(device), kind.name)
