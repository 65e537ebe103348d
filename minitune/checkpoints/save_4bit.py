"""Save the NF4 base of a model in bitsandbytes' layout.

The folder loads here without quantising anything, and in transformers with bitsandbytes. Linears
are stored as bitsandbytes_nf4.py describes. Embedding, norms, biases, head and linears that were
not quantised keep their dtype.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitune.checkpoints.bitsandbytes_nf4 import nf4_tensors
from minitune.checkpoints.merge import merged_config, merged_metadata
from minitune.checkpoints.model_folder import SHARD_BYTES, check_new_folder, write_model_folder
from minitune.checkpoints.safetensors_writer import TensorSpec, counted
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.model.causal_lm import CausalLM


def save_4bit(
    model: CausalLM,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    shard_bytes: float = SHARD_BYTES,
    progress: bool | None = None,
) -> Path:
    """Write the quantised base as a new folder and return the folder.

    An adapter of the model is not part of the base; `save_adapter` writes it.

    tokenizer: the tokenizer to write; None takes that of the model's folder.
    shard_bytes: limit of the tensors of one file, in bytes.
    progress: show a bar in bytes, as in progress.py.

    Raises: ValueError if the model has no NF4 weights, if the folder holds anything already, or if
        the disk has no room for the model.
    """
    folder = Path(folder)
    check_new_folder(model, folder)
    if model.gguf is not None:
        raise ValueError(
            f"{folder}: the weights are those of {model.gguf}, not NF4; write them as a folder of "
            "16 bit first (save_pretrained_merged, or `minitune export --merged DIR`), and save "
            "that folder in 4 bit"
        )
    if not model.is_nf4:
        raise ValueError(
            f"{folder}: the model was loaded in 16 bit and has no NF4 weights to save; "
            "load it with load_in_4bit=True"
        )
    dtype = model.model.embed_tokens.weight.dtype
    config = merged_config(model.config.raw, dtype)
    config["quantization_config"] = _quantization_config(model, dtype)
    specs = {
        name: TensorSpec(tuple(tensor.shape), tensor.dtype)
        for name, tensor in _base_tensors(model, dtype)
    }
    tensors = ((name, tensor.cpu()) for name, tensor in _base_tensors(model, dtype))
    write_model_folder(
        model,
        folder,
        tokenizer or Tokenizer.from_folder(model.folder),
        config,
        specs,
        counted(tensors, specs, "saving", progress),
        merged_metadata(model, None),
        shard_bytes,
    )
    return folder


def _base_tensors(model: CausalLM, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor on its device) of the base in the order of the model."""
    quantized = {name: linear for name, linear in model.linears() if linear.is_quantized}
    for name in model.config.tensor_shapes():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module in quantized:
            yield from nf4_tensors(module, quantized[module].quantized, dtype)
        else:
            yield name, model.get_parameter(name).detach()


def _quantization_config(model: CausalLM, dtype: torch.dtype) -> dict[str, Any]:
    """Return the quantization_config that transformers reads.

    llm_int8_skip_modules names the linears that are not quantised, of 4 bits too.
    """
    linears = dict(model.linears())
    skipped = [name for name, linear in linears.items() if not linear.is_quantized]
    nested = all(
        linear.quantized.nested_absmax is not None
        for linear in linears.values()
        if linear.is_quantized
    )
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head", *skipped],
    }
