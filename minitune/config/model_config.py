"""The shape of a model: config.json, checked and without the differences of its versions."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from minitune.atomic_files import read_json
from minitune.config.architectures import (
    ARCHITECTURES,
    HEAD_NORMS,
    LAYER_LINEARS,
    LAYER_NORMS,
    Architecture,
)
from minitune.config.text_config import is_wrapper, text_config

EXPECTED = {bool: "true or false", int: "a whole number above 0", float: "a number above 0"}
DEFAULT_MAX_SEQ_LENGTH = 2048
ROPE_SCALING_KEYS = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
}
# Further keys of a scaling that may be missing; 0 stands for a missing one.
OPTIONAL_ROPE_KEYS = {
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
}


class LinearShape(NamedTuple):
    """A linear of a decoder layer: y (N, out_features) = W x (N, in_features) + bias."""

    name: str  # in the checkpoint, below the layer: "self_attn.q_proj"
    group: str  # "qkv", "o", "gate_up" or "down": the linears of a group run as one matmul
    in_features: int
    out_features: int
    bias: bool

    @property
    def target(self) -> str:
        """Return the name that `target_modules` has for the linear: "q_proj"."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model.

    sliding_window: tokens that attention looks back at, or None for all.
    raw: config.json as it was read, of a wrapper its text model's; a merge writes it again.
    wrapper: model_type of the multimodal model around this text model, or "".
    """

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
    rope_scaling: dict | None  # None or {"rope_type": "linear", "llama3" or "yarn", ...}
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    architecture: Architecture
    raw: dict
    wrapper: str = ""

    def __post_init__(self):
        H, G = self.num_attention_heads, self.num_key_value_heads
        if H % G:
            raise ValueError(
                f"num_attention_heads {H} is not a multiple of num_key_value_heads {G}"
            )
        if self.head_dim % 8 or self.head_dim > 256:
            raise ValueError(
                f"head_dim {self.head_dim} is not supported; "
                "attention takes multiples of 8 up to 256"
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """Return facts about the folder that the user should know."""
        if not self.wrapper:
            return ()
        family = self.architecture.model_type
        return (
            f"the folder holds a {self.wrapper} model; its text model, of type {family}, is used "
            "and its other parts are left out",
        )

    @property
    def default_seq_length(self) -> int:
        """Return the default of max_seq_length."""
        positions = self.max_position_embeddings
        return min(DEFAULT_MAX_SEQ_LENGTH, positions, self.sliding_window or positions)

    def check_seq_length(self, max_seq_length: int) -> None:
        """Raise ValueError if the model cannot take samples of `max_seq_length` tokens."""
        positions, window = self.max_position_embeddings, self.sliding_window
        if not 0 < max_seq_length <= positions:
            raise ValueError(
                f"max_seq_length {max_seq_length} is not within the model's {positions} positions"
            )
        if window is not None and max_seq_length > window:
            raise ValueError(
                f"max_seq_length {max_seq_length} is more than the model's sliding_window; "
                f"attention here sees whole samples, so choose at most {window}"
            )

    @property
    def query_size(self) -> int:
        """Return the width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Return the width of all key heads together, which is also that of all value heads."""
        return self.num_key_value_heads * self.head_dim

    def linears(self) -> tuple[LinearShape, ...]:
        """Return the linears of one decoder layer, in the order of the model."""
        return tuple(
            LinearShape(
                spec.name,
                spec.group,
                in_features=getattr(self, spec.in_features),
                out_features=getattr(self, spec.out_features),
                bias=getattr(self, spec.bias),
            )
            for spec in LAYER_LINEARS
        )

    def linear_groups(self) -> dict[str, tuple[LinearShape, ...]]:
        """Return group -> its linears, which run as one matmul, in the order of the model."""
        groups: dict[str, tuple[LinearShape, ...]] = {}
        for linear in self.linears():
            groups[linear.group] = (*groups.get(linear.group, ()), linear)
        return groups

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of the model's tensors, in the order of the model.

        The names are Hugging Face's, the weights are those before quantisation. A tied head has no
        tensor of its own and is left out.
        """
        layer: dict[str, tuple[int, ...]] = {}
        for linear in self.linears():
            layer[f"{linear.name}.weight"] = (linear.out_features, linear.in_features)
            if linear.bias:
                layer[f"{linear.name}.bias"] = (linear.out_features,)
        for norm in LAYER_NORMS:
            layer[f"{norm}.weight"] = (self.hidden_size,)
        if self.qk_norm:
            for norm in HEAD_NORMS:
                layer[f"{norm}.weight"] = (self.head_dim,)

        shapes = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for i in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read FOLDER/config.json. Of a multimodal wrapper, the text model counts.

        Raises: ValueError that names the field if the model is not one that this code runs.
        """
        path = Path(folder) / "config.json"
        if not path.is_file() and path.with_name("adapter_config.json").is_file():
            raise ValueError(
                f"{folder}: is an adapter; load the model it was trained on, "
                "and the adapter onto it"
            )
        hint = "a model folder holds config.json, *.safetensors and a tokenizer"
        raw = read_json(path, hint=hint)
        try:
            if is_wrapper(raw):
                text = cls.from_dict(text_config(raw))
                return replace(text, wrapper=str(raw.get("model_type")))
            return cls.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: dict) -> "ModelConfig":
        """Check the content of a config.json and take the model's shape from it.

        Raises: ValueError that names the field if the model is not one that this code runs.
        """
        family = _architecture(raw)
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
            qkv_bias=_fixed_or_read(family.qkv_bias, raw, "attention_bias"),
            o_bias=_fixed_or_read(family.o_bias, raw, "attention_bias"),
            mlp_bias=_fixed_or_read(family.mlp_bias, raw, "mlp_bias"),
            qk_norm=family.qk_norm,
            sliding_window=_sliding_window(family, raw),
            architecture=family,
            raw=raw,
        )


def _architecture(raw: dict) -> Architecture:
    """Return the family of a config.json, after a check of the values that the family fixes."""
    model_type = raw.get("model_type")
    family = ARCHITECTURES.get(str(model_type))
    if family is None:
        raise ValueError(
            f"model_type {model_type!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    if (activation := raw.get("hidden_act", family.activation)) != family.activation:
        raise ValueError(
            f"hidden_act {activation!r} is not supported; "
            f"models of type {model_type} use {family.activation!r}"
        )
    return family


def _sliding_window(family: Architecture, raw: dict) -> int | None:
    """Return the window of attention in tokens, or None if every layer sees the whole sample."""
    if family.window_switch is not None and not _value(raw, family.window_switch, bool, False):
        return None
    return _value(raw, "sliding_window", int, 0) or None


def _fixed_or_read(fixed: bool | None, raw: dict, name: str) -> bool:
    """Return a family's fixed value, or config.json's if the family leaves it open."""
    return _value(raw, name, bool, False) if fixed is None else fixed


def _value(raw: dict, name: str, kind: type, default: Any = None) -> Any:
    """Return a field of config.json, or the default if the field is missing or null.

    Raises: ValueError if the value has another type, or is a number that is not above 0 and finite.
    """
    if (value := raw.get(name)) is None:
        if default is None:
            raise ValueError(f"{name} is missing; is this the config.json of a Llama-family model?")
        return default
    is_bool = isinstance(value, bool)
    if kind is bool:
        valid = is_bool
    else:
        is_number = isinstance(value, int if kind is int else (int, float)) and not is_bool
        valid = is_number and 0 < value < math.inf
    if not valid:
        raise ValueError(f"{name} is {value!r}; expected {EXPECTED[kind]}")
    return value


def _rope(raw: dict) -> tuple[float, dict | None]:
    """Return (theta, scaling) of either layout of config.json.

    The layouts are rope_theta and rope_scaling, or the rope_parameters of transformers 5.
    """
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"rope_scaling is {parameters!r}; expected an object")
    default_theta = _value(raw, "rope_theta", float, 10000.0)
    theta = float(_value(parameters, "rope_theta", float, default_theta))
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return theta, None
    if str(kind) not in ROPE_SCALING_KEYS:
        raise ValueError(
            f"rope scaling {kind!r} is not supported; "
            f"supported are default, {', '.join(ROPE_SCALING_KEYS)}"
        )
    values = {key: float(_value(parameters, key, float)) for key in ROPE_SCALING_KEYS[kind]}
    for key in OPTIONAL_ROPE_KEYS.get(kind, ()):
        values[key] = float(_value(parameters, key, float, 0.0))
    if not _value(parameters, "truncate", bool, True):
        raise ValueError("truncate false of rope scaling is not supported; only true is")
    if _value(parameters, "partial_rotary_factor", float, 1.0) != 1:
        raise ValueError("partial_rotary_factor is not supported; whole heads are rotated")
    return theta, {"rope_type": kind, **values}
