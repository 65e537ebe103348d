"""Fill a model from a folder of safetensors, tensor by tensor, quantising on the way.

Names in the model equal the checkpoint's keys, so loading is a walk over the names and shapes of
`ModelConfig.tensor_shapes`. Each tensor goes to the device, and a linear becomes NF4 there before
the next tensor is read. The 16-bit model never exists as a whole, and host memory holds one tensor
at a time.

Linears that bitsandbytes quantised are taken as they are stored. FP8 weights are dequantised first.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minitune.checkpoints.bitsandbytes_nf4 import check_bitsandbytes, quantized_linears, read_nf4
from minitune.checkpoints.check_tensors import check_tensors
from minitune.checkpoints.finite_check import FiniteCheck
from minitune.checkpoints.fp8 import FP8_METHODS, REMEDY, Block, Fp8Folder, block_of
from minitune.checkpoints.safetensors_folder import NOT_WEIGHTS, TIED_HEAD, SafetensorsFolder
from minitune.config.model_config import EMBEDDING, ModelConfig
from minitune.model.causal_lm import CausalLM
from minitune.model.linear import Linear
from minitune.model.nf4 import BLOCKSIZE, NF4
from minitune.model.quantized_weight import share_frozen_weight
from minitune.progress import ProgressBar


def open_model_folder(folder: Path) -> tuple[ModelConfig, SafetensorsFolder]:
    """Return the shape of the model in a folder, from config.json and the weights, and the weights.

    A folder may say that the head is the embedding, and hold a head with other values: a merge of
    an adapter that trained the head leaves such a folder. The head counts then, as in transformers
    and llama.cpp's converter.

    Raises: ValueError that names the field or the tensor at fault.
    """
    config = ModelConfig.from_folder(folder)
    stored = open_weights(folder, config)
    check_tensors(stored, config)
    if config.tie_word_embeddings and TIED_HEAD in stored and EMBEDDING in stored:
        shape = (config.vocab_size, config.hidden_size)
        if not torch.equal(stored.load(TIED_HEAD, shape), stored.load(EMBEDDING, shape)):
            raw = config.raw | {"tie_word_embeddings": False}
            config = replace(config, tie_word_embeddings=False, raw=raw)
    return config, stored


def open_weights(folder: Path, config: ModelConfig) -> SafetensorsFolder:
    """Return the weights of a model folder, under the names of `ModelConfig.tensor_shapes`.

    Raises: ValueError that names the file at fault, or a quantisation that is not read.
    """
    try:
        block = _fp8_block(config.raw.get("quantization_config") or {})
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from None
    is_wrapper = bool(config.wrapper)
    if block is None:
        return SafetensorsFolder(folder, is_wrapper)
    return Fp8Folder(folder, is_wrapper, block)


def _fp8_block(quantization: Any) -> Block | None:
    """Return the block of FP8 weights that share a scale, or None if the weights are not FP8.

    quantization: quantization_config of config.json, {} if there is none.

    Raises: ValueError if the weights are in a format that is not read.
    """
    if not isinstance(quantization, dict):
        raise ValueError(f"quantization_config is {quantization!r}; expected an object")
    method = quantization.get("quant_method", "bitsandbytes")
    if method in FP8_METHODS:
        return block_of(quantization)
    if method != "bitsandbytes":
        raise ValueError(
            f"the model is quantised with {method}; bitsandbytes' NF4, FP8 and 16-bit weights are "
            f"read: {REMEDY}"
        )
    if quantization:
        check_bitsandbytes(quantization)
    return None


def load_weights(
    model: CausalLM,
    stored: SafetensorsFolder,
    device: torch.device,
    load_in_4bit: bool,
    progress: bool | None = None,
) -> None:
    """Fill the modules of a model that has no weights yet.

    load_in_4bit: quantise every linear except the head to NF4. False keeps linears as stored, and
        rounds FP8 weights to the compute dtype. A folder that holds NF4 weights is read as it is
        either way, because bitsandbytes chose the linears to skip.
    progress: show a bar in bytes, as in progress.py.

    Raises: ValueError that names the tensor if a tensor is missing, has a wrong shape, has no place
        in the model, or holds NaN or infinite values.
    """
    finite = FiniteCheck()
    quantize = load_in_4bit and not stored.prequantized
    quantized = quantized_linears(stored)
    read: set[str] = set()
    for name, shape in _counted_tensors(model.config, stored, progress):
        module_name, _, kind = name.rpartition(".")
        module = model.get_submodule(module_name)
        is_weight = kind == "weight" and isinstance(module, Linear)
        if is_weight and module_name in quantized:
            state = quantized[module_name]
            module.quantized, names = read_nf4(stored, module_name, state, shape, device)
            read |= names
            finite.add_nf4(name, module.quantized)
            continue
        weight = _load_weight(stored, name, shape, device)
        read.add(name)
        if is_weight and quantize and module is not model.lm_head:
            module.quantized = _quantize(name, weight)
            finite.add_nf4(name, module.quantized)  # its scales tell: no pass over the weight
            continue
        finite.add(name, weight)
        if stored.is_dequantized(name):
            weight = weight.to(model.dtype)
        setattr(module, kind, nn.Parameter(weight, requires_grad=False))
    if model.config.tie_word_embeddings:
        share_frozen_weight(model.lm_head, model.model.embed_tokens)
        read.add(TIED_HEAD)
    check_all_known(stored, read)
    finite.require(stored.error, "get the file again, or another model")


def check_all_known(stored: SafetensorsFolder, known: set[str]) -> None:
    """Raise ValueError if a folder holds a weight whose name is not in `known`."""
    unknown = sorted(
        name for name in stored.names() if name not in known and not name.endswith(NOT_WEIGHTS)
    )
    if unknown:
        count = f"{len(unknown)} such tensors"
        raise stored.error(unknown[0], f"has no place in the model ({count})")


def _counted_tensors(
    config: ModelConfig, stored: SafetensorsFolder, progress: bool | None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of a model's tensors, and count their stored bytes in a bar."""
    nbytes = {name: stored.nbytes(name) for name in config.tensor_shapes()}
    with ProgressBar("loading", sum(nbytes.values()), show=progress) as bar:
        for name, shape in config.tensor_shapes().items():
            yield name, shape
            bar.update(nbytes[name])


def _load_weight(
    stored: SafetensorsFolder, name: str, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Return a tensor on the device, in its dtype or, if it is dequantised, in float32."""
    weight = stored.load(name, shape, device)
    if not weight.dtype.is_floating_point:
        raise stored.error(name, f"is {weight.dtype}, not a floating-point weight")
    return weight


def _quantize(name: str, weight: Tensor) -> NF4:
    """Return the NF4 form of a linear's weight.

    Raises: ValueError if the weight does not divide into blocks.
    """
    if weight.numel() % BLOCKSIZE:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}, "
            f"which NF4 cannot divide into blocks of {BLOCKSIZE}"
        )
    return NF4.quantize(weight)
