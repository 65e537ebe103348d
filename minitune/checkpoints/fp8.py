"""FP8 weights, dequantised while they are read.

A weight in F8_E4M3 has 4 bits of exponent and 3 of mantissa, and shares a scale with the weights of
its block. Two quantisers are read, by quant_method of config.json's quantization_config:

    fp8                  blocks of weight_block_size, 128 x 128 by default (DeepSeek, Qwen3-FP8)
    compressed-tensors   one block a tensor, a row ("channel"), a group of columns, or a rectangle

For a linear P, a folder holds

    P.weight             F8_E4M3 (out, in)
    P.weight_scale_inv   the blocks' scales (ceil(out / rows), ceil(in / columns)), because the last
    or P.weight_scale    block of a row or column may be partial; a single number scales all values

    value[i, j] = float32(weight[i, j]) * float32(scale[i // rows, j // columns])

The scales of static activations and of a KV cache are not read, because activations stay in 16 bit.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitune.checkpoints.safetensors_folder import SafetensorsFolder

FP8, COMPRESSED_TENSORS = "fp8", "compressed-tensors"
FP8_METHODS = (FP8, COMPRESSED_TENSORS)
FP8_DTYPE = "F8_E4M3"  # in the header of a safetensors file
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
SCALES = ("_scale_inv", "_scale")  # endings behind the name of a weight
ACTIVATION_SCALES = (".activation_scale", ".input_scale", ".output_scale", ".k_scale", ".v_scale")
FORMATS = ("float-quantized", "naive-quantized")  # of compressed-tensors
DEFAULT_BLOCK = (128, 128)
REMEDY = "load the 16-bit model that it was made from"

# Rows and columns of the block that shares a scale; None means all.
Block = tuple[int | None, int | None]


def block_of(quantization: dict[str, Any]) -> Block:
    """Return the block of an FP8 model's quantization_config.

    Raises: ValueError if the weights are not FP8, or the block is not given as the method does.
    """
    if quantization.get("quant_method") == FP8:
        size = quantization.get("weight_block_size", DEFAULT_BLOCK)
        return (None, None) if size is None else _rectangle("weight_block_size", size)
    return _compressed_tensors_block(quantization)


def _compressed_tensors_block(quantization: dict[str, Any]) -> Block:
    """Return the block that all groups of a compressed-tensors model share."""
    kind = quantization.get("format")
    if kind not in FORMATS:
        raise _not_fp8(str(kind))
    sparsity = quantization.get("sparsity_config") or {"format": "dense"}
    if not isinstance(sparsity, dict) or sparsity.get("format") != "dense":
        raise _not_fp8(f"sparsity_config {sparsity!r}")
    if quantization.get("transform_config"):
        raise _not_fp8("transform_config")
    groups = quantization.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    weights = [group.get("weights") if isinstance(group, dict) else None for group in groups]
    if not weights or not all(isinstance(values, dict) for values in weights):
        raise ValueError(
            "config_groups of the quantization_config is missing or has a group without weights; "
            f"{REMEDY}"
        )
    blocks = {_strategy_block(values) for values in weights}
    if len(blocks) > 1:
        raise ValueError(
            f"config_groups of the quantization_config have several kinds of blocks; {REMEDY}"
        )
    return blocks.pop()


def _strategy_block(weights: dict[str, Any]) -> Block:
    """Return the block of the weights of one config group."""
    kind, bits, strategy = (weights.get(key) for key in ("type", "num_bits", "strategy"))
    if (kind, bits) != ("float", 8):
        raise _not_fp8(f"{bits}-bit {kind} weights")
    if not weights.get("symmetric", True):
        raise _not_fp8("asymmetric weights")
    if strategy == "tensor":
        return None, None
    if strategy == "channel":
        return 1, None
    if strategy == "group":
        return _rectangle("group_size", [1, weights.get("group_size")])
    if strategy == "block":
        return _rectangle("block_structure", weights.get("block_structure"))
    raise _not_fp8(f"strategy {strategy!r}")


def _rectangle(name: str, size: Any) -> tuple[int, int]:
    """Return (rows, columns) of a block; `name` is the key that gives them."""
    is_pair = isinstance(size, (list, tuple)) and len(size) == 2
    if not is_pair or not all(type(length) is int and length > 0 for length in size):
        raise ValueError(f"{name} is {size!r}; expected two whole numbers above 0")
    return tuple(size)


def _not_fp8(found: str) -> ValueError:
    return ValueError(
        f"the model is quantised with compressed-tensors' {found}; of its formats only symmetric "
        f"FP8 weights ({', '.join(FORMATS)}) are read: {REMEDY}"
    )


def dequantize_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the values (out, in) in float32.

    weight: float8_e4m3fn (out, in). scale: (ceil(out / rows), ceil(in / columns)), or one number.
    block: (rows, columns).
    """
    values, scale = weight.float(), scale.float()
    if scale.numel() == 1:
        return values.mul_(scale.view(()))
    (out_features, in_features), (rows, columns) = weight.shape, block
    # A block may be larger than the weight.
    scale = scale.repeat_interleave(min(rows, out_features), 0)[:out_features]
    return values.mul_(scale.repeat_interleave(min(columns, in_features), 1)[:, :in_features])


class Fp8Folder(SafetensorsFolder):
    """The tensors of a folder with FP8 weights, dequantised to float32 as they are loaded.

    The scales have no names of their own. A weight in another dtype is loaded as it is stored.

    block: rows and columns of the block that shares a scale; None means all.
    """

    def __init__(self, folder: str | Path, is_wrapper: bool, block: Block):
        super().__init__(folder, is_wrapper)
        self._block = block
        self._scale_names = {
            name: [name + ending for ending in SCALES if name + ending in self]
            for name in super().names()
            if self._slice(name).get_dtype() == FP8_DTYPE
        }

    def names(self) -> list[str]:
        """Return the names of all tensors of the model, without their scales."""
        scales = {scale for names in self._scale_names.values() for scale in names}
        return [
            name
            for name in super().names()
            if name not in scales and not name.endswith(ACTIVATION_SCALES)
        ]

    def is_dequantized(self, name: str) -> bool:
        """Return True if a tensor is stored in FP8."""
        return name in self._scale_names

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which `load` returns a tensor.

        Raises: ValueError if no weight has such a dtype.
        """
        return torch.float32 if self.is_dequantized(name) else super().dtype(name)

    def load(
        self,
        name: str,
        shape: tuple[int, ...] | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Return a tensor on the device, an FP8 weight in float32.

        shape: shape that the tensor must have; None accepts any.

        Raises: ValueError if the tensor is missing or has another shape, or if an FP8 weight has no
            scale, two, or one that does not fit.
        """
        if not self.is_dequantized(name):
            return super().load(name, shape, device)
        self.check_shape(name, shape)
        size = self.shape(name)
        if len(size) != 2:
            raise self.error(name, f"has shape {size}; FP8 weights have two dimensions")
        block = tuple(
            length if part is None else part for length, part in zip(size, self._block, strict=True)
        )
        scale = self._load_scale(name, size, block)
        return dequantize_fp8(self._read(name).to(device), scale.to(device), block)

    def _load_scale(self, name: str, size: tuple[int, int], block: tuple[int, int]) -> Tensor:
        """Return the checked scale of an FP8 weight of shape `size`, on the CPU."""
        scales = self._scale_names[name]
        if len(scales) != 1:
            found = f"both {' and '.join(scales)}" if scales else f"no {name}_scale_inv"
            raise self.error(
                name, f"is {FP8_DTYPE}, and the folder holds {found}; expected one scale. {REMEDY}"
            )
        dtype, shape = self._slice(scales[0]).get_dtype(), self.shape(scales[0])
        if dtype not in SCALE_DTYPES:
            raise self.error(
                scales[0], f"is {dtype}; scales of FP8 weights are {', '.join(SCALE_DTYPES)}"
            )
        grid = tuple(-(-length // part) for length, part in zip(size, block, strict=True))
        if shape != grid and math.prod(shape) != 1:
            raise self.error(
                scales[0], f"has shape {shape}; blocks of {block} in a weight {size} need {grid}"
            )
        scale = self._read(scales[0])
        if not torch.isfinite(scale.float()).all():
            raise self.error(scales[0], "is not finite; get the file again")
        return scale
