"""Linears in the layout in which bitsandbytes stores NF4, read as they are and written.

For a linear P, a folder holds

    P.weight                                   packed 4-bit codes, uint8 (in * out / 2, 1), or
                                               the same bytes in another dtype (quant_storage)
    P.weight.absmax                            scale of each block, float32, or uint8 if nested
    P.weight.quant_map                         the 16 NF4 values, float32
    P.weight.nested_absmax                     if nested: scale of each block of scales, float32
    P.weight.nested_quant_map                  if nested: the 256 values of a scale, float32
    P.weight.quant_state.bitsandbytes__nf4     JSON in uint8: block sizes, shape, offset

Linears without these keys were skipped (llm_int8_skip_modules) and are stored in 16 bit.
"""

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minitune.checkpoints.safetensors_folder import QUANT_STATE, SafetensorsFolder
from minitune.config.numbers import check_number, number, shown, whole
from minitune.model.nf4 import NESTED_BLOCKSIZE, NF4, dynamic_map, nf4_code
from minitune.read_files import parse_json

BLOCKSIZES = whole(32, 4096)  # those of bitsandbytes; 32 is for some GPUs only
OFFSETS = number(-1e30, 1e30)
SIZES = whole(1)
MAX_STATE_BYTES = 1 << 16


def check_bitsandbytes(quantization: dict[str, Any]) -> None:
    """Raise ValueError if a bitsandbytes model's quantization_config declares another type."""
    if quantization.get("load_in_8bit") or quantization.get("_load_in_8bit"):
        raise ValueError(
            "the model is quantised with bitsandbytes' 8-bit (LLM.int8()); only its NF4 is read"
        )
    kind = quantization.get("bnb_4bit_quant_type", "fp4")
    if kind != "nf4":
        raise ValueError(
            f"the model is quantised with bitsandbytes' {str(kind).upper()}; only its NF4 is read"
        )


def quantized_linears(stored: SafetensorsFolder) -> dict[str, str]:
    """Return linear name -> name of its quantisation state, for each linear stored in 4 bit."""
    return {name.partition(QUANT_STATE)[0]: name for name in stored.names() if QUANT_STATE in name}


def read_nf4(
    stored: SafetensorsFolder,
    linear: str,
    state_name: str,
    shape: tuple[int, int],
    device: torch.device,
) -> tuple[NF4, set[str]]:
    """Return a quantised linear on the device, and the names of the tensors that were read.

    linear: the linear's name.
    state_name: the name of its quantisation state.
    shape: (out_features, in_features) that the linear must have.

    Raises: ValueError if the linear is not NF4, its state is broken, or a tensor does not fit.
    """
    kind = state_name.rpartition("__")[2]
    if kind != "nf4":
        raise ValueError(
            f"{stored.folder}: {linear} is quantised as {kind.upper()}; only NF4 is read"
        )
    nested = f"{linear}.weight.nested_absmax" in stored
    state = _read_state(stored, state_name, nested)
    _check_shape(stored, linear, state["shape"], shape)
    names = {state_name}

    def fetch(suffix: str, dtype: torch.dtype, *size: int) -> Tensor:
        name = f"{linear}.weight{suffix}"
        names.add(name)
        if (found := stored.dtype(name)) != dtype:
            raise ValueError(f"{stored.folder}: {name} is {found}; bitsandbytes writes {dtype}")
        return stored.load(name, size).to(device)

    def fetch_packed(nbytes: int) -> Tensor:
        name = f"{linear}.weight"
        names.add(name)
        dtype = stored.dtype(name)
        return stored.load(name, (nbytes // dtype.itemsize, 1)).view(torch.uint8).to(device)

    elements = shape[0] * shape[1]
    blocks = -(-elements // state["blocksize"])
    scale_dtype = torch.uint8 if nested else torch.float32
    weight = NF4(
        packed=fetch_packed(elements // 2).view(-1),
        absmax=fetch(".absmax", scale_dtype, blocks),
        code=_shared_if_equal(fetch(".quant_map", torch.float32, 16), nf4_code(device)),
        shape=shape,
        blocksize=state["blocksize"],
    )
    if nested:
        size = state["nested_blocksize"]
        weight.nested_blocksize = size
        weight.nested_absmax = fetch(".nested_absmax", torch.float32, -(-blocks // size))
        nested_code = fetch(".nested_quant_map", torch.float32, 256)
        weight.nested_code = _shared_if_equal(nested_code, dynamic_map(device))
        weight.nested_offset = torch.tensor(
            state["nested_offset"], dtype=torch.float32, device=device
        )
    return weight, names


def _check_shape(
    stored: SafetensorsFolder, linear: str, found: tuple[int, ...], expected: tuple[int, int]
) -> None:
    """Raise ValueError if a linear has another shape than the model needs."""
    if found != expected:
        raise ValueError(
            f"{stored.folder}: {linear}.weight has shape {found}, config.json asks for {expected}"
        )


def nf4_tensors(linear: str, weight: NF4, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a quantised linear, as `read_nf4` reads them.

    dtype: the dtype to which bitsandbytes dequantises the weight.
    """
    state = {
        "quant_type": "nf4",
        "blocksize": weight.blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": weight.shape,
    }
    yield f"{linear}.weight", weight.packed[:, None]
    yield f"{linear}.weight.absmax", weight.absmax
    yield f"{linear}.weight.quant_map", weight.code
    if weight.nested_absmax is not None:
        yield f"{linear}.weight.nested_absmax", weight.nested_absmax
        yield f"{linear}.weight.nested_quant_map", weight.nested_code
        state |= {
            "nested_blocksize": weight.nested_blocksize,
            "nested_dtype": "float32",
            "nested_offset": weight.nested_offset.item(),
        }
    content = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    yield f"{linear}{QUANT_STATE}nf4", content


def _read_state(stored: SafetensorsFolder, name: str, nested: bool) -> dict[str, Any]:
    """Return blocksize, shape, nested_blocksize and nested_offset of a quantisation state.

    Raises: ValueError that names the file, the state and its field if a value is not one that
        bitsandbytes writes.
    """
    if stored.dtype(name) != torch.uint8 or stored.nbytes(name) > MAX_STATE_BYTES:
        raise stored.error(name, "is not the JSON in bytes that bitsandbytes writes")
    try:
        return _checked_state(parse_json(bytes(stored.load(name).flatten().tolist())), nested)
    except ValueError as error:
        raise stored.error(
            name, f"is not what bitsandbytes writes: {error}; get the file again"
        ) from None


def _checked_state(content: Any, nested: bool) -> dict[str, Any]:
    """Return the values of a state that `read_nf4` needs.

    Raises: ValueError that names the field if a value is missing, or not one of bitsandbytes'.
    """
    if not isinstance(content, dict):
        raise ValueError(f"it holds {shown(content)}, not an object")
    if (kind := content.get("quant_type")) != "nf4":
        raise ValueError(f"quant_type is {shown(kind)}; expected 'nf4'")
    sizes = content.get("shape")
    if not isinstance(sizes, list):
        raise ValueError(f"shape is {shown(sizes)}; expected a list of two sizes")
    state = {
        "blocksize": content.get("blocksize"),
        "shape": tuple(check_number("shape", size, SIZES) for size in sizes),
        "nested_blocksize": content.get("nested_blocksize", NESTED_BLOCKSIZE),
        "nested_offset": 0.0,
    }
    for key in ("blocksize", "nested_blocksize"):
        size = check_number(key, state[key], BLOCKSIZES)
        if size & (size - 1):
            raise ValueError(f"{key} is {size}; expected a power of two")
    if nested:
        offset = check_number("nested_offset", content.get("nested_offset"), OFFSETS)
        state["nested_offset"] = float(offset)
    return state


def _shared_if_equal(found: Tensor, shared: Tensor) -> Tensor:
    """Return the shared copy of a code table if the folder's table equals it, to save memory."""
    return shared if torch.equal(found, shared) else found
