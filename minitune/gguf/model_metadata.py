"""The keys of a model's architecture in GGUF, its additional tensors, and what llama.cpp lacks."""

import warnings

import torch
from torch import Tensor

from minitune.config.model_config import ModelConfig
from minitune.gguf.writer import MetadataValue
from minitune.model.rope import YARN_BETA_FAST, YARN_BETA_SLOW, rope_divisors, rope_scale

# Hugging Face's module names, those of a layer without its prefix -> llama.cpp's
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Key of YaRN -> the value that llama.cpp computes with, whatever the file says; None if the key's
# effect is built in.
LLAMA_CPP_YARN = {
    "beta_fast": YARN_BETA_FAST,
    "beta_slow": YARN_BETA_SLOW,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
}
# The same for Ministral 3, of which llama.cpp reads the other keys.
LLAMA_CPP_YARN_MINISTRAL = {"attention_factor": None, "mscale": 1.0}
UNROTATED_PERIOD = 4  # of SmolLM3 in llama.cpp


def gguf_name(name: str) -> str:
    """Return llama.cpp's name: model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, part = module.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"
    return f"{GGUF_NAMES[module]}.{kind}"


def model_metadata(config: ModelConfig) -> dict[str, MetadataValue]:
    """Return the keys of the architecture, such as `llama.*`."""
    family, rope = config.architecture, config.ropes[0]
    metadata = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope.theta),
    }
    if config.raw.get("head_dim") is not None and family.gguf_head_dim:
        metadata["attention.key_length"] = config.head_dim  # otherwise llama.cpp divides
        metadata["attention.value_length"] = config.head_dim
    if family.gguf_llama_layout:
        metadata["vocab_size"] = config.vocab_size
    if family.gguf_llama_layout or family.partial_rotary:
        metadata["rope.dimension_count"] = rope.rotary_dim
    metadata |= _rope_scaling_metadata(config)
    if family.gguf_window:
        metadata["attention.sliding_window"] = max(k.window or 0 for k in config.layer_kinds)
    if family.multipliers:
        metadata |= {
            "attention.scale": float(config.attention_scale),
            "embedding_scale": float(config.embedding_multiplier),
            "residual_scale": float(config.residual_multiplier),
            "logit_scale": 1 / config.logit_multiplier,
        }
    return {f"{family.gguf}.{key}": value for key, value in metadata.items()}


def _rope_scaling_metadata(config: ModelConfig) -> dict[str, MetadataValue]:
    """Return the keys of the RoPE scaling; llama3's is a tensor."""
    family, rope = config.architecture, config.ropes[0]
    scaling, metadata = rope.scaling or {}, {}
    original = scaling.get("original_max_position_embeddings")
    if family.partial_rotary:  # Phi-3 has the key without a scaling too
        original = original or config.raw.get("original_max_position_embeddings", 4096)
    if original and rope.kind != "llama3":
        metadata["rope.scaling.original_context_length"] = int(original)
    if rope.kind in ("linear", "yarn"):
        metadata["rope.scaling.type"] = rope.kind
        metadata["rope.scaling.factor"] = float(scaling["factor"])
    if rope.kind == "yarn":
        for key in ("beta_fast", "beta_slow"):
            if scaling[key]:
                metadata[f"rope.scaling.yarn_{key}"] = float(scaling[key])
    if rope.kind == "longrope":
        metadata["rope.scaling.attn_factor"] = rope_scale(rope)
    if rope.query_growth:
        # llama.cpp's ratio of both mscale factors takes 1 for mscale.
        log_multiplier = scaling["mscale_all_dim"] if scaling["mscale"] else 0.0
        metadata["rope.scaling.yarn_log_multiplier"] = float(log_multiplier)
        metadata["attention.temperature_scale"] = rope.query_growth
    return metadata


def additional_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Return the tensors of the RoPE scaling, float32 (R/2,) by name."""
    rope, positions = config.ropes[0], config.max_position_embeddings
    if rope.kind == "llama3":
        return {"rope_freqs.weight": rope_divisors(rope, positions)}
    if rope.kind == "longrope":
        return {
            f"rope_factors_{length}.weight": torch.tensor(rope.scaling[f"{length}_factor"])
            for length in ("long", "short")
        }
    return {}


def check_expressible(config: ModelConfig) -> None:
    """Raise ValueError if llama.cpp would refuse or misread the model.

    A sliding window that llama.cpp ignores is only warned of, because shorter contexts agree.
    """
    family, rope = config.architecture, config.ropes[0]
    if (config.qkv_bias or config.o_bias) and not family.gguf_biases:
        raise _inexpressible(f"llama.cpp's {family.gguf} has no biases in attention")
    if config.mlp_bias and not family.gguf_biases:
        raise _inexpressible(f"llama.cpp's {family.gguf} has no biases in the MLP")
    if not family.gguf_head_dim and config.query_size != config.hidden_size:
        raise _inexpressible(
            f"llama.cpp's {family.gguf} has heads of {config.hidden_size} / "
            f"{config.num_attention_heads} columns, not head_dim {config.head_dim}"
        )
    if rope.kind in ("llama3", "longrope") and rope.kind not in family.gguf_rope_tensors:
        raise _inexpressible(f"llama.cpp's {family.gguf} has no RoPE scaling {rope.kind}")
    built_in = LLAMA_CPP_YARN_MINISTRAL if family.query_growth else LLAMA_CPP_YARN
    for key, value in built_in.items() if rope.kind == "yarn" else ():
        if rope.scaling[key] and rope.scaling[key] != value:
            raise ValueError(
                f"llama.cpp does not read YaRN's {key} for {family.gguf}, and this model sets "
                f"{rope.scaling[key]}; save the merged folder instead"
            )
    rotated = [kind.rope is not None for kind in config.layer_kinds]
    periodic = [(i + 1) % UNROTATED_PERIOD != 0 for i in range(len(rotated))]
    if family.unrotated_period_key and rotated != periodic:
        raise _inexpressible(
            f"llama.cpp's {family.gguf} has no RoPE in every {UNROTATED_PERIOD}th layer"
        )
    if window := max(kind.window or 0 for kind in config.layer_kinds):
        warnings.warn(
            f"llama.cpp ignores the sliding window of {family.gguf}: "
            f"run the file with a context of at most {window} tokens, where it changes nothing",
            stacklevel=2,
        )


def _inexpressible(reason: str) -> ValueError:
    return ValueError(f"{reason}, but this model differs; save the merged folder instead")
