"""The keys of a GGUF file that name the model, and its sampling defaults; the files' names."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minitune.checkpoints.resolve_model import is_gguf, is_hub_id
from minitune.config.training_config import GGUF_METHODS
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.writer import MetadataValue
from minitune.read_files import read_json

# Key of generation_config.json -> (key below general.sampling, type)
SAMPLING_KEYS = {
    "temperature": ("temp", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", np.int32),
    "min_p": ("min_p", float),
    "repetition_penalty": ("penalty_repeat", float),
}


# ---- names


def adapted_name(base: str) -> str:
    """Return the name of a base model with an adapter merged in."""
    return f"{base}-minitune"


def organization_and_name(name: str, base: Path) -> tuple[str, str]:
    """Return organization and name of a base model.

    A model from the cache is called org/name. Any other has the name of its folder, or of its GGUF
    file without the type, and "" as its organization.

    name: the base model as it was asked for. base: its folder or GGUF file.
    """
    if is_gguf(base):
        types = "|".join(GGUF_METHODS)
        return "", re.sub(f"[-._]({types})$", "", base.stem, flags=re.IGNORECASE)
    if not is_hub_id(name, base):
        return "", base.resolve().name
    return name.split("/")[0], name.split("/")[-1]


def origin_metadata(organization: str, base: str) -> dict[str, MetadataValue]:
    """Return the keys that name the base model of an adapter or of a merged model.

    organization, base: as of `organization_and_name`.
    """
    origin = {"general.base_model.count": 1, "general.base_model.0.name": base}
    if organization:
        origin["general.base_model.0.organization"] = organization
    return origin


def file_name(name: str, method: str) -> str:
    """Return the name of a model's file of a type."""
    return f"{name}-{method.upper()}.gguf"


def name_of_file(path: Path, method: str) -> str:
    """Return the model's name that a file name has, without suffix and type."""
    return re.sub(f"[-._]{method}$", "", path.stem, flags=re.IGNORECASE)


def check_targets(
    path: str | Path,
    name: str,
    methods: Sequence[str],
    overwrite: bool = False,
    base: Path | None = None,
) -> list[Path]:
    """Return the file of each type.

    path: a folder, or a file name that ends in .gguf if there is one type.
    name: the model's name, for the names of files in a folder.
    overwrite: accept that a file exists.
    base: the GGUF file of the base model, which is never replaced; None if there is none.

    Raises: ValueError if a file exists or is the base, or the path does not fit the types.
    """
    path = Path(path)
    if not is_gguf(path):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path}: is a file; give a folder, or a file name that ends in .gguf")
        targets = [path / file_name(name, method) for method in methods]
    elif len(methods) > 1:
        raise ValueError(
            f"{path}: is one file, but {len(methods)} types were asked for "
            f"({', '.join(methods)}); give a folder"
        )
    else:
        targets = [path]
    for target in targets:
        if base is not None and os.path.realpath(target) == os.path.realpath(base):
            raise ValueError(f"{target}: is the base model's own file; choose another name")
        if target.exists() and not overwrite:
            raise ValueError(f"{target}: exists; remove it or choose another name")
    return targets


# ---- keys


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
