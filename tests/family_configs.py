"""Values of config.json for a tiny model of each family, and for multimodal wrappers."""

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
MINISTRAL_YARN = YARN | {
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.5 + 0.5 * i for i in range(8)],
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
# name of the case -> (model_type, values of config.json)
FAMILIES = {
    "qwen2": ("qwen2", {"rope_theta": 1e6}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"head_dim": 24, "rope_theta": 1e6}),
    "qwen3 tied": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3 with biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen2 with YaRN": ("qwen2", {"rope_scaling": YARN}),
    "qwen3 with YaRN": (
        "qwen3",
        {"head_dim": 32, "rope_scaling": YARN | {"beta_fast": 32.0, "beta_slow": 1.0}},
    ),
    "mistral": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "mistral with a window": ("mistral", {"sliding_window": 13, "num_key_value_heads": 1}),
    "qwen2 with windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3 with windows": (
        "qwen3",
        {
            "head_dim": 24,
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "smollm3 with YaRN": (
        "smollm3",
        {
            "head_dim": 24,
            "num_hidden_layers": 4,
            "tie_word_embeddings": True,
            "rope_scaling": YARN,
        },
    ),
    "granite": ("granite", {"num_key_value_heads": 1, **GRANITE}),
    "granite tied": (
        "granite",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, **GRANITE},
    ),
    "phi3": ("phi3", {"sliding_window": 2047}),
    "phi3 in part rotated": (
        "phi3",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "partial_rotary_factor": 0.75},
    ),
    "phi3 in a long context": (
        "phi3",
        {
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 8,
            "rope_scaling": LONGROPE,
        },
    ),
    "phi3 in a short context": (
        "phi3",
        {
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 1000,
            "max_position_embeddings": 4000,
            "rope_scaling": LONGROPE,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo2 tied": ("olmo2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "olmo3": (
        "olmo3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 12,
            "rope_parameters": {
                "full_attention": YARN | {"beta_fast": 32.0, "beta_slow": 1.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "olmo3 with two thetas": (
        "olmo3",
        {
            "sliding_window": 12,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            },
        },
    ),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 24,
            "num_hidden_layers": 3,
            "sliding_window": 20,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 32,
            "num_hidden_layers": 7,
            "sliding_window": 20,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma3 untied": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 40}),
    "gemma3 with a scale": (
        "gemma3_text",
        {"head_dim": 16, "query_pre_attn_scalar": 40, "tie_word_embeddings": True},
    ),
    "ministral3": ("ministral3", {"head_dim": 24, "rope_parameters": MINISTRAL_YARN}),
    "ministral3 tied": (
        "ministral3",
        {
            "head_dim": 32,
            "tie_word_embeddings": True,
            "rope_parameters": MINISTRAL_YARN | {"llama_4_scaling_beta": 0.5},
        },
    ),
}

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e4}
GROWING = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.1,
}
# name of the case -> (model_type of the wrapper, text_config, values of the wrapper)
WRAPPERS = {
    "llava": ("llava", {"model_type": "llama"}, {"image_token_index": 5}),
    "llava with scaled RoPE": (
        "llava",
        {"model_type": "llama", "rope_parameters": LINEAR, "tie_word_embeddings": True},
        {"image_token_index": 5, "tie_word_embeddings": True},
    ),
    "mistral3": (
        "mistral3",
        {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
        {"tie_word_embeddings": False},
    ),
    "mistral3 tied by the wrapper": (
        "mistral3",
        {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
        {"tie_word_embeddings": True},
    ),
    "ministral3 in mistral3": (
        "mistral3",
        {"model_type": "ministral3", "head_dim": 32, "rope_parameters": GROWING},
        {"tie_word_embeddings": True},
    ),
    "gemma3": (
        "gemma3",
        {
            "model_type": "gemma3_text",
            "num_hidden_layers": 7,
            "head_dim": 32,
            "sliding_window": 20,
            "query_pre_attn_scalar": 40,
            "rope_parameters": {
                "full_attention": LINEAR | {"factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "tie_word_embeddings": True,
        },
        {"mm_tokens_per_image": 4, "tie_word_embeddings": True},
    ),
    "granite in llava": (
        "llava",
        {
            "model_type": "granite",
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
        {"image_token_index": 5},
    ),
    "idefics3": ("idefics3", {"model_type": "llama", "pad_token_id": 2}, {}),
    "internvl": ("internvl", {"model_type": "qwen2"}, {}),
    "qwen2.5 with sections": (
        "qwen2_5_vl",
        {"model_type": "qwen2_5_vl_text", "rope_parameters": MROPE},
        {"vision_config": QWEN_VISION | {"out_hidden_size": 64, "fullatt_block_indexes": [0]}},
    ),
    "qwen3 with sections": (
        "qwen3_vl",
        {
            "model_type": "qwen3_vl_text",
            "head_dim": 16,
            "rope_parameters": MROPE | {"mrope_interleaved": True},
        },
        {"vision_config": QWEN_VISION | {"out_hidden_size": 64, "deepstack_visual_indexes": [0]}},
    ),
}
