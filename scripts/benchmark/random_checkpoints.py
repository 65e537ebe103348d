"""Llama checkpoints with random weights, to measure with: the shapes of Llama 3.1 8B, Llama 3.2 1B and SmolLM2 135M.

A step's time and memory depend on shapes alone, so no real weights are needed. A folder holds what any library reads:
config.json, bf16 safetensors in shards with their index, and a tokenizer of bytes, so that a text of ASCII letters has
as many tokens as letters. The same seed on the same device draws the same weights; 8B takes 16.1 GB on disk.
"""

import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minitune.atomic_files import os_errors_as_value_error, require_space
from minitune.checkpoints.safetensors_writer import write_safetensors

SHARD_BYTES = 4e9
SPECIAL = ("<s>", "</s>", "<pad>")  # ids 0, 1 and 2; the bytes follow


def llama(
    hidden, ffn, layers, heads, kv_heads, vocab, theta, positions, tie, scaling_factor=None
) -> dict:
    """config.json of a Llama; with a factor, rope scaling is llama3's from 8192 positions."""
    scaling = {
        "rope_type": "llama3",
        "factor": scaling_factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "max_position_embeddings": positions,
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_scaling": scaling_factor and scaling | {"original_max_position_embeddings": 8192},
        "rope_theta": theta,
        "tie_word_embeddings": tie,
        "torch_dtype": "bfloat16",
        "vocab_size": vocab,
    }


SHAPES = {  # 8b knows twice the positions of Llama 3.1, for the longest contexts
    "8b": llama(4096, 14336, 32, 32, 8, 128256, 500000.0, 262144, tie=False, scaling_factor=8.0),
    "1b": llama(2048, 8192, 16, 32, 8, 128256, 500000.0, 131072, tie=True, scaling_factor=32.0),
    "135m": llama(576, 1536, 30, 9, 3, 49152, 100000.0, 8192, tie=True),
}


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """The checkpoint's names, in the order of the model, and their shapes."""
    D, F, V, K = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "head_dim")
    )
    H, G = config["num_attention_heads"], config["num_key_value_heads"]
    layer = {
        "input_layernorm": (D,),
        "self_attn.q_proj": (H * K, D),
        "self_attn.k_proj": (G * K, D),
        "self_attn.v_proj": (G * K, D),
        "self_attn.o_proj": (D, H * K),
        "post_attention_layernorm": (D,),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    shapes = {"model.embed_tokens.weight": (V, D)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (D,)
    return shapes if config["tie_word_embeddings"] else shapes | {"lm_head.weight": (V, D)}


def write_random_llama(
    folder: str | Path, config: dict, seed: int = 0, shard_bytes: float = SHARD_BYTES
) -> Path:
    """Write a checkpoint of this config.json and return its folder; config.json comes last, when all the rest is there.

    Raises ValueError where the folder holds a model already, or there is no room for it.
    """
    folder, shapes = Path(folder), tensor_shapes(config)
    if (folder / "config.json").exists():
        raise ValueError(f"{folder}: holds a model already; remove it or choose another folder")
    size = sum(2 * math.prod(shape) for shape in shapes.values())
    require_space(folder, size)
    tensors = _random_tensors(shapes, config["num_hidden_layers"], seed)
    shards = _shards(shapes, shard_bytes)
    with os_errors_as_value_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file, names in shards.items():
            part = {name: shapes[name] for name in names}
            write_safetensors(folder / file, part, torch.bfloat16, tensors, {"format": "pt"})
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
        _write_tokenizer(folder, config["max_position_embeddings"])
        _write_json(folder / "config.json", config)
    return folder


def _random_tensors(shapes: dict[str, tuple[int, ...]], layers: int, seed: int):
    """(name, bf16 tensor on the host) one by one: norms are 1, matrices normal with standard deviation 0.02.

    What is added to the residual stream is drawn smaller by sqrt(2 layers), as GPT-2 did, so that its size stays
    about the same from the first layer to the last.
    """
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(seed)
    for name, shape in shapes.items():
        std = (
            0.02 / math.sqrt(2 * layers)
            if name.endswith(("o_proj.weight", "down_proj.weight"))
            else 0.02
        )
        values = torch.ones(shape)
        if len(shape) > 1:
            values = torch.randn(shape, generator=generator, device=generator.device).mul_(std)
        yield name, values.to(torch.bfloat16).cpu()


def _shards(shapes: dict[str, tuple[int, ...]], shard_bytes: float) -> dict[str, list[str]]:
    """File name -> names of its tensors, in order; a shard ends with the tensor that takes it past `shard_bytes`."""
    shards, size = [[]], 0.0
    for name, shape in shapes.items():
        if size > shard_bytes:
            shards.append([])
            size = 0.0
        shards[-1].append(name)
        size += 2 * math.prod(shape)
    return {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": names
        for i, names in enumerate(shards, 1)
    }


def _write_tokenizer(folder: Path, positions: int) -> None:
    """A byte-level tokenizer without merges: one token a byte, nothing added around a text."""
    vocabulary = {
        token: i for i, token in enumerate((*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())))
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    named = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": positions,
        **named,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
