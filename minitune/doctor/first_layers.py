"""The first layers of a model as a model of its own, so that a large model is checked quickly.

Embedding, norm, head and tokenizer stay whole. The number of layers covers each kind of layer that
the model has (windows, rotations), and grows up to a number of parameters.
"""

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitune.atomic_files import require_space, write_json
from minitune.checkpoints.load_weights import open_model_folder
from minitune.checkpoints.merge import merged_config
from minitune.checkpoints.resolve_model import is_gguf
from minitune.checkpoints.safetensors_folder import WHOLE, SafetensorsFolder
from minitune.checkpoints.safetensors_writer import TensorSpec, total_bytes, write_safetensors
from minitune.config.model_config import ModelConfig
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.reader import GgufReader
from minitune.gguf.writer import ALIGNMENT, Content, TensorInfo

# Parameters in layers that a device checks in time.
LAYER_PARAMETERS = {"cpu": 16 << 20, "cuda": 512 << 20}
# Lists of config.json with an entry for each layer.
LAYER_LISTS = ("layer_types", "no_rope_layers")
LAYER = re.compile(r"(?:model\.layers|blk)\.(\d+)\.")
MAX_UINT32 = 2**32 - 1
# Keys of a GGUF file: the number of layers, behind the architecture, and the place of tensors.
BLOCK_COUNT, ALIGNMENT_KEY = "block_count", "general.alignment"


def layers_to_check(config: ModelConfig, device_type: str) -> int:
    """Return the number of layers to check of a model."""
    shapes = config.tensor_shapes()
    of_layer = sum(math.prod(shape) for name, shape in shapes.items() if _layer(name) == 0)
    covering = max(map(config.layer_kinds.index, set(config.layer_kinds))) + 1
    fitting = LAYER_PARAMETERS[device_type] // of_layer
    return min(max(2, covering, fitting), config.num_hidden_layers)


def write_first_layers(base: Path, count: int, target: Path) -> Path:
    """Write the first `count` layers of a folder or a GGUF file, and return the new model.

    target: an existing folder for the new folder or file.

    Raises: ValueError if the model cannot be read, or the disk has no room.
    """
    if is_gguf(base):
        return _write_file(base, count, target / base.name)
    folder = target / base.name
    folder.mkdir()
    _write_folder(base, count, folder)
    return folder


def _layer(name: str) -> int | None:
    """Return the number of the layer that a tensor belongs to; None for the others."""
    found = LAYER.match(name)
    return int(found[1]) if found else None


def _is_kept(name: str, count: int) -> bool:
    layer = _layer(name)
    return layer is None or layer < count


# ---- a folder


def _write_folder(base: Path, count: int, folder: Path) -> None:
    config, stored = open_model_folder(base)
    if stored.prequantized:
        names = [name for name in stored.names() if _is_kept(name, count)]
    else:
        names = [name for name in config.tensor_shapes() if _is_kept(name, count)]
    raw = _shorter_config(config.raw, count)
    if any(map(stored.is_dequantized, names)):  # FP8
        raw = merged_config(raw, torch.bfloat16)
    specs = {name: TensorSpec(stored.shape(name), _dtype(stored, name)) for name in names}
    require_space(folder, total_bytes(specs))
    write_safetensors(folder / WHOLE, specs, _tensors(stored, specs), stored.metadata())
    write_json(folder / "config.json", raw)
    Tokenizer.from_folder(base).save_pretrained(folder)
    generation = base / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)


def _dtype(stored: SafetensorsFolder, name: str) -> torch.dtype:
    return torch.bfloat16 if stored.is_dequantized(name) else stored.dtype(name)


def _tensors(
    stored: SafetensorsFolder, specs: dict[str, TensorSpec]
) -> Iterator[tuple[str, Tensor]]:
    for name, spec in specs.items():
        yield name, stored.load(name).to(spec.dtype).contiguous()


def _shorter_config(raw: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the config.json of the first `count` layers."""
    lists = {name: raw[name][:count] for name in LAYER_LISTS if isinstance(raw.get(name), list)}
    return raw | lists | {"num_hidden_layers": count}


# ---- a GGUF file


def _write_file(base: Path, count: int, path: Path) -> Path:
    reader = GgufReader(base)
    kept = [tensor for tensor in reader.tensors.values() if _is_kept(tensor.name, count)]
    infos = [TensorInfo(tensor.name, tensor.shape, tensor.type) for tensor in kept]
    content = Content(_shorter_metadata(reader.metadata, count), infos)
    require_space(path, content.nbytes)
    with path.open("wb") as file:
        file.write(content.head)
        for info in infos:
            file.write(memoryview(reader.data(info.name).numpy()).cast("B"))
            file.write(bytes(-info.nbytes % ALIGNMENT))
    return path


def _shorter_metadata(metadata: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the keys of the first `count` layers.

    Numbers that the writer has no type for are left out: counts of parameters, which no loader
    reads. So is the alignment, because the writer has its own.
    """
    architecture = f"{metadata['general.architecture']}."
    layers, shorter = metadata.get(architecture + BLOCK_COUNT), {}
    for key, value in metadata.items():
        is_too_large = type(value) is int and not 0 <= value <= MAX_UINT32
        if is_too_large or key == ALIGNMENT_KEY:
            continue
        is_list = isinstance(value, list) and len(value) == layers
        shorter[key] = value[:count] if is_list and key.startswith(architecture) else value
    return shorter | {architecture + BLOCK_COUNT: count}
