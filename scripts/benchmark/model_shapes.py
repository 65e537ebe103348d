"""The config.json of models that are measured: Llamas of three sizes, and other families."""

from typing import Any


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


GEMMA = {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
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
    "olmo3-7b": llama_config(
        hidden=4096,
        ffn=11008,
        layers=32,
        heads=32,
        kv_heads=32,
        vocab=100278,
        theta=500000.0,
        positions=65536,
        tie=False,
    )
    | {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
    "gemma2-9b": llama_config(
        hidden=3584,
        ffn=14336,
        layers=42,
        heads=16,
        kv_heads=8,
        vocab=256000,
        theta=10000.0,
        positions=8192,
        tie=True,
    )
    | GEMMA
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    },
    "gemma3-4b": llama_config(
        hidden=2560,
        ffn=10240,
        layers=34,
        heads=8,
        kv_heads=4,
        vocab=262208,
        theta=1000000.0,
        positions=131072,
        tie=True,
    )
    | GEMMA
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "rope_local_base_freq": 10000.0,
        "sliding_window": 1024,
    },
}
