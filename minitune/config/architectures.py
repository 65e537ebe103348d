"""The supported model families, and the linears of their decoder layer.

Every family has Llama's decoder layer and differs from it in the values of `Architecture`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple


class LinearSpec(NamedTuple):
    """A linear of the decoder layer; attributes of ModelConfig give its sizes and its bias."""

    name: str  # in the checkpoint, below the layer
    group: str  # the linears of one group share their input and run as one matmul
    in_features: str
    out_features: str
    bias: str
    parts: tuple[str, ...] = ()  # the linears of Llama that it holds one below the other

    @property
    def target(self) -> str:
        """Return the name that `target_modules` has for the linear: "q_proj"."""
        return self.name.rpartition(".")[2]


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
LORA_TARGETS = tuple(linear.target for linear in LAYER_LINEARS)
# With one linear for q, k and v, and one for gate and up, as the matmuls have them anyway.
MERGED_LINEARS = (
    LinearSpec(
        "self_attn.qkv_proj", "qkv", "hidden_size", "qkv_size", "qkv_bias", LORA_TARGETS[:3]
    ),
    LAYER_LINEARS[3],
    LinearSpec(
        "mlp.gate_up_proj", "gate_up", "hidden_size", "gate_up_size", "mlp_bias", LORA_TARGETS[4:6]
    ),
    LAYER_LINEARS[6],
)
# Every name that some family has a linear for.
ALL_TARGETS = tuple(dict.fromkeys(x.target for x in (*LAYER_LINEARS, *MERGED_LINEARS)))
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")  # with qk_norm


class NormNames(NamedTuple):
    """The names of a layer's norms in the checkpoint; None where the family has no norm.

    attention_in, attention_out: before and behind the attention block.
    mlp_in, mlp_out: before and behind the MLP.
    """

    attention_in: str | None
    attention_out: str | None
    mlp_in: str | None
    mlp_out: str | None


NORMS_BEFORE = NormNames("input_layernorm", None, "post_attention_layernorm", None)
NORMS_BEHIND = NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
NORMS_AROUND = NormNames(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


@dataclass(frozen=True)
class GgufFamily:
    """What llama.cpp has for a model family, and reads from a GGUF file.

    name: the value of general.architecture, and the prefix of the keys.
    biases: True if biases of the linears are read.
    llama_layout: True if the rows of q and k are read interleaved, and the keys vocab_size and
        rope.dimension_count, as for Llama.
    head_dim: True if a head_dim is read that is not hidden_size / heads.
    always_head_dim: True if the converter writes head_dim even if config.json has none.
    rope_tensors: the RoPE scalings whose tensors are read.
    window: "read" if the sliding window is read, "ignored" if its key is known and ignored, None if
        there is no such key.
    window_period: the p without a key, if all but every p-th layer slide.
    theta: RoPE's base without a key.
    local_theta: True if sliding layers may have a rope_theta of their own.
    head: "own" if the head must not be the embedding, "tied" if it must be; None if it may.
    """

    name: str
    biases: bool = True
    llama_layout: bool = True
    head_dim: bool = True
    always_head_dim: bool = False
    rope_tensors: tuple[str, ...] = ("llama3", "longrope")
    window: str | None = None
    window_period: int | None = None
    theta: float | None = None
    local_theta: bool = False
    head: str | None = None


GGUF_LLAMA = GgufFamily("llama", always_head_dim=True)
GGUF_QWEN2 = GgufFamily("qwen2", llama_layout=False, head_dim=False, rope_tensors=())
GGUF_QWEN3 = GgufFamily("qwen3", biases=False, llama_layout=False, rope_tensors=())
GGUF_PHI3 = GgufFamily(
    "phi3", llama_layout=False, head_dim=False, rope_tensors=("longrope",), window="ignored"
)
GGUF_OLMO2 = GgufFamily(
    "olmo2",
    biases=False,
    llama_layout=False,
    head_dim=False,
    rope_tensors=(),
    head="own",
)
GGUF_GEMMA2 = GgufFamily(
    "gemma2",
    biases=False,
    llama_layout=False,
    rope_tensors=(),
    window="read",
    window_period=2,
    theta=1e4,
    head="tied",
)
GGUF_GEMMA3 = replace(GGUF_GEMMA2, name="gemma3", window_period=6, theta=None, local_theta=True)


@dataclass(frozen=True)
class Architecture:
    """The values of one model family.

    model_type, model_class: the type of its config.json, and its class in transformers.
    activation: "silu" or "gelu_tanh".
    activation_key: the key of config.json that names the activation.
    norms: the norms of the decoder layer.
    norm_offset: 1 if every norm multiplies by 1 + weight.
    linears: the linears of the decoder layer.
    qkv_bias, o_bias: biases of the attention's linears; None: attention_bias of config.json.
    mlp_bias: biases of the MLP's linears; None: mlp_bias of config.json.
    qk_norm: the norm of queries and keys before RoPE: "head" normalises each head, "projection" all
        query heads together and all key heads; None for none.
    window_switch: the key of config.json that must be true for sliding_window to count; None if
        sliding_window alone decides.
    reads_layer_types: True if layer_types says which layers slide.
    sliding_layers: the layers that slide without layer_types: "none" (sliding_window does not
        count), "all", "last" (from max_window_layers on), "unrotated" (those without RoPE), or
        "periodic" (all but every sliding_window_pattern-th).
    unrotated_period_key: the key of a period p if every p-th layer has no RoPE, unless
        no_rope_layers lists the layers; None: all layers have it.
    two_ropes: True if sliding layers have a rotation of their own.
    partial_rotary: True if partial_rotary_factor may be below 1.
    rope_type_names: other names of RoPE scalings -> the names here.
    query_growth: True if queries grow with their position (llama_4_scaling_beta).
    multipliers: True if config.json scales the embedding, residual, scores and logits (Granite).
    scales_embedding: True if the embedding is multiplied by sqrt(hidden_size).
    query_scalar_key: the key of a number n, if the scores are divided by sqrt(n), not by
        sqrt(head_dim).
    soft_caps: True if config.json may bound scores and logits (Gemma).
    refused: keys of config.json that must be missing, null or false.
    gguf: what llama.cpp has for the family.
    """

    model_type: str
    model_class: str
    activation: str = "silu"
    activation_key: str = "hidden_act"
    norms: NormNames = NORMS_BEFORE
    norm_offset: float = 0.0
    linears: tuple[LinearSpec, ...] = LAYER_LINEARS
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: str | None = None
    window_switch: str | None = None
    reads_layer_types: bool = False
    sliding_layers: str = "none"
    unrotated_period_key: str | None = None
    two_ropes: bool = False
    partial_rotary: bool = False
    rope_type_names: Mapping[str, str] = field(default_factory=dict)
    query_growth: bool = False
    multipliers: bool = False
    scales_embedding: bool = False
    query_scalar_key: str | None = None
    soft_caps: bool = False
    refused: tuple[str, ...] = ()
    gguf: GgufFamily = GGUF_LLAMA


NO_BIASES = {"qkv_bias": False, "o_bias": False, "mlp_bias": False}
QWEN_WINDOWS = {
    "window_switch": "use_sliding_window",
    "reads_layer_types": True,
    "sliding_layers": "last",
}
GEMMA = {
    "activation": "gelu_tanh",
    "activation_key": "hidden_activation",
    "norms": NORMS_AROUND,
    "norm_offset": 1.0,
    "reads_layer_types": True,
    "sliding_layers": "periodic",
    "scales_embedding": True,
    "query_scalar_key": "query_pre_attn_scalar",
    "soft_caps": True,
    "refused": ("use_bidirectional_attention",),
}
ARCHITECTURES = {
    family.model_type: family
    for family in (
        Architecture("llama", "LlamaForCausalLM"),
        Architecture("mistral", "MistralForCausalLM", **NO_BIASES, sliding_layers="all"),
        Architecture(
            "ministral3",
            "Ministral3ForCausalLM",
            **NO_BIASES,
            sliding_layers="all",
            query_growth=True,
            gguf=GgufFamily("mistral3"),
        ),
        Architecture(
            "qwen2",
            "Qwen2ForCausalLM",
            qkv_bias=True,
            o_bias=False,
            mlp_bias=False,
            **QWEN_WINDOWS,
            gguf=GGUF_QWEN2,
        ),
        Architecture(
            "qwen3",
            "Qwen3ForCausalLM",
            mlp_bias=False,
            qk_norm="head",
            **QWEN_WINDOWS,
            gguf=GGUF_QWEN3,
        ),
        Architecture(
            "smollm3",
            "SmolLM3ForCausalLM",
            window_switch="use_sliding_window",
            reads_layer_types=True,
            sliding_layers="unrotated",
            unrotated_period_key="no_rope_layer_interval",
            gguf=GgufFamily("smollm3", biases=False, rope_tensors=()),
        ),
        Architecture(
            "granite",
            "GraniteForCausalLM",
            multipliers=True,
            gguf=GgufFamily("granite", head_dim=False),
        ),
        Architecture(
            "phi3",
            "Phi3ForCausalLM",
            **NO_BIASES,
            linears=MERGED_LINEARS,
            sliding_layers="all",
            partial_rotary=True,
            rope_type_names={"su": "longrope", "yarn": "longrope"},
            gguf=GGUF_PHI3,
        ),
        Architecture(
            "olmo2",
            "Olmo2ForCausalLM",
            mlp_bias=False,
            norms=NORMS_BEHIND,
            qk_norm="projection",
            gguf=GGUF_OLMO2,
        ),
        Architecture(
            "olmo3",
            "Olmo3ForCausalLM",
            mlp_bias=False,
            norms=NORMS_BEHIND,
            qk_norm="projection",
            reads_layer_types=True,
            sliding_layers="periodic",
            two_ropes=True,
            gguf=replace(GGUF_OLMO2, window="read"),
        ),
        Architecture(
            "gemma2",
            "Gemma2ForCausalLM",
            **GEMMA,
            mlp_bias=False,
            gguf=GGUF_GEMMA2,
        ),
        Architecture(
            "gemma3_text",
            "Gemma3ForCausalLM",
            **GEMMA,
            mlp_bias=False,
            qk_norm="head",
            two_ropes=True,
            gguf=GGUF_GEMMA3,
        ),
    )
}
