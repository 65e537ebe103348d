"""The small files of a model in a GGUF file, in a temporary folder that is read as a model folder.

The folder holds config.json, generation_config.json and the files of the tokenizer, which is
checked to cut texts as llama.cpp does with the file. The weights stay in the GGUF file. The folder
has the file's name, so an error that names one of its files names the model too.
"""

import math
import shutil
import tempfile
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from minitune.atomic_files import write_json
from minitune.checkpoints.resolve_model import is_gguf
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.base.architecture_keys import shortest
from minitune.gguf.base.open_gguf import named, open_gguf, read_config
from minitune.gguf.general_metadata import SAMPLING_KEYS
from minitune.gguf.tokenizer.file_vocabulary import end_token_ids, special_token_ids
from minitune.gguf.tokenizer.tokenizer_check import check_tokenizer
from minitune.gguf.tokenizer.tokenizer_files import tokenizer_files
from minitune.system_folders import temporary_folder

NAMED_IDS = ("bos", "pad")  # special tokens whose ids config.json holds, beside the ends of texts


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
        ids = _token_ids(reader.metadata)
        generation = ids | _sampling(reader.metadata)
    parent = Path(tempfile.mkdtemp(prefix="minitune-", dir=temporary_folder()))
    # Finalize runs at the end of a forked process too, and only in the process that made it.
    Finalize(None, shutil.rmtree, args=(parent, True), exitpriority=0)
    folder = parent / path.name
    folder.mkdir()
    write_json(folder / "config.json", config | ids)
    write_json(folder / "generation_config.json", generation)
    with named(path):
        tokenizer_files(reader.metadata, folder)
    check_tokenizer(reader.metadata, Tokenizer.from_folder(folder), path)
    return folder


def _token_ids(metadata: dict[str, Any]) -> dict:
    """Return the ids of bos, pad and of the tokens that end a text."""
    special, ends = special_token_ids(metadata), end_token_ids(metadata)
    found: dict = {f"{name}_token_id": special[name] for name in NAMED_IDS if name in special}
    if ends:
        found["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return found


def _sampling(metadata: dict[str, Any]) -> dict:
    """Return the sampling defaults of generation_config.json.

    Raises: ValueError if a default is not a number.
    """
    found = {}
    for name, (key, _) in SAMPLING_KEYS.items():
        value = metadata.get(f"general.sampling.{key}")
        if value is None:
            continue
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"general.sampling.{key} is {value!r}; expected a number")
        found[name] = value if type(value) is int else shortest(value)
    return found
