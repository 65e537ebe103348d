"""The supported model families, and the linears of their decoder layer.

Every family has Llama's decoder layer and differs from it in the values of `Architecture`.
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Architecture:
    """The values of one model family.

    activation: the only accepted hidden_act.
    qkv_bias, o_bias: biases of the attention's linears; None: attention_bias of config.json.
    mlp_bias: biases of the MLP's linears; None: mlp_bias of config.json.
    qk_norm: True if each query and key head is normalised before RoPE.
    window_switch: the key of config.json that must be true for sliding_window to count; None if
        sliding_window alone decides.
    gguf: the value of general.architecture, and the prefix of the keys in a GGUF file.
    gguf_biases: True if llama.cpp reads biases of the attention's linears.
    gguf_llama_layout: True if llama.cpp reads the rows of q and k interleaved, and the keys
        vocab_size and rope.dimension_count, as for Llama.
    """

    model_type: str
    activation: str = "silu"
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool = False
    window_switch: str | None = None
    gguf: str = "llama"
    gguf_biases: bool = True
    gguf_llama_layout: bool = True


QWEN_WINDOW = "use_sliding_window"
ARCHITECTURES = {
    family.model_type: family
    for family in (
        Architecture("llama"),
        Architecture("mistral", qkv_bias=False, o_bias=False, mlp_bias=False),
        Architecture(
            "qwen2",
            qkv_bias=True,
            o_bias=False,
            mlp_bias=False,
            window_switch=QWEN_WINDOW,
            gguf="qwen2",
            gguf_llama_layout=False,
        ),
        Architecture(
            "qwen3",
            mlp_bias=False,
            qk_norm=True,
            window_switch=QWEN_WINDOW,
            gguf="qwen3",
            gguf_biases=False,
            gguf_llama_layout=False,
        ),
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
    LinearSpec("self_attn.q_proj", "qkv", "hidden_size", "query_size", "qkv_bias"),
    LinearSpec("self_attn.k_proj", "qkv", "hidden_size", "key_value_size", "qkv_bias"),
    LinearSpec("self_attn.v_proj", "qkv", "hidden_size", "key_value_size", "qkv_bias"),
    LinearSpec("self_attn.o_proj", "o", "query_size", "hidden_size", "o_bias"),
    LinearSpec("mlp.gate_proj", "gate_up", "hidden_size", "intermediate_size", "mlp_bias"),
    LinearSpec("mlp.up_proj", "gate_up", "hidden_size", "intermediate_size", "mlp_bias"),
    LinearSpec("mlp.down_proj", "down", "intermediate_size", "hidden_size", "mlp_bias"),
)
# The names that `target_modules` takes: the last part of each linear's name.
LORA_TARGETS = tuple(linear.name.rpartition(".")[2] for linear in LAYER_LINEARS)
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")  # with qk_norm
