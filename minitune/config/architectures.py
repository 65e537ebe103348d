"""The supported model families, and the linears of their decoder layer.

Every family has Llama's decoder layer and differs from it in the values of `Architecture`.
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Architecture:
    """The values of one model family."""

    model_type: str
    activation: str = "silu"  # the only accepted hidden_act
    attention_bias: bool | None = None  # None: config.json decides
    mlp_bias: bool | None = None  # None: config.json decides
    # (key of config.json, reason): the key is refused unless it is missing or null
    refused: tuple[tuple[str, str], ...] = (
        ("sliding_window", "attention here sees the whole sample"),
    )


ARCHITECTURES = {
    family.model_type: family
    for family in (
        Architecture("llama"),
        Architecture("mistral", attention_bias=False, mlp_bias=False),
    )
}


class LinearSpec(NamedTuple):
    """A linear of the decoder layer; attributes of ModelConfig give its sizes and its bias."""

    name: str  # in the checkpoint, below the layer
    group: str  # the linears of one group share their input and run as one matmul
    in_features: str
    out_features: str
    bias: str


# In the order of the model.
LAYER_LINEARS = (
    LinearSpec("self_attn.q_proj", "qkv", "hidden_size", "query_size", "attention_bias"),
    LinearSpec("self_attn.k_proj", "qkv", "hidden_size", "key_value_size", "attention_bias"),
    LinearSpec("self_attn.v_proj", "qkv", "hidden_size", "key_value_size", "attention_bias"),
    LinearSpec("self_attn.o_proj", "o", "query_size", "hidden_size", "attention_bias"),
    LinearSpec("mlp.gate_proj", "gate_up", "hidden_size", "intermediate_size", "mlp_bias"),
    LinearSpec("mlp.up_proj", "gate_up", "hidden_size", "intermediate_size", "mlp_bias"),
    LinearSpec("mlp.down_proj", "down", "intermediate_size", "hidden_size", "mlp_bias"),
)
# The names that `target_modules` takes: the last part of each linear's name.
LORA_TARGETS = tuple(linear.name.rpartition(".")[2] for linear in LAYER_LINEARS)
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
