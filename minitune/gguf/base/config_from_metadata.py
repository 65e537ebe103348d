"""The config.json of a GGUF file: the way back from model_metadata.py.

The keys of the file's architecture, the names and shapes of its tensors and RoPE's divisors decide.
A missing key has llama.cpp's default. A model of the result computes what llama.cpp computes with
the file, with one exception: Phi-3 keeps its sliding window, which llama.cpp ignores.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from minitune.config.architectures import ARCHITECTURES, Architecture
from minitune.config.config_values import MAX_LAYERS
from minitune.config.layer_kinds import FULL, SLIDING, periodic
from minitune.gguf.base.architecture_keys import ArchitectureKeys
from minitune.gguf.base.rope_from_metadata import rope_fields
from minitune.gguf.model_metadata import GEMMA_27B_LAYERS, UNROTATED_PERIOD
from minitune.gguf.reader import StoredTensor

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# general.architecture -> model_type of config.json; OLMo 2 with a sliding window is OLMo 3.
MODEL_TYPES = {
    "llama": "llama",
    "mistral3": "ministral3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "granite": "granite",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
WINDOWED_OLMO = "olmo3"
# general.architecture -> sliding window without a key, tokens; 0 for none
DEFAULT_WINDOWS = {"gemma2": 4096}
# general.architecture -> all but every p-th layer slide without a key
DEFAULT_PERIODS = {"olmo2": 4, "gemma2": 2, "gemma3": 6}
GEMMA3_LOCAL_THETA = 10000.0
# Bounds on scores and logits without a key
DEFAULT_SOFT_CAPS = {"gemma2": (50.0, 30.0), "gemma3": (0.0, 0.0)}


def config_from_metadata(
    metadata: dict[str, Any],
    tensors: Mapping[str, StoredTensor],
    divisors: Mapping[str, Tensor],
) -> dict:
    """Return the content of config.json.

    metadata: the keys of a GGUF file.
    tensors: name -> tensor of the file.
    divisors: name -> values, of those of ROPE_TENSORS that the file holds.

    Raises: ValueError that names the key or the tensor if the architecture is not supported, a key
        is missing, or a value changes the computation in a way that is not supported.
    """
    keys = ArchitectureKeys(metadata, supported_architecture(metadata))
    family = _family(keys)
    if EMBEDDING not in tensors:
        raise ValueError(f"the tensor {EMBEDDING} is missing")
    config: dict = {"architectures": [family.model_class], "model_type": family.model_type}
    config |= _sizes(keys, family, tensors)
    config |= _biases(family, tensors)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    config |= rope_fields(keys, family, divisors, head_dim, config["max_position_embeddings"])
    config |= _windows(keys, family, config["num_hidden_layers"])
    config |= _local_rope(keys, family, config)
    config |= _scales(keys, family, config, head_dim)
    if family.unrotated_period_key:
        config[family.unrotated_period_key] = UNROTATED_PERIOD
    keys.check_all_read()
    return config


def supported_architecture(metadata: dict[str, Any]) -> str:
    """Return general.architecture.

    Raises: ValueError that lists the supported ones if it is another.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in MODEL_TYPES:
        found = "is missing" if name is None else f"{name!r} is not supported"
        raise ValueError(f"general.architecture {found}; supported are {', '.join(MODEL_TYPES)}")
    return name


def _family(keys: ArchitectureKeys) -> Architecture:
    """Return the family of the keys' architecture."""
    model_type = MODEL_TYPES[keys.name]
    if keys.name == "olmo2" and keys.whole("attention.sliding_window", 0, minimum=0):
        model_type = WINDOWED_OLMO
    return ARCHITECTURES[model_type]


def _sizes(
    keys: ArchitectureKeys, family: Architecture, tensors: Mapping[str, StoredTensor]
) -> dict:
    """Return the sizes of the model, its activation and the ties of its head."""
    layers = keys.whole("block_count", maximum=MAX_LAYERS)
    last = f"blk.{layers - 1}.attn_output.weight"
    if last not in tensors:
        raise ValueError(f"{keys.name}.block_count is {layers}, but the tensor {last} is missing")
    hidden = keys.whole("embedding_length")
    heads = keys.whole_of_layers("attention.head_count", layers)
    if heads > hidden:
        raise keys.error("attention.head_count", heads, f"at most the width {hidden}")
    head_dim = keys.whole("attention.key_length", hidden // heads)
    if head_dim * heads != tensors[last].shape[-1]:
        width = tensors[last].shape[-1] / heads
        raise keys.error("attention.key_length", head_dim, f"{width:g} for {heads} heads")
    keys.expect("attention.value_length", head_dim)
    keys.expect("attention.key_length_swa", head_dim)
    keys.expect("attention.value_length_swa", head_dim)
    keys.expect("embedding_length_out", hidden)
    config = {
        "vocab_size": tensors[EMBEDDING].shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.whole_of_layers("feed_forward_length", layers),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole_of_layers("attention.head_count_kv", layers, heads),
        "max_position_embeddings": keys.whole("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": HEAD not in tensors and family.gguf.head != "own",
        family.activation_key: "silu" if family.activation == "silu" else "gelu_pytorch_tanh",
    }
    if family.gguf.head_dim or head_dim * heads != hidden:
        config["head_dim"] = head_dim
    return config


def _biases(family: Architecture, tensors: Mapping[str, StoredTensor]) -> dict:
    """Return the switches of the biases that a family's config.json has."""
    biases = {
        part: f"blk.0.{part}.bias" in tensors
        for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    config = {}
    for switch, fixed, parts in (
        ("attention_bias", family.qkv_bias, list(biases)[:4]),
        ("mlp_bias", family.mlp_bias, list(biases)[4:]),
    ):
        if fixed is not None:
            continue
        config[switch] = any(biases[part] for part in parts)
        if missing := [part for part in parts if config[switch] and not biases[part]]:
            raise ValueError(
                f"{missing[0]} has no bias, but other linears have one; models of type "
                f"{family.model_type} have biases for all of {', '.join(parts)} or for none"
            )
    return config


def _windows(keys: ArchitectureKeys, family: Architecture, layers: int) -> dict:
    """Return the sliding window and the layers that it counts for."""
    if family.gguf.window is None:
        return {}
    window = keys.whole("attention.sliding_window", DEFAULT_WINDOWS.get(keys.name, 0), minimum=0)
    if family.gguf.window == "ignored":
        return {"sliding_window": window or None}
    if not window and keys.name == "gemma2":
        raise keys.error("attention.sliding_window", window, "a number of tokens above 0")
    if not window:
        return {"sliding_window": None}
    key = "attention.sliding_window_pattern"
    slides = keys.value(key, DEFAULT_PERIODS[keys.name])
    if not isinstance(slides, list):
        period = keys.whole(key, slides, minimum=0)
        slides = periodic(layers, period) if period else [True] * layers
    if len(slides) != layers or any(slide not in (0, 1) for slide in slides):
        raise keys.error(key, slides, f"true or false for each of {layers} layers")
    types = [SLIDING if slide else FULL for slide in slides]
    return {"sliding_window": window, "layer_types": types}


def _local_rope(keys: ArchitectureKeys, family: Architecture, config: dict) -> dict:
    """Return the rotation of sliding layers, if a family has one."""
    theta, scaling, key = config["rope_theta"], config["rope_scaling"], "rope.freq_base_swa"
    if not family.gguf.local_theta:
        keys.expect(key, theta)
        plain = {"rope_type": "default", "rope_theta": theta}
        both = {FULL: plain | (scaling or {}), SLIDING: plain}
        return {"rope_scaling": None, "rope_parameters": both} if family.two_ropes else {}
    is_yarn = scaling is not None and scaling["rope_type"] != "linear"
    if is_yarn and SLIDING in config.get("layer_types", ()):
        raise keys.error("rope.scaling.type", scaling["rope_type"], "linear, or no sliding layers")
    return {"rope_local_base_freq": keys.number(key, GEMMA3_LOCAL_THETA, minimum=2.0)}


def _scales(keys: ArchitectureKeys, family: Architecture, config: dict, head_dim: int) -> dict:
    """Return the factors and the bounds of the embedding, the scores and the logits."""
    found: dict = {}
    if family.multipliers:
        keys.expect("rope.scaling.finetuned", True)  # without it llama.cpp does not rotate
        found = {
            "attention_multiplier": keys.number("attention.scale", 0.0) or head_dim**-0.5,
            "embedding_multiplier": keys.number("embedding_scale", 0.0) or 1.0,
            "residual_multiplier": keys.number("residual_scale", 0.0) or 1.0,
            "logits_scaling": keys.number("logit_scale"),
        }
    if family.query_scalar_key is not None:
        is_27b = config["num_hidden_layers"] == GEMMA_27B_LAYERS[keys.name]
        heads = config["num_attention_heads"]
        found[family.query_scalar_key] = config["hidden_size"] // heads if is_27b else head_dim
    if family.soft_caps:
        scores, logits = DEFAULT_SOFT_CAPS[keys.name]
        if scores:
            scores = keys.number("attn_logit_softcapping", scores)
        found["attn_logit_softcapping"] = scores or None
        found["final_logit_softcapping"] = keys.number("final_logit_softcapping", logits) or None
        if keys.name == "gemma2" and None in found.values():
            raise ValueError("gemma2's soft caps are 0; expected numbers above 0")
    return found
