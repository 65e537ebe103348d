"""The values that stand for missing ones in config.json: the defaults of transformers' classes.

transformers writes the config inside a wrapper without the values that equal these defaults. The
reader's own defaults, which are Llama's, are left out here.
"""

from typing import Any

ROPE_KEYS = ("rope_parameters", "rope_scaling")
LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
MISTRAL = LLAMA | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
MINISTRAL_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
QWEN = LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
QWEN2 = QWEN | {"sliding_window": 4096, "max_window_layers": 28}
QWEN2_VL = QWEN2 | {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_window_layers": 80,
}
OLMO2 = LLAMA | {"vocab_size": 50304, "rms_norm_eps": 1e-5}
GEMMA2 = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
}
DEFAULTS: dict[str, dict[str, Any]] = {  # by model_type of a plain config or of a text_config
    "llama": LLAMA,
    "mistral": MISTRAL,
    "ministral3": {
        **LLAMA,
        "vocab_size": 131072,
        "intermediate_size": 14336,
        "num_hidden_layers": 34,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "rope_parameters": MINISTRAL_ROPE,
    },
    "qwen2": QWEN2,
    "qwen2_vl_text": QWEN2_VL,
    "qwen2_5_vl_text": QWEN2_VL,
    "qwen3": {**QWEN2, "head_dim": 128},
    "qwen3_vl_text": {
        **QWEN,
        "head_dim": 128,
        "max_position_embeddings": 128000,
        "rope_theta": 5e5,
    },
    "smollm3": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2e6,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
    "granite": LLAMA,
    "phi3": {
        **LLAMA,
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "olmo2": OLMO2,
    "olmo3": {**OLMO2, "sliding_window": 4096, "sliding_window_pattern": 4, "rope_theta": 5e5},
    "gemma2": GEMMA2,
    "gemma3_text": {
        **GEMMA2,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
}


def with_defaults(raw: dict, model_type: str) -> dict:
    """Return the values of a config.json with the defaults of `model_type` for missing ones.

    A default never stands beside the same value in the parameters of the rotary embedding.
    """
    values = {key: raw[key] for key in raw if key not in ROPE_KEYS or raw[key] is not None}
    rope = next((values[key] for key in ROPE_KEYS if isinstance(values.get(key), dict)), {})
    given = {*values, *rope, *(ROPE_KEYS if rope else ())}
    missing = {k: v for k, v in DEFAULTS[model_type].items() if k not in given}
    return missing | values
