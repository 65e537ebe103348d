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
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minitune.config import ModelConfig
from minitune.layers import Embedding, RMSNorm
from minitune.linear import Linear
from minitune.nf4 import BLOCKSIZE, NESTED_BLOCKSIZE, NF4, dynamic_map, nf4_code

_STATE = "weight.quant_state.bitsandbytes__"
NOT_WEIGHTS = ("rotary_emb.inv_freq", ".attention.bias", ".masked_bias")  # constants that old writers saved


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
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(home).expanduser() / "hub"


class Checkpoint:
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
                raise ValueError(f"{index}: not a safetensors index (JSON with a weight_map)") from None
        else:
            expected, whole = {}, self.folder / "model.safetensors"
            shards = [whole] if whole.is_file() else sorted(self.folder.glob("*.safetensors"))
            if not shards:
                raise ValueError(f"{self.folder}: holds no *.safetensors; other weight formats are not read")
        self._file_of: dict[str, Path] = {}
        self._files = {}
        for path in shards:
            if not path.is_file():
                raise ValueError(f"{index}: names the shard {path.name}, which is not in the folder")
            try:
                self._files[path] = safe_open(path, "pt")
            except SafetensorError as error:
                raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from None
            for name in self._files[path].keys():  # noqa: SIM118 (not a dictionary)
                if name in self._file_of:
                    raise ValueError(f"{self.folder}: {name} is in both {self._file_of[name].name} and {path.name}")
                self._file_of[name] = path
        for name, file in expected.items():
            if self._file_of.get(name) != self.folder / file:
                raise ValueError(f"{index}: says that {file} holds {name}, but it does not")
        if expected and (extra := sorted(self._file_of.keys() - expected.keys())):
            raise ValueError(f"{self._file_of[extra[0]]}: holds {extra[0]}, which is missing from {index.name}")

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
        known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
        if (kind := self._slice(name).get_dtype()) not in known:
            raise ValueError(f"{self._file_of[name]}: {name} is {kind}; weights are F32, F16 or BF16")
        return known[kind]

    def load(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """The tensor on the CPU; ValueError where `shape` is given and differs."""
        found, _ = self.shape(name), self.dtype(name)
        if shape is not None and found != tuple(shape):
            raise ValueError(f"{self._file_of[name]}: {name} has shape {found}, config.json asks for {tuple(shape)}")
        return self._files[self._file_of[name]].get_tensor(name)

    @property
    def prequantized(self) -> bool:
        """Whether any linear is stored as NF4."""
        return any(f"{_STATE}nf4" in name for name in self._file_of)


def check_quantization(config: ModelConfig) -> None:
    """Refuse, by name, a folder quantised in any way but bitsandbytes' NF4."""
    q = config.raw.get("quantization_config")
    if not q:
        return
    if not isinstance(q, dict):
        raise ValueError(f"quantization_config is {q!r}; expected an object")
    method = q.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise ValueError(f"the model is quantised with {method}; only bitsandbytes' NF4 or 16-bit weights are read")
    if q.get("load_in_8bit") or q.get("_load_in_8bit"):
        raise ValueError("the model is quantised with bitsandbytes' 8-bit (LLM.int8()); only its NF4 is read")
    if (kind := q.get("bnb_4bit_quant_type", "fp4")) != "nf4":
        raise ValueError(f"the model is quantised with bitsandbytes' {kind.upper()}; only its NF4 is read")


def load_weights(
    model: nn.Module, checkpoint: Checkpoint, device: torch.device, load_in_4bit: bool, progress: bool = False
) -> None:
    """Fill the modules of a weightless model; every linear but the head becomes NF4 where `load_in_4bit`.

    Raises ValueError that names the tensor where one is missing, of a wrong shape, or has no place in the model.
    """
    check_quantization(model.config)
    quantize = load_in_4bit and not checkpoint.prequantized  # what bitsandbytes skipped stays as stored
    used: set[str] = set()

    def fetch(name: str, shape: tuple[int, ...]) -> nn.Parameter:
        used.add(name)
        tensor = checkpoint.load(name, shape)
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{checkpoint.folder}: {name} is {tensor.dtype}, not a floating-point weight")
        return nn.Parameter(tensor.to(device), requires_grad=False)

    modules = [(name, m) for name, m in model.named_modules() if isinstance(m, (Embedding, Linear, RMSNorm))]
    for name, module in _bar(modules, progress):
        if name == "lm_head" and model.config.tie_word_embeddings:
            module.weight = model.model.embed_tokens.weight
            used.add("lm_head.weight")
            continue
        key = f"{name}.weight"
        if not isinstance(module, Linear):
            module.weight = fetch(key, module.shape)
            continue
        shape = (module.out_features, module.in_features)
        if state := [n for n in checkpoint.names() if n.startswith(f"{name}.{_STATE}")]:
            module.nf4, names = _prequantized(checkpoint, name, state[0], shape, device)
            used |= names
        elif quantize and name != "lm_head":
            weight = fetch(key, shape).data
            if weight.numel() % BLOCKSIZE:
                raise ValueError(f"{key} has shape {shape}, which NF4 cannot cut into blocks of {BLOCKSIZE}")
            module.nf4 = NF4.quantize(weight)
        else:
            module.weight = fetch(key, shape)
        if module.has_bias:
            module.bias = fetch(f"{name}.bias", (module.out_features,))
    unknown = sorted(n for n in checkpoint.names() if n not in used and not n.endswith(NOT_WEIGHTS))
    if unknown:
        raise ValueError(f"{checkpoint.folder}: {unknown[0]} has no place in a Llama ({len(unknown)} such tensors)")


def _bar(modules: list, progress: bool) -> Iterable:
    from tqdm import tqdm

    return tqdm(modules, desc="loading", unit="tensor", leave=False, disable=None if progress else True)


def _prequantized(
    checkpoint: Checkpoint, linear: str, state_name: str, shape: tuple[int, int], device: torch.device
) -> tuple[NF4, set[str]]:
    """A linear that bitsandbytes quantised, and the names of the tensors that it is made of."""
    kind = state_name.rsplit("__", 1)[1]
    if kind != "nf4":
        raise ValueError(f"{checkpoint.folder}: {linear} is quantised as {kind.upper()}; only NF4 is read")
    nested = f"{linear}.weight.nested_absmax" in checkpoint
    try:
        state = json.loads(bytes(checkpoint.load(state_name).tolist()))
        blocksize, found = int(state["blocksize"]), tuple(state["shape"])
        nested_blocksize = int(state.get("nested_blocksize", NESTED_BLOCKSIZE))
        offset = float(state["nested_offset"]) if nested else 0.0
        if blocksize < 1 or nested_blocksize < 1:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{checkpoint.folder}: {state_name} is not the JSON that bitsandbytes writes") from None
    if found != shape:
        raise ValueError(f"{checkpoint.folder}: {linear}.weight has shape {found}, config.json asks for {shape}")
    names = {state_name}

    def fetch(suffix: str, dtype: torch.dtype, *size: int) -> Tensor:
        names.add(name := f"{linear}.weight{suffix}")
        if (stored := checkpoint.dtype(name)) != dtype:
            raise ValueError(f"{checkpoint.folder}: {name} is {stored}; bitsandbytes writes {dtype}")
        return checkpoint.load(name, size).to(device)

    n = shape[0] * shape[1]
    blocks = -(-n // blocksize)
    weight = NF4(
        packed=fetch("", torch.uint8, n // 2, 1).view(-1),
        absmax=fetch(".absmax", torch.uint8 if nested else torch.float32, blocks),
        code=_same(fetch(".quant_map", torch.float32, 16), nf4_code(device)),
        shape=shape,
        blocksize=blocksize,
    )
    if nested:
        weight.nested_blocksize = nested_blocksize
        weight.nested_absmax = fetch(".nested_absmax", torch.float32, -(-blocks // nested_blocksize))
        weight.nested_code = _same(fetch(".nested_quant_map", torch.float32, 256), dynamic_map(device))
        weight.nested_offset = torch.tensor(offset, dtype=torch.float32, device=device)
    return weight, names


def _same(found: Tensor, shared: Tensor) -> Tensor:
    """The one shared copy of a code table, where the folder's table equals it."""
    return shared if torch.equal(found, shared) else found
