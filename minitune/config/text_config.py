"""The text model inside a multimodal wrapper, as the config.json of a plain text model.

A wrapper's config.json holds the text model's values in `text_config`, beside those of a vision or
audio encoder. Qwen2-VL's and Qwen2.5-VL's first layout has the text model's values at the top.
"""

from minitune.config.architectures import ARCHITECTURES
from minitune.config.family_defaults import ROPE_KEYS, with_defaults

# model_type of a text_config -> that of the plain model that equals the text model
PLAIN_TYPES = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
# Wrappers whose config.json may hold the text model's values at the top -> type of the text model
FLAT_WRAPPERS = {"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text"}
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
    text_type = str(text["model_type"])
    family = ARCHITECTURES.get(PLAIN_TYPES.get(text_type, text_type))
    if family is None:
        return text
    plain = {"model_type": family.model_type, "architectures": [family.model_class]}
    return with_defaults(text, text_type) | plain


def _plain_rope(rope: dict) -> dict:
    """Return the parameters of a rotary embedding that a text without images needs."""
    plain = {key: value for key, value in rope.items() if key not in MROPE_KEYS}
    for key in ("rope_type", "type"):
        if plain.get(key) == "mrope":
            plain[key] = "default"
    return plain
