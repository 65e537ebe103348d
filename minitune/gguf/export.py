"""A model as one GGUF file: its keys, its tensors and their layout.

writer.py has the bytes; model_metadata.py and tokenizer_metadata.py have most keys. The values are
those of the merged 16-bit model, and tensors go from the merge to the file one by one. Two things
differ from Hugging Face's layout, and a file without them loads and generates nonsense:

- For some families llama.cpp's rotary embedding pairs the neighbouring rows 2i and 2i + 1 of a q
  or k head, not i and i + K/2: the rows are interleaved (Architecture.gguf_llama_layout);
- the divisors of some RoPE scalings become tensors (model_metadata.py).

Norms and biases are always float32. If a tensor's width is not a multiple of the block of a
quantised type (Q8_0: 32), that tensor is float16.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, LlamaFileType
from torch import Tensor

from minitune.atomic_files import read_json
from minitune.checkpoints.load_weights import check_all_known, open_model_folder
from minitune.checkpoints.merge import merged_tensors
from minitune.checkpoints.safetensors_folder import TIED_HEAD
from minitune.config.model_config import ModelConfig
from minitune.config.training_config import GGUF_METHODS
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.model_metadata import (
    additional_tensors,
    check_expressible,
    gguf_name,
    model_metadata,
)
from minitune.gguf.tokenizer_metadata import tokenizer_metadata
from minitune.gguf.writer import GGMLType, MetadataValue, TensorInfo, write_gguf
from minitune.model.causal_lm import CausalLM

FILE_TYPES = {
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "f32": LlamaFileType.ALL_F32,
}
QUANTIZATION_VERSION = 2  # of GGML's quantised types
# Key of generation_config.json -> (key below general.sampling, type)
SAMPLING_KEYS = {
    "temperature": ("temp", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", np.int32),
    "min_p": ("min_p", float),
    "repetition_penalty": ("penalty_repeat", float),
}


def export_gguf(
    model: CausalLM,
    path: str | Path,
    tokenizer: Tokenizer,
    quantization_method: str = "q8_0",
    merge_base: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Write the merged model as a GGUF file and return the file's path.

    path: a file name that ends in .gguf, or a folder for a file named after the base model.
    quantization_method: q8_0, f16, bf16 or f32.
    merge_base: weights to merge onto, as in checkpoints/merge.py.
    overwrite: replace an existing file once the new one is complete.

    Raises: ValueError if the file exists (unless `overwrite`), if the disk has no room, or if GGUF
        cannot express the model or the tokenizer.
    """
    organization, base = organization_and_name(model.name, model.folder)
    name = adapted_name(base) if model.lora else base
    target = _target(path, name, quantization_method, overwrite)
    metadata = {
        "general.name": _model_name(target, quantization_method),
        "general.base_model.count": 1,
        "general.base_model.0.name": base,
    }
    if organization:
        metadata["general.base_model.0.organization"] = organization
    tensors = merged_tensors(model, merge_base)
    _write_model(target, model.config, metadata, tokenizer, tensors, quantization_method)
    return target


def convert_folder(folder: str | Path, path: str | Path, quantization_method: str = "q8_0") -> Path:
    """Write the weights of a model folder as a GGUF file and return its path.

    The weights have 16 or 32 bits, or are FP8 and dequantised.

    path, quantization_method: as in `export_gguf`.

    Raises: ValueError as `export_gguf`, and if the folder holds 4-bit or unknown weights.
    """
    folder = Path(folder)
    config, stored = open_model_folder(folder)
    if stored.prequantized:
        raise ValueError(f"{folder}: holds 4-bit weights; load it as a model and export that")
    target = _target(path, folder.resolve().name, quantization_method)
    shapes = config.tensor_shapes()
    check_all_known(stored, {*shapes, TIED_HEAD})
    tensors = ((name, stored.load(name, shape)) for name, shape in shapes.items())
    metadata = {"general.name": _model_name(target, quantization_method)}
    tokenizer = Tokenizer.from_folder(folder)
    _write_model(target, config, metadata, tokenizer, tensors, quantization_method)
    return target


def gguf_file_name(name: str, folder: Path, method: str) -> str:
    """Return the file name that `export_gguf` chooses for an adapter on a base model.

    name: the base model as it was asked for. folder: the base model's folder.
    """
    return f"{adapted_name(organization_and_name(name, folder)[1])}-{method.upper()}.gguf"


def check_gguf(name: str, folder: Path) -> None:
    """Check that an adapter on a base model can become a GGUF file, before there is an adapter.

    name, folder: as in `gguf_file_name`.

    Raises: ValueError if GGUF cannot express the model or the tokenizer.
    """
    general_name = adapted_name(organization_and_name(name, folder)[1])
    _content_metadata(ModelConfig.from_folder(folder), Tokenizer.from_folder(folder), general_name)


def adapted_name(base: str) -> str:
    """Return the name of a base model with an adapter merged in."""
    return f"{base}-minitune"


def organization_and_name(name: str, folder: Path) -> tuple[str, str]:
    """Return organization and name of a base model.

    A model from the cache is called org/name. Any other has the name of its folder and "" as its
    organization.
    """
    if Path(name).expanduser() == folder:
        return "", folder.resolve().name
    return name.split("/")[0], name.split("/")[-1]


# ---- metadata


def _content_metadata(
    config: ModelConfig, tokenizer: Tokenizer, name: str
) -> dict[str, MetadataValue]:
    """Return the keys of sampling, architecture and tokenizer.

    name: general.name.

    Raises: ValueError if GGUF cannot express the model or the tokenizer.
    """
    check_expressible(config)
    metadata = sampling_metadata(tokenizer) | model_metadata(config)
    return metadata | tokenizer_metadata(tokenizer, config.vocab_size, name)


def sampling_metadata(tokenizer: Tokenizer) -> dict[str, MetadataValue]:
    """Return the sampling defaults of generation_config.json, from which llama.cpp starts.

    Raises: ValueError if a default is not a number.
    """
    path = tokenizer.folder / "generation_config.json"
    defaults = read_json(path, default={})
    if defaults.get("do_sample") is False:
        return {}
    metadata = {}
    for key, (gguf_key, kind) in SAMPLING_KEYS.items():
        value = defaults.get(key)
        if value is None:
            continue
        if type(value) not in (int, float) or not abs(value) < 2**31:  # NaN fails too
            raise ValueError(f"{path}: {key} is {value!r}, expected a number")
        metadata[f"general.sampling.{gguf_key}"] = kind(value)
    return metadata


def size_label(parameters: int) -> str:
    """Return a number in two digits or more: 134515008 -> 135M, 8030261248 -> 8.0B."""
    units = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))
    unit, letter = next((entry for entry in units if parameters >= entry[0]), units[-1])
    digits = 1 if parameters < 9.5 * unit else 0
    return f"{parameters / unit:.{digits}f}{letter}"


# ---- tensors


def interleave_rope_rows(tensor: Tensor, heads: int) -> Tensor:
    """Return the rows of a q or k weight or bias with i and i + K/2 of each head as neighbours."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def _write_model(
    target: Path,
    config: ModelConfig,
    metadata: dict[str, MetadataValue],
    tokenizer: Tokenizer,
    tensors: Iterator[tuple[str, Tensor]],
    method: str,
) -> None:
    """Write the file.

    metadata: the keys that name the model.
    tensors: (Hugging Face's name, tensor) in the order of `config.tensor_shapes()`.
    """
    kind = GGMLType[method.upper()]
    shapes = config.tensor_shapes()
    parameters = sum(math.prod(shape) for shape in shapes.values())
    metadata = {
        "general.architecture": config.architecture.gguf.name,
        "general.type": "model",
        **metadata,
        "general.size_label": size_label(parameters),
        "general.file_type": int(FILE_TYPES[method]),
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    metadata |= _content_metadata(config, tokenizer, metadata["general.name"])
    additional = additional_tensors(config)
    infos = [TensorInfo(name, tuple(x.shape), GGMLType.F32) for name, x in additional.items()]
    infos += [
        TensorInfo(gguf_name(name, config.architecture), shape, _storage_type(shape, kind))
        for name, shape in shapes.items()
    ]
    ordered = itertools.chain(additional.values(), _gguf_tensors(config, tensors))
    write_gguf(target, metadata, infos, ordered)


def _gguf_tensors(config: ModelConfig, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[Tensor]:
    """Yield the model's tensors in the order and layout of the file."""
    heads = {}  # linear -> heads, of the linears whose rows are interleaved
    if config.architecture.gguf.llama_layout:
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    shapes = config.tensor_shapes()
    for (name, shape), (found, tensor) in zip(shapes.items(), tensors, strict=True):
        assert (found, tuple(tensor.shape)) == (name, shape), (
            f"{found} {tuple(tensor.shape)} instead of {name} {shape}"
        )
        linear = name.split(".")[-2]
        if name.endswith("norm.weight") and config.architecture.norm_offset:
            tensor = tensor.float() + config.architecture.norm_offset  # llama.cpp has no offset
        yield interleave_rope_rows(tensor, heads[linear]) if linear in heads else tensor


def _storage_type(shape: tuple[int, ...], kind: GGMLType) -> GGMLType:
    """Return the type in which a tensor of this shape is stored."""
    if len(shape) == 1:
        return GGMLType.F32
    block = GGML_QUANT_SIZES[kind][0]
    return GGMLType.F16 if shape[1] % block else kind


# ---- file name


def _target(path: str | Path, name: str, method: str, overwrite: bool = False) -> Path:
    """Return the file to write.

    Raises: ValueError if the method is unknown, or the file exists and must not be replaced.
    """
    if not isinstance(method, str) or method not in GGUF_METHODS:
        known = ", ".join(GGUF_METHODS)
        raise ValueError(f"quantization_method {method!r} is not supported; choose one of {known}")
    path = Path(path)
    if path.suffix != ".gguf":
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path}: is a file; give a folder, or a file name that ends in .gguf")
        path = path / f"{name}-{method.upper()}.gguf"
    if path.exists() and not overwrite:
        raise ValueError(f"{path}: exists; remove it or choose another name")
    return path


def _model_name(target: Path, method: str) -> str:
    """Return general.name: the file's name without suffix and quantisation method."""
    return target.stem.removesuffix(f"-{method.upper()}")
