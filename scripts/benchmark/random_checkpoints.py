"""Checkpoints with random weights, in the shapes of model_shapes.py.

Time and memory of a step depend on shapes alone, so the benchmark needs no real weights. A folder
holds the files that any library reads: config.json, bf16 safetensors in shards with their index,
and a tokenizer of bytes, so a text of ASCII letters has one token a letter. The same seed on the
same device draws the same weights. 8B takes 16.1 GB on disk.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from minitune.atomic_files import os_errors_as_value_error, require_space, write_json
from minitune.checkpoints.safetensors_writer import (
    specs_of_dtype,
    total_bytes,
    write_model_files,
)
from minitune.config.model_config import ModelConfig

SHARD_BYTES = 4e9
SPECIAL = ("<s>", "</s>", "<pad>")  # ids 0, 1 and 2; the bytes follow
INITIAL_STD = 0.02


def write_random_checkpoint(
    folder: str | Path, config: dict[str, Any], seed: int = 0, shard_bytes: float = SHARD_BYTES
) -> Path:
    """Write a checkpoint of this config.json and return its folder.

    config.json is written last, so a folder that has one is complete.

    Raises: ValueError if the folder holds a model already, or the disk has no room for it.
    """
    folder, model = Path(folder), ModelConfig.from_dict(config)
    if (folder / "config.json").exists():
        raise ValueError(f"{folder}: holds a model already; remove it or choose another folder")
    specs = specs_of_dtype(model.tensor_shapes(), torch.bfloat16)
    require_space(folder, total_bytes(specs))
    tensors = _random_tensors(model, seed)
    with os_errors_as_value_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_model_files(folder, specs, tensors, {"format": "pt"}, shard_bytes)
        _write_tokenizer(folder, config["max_position_embeddings"])
        write_json(folder / "config.json", config)
    return folder


def _random_tensors(model: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, bf16 tensor on the host): norms are 1, biases 0, and matrices normal.

    o_proj and down_proj add to the residual stream 2 * layers times in all. Their deviation is
    smaller by sqrt(2 * layers), as in GPT-2, so the stream keeps its size from layer to layer.
    """
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(seed)
    layers = model.num_hidden_layers
    for name, shape in model.tensor_shapes().items():
        if len(shape) == 1:
            value = 0.0 if name.endswith(".bias") else 1.0 - model.architecture.norm_offset
            yield name, torch.full(shape, value, dtype=torch.bfloat16)
            continue
        adds_to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = INITIAL_STD / math.sqrt(2 * layers) if adds_to_residual else INITIAL_STD
        values = torch.randn(shape, generator=generator, device=generator.device).mul_(std)
        yield name, values.to(torch.bfloat16).cpu()


def _write_tokenizer(folder: Path, positions: int) -> None:
    """Write a byte-level tokenizer without merges: one token a byte, no token around a text."""
    tokens = (*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": positions,
        **dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=True)),
    }
    write_json(folder / "tokenizer_config.json", settings)
