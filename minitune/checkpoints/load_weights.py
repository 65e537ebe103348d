"""TODO docstring."""

import json
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minitune.checkpoints.safetensors_folder import _STATE, SafetensorsFolder
from minitune.config.model_config import ModelConfig
from minitune.model.layers import Embedding, RMSNorm
from minitune.model.linear import Linear
from minitune.model.nf4 import BLOCKSIZE, NESTED_BLOCKSIZE, NF4, dynamic_map, nf4_code

NOT_WEIGHTS = (
    "rotary_emb.inv_freq",
    ".attention.bias",
    ".masked_bias",
)  # constants that old writers saved


def check_quantization(config: ModelConfig) -> None:
    """Refuse, by name, a folder quantised in any way but bitsandbytes' NF4."""
    q = config.raw.get("quantization_config")
    if not q:
        return
    if not isinstance(q, dict):
        raise ValueError(f"quantization_config is {q!r}; expected an object")
    method = q.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise ValueError(
            f"the model is quantised with {method}; only bitsandbytes' NF4 or 16-bit weights are read"
        )
    if q.get("load_in_8bit") or q.get("_load_in_8bit"):
        raise ValueError(
            "the model is quantised with bitsandbytes' 8-bit (LLM.int8()); only its NF4 is read"
        )
    if (kind := q.get("bnb_4bit_quant_type", "fp4")) != "nf4":
        raise ValueError(
            f"the model is quantised with bitsandbytes' {kind.upper()}; only its NF4 is read"
        )


def load_weights(
    model: nn.Module,
    checkpoint: SafetensorsFolder,
    device: torch.device,
    load_in_4bit: bool,
    progress: bool = False,
) -> None:
    """Fill the modules of a weightless model; every linear but the head becomes NF4 where `load_in_4bit`.

    Raises ValueError that names the tensor where one is missing, of a wrong shape, or has no place in the model.
    """
    check_quantization(model.config)
    quantize = (
        load_in_4bit and not checkpoint.prequantized
    )  # what bitsandbytes skipped stays as stored
    used: set[str] = set()

    def fetch(name: str, shape: tuple[int, ...]) -> nn.Parameter:
        used.add(name)
        tensor = checkpoint.load(name, shape)
        if not tensor.dtype.is_floating_point:
            raise ValueError(
                f"{checkpoint.folder}: {name} is {tensor.dtype}, not a floating-point weight"
            )
        return nn.Parameter(tensor.to(device), requires_grad=False)

    modules = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, (Embedding, Linear, RMSNorm))
    ]
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
                raise ValueError(
                    f"{key} has shape {shape}, which NF4 cannot cut into blocks of {BLOCKSIZE}"
                )
            module.nf4 = NF4.quantize(weight)
        else:
            module.weight = fetch(key, shape)
        if module.has_bias:
            module.bias = fetch(f"{name}.bias", (module.out_features,))
    unknown = sorted(n for n in checkpoint.names() if n not in used and not n.endswith(NOT_WEIGHTS))
    if unknown:
        raise ValueError(
            f"{checkpoint.folder}: {unknown[0]} has no place in a Llama ({len(unknown)} such tensors)"
        )


def _bar(modules: list, progress: bool) -> Iterable:
    return tqdm(
        modules, desc="loading", unit="tensor", leave=False, disable=None if progress else True
    )


def _prequantized(
    checkpoint: SafetensorsFolder,
    linear: str,
    state_name: str,
    shape: tuple[int, int],
    device: torch.device,
) -> tuple[NF4, set[str]]:
    """A linear that bitsandbytes quantised, and the names of the tensors that it is made of."""
    kind = state_name.rsplit("__", 1)[1]
    if kind != "nf4":
        raise ValueError(
            f"{checkpoint.folder}: {linear} is quantised as {kind.upper()}; only NF4 is read"
        )
    nested = f"{linear}.weight.nested_absmax" in checkpoint
    try:
        state = json.loads(bytes(checkpoint.load(state_name).tolist()))
        blocksize, found = int(state["blocksize"]), tuple(state["shape"])
        nested_blocksize = int(state.get("nested_blocksize", NESTED_BLOCKSIZE))
        offset = float(state["nested_offset"]) if nested else 0.0
        if blocksize < 1 or nested_blocksize < 1:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{checkpoint.folder}: {state_name} is not the JSON that bitsandbytes writes"
        ) from None
    if found != shape:
        raise ValueError(
            f"{checkpoint.folder}: {linear}.weight has shape {found}, config.json asks for {shape}"
        )
    names = {state_name}

    def fetch(suffix: str, dtype: torch.dtype, *size: int) -> Tensor:
        names.add(name := f"{linear}.weight{suffix}")
        if (stored := checkpoint.dtype(name)) != dtype:
            raise ValueError(
                f"{checkpoint.folder}: {name} is {stored}; bitsandbytes writes {dtype}"
            )
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
        weight.nested_absmax = fetch(
            ".nested_absmax", torch.float32, -(-blocks // nested_blocksize)
        )
        weight.nested_code = _same(
            fetch(".nested_quant_map", torch.float32, 256), dynamic_map(device)
        )
        weight.nested_offset = torch.tensor(offset, dtype=torch.float32, device=device)
    return weight, names


def _same(found: Tensor, shared: Tensor) -> Tensor:
    """The one shared copy of a code table, where the folder's table equals it."""
    return shared if torch.equal(found, shared) else found
