"""Merge the adapter into the base: W' = round16(float32(W) + s B A), and write a folder that any library loads.

Which W: `merge_base` chooses.
    "original"  the 16-bit weights of the base folder
    "nf4"       the dequantised NF4 weights in the compute dtype: what the adapter was trained against
    "auto"      "original" where the base folder has 16-bit weights, else "nf4"

Tensors come one at a time, in the model's order, and go straight to the file, so that merging needs memory for one
tensor and not for a model. That is why the safetensors files are written here: 8 bytes with the length of a JSON
header, the header (dtype, shape and byte range of each tensor), then the tensors' bytes; every size is known
beforehand. The header's metadata names the adapters that went in, so that none is merged twice.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from minitune.atomic_files import atomic_folder, require_space
from minitune.checkpoints.safetensors_folder import SafetensorsFolder
from minitune.data.tokenizer import Tokenizer
from minitune.model.causal_lm import CausalLM
from minitune.model.layers import Embedding, RMSNorm
from minitune.model.linear import Linear

MERGE_BASES = ("auto", "original", "nf4")
MERGED = "minitune.merged_adapters"  # key in the safetensors metadata: digests, separated by spaces
SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16"}


def merged_tensors(model: CausalLM, merge_base: str = "auto") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the merged model, one at a time, on the CPU, in the order of `merged_shapes`.

    The dtype is float16 where the base folder's is, else bfloat16. Without an adapter, or with one that was not
    trained, the result is the base. Raises ValueError, before the first tensor, for a base that is not there
    (`merge_base`) and for an adapter that was merged into this base before; later where a value does not fit.
    """
    checkpoint = SafetensorsFolder(model.folder)
    original = _use_original(model, checkpoint, merge_base)
    if adapter_digest(model) in _merged_adapters(model.folder):
        raise ValueError(
            f"{model.folder}: this adapter is merged into it already; load the base it was trained on"
        )
    return _merge(model, checkpoint if original else None, merged_dtype(model))


def merged_shapes(model: CausalLM) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what `merged_tensors` yields; names are Hugging Face's. A tied head is not among them.

    The model needs no weights for that.
    """
    shapes = {}
    for name, module in _modules(model):
        linear = isinstance(module, Linear)
        shapes[f"{name}.weight"] = (
            (module.out_features, module.in_features) if linear else tuple(module.shape)
        )
        if linear and module.has_bias:
            shapes[f"{name}.bias"] = (module.out_features,)
    return shapes


def merged_dtype(model: CausalLM) -> torch.dtype:
    """The 16-bit dtype of the merged tensors."""
    stored = model.model.embed_tokens.weight.dtype
    return torch.float16 if stored == torch.float16 else torch.bfloat16


def merge_to_folder(
    model: CausalLM,
    folder: str | Path,
    tokenizer: Tokenizer,
    merge_base: str = "auto",
    shard_bytes: float = 5e9,
) -> Path:
    """Write the merged model as a new folder: 16-bit safetensors in shards, config, generation config, tokenizer.

    Raises ValueError where the folder holds something already, there is no room for it, or see `merged_tensors`.
    Until everything is written, nothing is there under that name.
    """
    folder = Path(folder)
    if folder.resolve() == model.folder.resolve():
        raise ValueError(f"{folder}: is the base model's own folder; choose another one")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not empty; remove it or choose another folder")
    shapes, dtype = merged_shapes(model), merged_dtype(model)
    tensors = merged_tensors(model, merge_base)
    require_space(folder, sum(2 * math.prod(shape) for shape in shapes.values()))
    digests = _merged_adapters(model.folder) + (
        [digest] if (digest := adapter_digest(model)) else []
    )
    metadata = {"format": "pt", **({MERGED: " ".join(digests)} if digests else {})}
    with atomic_folder(folder) as partial:
        files = _plan_shards(shapes, shard_bytes)
        for file, names in files.items():
            write_safetensors(
                partial / file, {name: shapes[name] for name in names}, dtype, tensors, metadata
            )
        if len(files) > 1:
            index = {
                "metadata": {"total_size": sum(2 * math.prod(shape) for shape in shapes.values())},
                "weight_map": {name: file for file, names in files.items() for name in names},
            }
            _write_json(partial / "model.safetensors.index.json", index)
        _write_json(partial / "config.json", merged_config(model.config.raw, dtype))
        tokenizer.save_pretrained(partial)
        if (generation := model.folder / "generation_config.json").is_file():
            shutil.copyfile(generation, partial / generation.name)
    return folder


def merged_config(raw: dict, dtype: torch.dtype) -> dict:
    """config.json of the merged model: the base's, without its quantisation and with the new dtype."""
    config = {
        key: value
        for key, value in raw.items()
        if key not in ("quantization_config", "dtype", "torch_dtype")
    }
    key = (
        "dtype" if "dtype" in raw else "torch_dtype"
    )  # transformers 5 writes the first and reads both
    return {**config, key: str(dtype).removeprefix("torch.")}


def adapter_digest(model: CausalLM) -> str | None:
    """What tells one adapter from another: a hash of its values and scaling; None where it changes nothing."""
    linears = [(name, module) for name, module in model.linears() if module.lora_A is not None]
    if not any(linear.lora_B.weight.any() for _, linear in linears):
        return None
    digest = hashlib.sha256()
    for name, linear in linears:
        digest.update(f"{name} {linear.scaling}".encode())
        for factor in (linear.lora_A, linear.lora_B):
            digest.update(_bytes(factor.weight.detach().float().cpu()))
    return digest.hexdigest()[:32]


def write_safetensors(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterator[tuple[str, Tensor]],
    metadata: dict[str, str],
) -> None:
    """Write the tensors that `shapes` names, taking them from `tensors` one by one, in the same order."""
    header, at = {"__metadata__": metadata}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins on a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            found, tensor = next(tensors)
            assert (found, tuple(tensor.shape), tensor.dtype) == (name, shape, dtype), (
                f"{found} instead of {name}"
            )
            file.write(_bytes(tensor))


def _modules(model: CausalLM) -> Iterable[tuple[str, nn.Module]]:
    """The modules that own tensors of the checkpoint, in the model's order; without a tied head."""
    for name, module in model.named_modules():
        if isinstance(module, (Embedding, Linear, RMSNorm)) and not (
            module is model.lm_head and model.config.tie_word_embeddings
        ):
            yield name, module


def _use_original(model: CausalLM, checkpoint: SafetensorsFolder, merge_base: str) -> bool:
    if merge_base not in MERGE_BASES:
        raise ValueError(
            f"merge_base {merge_base!r} does not exist; choose from {', '.join(MERGE_BASES)}"
        )
    if merge_base == "original" and checkpoint.prequantized:
        raise ValueError(
            f"{model.folder}: holds 4-bit weights only; merge_base must be 'nf4' or 'auto'"
        )
    if merge_base == "nf4" and not any(linear.is_quantized for _, linear in model.linears()):
        raise ValueError(
            "merge_base 'nf4': the model was loaded in 16 bit and has no NF4 weights; choose 'original'"
        )
    return merge_base != "nf4" and not checkpoint.prequantized


def _merge(
    model: CausalLM, original: SafetensorsFolder | None, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for name, module in _modules(model):
        weight = f"{name}.weight"
        if not isinstance(module, Linear):
            yield weight, _rounded(weight, module.weight.detach(), dtype)
            continue
        if not module.is_quantized:
            base = module.weight.detach()
        elif original is not None:
            base = original.load(weight, (module.out_features, module.in_features)).to(model.device)
        else:
            base = module.weight_as(model.dtype)
        if module.lora_A is not None:
            A, B = (factor.weight.detach().float() for factor in (module.lora_A, module.lora_B))
            base = torch.addmm(base.float(), B, A, alpha=module.scaling)
        yield weight, _rounded(weight, base, dtype)
        if module.bias is not None:
            yield f"{name}.bias", _rounded(f"{name}.bias", module.bias.detach(), dtype)


def _rounded(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = values.to(dtype)
    if not torch.isfinite(rounded).all():
        largest = values.abs().max().item()
        raise ValueError(
            f"{name}: the merged weight is not finite in {dtype} (largest magnitude {largest:g})"
        )
    return rounded.cpu().contiguous()


def _merged_adapters(folder: Path) -> list[str]:
    """Digests of the adapters that were merged into the weights of this folder."""
    first = min(folder.glob("*.safetensors"), default=None)
    if first is None:
        return []
    with safe_open(first, "pt") as file:
        return (file.metadata() or {}).get(MERGED, "").split()


def _plan_shards(shapes: dict[str, tuple[int, ...]], shard_bytes: float) -> dict[str, list[str]]:
    """File name -> names of its tensors; a shard is full before it passes `shard_bytes`."""
    shards, size = [[]], 0
    for name, shape in shapes.items():
        needed = 2 * math.prod(shape)
        if shards[-1] and size + needed > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += needed
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": names
        for i, names in enumerate(shards, 1)
    }


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
