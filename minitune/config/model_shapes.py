"""The shapes of published models, so that a plan needs no file of the model.

The values are those of the published config.json files, as far as memory and time depend on them.
A tokenizer, weights and the scaling of long contexts are not described: plans use none of them.
"""

import difflib
import re
from typing import Any, NamedTuple

from minitune.config.model_config import ModelConfig

LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
SMOLLM2 = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 100000.0}
MISTRAL = {"model_type": "mistral", "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None}
QWEN2 = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6}
QWEN3 = {"model_type": "qwen3", "rms_norm_eps": 1e-6, "rope_theta": 1e6}
GEMMA2 = {
    "model_type": "gemma2",
    "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10000.0,
    "sliding_window": 1024,
}
PHI3 = {"model_type": "phi3", "rms_norm_eps": 1e-5, "rope_theta": 250000.0}
OLMO2 = {"model_type": "olmo2", "rms_norm_eps": 1e-6, "rope_theta": 500000.0}
OLMO3 = {**OLMO2, "model_type": "olmo3", "sliding_window": 4096}
GRANITE = {
    "model_type": "granite",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e7,
    "attention_multiplier": 0.0078125,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 16.0,
}
SMOLLM3 = {
    "model_type": "smollm3",
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e6,
    "no_rope_layer_interval": 4,
}


class Shape(NamedTuple):
    """One row of the table.

    family: values that all sizes of a model share.
    hidden, ffn: widths of the residual stream and of the MLP.
    heads, kv_heads, head_dim: of attention.
    vocab: rows of the embedding.
    positions: the longest context.
    tied: True if the head is the embedding.
    more: values of this size alone.
    """

    family: dict[str, Any]
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    positions: int
    tied: bool
    more: dict[str, Any] = {}  # noqa: RUF012


SHAPES = {
    # family, layers, hidden, ffn, heads, kv_heads, head_dim, vocab, positions, tied
    "llama-2-7b": Shape(LLAMA, 32, 4096, 11008, 32, 32, 128, 32000, 4096, False),
    "llama-2-13b": Shape(LLAMA, 40, 5120, 13824, 40, 40, 128, 32000, 4096, False),
    "llama-3-8b": Shape(LLAMA, 32, 4096, 14336, 32, 8, 128, 128256, 8192, False),
    "llama-3-70b": Shape(LLAMA, 80, 8192, 28672, 64, 8, 128, 128256, 8192, False),
    "llama-3.1-8b": Shape(LLAMA, 32, 4096, 14336, 32, 8, 128, 128256, 131072, False),
    "llama-3.1-70b": Shape(LLAMA, 80, 8192, 28672, 64, 8, 128, 128256, 131072, False),
    "llama-3.2-1b": Shape(LLAMA, 16, 2048, 8192, 32, 8, 64, 128256, 131072, True),
    "llama-3.2-3b": Shape(LLAMA, 28, 3072, 8192, 24, 8, 128, 128256, 131072, True),
    "llama-3.3-70b": Shape(LLAMA, 80, 8192, 28672, 64, 8, 128, 128256, 131072, False),
    "tinyllama-1.1b": Shape(LLAMA, 22, 2048, 5632, 32, 4, 64, 32000, 2048, False),
    "smollm2-135m": Shape(SMOLLM2, 30, 576, 1536, 9, 3, 64, 49152, 8192, True),
    "smollm2-360m": Shape(SMOLLM2, 32, 960, 2560, 15, 5, 64, 49152, 8192, True),
    "smollm2-1.7b": Shape(SMOLLM2, 24, 2048, 8192, 32, 32, 64, 49152, 8192, True),
    "smollm3-3b": Shape(SMOLLM3, 36, 2048, 11008, 16, 4, 128, 128256, 65536, True),
    "mistral-7b": Shape(MISTRAL, 32, 4096, 14336, 32, 8, 128, 32768, 32768, False),
    "mistral-nemo-12b": Shape(MISTRAL, 40, 5120, 14336, 32, 8, 128, 131072, 131072, False),
    "mistral-small-24b": Shape(MISTRAL, 40, 5120, 32768, 32, 8, 128, 131072, 32768, False),
    "qwen2.5-0.5b": Shape(QWEN2, 24, 896, 4864, 14, 2, 64, 151936, 32768, True),
    "qwen2.5-1.5b": Shape(QWEN2, 28, 1536, 8960, 12, 2, 128, 151936, 32768, True),
    "qwen2.5-3b": Shape(QWEN2, 36, 2048, 11008, 16, 2, 128, 151936, 32768, True),
    "qwen2.5-7b": Shape(QWEN2, 28, 3584, 18944, 28, 4, 128, 152064, 131072, False),
    "qwen2.5-14b": Shape(QWEN2, 48, 5120, 13824, 40, 8, 128, 152064, 131072, False),
    "qwen2.5-32b": Shape(QWEN2, 64, 5120, 27648, 40, 8, 128, 152064, 131072, False),
    "qwen2.5-72b": Shape(QWEN2, 80, 8192, 29568, 64, 8, 128, 152064, 131072, False),
    "qwen3-0.6b": Shape(QWEN3, 28, 1024, 3072, 16, 8, 128, 151936, 40960, True),
    "qwen3-1.7b": Shape(QWEN3, 28, 2048, 6144, 16, 8, 128, 151936, 40960, True),
    "qwen3-4b": Shape(QWEN3, 36, 2560, 9728, 32, 8, 128, 151936, 40960, True),
    "qwen3-8b": Shape(QWEN3, 36, 4096, 12288, 32, 8, 128, 151936, 40960, False),
    "qwen3-14b": Shape(QWEN3, 40, 5120, 17408, 40, 8, 128, 151936, 40960, False),
    "qwen3-32b": Shape(QWEN3, 64, 5120, 25600, 64, 8, 128, 151936, 40960, False),
    "gemma-2-2b": Shape(GEMMA2, 26, 2304, 9216, 8, 4, 256, 256000, 8192, True),
    "gemma-2-9b": Shape(GEMMA2, 42, 3584, 14336, 16, 8, 256, 256000, 8192, True),
    "gemma-2-27b": Shape(
        *(GEMMA2, 46, 4608, 36864, 32, 16, 128, 256000, 8192, True),
        {"query_pre_attn_scalar": 144},
    ),
    "gemma-3-270m": Shape(
        *(GEMMA3, 18, 640, 2048, 4, 1, 256, 262144, 32768, True),
        {"sliding_window": 512},
    ),
    "gemma-3-1b": Shape(
        *(GEMMA3, 26, 1152, 6912, 4, 1, 256, 262144, 32768, True),
        {"sliding_window": 512},
    ),
    "gemma-3-4b": Shape(GEMMA3, 34, 2560, 10240, 8, 4, 256, 262208, 131072, True),
    "gemma-3-12b": Shape(GEMMA3, 48, 3840, 15360, 16, 8, 256, 262208, 131072, True),
    "gemma-3-27b": Shape(
        *(GEMMA3, 62, 5376, 21504, 32, 16, 128, 262208, 131072, True),
        {"query_pre_attn_scalar": 168},
    ),
    "phi-3-mini": Shape(PHI3, 32, 3072, 8192, 32, 32, 96, 32064, 4096, False),
    "phi-4": Shape(PHI3, 40, 5120, 17920, 40, 10, 128, 100352, 16384, False),
    "phi-4-mini": Shape(
        *(PHI3, 32, 3072, 8192, 24, 8, 128, 200064, 131072, True),
        {"partial_rotary_factor": 0.75},
    ),
    "olmo-2-1b": Shape(OLMO2, 16, 2048, 8192, 16, 16, 128, 100352, 4096, False),
    "olmo-2-7b": Shape(OLMO2, 32, 4096, 11008, 32, 32, 128, 100352, 4096, False),
    "olmo-2-13b": Shape(OLMO2, 40, 5120, 13824, 40, 40, 128, 100352, 4096, False),
    "olmo-2-32b": Shape(OLMO2, 64, 5120, 27648, 40, 8, 128, 100352, 4096, False),
    "olmo-3-7b": Shape(OLMO3, 32, 4096, 11008, 32, 32, 128, 100278, 65536, False),
    "granite-3-2b": Shape(
        *(GRANITE, 40, 2048, 8192, 32, 8, 64, 49159, 131072, True),
        {"attention_multiplier": 0.015625, "logits_scaling": 8.0},
    ),
    "granite-3-8b": Shape(GRANITE, 40, 4096, 12800, 32, 8, 128, 49159, 131072, True),
}
# Parts of a published name that say nothing about the shape.
NOT_SHAPE = re.compile(r"^meta-|-(?:instruct|it|pt|base|hf|chat|bnb-4bit|unsloth|v0\.3)(?=-|$)")


def shape_name(model: str) -> str | None:
    """Return the name in SHAPES of a model such as Qwen/Qwen3-4B or llama-3-8b, or None."""
    name = model.rsplit("/", 1)[-1].lower().replace("_", "-")
    name = NOT_SHAPE.sub("", NOT_SHAPE.sub("", name))
    for candidate in (name, name.replace("llama3", "llama-3").replace("gemma3", "gemma-3")):
        if candidate in SHAPES:
            return candidate
    return None


def config_of_shape(name: str) -> ModelConfig:
    """Return the config of a name in SHAPES."""
    shape = SHAPES[name]
    return ModelConfig.from_dict(
        shape.family
        | {
            "num_hidden_layers": shape.layers,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.ffn,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "vocab_size": shape.vocab,
            "max_position_embeddings": shape.positions,
            "tie_word_embeddings": shape.tied,
        }
        | shape.more
    )


def nearest_shapes(model: str) -> list[str]:
    """Return up to three names in SHAPES that are like a wrong name, the most similar first."""
    name = model.rsplit("/", 1)[-1].lower()
    return difflib.get_close_matches(name, SHAPES, n=3, cutoff=0.6)
