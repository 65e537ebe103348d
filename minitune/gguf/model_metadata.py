"""The keys of a model's architecture in GGUF, its additional tensors, and what llama.cpp lacks."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from minitune.config.architectures import Architecture, NormNames
from minitune.config.family_defaults import with_defaults
from minitune.config.layer_kinds import periodic
from minitune.config.model_config import ModelConfig
from minitune.gguf.writer import MetadataValue
from minitune.model.rope import YARN_BETA_FAST, YARN_BETA_SLOW, rope_divisors, rope_scale
from minitune.progress import warn

# Hugging Face's module names, those of a layer without its prefix -> llama.cpp's
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GGUF_NORMS = NormNames("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
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
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
ORIGINAL = "original_max_position_embeddings"
UNROTATED_PERIOD = 4  # of SmolLM3 in llama.cpp


def gguf_name(name: str, family: Architecture) -> str:
    """Return llama.cpp's name: model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, part = module.split(".", 3)
        norms = dict(zip(family.norms, GGUF_NORMS, strict=True))
        return f"blk.{layer}.{norms.get(part) or GGUF_NAMES[part]}.{kind}"
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
    }
    if rope.theta != family.gguf.theta:
        metadata["rope.freq_base"] = float(rope.theta)
    values = with_defaults(config.raw, family.model_type)
    has_head_dim = values.get("head_dim") is not None or family.gguf.always_head_dim
    if family.gguf.head_dim and has_head_dim:
        metadata["attention.key_length"] = config.head_dim  # otherwise llama.cpp divides
        metadata["attention.value_length"] = config.head_dim
    if family.gguf.llama_layout:
        metadata["vocab_size"] = config.vocab_size
    if family.gguf.llama_layout or family.partial_rotary:
        metadata["rope.dimension_count"] = rope.rotary_dim
    metadata |= _rope_scaling_metadata(config)
    metadata |= _window_metadata(config)
    if family.multipliers:
        metadata |= {
            "attention.scale": float(config.attention_scale),
            "embedding_scale": float(config.embedding_multiplier),
            "residual_scale": float(config.residual_multiplier),
            "logit_scale": 1 / config.logit_multiplier,
        }
    if config.score_softcap:
        metadata["attn_logit_softcapping"] = config.score_softcap
    if config.logit_softcap:
        metadata["final_logit_softcapping"] = config.logit_softcap
    return {f"{family.gguf.name}.{key}": value for key, value in metadata.items()}


def _window_metadata(config: ModelConfig) -> dict[str, MetadataValue]:
    """Return the keys of the sliding window."""
    family, windows = config.architecture, [kind.window for kind in config.layer_kinds]
    if family.gguf.window is None:
        return {}
    metadata = {"attention.sliding_window": max(window or 0 for window in windows)}
    slides = [window is not None for window in windows]
    if family.gguf.window == "ignored" or not any(slides):
        return metadata
    period = family.gguf.window_period
    if period is None or slides != periodic(len(slides), period):
        metadata["attention.sliding_window_pattern"] = slides
    if family.two_ropes:
        metadata["rope.freq_base_swa"] = float(config.ropes[1].theta)
    return metadata


def _rope_scaling_metadata(config: ModelConfig) -> dict[str, MetadataValue]:
    """Return the keys of the RoPE scaling; llama3's is a tensor."""
    family, rope = config.architecture, config.ropes[0]
    scaling, metadata = rope.scaling or {}, {}
    original = scaling.get(ORIGINAL)
    if family.partial_rotary:  # Phi-3 has the key without a scaling too
        original = original or with_defaults(config.raw, family.model_type)[ORIGINAL]
    if original and rope.kind != "llama3":
        metadata["rope.scaling.original_context_length"] = int(original)
    if rope.kind in ("linear", "yarn") or (rope.kind == "longrope" and not family.partial_rotary):
        metadata["rope.scaling.type"] = rope.kind  # Phi-3's divisors count without the key
    if rope.kind in ("linear", "yarn"):
        metadata["rope.scaling.factor"] = float(scaling["factor"])
    if rope.kind == "yarn":
        for key in ("beta_fast", "beta_slow", "attention_factor"):
            if scaling[key]:
                name = key.replace("attention", "attn")
                metadata[f"rope.scaling.yarn_{name}"] = float(scaling[key])
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
    if window := ignored_window(config):
        warn(
            f"llama.cpp ignores the sliding window of {config.architecture.gguf.name}: "
            f"run the file with a context of at most {window} tokens, where it changes nothing",
            stacklevel=2,
        )
    family, rope = config.architecture, config.ropes[0]
    if (config.qkv_bias or config.o_bias) and not family.gguf.biases:
        raise _inexpressible(f"llama.cpp's {family.gguf.name} has no biases in attention")
    if config.mlp_bias and not family.gguf.biases:
        raise _inexpressible(f"llama.cpp's {family.gguf.name} has no biases in the MLP")
    if not family.gguf.head_dim and config.query_size != config.hidden_size:
        raise _inexpressible(
            f"llama.cpp's {family.gguf.name} has heads of {config.hidden_size} / "
            f"{config.num_attention_heads} columns, not head_dim {config.head_dim}"
        )
    if rope.kind in ("llama3", "longrope") and rope.kind not in family.gguf.rope_tensors:
        raise _inexpressible(f"llama.cpp's {family.gguf.name} has no RoPE scaling {rope.kind}")
    built_in = LLAMA_CPP_YARN_MINISTRAL if family.query_growth else LLAMA_CPP_YARN
    if rope.kind == "yarn":
        plain = replace(rope, scaling=rope.scaling | {"attention_factor": 0.0})
        if math.isclose(rope_scale(plain), rope_scale(rope), rel_tol=1e-4):
            built_in = built_in | {"attention_factor": rope.scaling["attention_factor"]}
    for key, value in built_in.items() if rope.kind == "yarn" else ():
        if rope.scaling[key] and rope.scaling[key] != value:
            raise ValueError(
                f"llama.cpp does not read YaRN's {key} for {family.gguf.name}, and this model sets "
                f"{rope.scaling[key]}; save the merged folder instead"
            )
    _check_layers(config)


def _check_layers(config: ModelConfig) -> None:
    """Raise ValueError if llama.cpp has other kinds of layers or another head for the family."""
    family, rope = config.architecture, config.ropes[0]
    rotated = [kind.rope is not None for kind in config.layer_kinds]
    if family.unrotated_period_key and rotated != periodic(len(rotated), UNROTATED_PERIOD):
        raise _inexpressible(
            f"llama.cpp's {family.gguf.name} has no RoPE in every {UNROTATED_PERIOD}th layer"
        )
    for sliding in config.ropes[1:]:
        if sliding.scaling is not None:
            raise _inexpressible(f"llama.cpp's {family.gguf.name} scales no RoPE of sliding layers")
        if sliding.theta != rope.theta and not family.gguf.local_theta:
            raise _inexpressible(
                f"llama.cpp's {family.gguf.name} has one rope_theta for all layers"
            )
    if config.tie_word_embeddings and family.gguf.head == "own":
        raise _inexpressible(f"llama.cpp's {family.gguf.name} has a head that is not the embedding")
    if not config.tie_word_embeddings and family.gguf.head == "tied":
        raise _inexpressible(f"llama.cpp's {family.gguf.name} has the embedding as its head")
    scale, built_in_scale = config.attention_scale, _gemma_scale(config)
    if family.query_scalar_key and not math.isclose(scale, built_in_scale):
        raise _inexpressible(
            f"llama.cpp's {family.gguf.name} has {family.query_scalar_key} {built_in_scale**-2:g}, "
            f"not {scale**-2:g}"
        )
    if config.score_softcap and family.gguf.name != "gemma2":
        raise _inexpressible(f"llama.cpp's {family.gguf.name} has no attn_logit_softcapping")
    slides = any(kind.window for kind in config.layer_kinds)
    if family.gguf.name == "gemma2" and not (
        slides and config.score_softcap and config.logit_softcap
    ):
        raise _inexpressible("llama.cpp's gemma2 has a sliding window and both soft caps")


def ignored_window(config: ModelConfig) -> int | None:
    """Return the sliding window in tokens that llama.cpp ignores, or None if it ignores none."""
    if config.architecture.gguf.window == "read":
        return None
    return min((kind.window for kind in config.layer_kinds if kind.window), default=None)


def check_window(config: ModelConfig, max_seqlen: int) -> None:
    """Check that training did not reach beyond a sliding window that llama.cpp ignores.

    max_seqlen: tokens of the longest sample that the model was trained on, 0 if it is not known.

    Raises: ValueError if training did.
    """
    window = ignored_window(config)
    if window is not None and max_seqlen > window:
        raise ValueError(
            f"llama.cpp ignores the sliding window of {config.architecture.gguf.name}, {window} "
            f"tokens, but a sample of the training has {max_seqlen:,} tokens; set max_length to "
            f"{window}, or save the merged folder instead"
        )


def _gemma_scale(config: ModelConfig) -> float:
    """Return the factor of the scores that llama.cpp has for Gemma, by the number of layers."""
    if config.num_hidden_layers == GEMMA_27B_LAYERS.get(config.architecture.gguf.name):
        return (config.hidden_size // config.num_attention_heads) ** -0.5
    return config.head_dim**-0.5


def _inexpressible(reason: str) -> ValueError:
    return ValueError(f"{reason}, but this model differs; save the merged folder instead")
