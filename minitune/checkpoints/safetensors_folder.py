"""From a folder of safetensors into the model, tensor by tensor, quantising as it streams.

Module names in the model equal the checkpoint's keys, so loading is a walk over the modules: each asks for its own
tensors, puts them on the device, and a linear becomes NF4 there before the next is read. The 16-bit model never exists
as a whole; host memory holds one tensor at a time (the files are memory-mapped).

A folder that bitsandbytes quantised (NF4, nested or plain scales) is taken as it stands: for a linear P it holds
P.weight (packed bytes), P.weight.absmax, P.weight.quant_map, with nesting P.weight.nested_absmax and
P.weight.nested_quant_map, and P.weight.quant_state.bitsandbytes__nf4, JSON in a uint8 tensor. Linears without those
keys were skipped (llm_int8_skip_modules) and stay in 16 bit.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_STATE = "weight.quant_state.bitsandbytes__"


def resolve_model(name: str | Path) -> Path:
    """A folder as it is, or an id `org/name` looked up offline in the Hugging Face cache (its ref `main`).

    Raises ValueError that says where it looked and how to get the model there.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    parts = str(name).split("/")
    if len(parts) != 2 or not all(parts) or str(name).startswith((".", "~")):
        raise ValueError(f"model folder {name} does not exist")
    entry = _hub_cache() / f"models--{parts[0]}--{parts[1]}"
    ref = entry / "refs" / "main"
    if ref.is_file() and (snapshot := entry / "snapshots" / ref.read_text().strip()).is_dir():
        return snapshot
    raise ValueError(
        f"model {name} is neither a folder nor in the local cache {entry.parent}; nothing is downloaded here: "
        f"get it on a machine with a network (`hf download {name}`) and copy the folder, or give a folder's path"
    )


def _hub_cache() -> Path:
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    home = (
        os.environ.get("HF_HOME")
        or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    )
    return Path(home).expanduser() / "hub"


class SafetensorsFolder:
    """The tensors of a model folder by name; the files are opened once and read lazily.

    Raises ValueError that names the file where the index is broken, or a shard is missing, truncated or not
    safetensors.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                expected = dict(json.loads(index.read_text())["weight_map"])
                shards = sorted({self.folder / file for file in expected.values()})
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{index}: not a safetensors index (JSON with a weight_map)"
                ) from None
        else:
            expected, whole = {}, self.folder / "model.safetensors"
            shards = [whole] if whole.is_file() else sorted(self.folder.glob("*.safetensors"))
            if not shards:
                raise ValueError(
                    f"{self.folder}: holds no *.safetensors; other weight formats are not read"
                )
        self._file_of: dict[str, Path] = {}
        self._files = {}
        for path in shards:
            if not path.is_file():
                raise ValueError(
                    f"{index}: names the shard {path.name}, which is not in the folder"
                )
            try:
                self._files[path] = safe_open(path, "pt")
            except SafetensorError as error:
                raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from None
            for name in self._files[path].keys():  # noqa: SIM118 (not a dictionary)
                if name in self._file_of:
                    raise ValueError(
                        f"{self.folder}: {name} is in both {self._file_of[name].name} and {path.name}"
                    )
                self._file_of[name] = path
        for name, file in expected.items():
            if self._file_of.get(name) != self.folder / file:
                raise ValueError(f"{index}: says that {file} holds {name}, but it does not")
        if expected and (extra := sorted(self._file_of.keys() - expected.keys())):
            raise ValueError(
                f"{self._file_of[extra[0]]}: holds {extra[0]}, which is missing from {index.name}"
            )

    def names(self) -> list[str]:
        return list(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def _slice(self, name: str):
        if name not in self._file_of:
            raise ValueError(f"{self.folder}: holds no tensor {name}")
        return self._files[self._file_of[name]].get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        known = {
            "F32": torch.float32,
            "F16": torch.float16,
            "BF16": torch.bfloat16,
            "U8": torch.uint8,
        }
        if (kind := self._slice(name).get_dtype()) not in known:
            raise ValueError(
                f"{self._file_of[name]}: {name} is {kind}; weights are F32, F16 or BF16"
            )
        return known[kind]

    def load(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """The tensor on the CPU; ValueError where `shape` is given and differs."""
        found, _ = self.shape(name), self.dtype(name)
        if shape is not None and found != tuple(shape):
            raise ValueError(
                f"{self._file_of[name]}: {name} has shape {found}, config.json asks for {tuple(shape)}"
            )
        return self._files[self._file_of[name]].get_tensor(name)

    @property
    def prequantized(self) -> bool:
        """Whether any linear is stored as NF4."""
        return any(f"{_STATE}nf4" in name for name in self._file_of)
