"""The search for a model: a folder, a GGUF file, an id, an adapter, or the folder of a run.

    models/llama       a model folder: config.json, safetensors and a tokenizer
    models/llama.gguf  a GGUF file, which holds all of that
    org/name           the same in the local Hugging Face cache
    runs/1/adapter     an adapter, whose adapter_config.json names its base
    runs/1             a run: its adapter, or its newest checkpoint until there is an adapter

An adapter names its base by an absolute path or by an id. A relative path, as other programs write,
is sought in the working directory and then in the folders above the adapter.
"""

import re
from pathlib import Path
from typing import NamedTuple

from minitune.checkpoints.adapter_config import CONFIG, WEIGHTS, read_adapter_config
from minitune.checkpoints.resolve_model import (
    GGUF_SUFFIX,
    MODEL_CONFIG,
    is_gguf,
    resolve_model,
)
from minitune.read_files import file_exists
from minitune.system_folders import expanded

ADAPTER = "adapter"  # folder of a run's result
RUN_FILES = ("outputs.json", "metrics.jsonl")  # a folder with one of them is a run's
CHECKPOINT_NAME = re.compile("checkpoint-([1-9][0-9]*)")


class ModelSource(NamedTuple):
    """The files to load a model from.

    base: folder or GGUF file of the base model, an absolute path.
    name: the base model as it was named: a path, or org/name.
    adapter: folder of the adapter to attach, or None.
    """

    base: Path
    name: str
    adapter: Path | None = None


def find_model(name: str | Path, adapter: str | Path | None = None) -> ModelSource:
    """Return the base model and the adapter that a name stands for.

    name: a model folder, a GGUF file, org/name, an adapter's folder, or a run's folder.
    adapter: the adapter to attach to the model `name`, as in `find_adapter`.

    Raises: ValueError if a folder is missing or holds something else, if an adapter's base is not
        found, or if `name` is an adapter and `adapter` another one.
    """
    folder = resolve_model(name)
    given = None if adapter is None else find_adapter(adapter)
    named = None if _holds_weights(folder) else _adapter_in(folder)
    if named is None:
        _check_model_folder(folder)
        return ModelSource(folder.absolute(), str(name), given)
    if given is not None and given.resolve() != named.resolve():
        raise ValueError(
            f"{name} is an adapter itself, so {adapter} would be a second one; give the base model "
            f"together with {adapter}, or only one of the two"
        )
    return _source_of_adapter(named)


def find_adapter(path: str | Path) -> Path:
    """Return the folder of an adapter: `path` itself, or in a run its adapter or last checkpoint.

    Raises: ValueError if the folder is missing or holds no adapter.
    """
    folder = resolve_model(path, "adapter")
    found = _adapter_in(folder)
    if found is not None:
        return found
    if _is_run(folder):
        raise ValueError(_unfinished(folder))
    raise ValueError(f"{folder}: holds no adapter; an adapter folder holds {CONFIG} and {WEIGHTS}")


def checkpoint_step(folder: Path) -> int | None:
    """Return N if the folder is named checkpoint-N, otherwise None."""
    found = CHECKPOINT_NAME.fullmatch(folder.name)
    return int(found[1]) if found else None


def _adapter_in(folder: Path) -> Path | None:
    """Return the folder of the adapter in an adapter's or a run's folder, or None."""
    if file_exists(folder / CONFIG):
        return folder
    if file_exists(folder / ADAPTER / CONFIG):
        return folder / ADAPTER
    saved = [path.parent for path in folder.glob(f"checkpoint-*/{CONFIG}")]
    return max(filter(checkpoint_step, saved), key=checkpoint_step, default=None)


def _holds_weights(folder: Path) -> bool:
    """Return True if a path is a whole model, perhaps with an adapter beside it."""
    if is_gguf(folder):
        return True
    files = {path.name for path in folder.glob("*.safetensors")}
    return file_exists(folder / MODEL_CONFIG) and bool(files - {WEIGHTS})


def _source_of_adapter(adapter: Path) -> ModelSource:
    """Return the source of a model from the adapter's folder."""
    name = read_adapter_config(adapter).get("base_model_name_or_path")
    remedy = f"load the base model by its own path, and pass adapter={str(adapter)!r}"
    if not isinstance(name, str) or not name:
        raise ValueError(f"{adapter / CONFIG}: names no base model; {remedy}")
    folder = expanded(name)
    is_relative = not folder.is_absolute()
    for place in adapter.resolve().parents if is_relative and not folder.exists() else ():
        if (place / folder / MODEL_CONFIG).is_file() or (place / folder).is_file():
            name = str(place / folder)
            break
    try:
        base = resolve_model(name)
    except ValueError as error:
        places = "the working directory and the folders above the adapter" if is_relative else ""
        tried = f"; {places} were searched" if places else ""
        raise ValueError(
            f"{adapter}: its base model is missing: {error}{tried}; {remedy}"
        ) from None
    if not _holds_weights(base) and _adapter_in(base) is not None:
        raise ValueError(f"{adapter / CONFIG}: names {name} as its base, an adapter; {remedy}")
    _check_model_folder(base)
    return ModelSource(base.absolute(), name, adapter)


def _check_model_folder(folder: Path) -> None:
    """Raise ValueError if a folder without config.json is of a known other kind."""
    if is_gguf(folder) or file_exists(folder / MODEL_CONFIG):
        return
    if _is_run(folder):
        raise ValueError(_unfinished(folder))
    if files := sorted(folder.glob(f"*{GGUF_SUFFIX}")):
        raise ValueError(
            f"{folder}: holds no {MODEL_CONFIG}; give a GGUF file in it by its own path, such as "
            f"{files[0]}"
        )


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in RUN_FILES)


def _unfinished(folder: Path) -> str:
    return (
        f"{folder}: is the folder of a run that has saved neither an adapter nor a checkpoint yet; "
        "wait for its first one, or give another run"
    )
