"""The place of a model: a folder, a GGUF file, or an id in the local Hugging Face cache.

$HF_HUB_CACHE/models--org--name/refs/main            the name of a snapshot
$HF_HUB_CACHE/models--org--name/snapshots/SNAPSHOT   the model's folder
"""

import os
from pathlib import Path

from minitune.read_files import file_exists, read_text
from minitune.system_folders import expanded

MODEL_CONFIG = "config.json"
GGUF_SUFFIX = ".gguf"


def resolve_model(name: str | Path, kind: str = "model") -> Path:
    """Return a model's folder or GGUF file, or a snapshot of `org/name` in Hugging Face's cache.

    The ref `main` names the snapshot. Nothing is downloaded.

    kind: word for the content, for errors. Only a "model" may be a GGUF file.

    Raises: ValueError that names the places searched and the way to get the model there.
    """
    folder = expanded(name)
    if folder.is_dir():
        return folder
    if file_exists(folder):
        if not is_gguf(folder):
            gguf = f", or a GGUF file, whose name ends in {GGUF_SUFFIX}" if kind == "model" else ""
            raise ValueError(f"{name} is a file; give the folder of the {kind}{gguf}")
        if kind != "model":
            raise ValueError(
                f"{name} is a GGUF file, which llama.cpp reads as it is; give the folder of the "
                f"{kind} in PEFT's format"
            )
        return folder
    if is_gguf(folder):
        raise ValueError(f"GGUF file {name} does not exist{_neighbours(folder)}")
    parts = str(name).split("/")
    if len(parts) != 2 or not all(parts) or str(name).startswith((".", "~")):
        raise ValueError(f"{kind} folder {name} does not exist{_neighbours(folder)}")
    entry = _hub_cache() / hub_entry(str(name))
    ref = entry / "refs" / "main"
    if file_exists(ref):
        snapshot = entry / "snapshots" / read_text(ref).strip()
        if snapshot.parent == entry / "snapshots" and snapshot.is_dir():
            return snapshot
    if folder.parent.is_dir():
        raise ValueError(f"{kind} folder {name} does not exist{_neighbours(folder)}")
    raise ValueError(
        f"{kind} {name} is neither a folder nor in the local cache {entry.parent}; nothing is "
        f"downloaded here: get it on a machine with a network (`hf download {name}`) and copy the "
        "folder, or give a folder's path"
    )


def is_gguf(path: Path) -> bool:
    """Return True if a model's place is named as a GGUF file, not as a folder."""
    return path.suffix.lower() == GGUF_SUFFIX and not path.is_dir()


def _neighbours(folder: Path) -> str:
    """Return the end of an error about a missing folder or GGUF file: its like beside it."""
    if not folder.parent.is_dir():
        return ""
    wanted, kind = (is_gguf, "GGUF file") if is_gguf(folder) else (Path.is_dir, "folder")
    beside = sorted(p.name for p in folder.parent.iterdir() if wanted(p) and p.name[0] != ".")
    return f"; {folder.parent.resolve()} holds {', '.join(beside[:8]) or f'no {kind}'}"


def hub_entry(name: str) -> str:
    """Return the name of the folder that Hugging Face's cache has for org/name."""
    return "models--" + name.replace("/", "--")


def is_hub_id(name: str, folder: Path) -> bool:
    """Return True if a model that was found in `folder` was named org/name."""
    return folder.parent.parent.name == hub_entry(name)


def _hub_cache() -> Path:
    """Return the Hugging Face cache: HF_HUB_CACHE, else `hub` in HF_HOME or in the user's cache."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return expanded(cache)
    user_cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    home = os.environ.get("HF_HOME") or user_cache / "huggingface"
    return expanded(home) / "hub"
