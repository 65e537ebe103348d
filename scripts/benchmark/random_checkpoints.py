"""Checkpoints with random weights, in the shapes of Llama and of models of the other families.

Time and memory of a step depend on shapes alone, so the benchmark needs no real weights. A folder
holds the files that any library reads: config.json, bf16 safetensors in shards with their index,
and a tokenizer of bytes, so a text of ASCII letters has one token a letter. The same seed on the
same device draws the same weights. 8B takes 16.1 GB on disk.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from minitune.atomic_files import os_errors_as_value_error, require_space, write_json
from minitune.checkpoints.safetensors_writer import (
    specs_of_dtype,
    total_bytes,
    write_model_files,
)
from minitune.config.model_config import ModelConfig

SHARD_BYTES = 4e9
SPECIAL = ("<s>", "</s>", "<pad>")  # ids 0, 1 and 2; the bytes follow
INITIAL_STD = 0.02


def llama_config(
    hidden: int,
    ffn: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    theta: float,
    positions: int,
    tie: bool,
    scaling_factor: float | None = None,
) -> dict[str, Any]:
    """Return the config.json of a Llama.

    theta: base of RoPE.
    positions: the longest context.
    tie: True if the head is the embedding.
    scaling_factor: factor of llama3's RoPE scaling from 8192 positions; None is no scaling.
    """
    scaling = {
        "rope_type": "llama3",
        "factor": scaling_factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
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
        "rope_scaling": scaling if scaling_factor else None,
        "rope_theta": theta,
        "tie_word_embeddings": tie,
        "torch_dtype": "bfloat16",
        "vocab_size": vocab,
    }


SHAPES = {
    "8b": llama_config(
        hidden=4096,
        ffn=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        vocab=128256,
        theta=500000.0,
        positions=262144,  # twice those of Llama 3.1, for the longest contexts
        tie=False,
        scaling_factor=8.0,
    ),
    "1b": llama_config(
        hidden=2048,
        ffn=8192,
        layers=16,
        heads=32,
        kv_heads=8,
        vocab=128256,
        theta=500000.0,
        positions=131072,
        tie=True,
        scaling_factor=32.0,
    ),
    "135m": llama_config(
        hidden=576,
        ffn=1536,
        layers=30,
        heads=9,
        kv_heads=3,
        vocab=49152,
        theta=100000.0,
        positions=8192,
        tie=True,
    ),
    "qwen3-8b": llama_config(
        hidden=4096,
        ffn=12288,
        layers=36,
        heads=32,
        kv_heads=8,
        vocab=151936,
        theta=1000000.0,
        positions=40960,
        tie=False,
    )
    | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rms_norm_eps": 1e-6},
    "qwen2.5-7b": llama_config(
        hidden=3584,
        ffn=18944,
        layers=28,
        heads=28,
        kv_heads=4,
        vocab=152064,
        theta=1000000.0,
        positions=131072,
        tie=False,
    )
    | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6},
    "mistral-7b": llama_config(  # version 0.1, the one with a sliding window
        hidden=4096,
        ffn=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        vocab=32000,
        theta=10000.0,
        positions=32768,
        tie=False,
    )
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 4096,
    },
    "ministral3-8b": llama_config(
        hidden=4096,
        ffn=14336,
        layers=34,
        heads=32,
        kv_heads=8,
        vocab=131072,
        theta=1000000.0,
        positions=262144,
        tie=False,
    )
    | {
        "architectures": ["Ministral3ForCausalLM"],
        "model_type": "ministral3",
        "rope_scaling": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "smollm3-3b": llama_config(
        hidden=2048,
        ffn=11008,
        layers=36,
        heads=16,
        kv_heads=4,
        vocab=128256,
        theta=5000000.0,
        positions=65536,
        tie=True,
    )
    | {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "no_rope_layer_interval": 4,
        "rms_norm_eps": 1e-6,
    },
    "granite-8b": llama_config(  # version 3.3
        hidden=4096,
        ffn=12800,
        layers=40,
        heads=32,
        kv_heads=8,
        vocab=49159,
        theta=10000000.0,
        positions=131072,
        tie=True,
    )
    | {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "attention_multiplier": 0.0078125,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 16.0,
    },
    "phi-4": llama_config(
        hidden=5120,
        ffn=17920,
        layers=40,
        heads=40,
        kv_heads=10,
        vocab=100352,
        theta=250000.0,
        positions=16384,
        tie=False,
    )
    | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"},
    "phi-4-mini": llama_config(
        hidden=3072,
        ffn=8192,
        layers=32,
        heads=24,
        kv_heads=8,
        vocab=200064,
        theta=10000.0,
        positions=131072,
        tie=True,
    )
    | {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 48,
            "long_factor": [32.0]
            * 48,  # the model's own rise from 1 to 48; no time depends on them
        },
        "sliding_window": 262144,
    },
}


def write_random_checkpoint(
    folder: str | Path, config: dict[str, Any], seed: int = 0, shard_bytes: float = SHARD_BYTES
) -> Path:
    """Write a checkpoint of this config.json and return its folder.

    config.json is written last, so a folder that has one is complete.

    Raises: ValueError if the folder holds a model already, or the disk has no room for it.
    """
    folder, shapes = Path(folder), ModelConfig.from_dict(config).tensor_shapes()
    if (folder / "config.json").exists():
        raise ValueError(f"{folder}: holds a model already; remove it or choose another folder")
    specs = specs_of_dtype(shapes, torch.bfloat16)
    require_space(folder, total_bytes(specs))
    tensors = _random_tensors(shapes, config["num_hidden_layers"], seed)
    with os_errors_as_value_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_model_files(folder, specs, tensors, {"format": "pt"}, shard_bytes)
        _write_tokenizer(folder, config["max_position_embeddings"])
        write_json(folder / "config.json", config)
    return folder


def _random_tensors(
    shapes: dict[str, tuple[int, ...]], layers: int, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, bf16 tensor on the host): norms are 1, biases 0, and matrices normal.

    o_proj and down_proj add to the residual stream 2 * layers times in all. Their deviation is
    smaller by sqrt(2 * layers), as in GPT-2, so the stream keeps its size from layer to layer.
    """
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(seed)
    for name, shape in shapes.items():
        if len(shape) == 1:
            value = 0.0 if name.endswith(".bias") else 1.0
            yield name, torch.full(shape, value, dtype=torch.bfloat16)
            continue
        adds_to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = INITIAL_STD / math.sqrt(2 * layers) if adds_to_residual else INITIAL_STD
        values = torch.randn(shape, generator=generator, device=generator.device).mul_(std)
        yield name, values.to(torch.bfloat16).cpu()


def _write_tokenizer(folder: Path, positions: int) -> None:
    """Write a byte-level tokenizer without merges: one token a byte, no token around a text."""
    tokens = (*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": positions,
        **dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=True)),
    }
    write_json(folder / "tokenizer_config.json", settings)
