"""The order and layout of a model's tensors in a GGUF file.

Two things differ from Hugging Face's layout, and a file without them loads and generates nonsense:

- For some families llama.cpp's rotary embedding pairs the neighbouring rows 2i and 2i + 1 of a q
  or k head, not i and i + K/2: the rows are interleaved (GgufFamily.llama_layout);
- the divisors of some RoPE scalings become tensors (model_metadata.py).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from minitune.config.model_config import ModelConfig
from minitune.gguf.model_metadata import additional_tensors


def tensors_of_file(
    config: ModelConfig, tensors: Iterator[tuple[str, Tensor]], device: torch.device
) -> Iterator[Tensor]:
    """Yield the tensors of a file, in the file's order and layout, on the device.

    tensors: (Hugging Face's name, tensor), in the order of `config.tensor_shapes()`.
    """
    yield from additional_tensors(config).values()
    family, heads = config.architecture, interleaved_heads(config)
    shapes = config.tensor_shapes()
    for (name, shape), (found, tensor) in zip(shapes.items(), tensors, strict=True):
        assert (found, tuple(tensor.shape)) == (name, shape), (
            f"{found} {tuple(tensor.shape)} instead of {name} {shape}"
        )
        tensor = tensor.to(device)
        linear = name.split(".")[-2]
        if name.endswith("norm.weight") and family.norm_offset:
            tensor = tensor.float() + family.norm_offset  # llama.cpp has no offset
        yield interleave_rope_rows(tensor, heads[linear]) if linear in heads else tensor


def interleave_rope_rows(tensor: Tensor, heads: int) -> Tensor:
    """Return the rows of a q or k weight or bias with i and i + K/2 of each head as neighbours."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def separate_rope_rows(tensor: Tensor, heads: int) -> Tensor:
    """Return the rows of `interleave_rope_rows` in their order before it."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)


def interleaved_heads(config: ModelConfig) -> dict[str, int]:
    """Return linear -> heads, of the linears whose rows are interleaved."""
    if not config.architecture.gguf.llama_layout:
        return {}
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
