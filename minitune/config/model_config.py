"""The shape of a model: config.json, checked and without the differences of its versions."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from minitune.config.architectures import ARCHITECTURES, HEAD_NORMS, Architecture
from minitune.config.config_values import read_flag, read_number
from minitune.config.family_defaults import with_defaults
from minitune.config.foreign_arguments import foreign_attributes
from minitune.config.layer_kinds import LayerKind, read_layer_kinds
from minitune.config.loading_arguments import CONFIG_ATTRIBUTES
from minitune.config.numbers import shown
from minitune.config.rope_config import RopeConfig, RopeReader
from minitune.config.text_config import is_wrapper, text_config
from minitune.read_files import read_json

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
DEFAULT_MAX_SEQ_LENGTH = 2048
DROPOUT_KEYS = ("attention_dropout", "resid_pdrop", "embd_pdrop")
# The names that config.json has for each activation.
ACTIVATION_NAMES = {"silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh",)}


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


@foreign_attributes(**CONFIG_ATTRIBUTES)
@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model.

    ropes: the rotations that its layers use.
    layer_kinds: the window and the rotation of each layer.
    attention_scale: factor of the scores.
    score_softcap, logit_softcap: bounds on scores and logits; 0 for none.
    embedding_multiplier: factor of the embedding, where the residual stream begins.
    residual_multiplier: factor of all that a layer adds to the residual stream.
    logit_multiplier: factor of the logits.
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
    ropes: tuple[RopeConfig, ...]
    layer_kinds: tuple[LayerKind, ...]
    attention_scale: float
    score_softcap: float
    logit_softcap: float
    embedding_multiplier: float
    residual_multiplier: float
    logit_multiplier: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    architecture: Architecture
    raw: dict
    wrapper: str = ""

    def __post_init__(self):
        H, G = self.num_attention_heads, self.num_key_value_heads
        if H % G:
            raise ValueError(
                f"num_attention_heads {H} is not a multiple of num_key_value_heads {G}"
            )
        _check_head_dim(self.head_dim)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return facts about the folder that the user should know."""
        found = []
        if self.wrapper:
            found.append(
                f"the folder holds a {self.wrapper} model; its text model, of type "
                f"{self.architecture.model_type}, is used and its other parts are left out"
            )
        found += [
            f"{key} {shown(self.raw[key])} of config.json is not applied in training"
            for key in DROPOUT_KEYS
            if self.raw.get(key)
        ]
        return tuple(found)

    @property
    def default_seq_length(self) -> int:
        """Return the default of max_seq_length."""
        return min(DEFAULT_MAX_SEQ_LENGTH, self.max_position_embeddings)

    def check_seq_length(self, max_seq_length: int) -> None:
        """Raise ValueError if the model cannot take samples of `max_seq_length` tokens."""
        positions = self.max_position_embeddings
        if type(max_seq_length) is not int:
            raise ValueError(
                f"max_seq_length is {shown(max_seq_length)}; expected a whole number of tokens"
            )
        if not 0 < max_seq_length <= positions:
            raise ValueError(
                f"max_seq_length {shown(max_seq_length)} is not within the model's "
                f"{positions} positions"
            )

    def kinds_up_to(self, max_seq_length: int) -> tuple[LayerKind, ...]:
        """Return the kind of each layer, without the windows that no sample reaches beyond."""
        return tuple(
            kind._replace(window=None)
            if kind.window is not None and kind.window >= max_seq_length
            else kind
            for kind in self.layer_kinds
        )

    @property
    def query_size(self) -> int:
        """Return the width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Return the width of all key heads together, which is also that of all value heads."""
        return self.num_key_value_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Return the width of q, k and v side by side."""
        return self.query_size + 2 * self.key_value_size

    @property
    def gate_up_size(self) -> int:
        """Return the width of gate and up side by side."""
        return 2 * self.intermediate_size

    def head_norm_sizes(self) -> tuple[int, int]:
        """Return the widths of the norms of queries and of keys."""
        if self.architecture.qk_norm == "projection":
            return self.query_size, self.key_value_size
        return self.head_dim, self.head_dim

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
            for spec in self.architecture.linears
        )

    def linear_groups(self) -> dict[str, tuple[LinearShape, ...]]:
        """Return group -> its linears, which run as one matmul, in the order of the model."""
        groups: dict[str, tuple[LinearShape, ...]] = {}
        for linear in self.linears():
            groups[linear.group] = (*groups.get(linear.group, ()), linear)
        return groups

    def adapted_linears(self, target_modules: Sequence[str]) -> tuple[str, ...]:
        """Return the names of the model's own linears that `target_modules` means, in its order.

        The names of all parts of a linear mean the linear: q_proj, k_proj and v_proj mean qkv_proj.

        Raises: ValueError if the model has no such linear.
        """
        names, found = set(target_modules), []
        for spec in self.architecture.linears:
            parts = set(spec.parts)
            if spec.target in names or (parts and parts <= names):
                found.append(spec.target)
                names -= {spec.target, *parts}
        if unknown := [name for name in target_modules if name in names]:
            own = ", ".join(spec.target for spec in self.architecture.linears)
            raise ValueError(
                f"target module {unknown[0]!r} does not exist in models of type "
                f"{self.architecture.model_type}; choose from {own}"
            )
        return tuple(found)

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
        for norm in self.architecture.norms:
            if norm is not None:
                layer[f"{norm}.weight"] = (self.hidden_size,)
        if self.architecture.qk_norm is not None:
            for norm, width in zip(HEAD_NORMS, self.head_norm_sizes(), strict=True):
                layer[f"{norm}.weight"] = (width,)

        shapes = {EMBEDDING: (self.vocab_size, self.hidden_size)}
        for i in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes[NORM] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes[HEAD] = (self.vocab_size, self.hidden_size)
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
                return replace(text, wrapper=str(raw.get("model_type") or "multimodal"))
            return cls.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: dict) -> "ModelConfig":
        """Check the content of a config.json and take the model's shape from it.

        Raises: ValueError that names the field if the model is not one that this code runs.
        """
        family = _architecture(raw)
        return _read_config(family, with_defaults(raw, family.model_type), raw)


def _read_config(family: Architecture, values: dict, raw: dict) -> ModelConfig:
    """Return the config of a model; `values` are those of `raw` with the family's defaults."""
    hidden = read_number(values, "hidden_size")
    heads = read_number(values, "num_attention_heads")
    layers = read_number(values, "num_hidden_layers")
    head_dim = _check_head_dim(read_number(values, "head_dim", hidden // heads))
    positions = read_number(values, "max_position_embeddings", 2048)
    scale, embedding, residual, logits = head_dim**-0.5, 1.0, 1.0, 1.0
    score_softcap = logit_softcap = 0.0
    if family.query_scalar_key is not None:
        scale = read_number(values, family.query_scalar_key) ** -0.5
    if family.scales_embedding:
        embedding = hidden**0.5
    if family.soft_caps:
        score_softcap = float(read_number(values, "attn_logit_softcapping", 0.0))
        logit_softcap = float(read_number(values, "final_logit_softcapping", 0.0))
    if family.multipliers:
        scale = float(read_number(values, "attention_multiplier", 1.0))
        embedding = float(read_number(values, "embedding_multiplier", 1.0))
        residual = float(read_number(values, "residual_multiplier", 1.0))
        logits = 1 / read_number(values, "logits_scaling", 1.0)
    return ModelConfig(
        vocab_size=read_number(values, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=read_number(values, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=read_number(values, "num_key_value_heads", heads),
        head_dim=head_dim,
        max_position_embeddings=positions,
        rms_norm_eps=read_number(values, "rms_norm_eps", 1e-6),
        ropes=RopeReader(family, values, head_dim, positions).read_all(),
        layer_kinds=read_layer_kinds(family, values, layers),
        attention_scale=scale,
        score_softcap=score_softcap,
        logit_softcap=logit_softcap,
        embedding_multiplier=embedding,
        residual_multiplier=residual,
        logit_multiplier=logits,
        tie_word_embeddings=read_flag(values, "tie_word_embeddings", False),
        qkv_bias=_fixed_or_read(family.qkv_bias, values, "attention_bias"),
        o_bias=_fixed_or_read(family.o_bias, values, "attention_bias"),
        mlp_bias=_fixed_or_read(family.mlp_bias, values, "mlp_bias"),
        architecture=family,
        raw=raw,
    )


def _check_head_dim(head_dim: int) -> int:
    """Return the width of a head. Raise ValueError if attention does not take it."""
    if not 0 < head_dim <= 256 or head_dim % 8:
        raise ValueError(
            f"head_dim {head_dim} is not supported; attention takes multiples of 8 up to 256"
        )
    return head_dim


def _architecture(raw: dict) -> Architecture:
    """Return the family of a config.json, after a check of the values that the family fixes."""
    model_type = raw.get("model_type")
    family = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        supported = f"supported are {', '.join(ARCHITECTURES)}"
        if alike := difflib.get_close_matches(shown(model_type), ARCHITECTURES, n=1):
            supported += f"; the nearest is {alike[0]}"
        raise ValueError(f"model_type {shown(model_type)} is not supported; {supported}")
    accepted = ACTIVATION_NAMES[family.activation]
    if (activation := raw.get(family.activation_key, accepted[0])) not in accepted:
        raise ValueError(
            f"{family.activation_key} {shown(activation)} is not supported; "
            f"models of type {model_type} use {accepted[0]!r}"
        )
    for key in family.refused:
        if raw.get(key):
            raise ValueError(f"{key} {shown(raw[key])} is not supported; expected none")
    return family


def _fixed_or_read(fixed: bool | None, raw: dict, name: str) -> bool:
    """Return a family's fixed value, or config.json's if the family leaves it open."""
    return read_flag(raw, name, False) if fixed is None else fixed
