"""New model folders: weights, config.json, generation_config.json and the tokenizer.

A folder appears under its name when it is complete.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from minitune.atomic_files import atomic_folder, require_space, write_json
from minitune.checkpoints.safetensors_writer import Specs, total_bytes, write_model_files
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.model.causal_lm import CausalLM
from minitune.read_files import file_exists

SHARD_BYTES = 5e9  # limit of the tensors of one file


def check_new_folder(model: CausalLM, folder: Path) -> None:
    """Raise ValueError if a folder holds anything already, or is the model's own."""
    if folder.resolve() == model.folder.resolve():
        raise ValueError(f"{folder}: is the base model's own folder; choose another one")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not empty; remove it or choose another folder")


def write_model_folder(
    model: CausalLM,
    folder: Path,
    tokenizer: Tokenizer,
    config: dict[str, Any],
    specs: Specs,
    tensors: Iterator[tuple[str, Tensor]],
    metadata: dict[str, str],
    shard_bytes: float,
) -> None:
    """Write a model as a new folder.

    model: the model that was loaded; its folder gives generation_config.json.
    config: content of config.json.
    specs, tensors, metadata, shard_bytes: as in `write_model_files`.

    Raises: ValueError if the disk has no room for the tensors, or the folder cannot be written.
    """
    require_space(folder, total_bytes(specs))
    with atomic_folder(folder) as partial:
        write_model_files(partial, specs, tensors, metadata, shard_bytes)
        write_json(partial / "config.json", config)
        tokenizer.save_pretrained(partial)
        generation = model.folder / "generation_config.json"
        if file_exists(generation):
            shutil.copyfile(generation, partial / generation.name)
