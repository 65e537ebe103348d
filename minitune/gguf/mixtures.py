"""The type of each tensor of a GGUF file, as llama.cpp's llama-quantize chooses it.

A quantised file is a mixture. Most tensors have the type in the file's name, and the tensors that
suffer most from rounding have more bits:

- the head, or the embedding if the embedding is the head: Q6_K, or Q8_0 in a Q8_0 file;
- attn_v and the fused attn_qkv, ffn_down and attn_output: by the tables below. The rules depend on
  the layer, on the number of query heads for each key and value head, and on an importance matrix.

If a row is no multiple of a type's block (256 values of the K types, 32 of the others), the tensor
falls back to a type of blocks of 32, and then to F16. Vectors, such as norms and biases, are F32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as GGMLType

from minitune.config.model_config import ModelConfig
from minitune.config.training_config import (
    GGUF_ALIASES,
    GGUF_METHODS,
    GGUF_WORDS,
    NOT_QUANTIZED,
)

QUANTIZATION_METHODS = {
    name: LlamaFileType[f"{'ALL' if name == 'f32' else 'MOSTLY'}_{name.upper()}"]
    for name in GGUF_METHODS
}
FLOAT_TYPES = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
# Types of blocks of 256 values -> the type for rows that are no multiple of 256
FALLBACKS = {
    GGMLType.Q2_K: GGMLType.Q4_0,
    GGMLType.Q3_K: GGMLType.Q4_0,
    GGMLType.Q4_K: GGMLType.Q5_0,
    GGMLType.Q5_K: GGMLType.Q5_1,
    GGMLType.Q6_K: GGMLType.Q8_0,
    GGMLType.IQ4_XS: GGMLType.IQ4_NL,
}
MANY_QUERY_HEADS = 4  # for each key and value head: attn_v is small, and gets more bits
LLAMA_70B_LAYERS = 80
# attn_output by method; of the other methods it has the file's type
ATTENTION_OUTPUT = {"q2_k": GGMLType.Q3_K, "q3_k_m": GGMLType.Q4_K, "q3_k_l": GGMLType.Q5_K}
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
FILE_TYPE_WORDS = ("_S", "_M", "_L")  # sizes of a mixture: Q4_K_M is mostly Q4_K


@dataclass(frozen=True)
class _Model:
    """The facts about a model on which the rules depend.

    layers: number of layers.
    query_heads: query heads for each key and value head.
    is_70b: True if llama.cpp calls the model's size 70B.
    has_importance: True if the file is written with an importance matrix.
    """

    layers: int
    query_heads: int
    is_70b: bool
    has_importance: bool

    def is_sensitive(self, layer: int) -> bool:
        """Return True for the first and the last eighth of the layers, and every third between."""
        first, last = self.layers // 8, 7 * self.layers // 8
        return layer < first or layer >= last or (layer - first) % 3 == 2


def gguf_methods(names: str | Sequence[str], is_float16: bool) -> tuple[str, ...]:
    """Return the types that a name or a list of names means, each type once.

    names: words of GGUF_WORDS in upper or lower case.
    is_float16: True if the 16-bit weights are float16: not_quantized means f16, otherwise bf16.

    Raises: ValueError that lists all names if a name is unknown or the list is empty.
    """
    listed = (names,) if isinstance(names, str) else names
    if not isinstance(listed, list | tuple) or not listed:
        raise _unknown(names)
    meanings = GGUF_ALIASES | {NOT_QUANTIZED: "f16" if is_float16 else "bf16"}
    methods = []
    for name in listed:
        word = name.lower() if isinstance(name, str) else name
        if word not in GGUF_WORDS:
            raise _unknown(name)
        methods.append(meanings.get(word, word))
    return tuple(dict.fromkeys(methods))


def tensor_types(
    config: ModelConfig,
    shapes: dict[str, tuple[int, ...]],
    method: str,
    has_importance: bool = False,
) -> dict[str, GGMLType]:
    """Return the type of each tensor by its name.

    shapes: GGUF name -> shape in PyTorch's order, of all tensors of the file.
    method: a name of QUANTIZATION_METHODS.
    has_importance: True if the file is written with an importance matrix.
    """
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    family = config.architecture.gguf.name
    model = _Model(
        layers=config.num_hidden_layers,
        query_heads=heads // groups,
        is_70b=config.num_hidden_layers == LLAMA_70B_LAYERS
        and (family == "qwen2" or (family == "llama" and heads != groups)),
        has_importance=has_importance,
    )
    head = HEAD if HEAD in shapes else EMBEDDING
    return {
        name: GGMLType.F32 if len(shape) < 2 else _type(name, shape[-1], method, model, head)
        for name, shape in shapes.items()
    }


def base_type(method: str) -> GGMLType:
    """Return the type that most tensors of a file have: q4_k_m -> Q4_K."""
    name = method.upper()
    return GGMLType[name[:-2] if name.endswith(FILE_TYPE_WORDS) else name]


def _type(name: str, width: int, method: str, model: _Model, head: str) -> GGMLType:
    """Return the type of a matrix.

    head: name of the tensor that is the head.
    """
    base = base_type(method)
    if base in FLOAT_TYPES:
        return base
    if name == head:
        # A width that does not fit the file's type makes the head Q8_0.
        large = base == GGMLType.Q8_0 or not _fits(width, base)
        return _fallback(width, GGMLType.Q8_0 if large else GGMLType.Q6_K)
    part, layer = name.removesuffix(".weight"), 0
    if name.startswith("blk."):
        _, number, part, _ = name.split(".")
        layer = int(number)
    if part in ("attn_v", "attn_qkv"):
        kind = _value_type(method, layer, model)
    elif part == "ffn_down":
        kind = _down_type(method, layer, model)
    elif part == "attn_output":
        kind = ATTENTION_OUTPUT.get(method)
    else:
        kind = None
    return _fallback(width, kind or base)


def _value_type(method: str, layer: int, model: _Model) -> GGMLType | None:
    """Return the type of attn_v or attn_qkv, or None for the file's type."""
    many = model.query_heads >= MANY_QUERY_HEADS
    kind = None
    if method == "q2_k":
        kind = GGMLType.Q4_K if many else GGMLType.Q3_K
    elif method == "q3_k_m":
        kind = GGMLType.Q5_K if layer < 2 else GGMLType.Q4_K
    elif method == "q3_k_l" or (many and method in ("iq4_nl", "iq4_xs")):
        kind = GGMLType.Q5_K
    elif method in ("q4_k_m", "q5_k_m") and model.is_sensitive(layer):
        kind = GGMLType.Q6_K
    elif method == "q4_k_s" and layer < 4:
        kind = GGMLType.Q5_K
    if model.is_70b and (kind or base_type(method)) in (GGMLType.Q3_K, GGMLType.Q4_K):
        return GGMLType.Q5_K
    return kind


def _down_type(method: str, layer: int, model: _Model) -> GGMLType | None:
    """Return the type of ffn_down, or None for the file's type."""
    is_first = layer < model.layers // 8
    if method == "q2_k":
        return GGMLType.Q3_K
    if method == "q3_k_m":
        return GGMLType.Q5_K if layer < model.layers // 16 else GGMLType.Q4_K
    if method == "q3_k_l":
        return GGMLType.Q5_K
    if method in ("q4_k_m", "q5_k_m"):
        return GGMLType.Q6_K if model.is_sensitive(layer) else None
    if not is_first:
        return None
    if method == "q4_k_s" or (method in ("iq4_nl", "iq4_xs") and not model.has_importance):
        return GGMLType.Q5_K
    if model.has_importance:
        return {"q4_0": GGMLType.Q4_1, "q5_0": GGMLType.Q5_1}.get(method)
    return None


def _fits(width: int, kind: GGMLType) -> bool:
    """Return True if a row of `width` values divides into the blocks of a type."""
    return width % GGML_QUANT_SIZES[kind][0] == 0


def _fallback(width: int, kind: GGMLType) -> GGMLType:
    """Return `kind`, or the type that a row of `width` values has instead."""
    if _fits(width, kind):
        return kind
    smaller = FALLBACKS.get(kind, kind)
    return smaller if _fits(width, smaller) else GGMLType.F16


def _unknown(name: object) -> ValueError:
    aliases = ", ".join(f"{alias} ({meaning})" for alias, meaning in GGUF_ALIASES.items())
    return ValueError(
        f"quantization_method {name!r} is not supported; "
        f"choose from {', '.join(GGUF_METHODS)}, {aliases}, or a list of these"
    )
