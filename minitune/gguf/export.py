"""A Llama as one GGUF file, the format of llama.cpp, Ollama and LM Studio: which keys, which tensors, which values.

gguf_file.py has the bytes, gguf_vocab.py the tokenizer's keys. The values are those of the merged 16-bit model, and
tensors go from the merge to the file one by one. Two things differ from Hugging Face's layout:

- rotary embedding pairs the neighbouring rows 2i and 2i + 1 of a q or k head, not i and i + K/2, so rows are permuted;
- the frequencies of llama3 scaling are a tensor, rope_freqs.weight, of what each frequency is divided by.

Forgetting either gives a file that loads and talks nonsense. Norms and biases are always float32. A quantised type
whose block does not divide a tensor's width (Q8_0: 32) gives way to float16 for that tensor.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, LlamaFileType
from torch import Tensor

from minitune.checkpoints.load_weights import TIED_HEAD, check_all_known
from minitune.checkpoints.merge import merged_tensors
from minitune.checkpoints.safetensors_folder import SafetensorsFolder
from minitune.config.model_config import ModelConfig
from minitune.config.training_config import GGUF_METHODS
from minitune.data.tokenizer import Tokenizer
from minitune.gguf.tokenizer_metadata import vocab_metadata
from minitune.gguf.writer import GGMLType, MetadataValue, TensorInfo, write_gguf
from minitune.model.causal_lm import CausalLM
from minitune.model.rope import rope_divisors

FILE_TYPES = {
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "f32": LlamaFileType.ALL_F32,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def export_gguf(
    model: CausalLM,
    path: str | Path,
    tokenizer: Tokenizer,
    quantization_method: str = "q8_0",
    merge_base: str = "auto",
) -> Path:
    """Write the merged model to `path`, a file ending in .gguf, or a folder for a file named after the base model.

    quantization_method: q8_0, f16, bf16 or f32. merge_base: see merge.py. Returns the file's path.
    Raises ValueError where the file exists, there is no room, or model or tokenizer cannot be expressed in GGUF.
    """
    organization, base = _origin(model.name, model.folder)
    target = _target(path, f"{base}-minitune" if model.lora else base, quantization_method)
    metadata = {"general.name": _name(target, quantization_method)}
    metadata |= {"general.base_model.count": 1, "general.base_model.0.name": base}
    if organization:
        metadata["general.base_model.0.organization"] = organization
    tensors = merged_tensors(model, merge_base)
    _write(
        target,
        model.config,
        metadata,
        tokenizer,
        model.config.tensor_shapes(),
        tensors,
        quantization_method,
    )
    return target


def gguf_file_name(name: str, folder: Path, method: str) -> str:
    """The file name that `export_gguf` gives a trained adapter on the base model `name`, which lies in `folder`."""
    return f"{_origin(name, folder)[1]}-minitune-{method.upper()}.gguf"


def convert_folder(folder: str | Path, path: str | Path, quantization_method: str = "q8_0") -> Path:
    """Write the model of a Hugging Face folder with 16- or 32-bit weights as GGUF; see `export_gguf`.

    Raises ValueError for a tensor in the folder that has no place in a Llama as well.
    """
    folder = Path(folder)
    config, checkpoint = ModelConfig.from_folder(folder), SafetensorsFolder(folder)
    if checkpoint.prequantized:
        raise ValueError(f"{folder}: holds 4-bit weights; load it as a model and export that")
    target = _target(path, folder.resolve().name, quantization_method)
    shapes = config.tensor_shapes()
    check_all_known(checkpoint, {*shapes, TIED_HEAD})
    tensors = ((name, checkpoint.load(name, shape)) for name, shape in shapes.items())
    metadata = {"general.name": _name(target, quantization_method)}
    _write(
        target,
        config,
        metadata,
        Tokenizer.from_folder(folder),
        shapes,
        tensors,
        quantization_method,
    )
    return target


# ---- what goes into the file


def _write(
    target: Path,
    config: ModelConfig,
    metadata: dict[str, MetadataValue],
    tokenizer: Tokenizer,
    shapes: dict[str, tuple[int, ...]],
    tensors: Iterator[tuple[str, Tensor]],
    method: str,
) -> None:
    kind = GGMLType[method.upper()]
    count = sum(math.prod(shape) for shape in shapes.values())
    metadata = {"general.architecture": "llama", "general.type": "model", **metadata}
    metadata |= {
        "general.size_label": size_label(count),
        "general.file_type": int(FILE_TYPES[method]),
    }
    if kind == GGMLType.Q8_0:
        metadata["general.quantization_version"] = 2
    metadata |= (
        _sampling(tokenizer) | model_metadata(config) | vocab_metadata(tokenizer, config.vocab_size)
    )
    infos = [
        TensorInfo(gguf_name(name), shape, _type(shape, kind)) for name, shape in shapes.items()
    ]
    extra = []
    if config.rope_scaling and config.rope_scaling["rope_type"] == "llama3":
        divisors = rope_divisors(config)
        infos.insert(0, TensorInfo("rope_freqs.weight", tuple(divisors.shape), GGMLType.F32))
        extra = [divisors]

    def values() -> Iterator[Tensor]:
        yield from extra
        for name, (found, tensor) in zip(shapes, tensors, strict=True):
            assert (found, tuple(tensor.shape)) == (name, shapes[name]), (
                f"{found} {tensor.shape} instead of {name}"
            )
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            projection = name.split(".")[-2]
            yield interleave_rope_rows(tensor, heads[projection]) if projection in heads else tensor

    write_gguf(target, metadata, infos, values())


def model_metadata(config: ModelConfig) -> dict[str, MetadataValue]:
    """The `llama.*` keys."""
    metadata = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocab_size,
    }
    if config.rope_scaling and config.rope_scaling["rope_type"] == "linear":
        metadata |= {
            "rope.scaling.type": "linear",
            "rope.scaling.factor": float(config.rope_scaling["factor"]),
        }
    return {f"llama.{key}": value for key, value in metadata.items()}


def interleave_rope_rows(tensor: Tensor, heads: int) -> Tensor:
    """Rows (or bias entries) of q or k: each head's halves, i and i + K/2, become neighbours, 2i and 2i + 1."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, part = module.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def size_label(parameters: int) -> str:
    """134515008 -> 135M, 1235814400 -> 1.2B: at least two digits."""
    units = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))
    unit, letter = next((entry for entry in units if parameters >= entry[0]), units[-1])
    return f"{parameters / unit:.{1 if parameters < 9.5 * unit else 0}f}{letter}"


def _type(shape: tuple[int, ...], kind: GGMLType) -> GGMLType:
    if len(shape) == 1:
        return GGMLType.F32
    return GGMLType.F16 if shape[1] % GGML_QUANT_SIZES[kind][0] else kind


def _sampling(tokenizer: Tokenizer) -> dict[str, MetadataValue]:
    """Sampling defaults out of generation_config.json; llama.cpp starts from them."""
    keys = {
        "temperature": ("temp", float),
        "top_p": ("top_p", float),
        "top_k": ("top_k", np.int32),
        "min_p": ("min_p", float),
        "repetition_penalty": ("penalty_repeat", float),
    }
    path = tokenizer.folder / "generation_config.json"
    chosen = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if chosen.get("do_sample") is False:
        return {}
    present = {key: chosen[key] for key in keys if chosen.get(key) is not None}
    for key, value in present.items():
        if type(value) not in (int, float) or not abs(value) < 2**31:  # NaN is not, either
            raise ValueError(f"{path}: {key} is {value!r}, expected a number")
    return {
        f"general.sampling.{keys[key][0]}": keys[key][1](value) for key, value in present.items()
    }


def _origin(name: str, folder: Path) -> tuple[str, str]:
    """Organization, or "", and name of a base model: org/name as found in the cache, else its folder's name."""
    cached = Path(name).expanduser() != folder
    return (name.split("/")[0], name.split("/")[-1]) if cached else ("", folder.resolve().name)


def _target(path: str | Path, name: str, method: str) -> Path:
    if not isinstance(method, str) or method not in GGUF_METHODS:
        raise ValueError(
            f"quantization_method {method!r} is not supported; choose one of {', '.join(GGUF_METHODS)}"
        )
    path = Path(path)
    if path.suffix != ".gguf":
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path}: is a file; give a folder, or a file name that ends in .gguf")
        path = path / f"{name}-{method.upper()}.gguf"
    if path.exists():
        raise ValueError(f"{path}: exists; remove it or choose another name")
    return path


def _name(target: Path, method: str) -> str:
    return target.stem.removesuffix(f"-{method.upper()}")
