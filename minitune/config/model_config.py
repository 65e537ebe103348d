"""What a run is made of, as frozen dataclasses: the model's shape (from config.json), the adapter, the training.

Every field is checked when the object is made, so that the rest of the code can rely on it. A field that a user may set
carries its help text and its range (`setting`); command-line flags and TOML keys are built from these (flags.py).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitune.config.architectures import MODEL_TYPES


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama-family model. `raw` is config.json as it was read, for what is written beside a merge."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None  # None, {"rope_type": "linear", ...} or {"rope_type": "llama3", ...}
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    raw: dict

    def __post_init__(self):
        H, G = self.num_attention_heads, self.num_key_value_heads
        if H % G:
            raise ValueError(
                f"num_attention_heads {H} is not a multiple of num_key_value_heads {G}"
            )
        if self.head_dim % 8 or self.head_dim > 256:
            raise ValueError(
                f"head_dim {self.head_dim} is not supported; attention takes multiples of 8 up to 256"
            )

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read FOLDER/config.json. ValueError names the field where the model is not one that this code runs."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            if path.with_name("adapter_config.json").is_file():
                raise ValueError(
                    f"{folder}: is an adapter; load the model it was trained on, and the adapter onto it"
                )
            raise ValueError(
                f"{path}: not found; a model folder holds config.json, *.safetensors and a tokenizer"
            )
        try:
            raw = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        try:
            return cls.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: dict) -> "ModelConfig":
        if not isinstance(raw, dict):
            raise ValueError(f"holds a {type(raw).__name__}, not an object")
        if (family := raw.get("model_type")) not in MODEL_TYPES:
            raise ValueError(
                f"model_type {family!r} is not supported; supported are {', '.join(MODEL_TYPES)}"
            )
        if (act := raw.get("hidden_act", "silu")) != "silu":
            raise ValueError(f"hidden_act {act!r} is not supported; Llama-family models use 'silu'")
        if (window := raw.get("sliding_window")) is not None:
            raise ValueError(
                f"sliding_window {window} is not supported: attention here sees the whole sample"
            )
        hidden, heads = _value(raw, "hidden_size", int), _value(raw, "num_attention_heads", int)
        theta, scaling = _rope(raw)
        return cls(
            vocab_size=_value(raw, "vocab_size", int),
            hidden_size=hidden,
            intermediate_size=_value(raw, "intermediate_size", int),
            num_hidden_layers=_value(raw, "num_hidden_layers", int),
            num_attention_heads=heads,
            num_key_value_heads=_value(raw, "num_key_value_heads", int, heads),
            head_dim=_value(raw, "head_dim", int, hidden // heads),
            max_position_embeddings=_value(raw, "max_position_embeddings", int, 2048),
            rms_norm_eps=_value(raw, "rms_norm_eps", float, 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=_value(raw, "tie_word_embeddings", bool, False),
            attention_bias=_value(raw, "attention_bias", bool, False),
            mlp_bias=_value(raw, "mlp_bias", bool, False),
            raw=raw,
        )


def _value(raw: dict, name: str, kind: type, default: Any = None) -> Any:
    """A field of config.json, or the default where it is missing or null; numbers are positive."""
    if (value := raw.get(name)) is None:
        if default is None:
            raise ValueError(f"{name} is missing; is this the config.json of a Llama-family model?")
        return default
    numeric = isinstance(value, int if kind is int else (int, float)) and not isinstance(
        value, bool
    )
    if not (isinstance(value, bool) if kind is bool else numeric and 0 < value < math.inf):
        expected = {
            bool: "true or false",
            int: "a whole number above 0",
            float: "a number above 0",
        }[kind]
        raise ValueError(f"{name} is {value!r}; expected {expected}")
    return value


def _rope(raw: dict) -> tuple[float, dict | None]:
    """(theta, scaling) from either layout: rope_theta + rope_scaling, or the rope_parameters of transformers >= 5."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"rope_scaling is {parameters!r}; expected an object")
    theta = float(
        _value(parameters, "rope_theta", float, _value(raw, "rope_theta", float, 10000.0))
    )
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return theta, None
    keys = {
        "linear": ["factor"],
        "llama3": [
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ],
    }
    if kind not in keys:
        raise ValueError(
            f"rope scaling {kind!r} is not supported; supported are default, {', '.join(keys)}"
        )
    return theta, {
        "rope_type": kind,
        **{key: float(_value(parameters, key, float)) for key in keys[kind]},
    }
