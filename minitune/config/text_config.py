"""The text model inside a multimodal wrapper, as the config.json of a plain text model.

A wrapper's config.json holds the text model's values in `text_config`, beside those of a vision or
audio encoder. Qwen2-VL's and Qwen2.5-VL's first layout has the text model's values at the top.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TextModel:
    """The plain model that equals a wrapper's text model.

    model_type, model_class: the type of the plain model, and its class in transformers.
    defaults: values that a text_config may leave out, beside the family's. transformers wrote a
        nested config without the values that equal the defaults of its class.
    """

    model_type: str
    model_class: str
    defaults: dict[str, Any] = field(default_factory=dict)


QWEN2_VL_DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
TEXT_MODELS = {  # by model_type of the text_config
    "llama": TextModel(
        "llama",
        "LlamaForCausalLM",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
    ),
    "mistral": TextModel(
        "mistral",
        "MistralForCausalLM",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        },
    ),
    "ministral3": TextModel(
        "ministral3",
        "Ministral3ForCausalLM",
        {
            "vocab_size": 131072,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 34,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale_all_dim": 1.0,
                "mscale": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "granite": TextModel(
        "granite",
        "GraniteForCausalLM",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
    ),
    "gemma3_text": TextModel(
        "gemma3_text",
        "Gemma3ForCausalLM",
        {
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
    ),
    "qwen2": TextModel(
        "qwen2",
        "Qwen2ForCausalLM",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
        },
    ),
    "qwen3": TextModel(
        "qwen3",
        "Qwen3ForCausalLM",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
        },
    ),
    "qwen2_vl_text": TextModel("qwen2", "Qwen2ForCausalLM", QWEN2_VL_DEFAULTS),
    "qwen2_5_vl_text": TextModel("qwen2", "Qwen2ForCausalLM", QWEN2_VL_DEFAULTS),
    "qwen3_vl_text": TextModel(
        "qwen3",
        "Qwen3ForCausalLM",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 128000,
            "rope_theta": 500000.0,
        },
    ),
}
# Wrappers whose config.json may hold the text model's values at the top -> type of the text model
FLAT_WRAPPERS = {"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text"}
ROPE_KEYS = ("rope_parameters", "rope_scaling")
# Keys of the rotary embedding for the positions of an image. A text's three positions are equal,
# and with these the sections of the heads rotate as a plain model's.
MROPE_KEYS = ("mrope_section", "mrope_interleaved")
# Values of the wrapper that count if the text_config has none.
OUTER_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
    "quantization_config",
)


def is_wrapper(raw: dict) -> bool:
    """Return True if a config.json is that of a model around a text model."""
    return raw.get("text_config") is not None or str(raw.get("model_type")) in FLAT_WRAPPERS


def text_config(raw: dict) -> dict:
    """Return the config.json of the plain text model inside a wrapper.

    Raises: ValueError if text_config is no object, or has no model_type.
    """
    inner = raw.get("text_config")
    if inner is None:
        flat = {key: value for key, value in raw.items() if key != "vision_config"}
        inner = flat | {"model_type": FLAT_WRAPPERS[raw["model_type"]]}
    if not isinstance(inner, dict):
        raise ValueError(f"text_config is {inner!r}; expected an object")
    if inner.get("model_type") is None:
        raise ValueError("text_config has no model_type; expected that of the text model")
    text = {key: raw[key] for key in OUTER_KEYS if raw.get(key) is not None}
    text |= {key: value for key, value in inner.items() if value is not None or key not in text}
    # A head that is stored counts either way, so a model is tied if any of the two says so.
    ties = [part["tie_word_embeddings"] for part in (raw, inner) if "tie_word_embeddings" in part]
    if ties:
        text["tie_word_embeddings"] = next((tie for tie in ties if tie), ties[0])
    for key in ROPE_KEYS:
        if isinstance(text.get(key), dict):
            text[key] = _plain_rope(text[key])
    model = TEXT_MODELS.get(str(text["model_type"]))
    if model is None:
        return text
    rope = next((text[key] for key in ROPE_KEYS if isinstance(text.get(key), dict)), {})
    given = {*text, *rope, *(ROPE_KEYS if rope else ())}
    missing = {key: value for key, value in model.defaults.items() if key not in given}
    text |= {"model_type": model.model_type, "architectures": [model.model_class]}
    return missing | text


def _plain_rope(rope: dict) -> dict:
    """Return the parameters of a rotary embedding that a text without images needs."""
    plain = {key: value for key, value in rope.items() if key not in MROPE_KEYS}
    for key in ("rope_type", "type"):
        if plain.get(key) == "mrope":
            plain[key] = "default"
    return plain
