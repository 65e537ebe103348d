"""The identity of a base model: its config, and a fingerprint of its weights.

state.json of a checkpoint holds both. A run is continued on the same base only, wherever the files
lie. Names, types and shapes of all tensors are hashed, and 16 rows of each tensor, from the first
to the last one. A tensor of at most 64 KiB is hashed as a whole.

A model that was trained further or quantised again differs in nearly every row, and is told apart.
A change in a few rows that are not sampled is missed. The fingerprint does not depend on the
division into shards. It reads 196 MB of a Llama 3 70B in 16 bit, right after these were loaded.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitune.checkpoints.safetensors_folder import SafetensorsFolder
from minitune.config.model_config import ModelConfig
from minitune.gguf.base.open_gguf import open_gguf
from minitune.model.causal_lm import CausalLM

WHOLE_BYTES = 1 << 16  # largest tensor that is hashed as a whole
SAMPLED_ROWS = 16  # of a larger tensor
SHOWN_CHANGES = 3  # fields in the error
NOT_COMPARED = ("raw", "architecture")  # config.json as it was written; the family's values
OLDER_VERSION = (
    "{} was saved by an older version, without a fingerprint of the base: whether the weights "
    "and config.json are still the same is not checked"
)


def base_identity(model: CausalLM) -> dict[str, Any]:
    """Return the config and the fingerprint of the weights, as values of JSON.

    Raises: ValueError that names the file if the base model cannot be read any more.
    """
    return {"weights": _fingerprint(model), "config": _config_values(model.config)}


def _config_values(config: ModelConfig) -> dict[str, Any]:
    """Return every value that the model is built from."""
    values = {
        item.name: getattr(config, item.name)
        for item in fields(config)
        if item.name not in NOT_COMPARED
    }
    values["model_type"] = config.architecture.model_type
    values["ropes"] = [vars(rope) for rope in config.ropes]
    return json.loads(json.dumps(values))  # tuples become lists, as in state.json


# ---- weights


def _fingerprint(model: CausalLM) -> str:
    """Return the fingerprint of the weights in a model's files."""
    if model.gguf is not None:
        reader = open_gguf(model.gguf)
        described = (
            (name, tensor.type.name, tensor.shape, tensor.nbytes)
            for name, tensor in reader.tensors.items()
        )
        return _digest(described, reader.data)
    stored = SafetensorsFolder(model.folder, bool(model.config.wrapper))
    described = (
        (name, stored.stored_dtype(name), stored.shape(name), stored.nbytes(name))
        for name in stored.names()
    )
    return _digest(described, stored.rows)


def _digest(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]],
    read: Callable[[str, slice], Tensor],
) -> str:
    """Return the SHA-256 of tensors.

    tensors: name, type, shape and bytes of each one.
    read: returns rows of a tensor by its name.
    """
    digest = hashlib.sha256()
    for name, kind, shape, nbytes in sorted(tensors):
        digest.update(json.dumps([name, kind, shape]).encode())
        count = shape[0] if len(shape) > 1 else 1
        if nbytes <= WHOLE_BYTES or count <= SAMPLED_ROWS:
            digest.update(_bytes(read(name, slice(None))))
            continue
        for i in range(SAMPLED_ROWS):
            row = i * (count - 1) // (SAMPLED_ROWS - 1)
            digest.update(_bytes(read(name, slice(row, row + 1))))
    return digest.hexdigest()


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.contiguous().view(-1).view(torch.uint8).numpy())


# ---- compared


def check_same_base(source: Path, before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Check that a run is continued on the base that it began with.

    source: the checkpoint.
    before, now: identities of the run (resume.py) with the values of `base_identity`.

    Returns: a note if the checkpoint holds no fingerprint, otherwise None.

    Raises: ValueError that names the changed fields or the changed weights.
    """
    if not {"weights", "config"} <= before.keys():
        return OLDER_VERSION.format(source)
    remedy = (
        "restore what the run began with, or start again with overwrite=True; "
        f"adapter={str(source)!r} in another output_dir trains its adapter further on this base"
    )
    if changes := _changed_leaves(before["config"], now["config"]):
        shown = ", ".join(changes[:SHOWN_CHANGES])
        raise ValueError(
            f"{source} cannot be continued: config.json of {now['model']} changed: {shown}; "
            f"{remedy}"
        )
    if before["weights"] != now["weights"]:
        raise ValueError(
            f"{source} cannot be continued: the weights of {now['model']} are not those that the "
            f"run began with; {remedy}"
        )
    return None


def _changed_leaves(before: Any, now: Any, name: str = "") -> list[str]:
    """Return `name old -> new` for each changed value; `ropes.0.theta` is in a list of objects.

    A field that only one version of this package knows is not compared.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        pairs = [(key, before[key], now[key]) for key in now if key in before]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = [(str(i), *pair) for i, pair in enumerate(zip(before, now, strict=True))]
    else:
        return [] if before == now else [f"{name} {before} -> {now}"]
    found = []
    for key, old, new in pairs:
        found += _changed_leaves(old, new, f"{name}.{key}" if name else key)
    return found
