"""The small files of a model in a GGUF file, in a temporary folder that is read as a model folder.

The folder holds config.json and generation_config.json. The weights stay in the GGUF file. The
folder has the file's name, so an error that names one of its files names the model too.
"""

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from gguf import TokenType

from minitune.atomic_files import write_json
from minitune.checkpoints.resolve_model import is_gguf
from minitune.gguf.check_tensors import TOKENS
from minitune.gguf.general_metadata import SAMPLING_KEYS
from minitune.gguf.llama_cpp_specials import END_TOKENS
from minitune.gguf.open_gguf import named, open_gguf, read_config

# Key below tokenizer.ggml -> key of config.json
TOKEN_IDS = {"bos": "bos_token_id", "padding": "pad_token_id"}
END_KEYS = ("eos", "eot", "eom")
CONTROL = int(TokenType.CONTROL)


def model_files(base: str | Path) -> Path:
    """Return the folder that holds config.json and the tokenizer of a model.

    base: a model folder, which is returned, or a GGUF file. The folder of a file is made once a
        process, and removed when the process ends.

    Raises: ValueError that names the file if it is not a model that this code runs.
    """
    path = Path(base)
    if not is_gguf(path):
        return path
    return _folder_of(path.absolute(), *_version(path))


def _version(path: Path) -> tuple[int, int]:
    """Return size and time of change of a file, which tell its versions apart."""
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"{path}: could not be read ({error.strerror or error})") from None
    return status.st_size, status.st_mtime_ns


@cache
def _folder_of(path: Path, size: int, changed: int) -> Path:
    """Make the folder of a version of a file."""
    reader = open_gguf(path)
    config = read_config(reader)
    with named(path):
        ids = _token_ids(reader.metadata, config["vocab_size"])
        generation = ids | _sampling(reader.metadata)
    parent = Path(tempfile.mkdtemp(prefix="minitune-"))
    atexit.register(_remove, parent, os.getpid())
    folder = parent / path.name
    folder.mkdir()
    write_json(folder / "config.json", config | ids)
    write_json(folder / "generation_config.json", generation)
    return folder


def _remove(folder: Path, process: int) -> None:
    """Remove a folder, unless this is a fork of the process that made it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def _token_ids(metadata: dict[str, Any], rows: int) -> dict:
    """Return the ids of bos, pad and of the tokens that end a text.

    llama.cpp also ends a text at some tokens whose texts it knows. They count if the file calls
    them control tokens, up to the number of tokens that the keys of a file can name.
    """
    found: dict = {}
    for key, name in TOKEN_IDS.items():
        if (id := _token_id(metadata, key, rows)) is not None:
            found[name] = id
    ends = [_token_id(metadata, key, rows) for key in END_KEYS]
    types = metadata.get("tokenizer.ggml.token_type") or []
    ids = {text: id for id, text in enumerate(metadata[TOKENS]) if types[id : id + 1] == [CONTROL]}
    ends += [ids.get(text) for text in END_TOKENS.split()]
    unique = list(dict.fromkeys(id for id in ends if id is not None))[: len(END_KEYS)]
    if unique:
        found["eos_token_id"] = unique[0] if len(unique) == 1 else unique
    return found


def _token_id(metadata: dict[str, Any], key: str, rows: int) -> int | None:
    """Return the id of a special token, or None if the file names none."""
    name = f"tokenizer.ggml.{key}_token_id"
    id = metadata.get(name)
    if id is not None and (type(id) is not int or not 0 <= id < rows):
        raise ValueError(f"{name} is {id!r}; expected an id below {rows}")
    return id


def _sampling(metadata: dict[str, Any]) -> dict:
    """Return the sampling defaults of generation_config.json."""
    found = {}
    for name, (key, _) in SAMPLING_KEYS.items():
        if (value := metadata.get(f"general.sampling.{key}")) is not None:
            found[name] = value
    return found
