"""Merge the adapter into the base, W' = round16(float32(W) + s B A), and write a model folder.

`merge_base` chooses W:

    "original"  the 16-bit weights of the base folder; FP8 weights are dequantised to float32
    "nf4"       the dequantised NF4 weights, on which the adapter was trained, in the compute dtype
    "auto"      "original" if the base folder holds 16-bit weights, otherwise "nf4"

A model from a GGUF file has one base, the file's weights, dequantised to float32 as llama.cpp has
them.

Tensors come one at a time, in the model's order and on its device, and go straight to the file, so
merging needs memory for one tensor. The metadata of the files names the adapters that were merged
into them, so that no adapter is merged twice.
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from minitune.checkpoints.load_weights import open_weights
from minitune.checkpoints.model_folder import SHARD_BYTES, check_new_folder, write_model_folder
from minitune.checkpoints.safetensors_folder import SafetensorsFolder
from minitune.checkpoints.safetensors_writer import (
    Specs,
    counted,
    specs_of_dtype,
    tensor_bytes,
)
from minitune.config.training_config import MERGE_BASES
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.model.causal_lm import CausalLM
from minitune.model.linear import Linear

MERGED = "minitune.merged_adapters"  # key in the safetensors metadata: digests, separated by spaces


def merged_tensors(
    model: CausalLM, merge_base: str = "auto", names: Collection[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Return an iterator of (name, tensor on the model's device) over the merged model.

    Names, shapes and order are those of `ModelConfig.tensor_shapes`; `merged_dtype` is the dtype.
    Without an adapter, or with an untrained one, the tensors are the base's.

    names: the tensors to return; None returns all.

    Raises: ValueError, before the first tensor, if `merge_base` is not available or if this adapter
        is already merged into the base; later, if a merged value is not finite in the dtype.
    """
    stored = _stored_weights(model)
    use_original = _use_original(model, stored, merge_base)
    if adapter_digest(model) in _merged_adapters(stored):
        raise ValueError(
            f"{model.folder}: this adapter is merged into it already; "
            "load the base it was trained on"
        )
    wanted = [n for n in model.config.tensor_shapes() if names is None or n in names]
    return _merge(model, stored if use_original else None, merged_dtype(model), wanted)


def merge_to_folder(
    model: CausalLM,
    folder: str | Path,
    tokenizer: Tokenizer,
    merge_base: str = "auto",
    shard_bytes: float = SHARD_BYTES,
    progress: bool | None = None,
) -> Path:
    """Write the merged model as a new folder and return the folder.

    The folder holds 16-bit safetensors, config.json, generation_config.json and the tokenizer. It
    appears under its name when it is complete.

    merge_base: weights to merge onto, as in the module's docstring.
    shard_bytes: limit of the tensors of one file, in bytes.
    progress: show a bar in bytes, as in progress.py.

    Raises: ValueError if the folder holds anything already, or if the disk has no room for the
        model. See also `merged_tensors`.
    """
    folder = Path(folder)
    check_new_folder(model, folder)
    dtype, specs = merged_dtype(model), merged_specs(model)
    tensors = ((name, tensor.cpu()) for name, tensor in merged_tensors(model, merge_base))
    tensors = counted(tensors, specs, "merging", progress)
    config = merged_config(model.config.raw, dtype)
    metadata = merged_metadata(model, adapter_digest(model))
    write_model_folder(model, folder, tokenizer, config, specs, tensors, metadata, shard_bytes)
    return folder


def merge_text(model: CausalLM, merge_base: str) -> str:
    """Return a line about the base that a merge uses, and how to answer as in training.

    Raises: ValueError if `merge_base` is not available.
    """
    original = _use_original(model, _stored_weights(model), merge_base)
    form = "16-bit" if original else model.formats_text
    if model.lora is None:
        return f"without an adapter: the {form} weights of {model.name}"
    text = f"the adapter into the {form} weights of {model.name}"
    if original and (model.lora_base == "nf4" or model.is_nf4):
        text += '; merge_base="nf4" answers as in training'
    return text


def merged_specs(model: CausalLM) -> Specs:
    """Return the shapes and the dtype of the merged tensors."""
    return specs_of_dtype(model.config.tensor_shapes(), merged_dtype(model))


def merged_metadata(model: CausalLM, digest: str | None) -> dict[str, str]:
    """Return the metadata of a safetensors file that names the adapters in its weights.

    digest: hash of an adapter that is merged now, besides those in the base folder; or None.
    """
    digests = _merged_adapters(_stored_weights(model))
    if digest is not None:
        digests.append(digest)
    return {"format": "pt"} | ({MERGED: " ".join(digests)} if digests else {})


def merged_config(raw: dict, dtype: torch.dtype) -> dict:
    """Return the merged model's config.json: the base's with `dtype` and without quantisation."""
    dropped = ("quantization_config", "dtype", "torch_dtype")
    config = {key: value for key, value in raw.items() if key not in dropped}
    # transformers 5 writes `dtype` and reads both
    key = "dtype" if "dtype" in raw else "torch_dtype"
    return {**config, key: str(dtype).removeprefix("torch.")}


def adapter_digest(model: CausalLM) -> str | None:
    """Return a hash of the adapter's values and scaling, or None if the adapter changes nothing."""
    linears = [(name, linear) for name, linear in model.linears() if linear.lora_A is not None]
    if not any(linear.lora_B.weight.any() for _, linear in linears):
        return None
    digest = hashlib.sha256()
    for name, linear in linears:
        digest.update(f"{name} {linear.scaling}".encode())
        for factor in (linear.lora_A, linear.lora_B):
            digest.update(tensor_bytes(factor.weight.detach().float().cpu()))
    return digest.hexdigest()[:32]


def _stored_weights(model: CausalLM) -> SafetensorsFolder | None:
    """Return the weights of the model's folder, or None if they are those of a GGUF file."""
    return open_weights(model.folder, model.config) if model.gguf is None else None


def _merged_adapters(stored: SafetensorsFolder | None) -> list[str]:
    """Return the digests of the adapters that were merged into the weights of a folder."""
    return [] if stored is None else stored.metadata().get(MERGED, "").split()


def merged_dtype(model: CausalLM) -> torch.dtype:
    """Return the dtype of the merged tensors, which does not depend on the compute dtype.

    It is float16 if the base's folder or GGUF file stores the embedding in float16, otherwise
    bfloat16.
    """
    is_float16 = model.model.embed_tokens.table.dtype == torch.float16
    return torch.float16 if is_float16 else torch.bfloat16


def _use_original(model: CausalLM, stored: SafetensorsFolder | None, merge_base: str) -> bool:
    """Return True if `merge_base` means the base folder's 16-bit weights.

    Raises: ValueError as `check_merge_base`.
    """
    check_merge_base(merge_base, model.gguf or model.folder, stored, model.is_nf4)
    return stored is not None and merge_base != "nf4" and not stored.prequantized


def check_merge_base(
    merge_base: str, base: Path, stored: SafetensorsFolder | None, is_nf4: bool
) -> None:
    """Check that a model has the weights that `merge_base` names.

    base: folder or GGUF file of the model.
    stored: the weights in the folder, or None for a GGUF file.
    is_nf4: True if the linears are loaded as NF4.

    Raises: ValueError if `merge_base` is unknown or the model has no such weights.
    """
    if merge_base not in MERGE_BASES:
        raise ValueError(
            f"merge_base {merge_base!r} does not exist; choose from {', '.join(MERGE_BASES)}"
        )
    if stored is None:
        if merge_base != "auto":
            raise ValueError(
                f"merge_base {merge_base!r}: the only weights of this model are those of "
                f"{base}; merge_base must be 'auto'"
            )
    elif merge_base == "original" and stored.prequantized:
        raise ValueError(f"{base}: holds 4-bit weights only; merge_base must be 'nf4' or 'auto'")
    elif merge_base == "nf4" and not is_nf4:
        raise ValueError(
            "merge_base 'nf4': the model was loaded in 16 bit and has no NF4 weights; "
            "choose 'original'"
        )


def _merge(
    model: CausalLM,
    original: SafetensorsFolder | None,
    dtype: torch.dtype,
    names: Sequence[str],
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, merged tensor); `original` holds the 16-bit weights to merge onto."""
    for name in names:
        module_name, _, kind = name.rpartition(".")
        module = model.get_submodule(module_name)
        if kind == "weight" and isinstance(module, Linear):
            values = _merged_weight(model, module, original, name)
        elif module is model.model.embed_tokens and module.quantized is not None:
            values = module.quantized.dequantize(torch.float32)
        else:
            values = getattr(module, kind).detach()
        yield name, _rounded(name, values, dtype)


def _merged_weight(
    model: CausalLM, linear: Linear, original: SafetensorsFolder | None, name: str
) -> Tensor:
    """Return W + s B A of one linear, in float32 if the linear has an adapter."""
    rounded = linear.is_quantized or (original is not None and original.is_dequantized(name))
    if not rounded:
        base = linear.weight.detach()
    elif original is not None:
        base = original.load(name, (linear.out_features, linear.in_features), model.device)
    else:
        base = linear.weight_as(torch.float32 if model.gguf else model.dtype)
    if linear.lora_A is None:
        return base
    A, B = (factor.float() for factor in linear.adapter())
    with model.as_current_device():  # ignores the caller's autocast
        return torch.addmm(base.float(), B, A, alpha=linear.scaling)


def _rounded(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values in `dtype`, contiguous."""
    rounded = values.to(dtype)
    if not torch.isfinite(rounded).all():
        largest = values.abs().max().item()
        raise ValueError(
            f"{name}: the merged weight is not finite in {dtype} (largest magnitude {largest:g})"
        )
    return rounded.contiguous()
