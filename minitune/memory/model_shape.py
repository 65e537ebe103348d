"""The sizes of a model and its adapter that a plan depends on.

They follow from config.json and the adapter's settings, so a plan needs neither a model nor a GPU.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

from minitune.config.architectures import NormNames
from minitune.config.layer_kinds import LayerKind
from minitune.config.model_config import LinearShape, ModelConfig
from minitune.config.training_config import LoraConfig
from minitune.kernels.lora_linear import padded_rank
from minitune.memory.stored_weights import StoredWeights


@dataclass(frozen=True)
class FusedShape:
    """The linears of a layer that run as one matmul: qkv, o, gate_up or down.

    in_features, out_features: widths of its input and output.
    biases: number of its linears with a bias.
    adapters: number of its linears with an adapter.
    lora_columns: padded rank R beside its input and output; 0 without an adapter.
    lora_parameters: elements of A and B of its adapters.
    """

    in_features: int
    out_features: int
    biases: int
    adapters: int
    lora_columns: int
    lora_parameters: int

    @property
    def parameters(self) -> int:
        """Return the frozen parameters."""
        return self.in_features * self.out_features

    @property
    def weight_elements(self) -> int:
        """Return the elements of the extended weight (kernels/lora_linear.py)."""
        return (self.out_features + self.lora_columns) * (self.in_features + self.lora_columns)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model with its adapter, in elements.

    kinds: the window and the rotation of each decoder layer.
    D: model width.
    F: ffn width.
    HK: width of all query heads together.
    GK: width of all key heads together, and of all value heads.
    H, G: number of query heads, of key/value heads.
    V: vocabulary.
    itemsize: bytes of an element in the compute dtype.
    tied: True if the head is the embedding.
    qk_norm: the norm of queries and keys, as in Architecture.
    norms: the norms of a layer by name; None where there is none.
    caps_scores: True if the scores of attention have a soft bound.
    weights: the bytes of the frozen weights as they are stored.
    qkv, o, gate_up, down: the fused linears of a layer.
    """

    kinds: tuple[LayerKind, ...]
    D: int
    F: int
    HK: int
    GK: int
    H: int
    G: int
    V: int
    itemsize: int
    tied: bool
    qk_norm: str | None
    norms: NormNames
    caps_scores: bool
    weights: StoredWeights
    qkv: FusedShape
    o: FusedShape
    gate_up: FusedShape
    down: FusedShape

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        lora: LoraConfig | None,
        itemsize: int,
        max_seq_length: int,
        device_type: str = "cuda",
        weights: StoredWeights | None = None,
    ) -> "ModelShape":
        """Return the shape of a model.

        max_seq_length: rows of the longest sample that the model takes; wider windows do not count.
        device_type: decides how ranks are padded.
        weights: the frozen weights as they are stored; None means linears in NF4.
        """
        if lora is not None:
            lora = replace(lora, target_modules=config.adapted_linears(lora.target_modules))
        return cls(
            kinds=config.kinds_up_to(max_seq_length),
            D=config.hidden_size,
            F=config.intermediate_size,
            HK=config.query_size,
            GK=config.key_value_size,
            H=config.num_attention_heads,
            G=config.num_key_value_heads,
            V=config.vocab_size,
            itemsize=itemsize,
            tied=config.tie_word_embeddings,
            qk_norm=config.architecture.qk_norm,
            norms=config.architecture.norms,
            caps_scores=config.score_softcap != 0,
            weights=weights or StoredWeights.of_folder(config, itemsize),
            **{
                group: _fused_shape(linears, lora, device_type)
                for group, linears in config.linear_groups().items()
            },
        )

    @property
    def layers(self) -> int:
        """Return the number of decoder layers."""
        return len(self.kinds)

    @cached_property
    def kind_counts(self) -> tuple[tuple[LayerKind, int], ...]:
        """Return (kind, number of layers of this kind)."""
        return tuple(Counter(self.kinds).items())

    @property
    def K(self) -> int:
        """Return the width of a head."""
        return self.HK // self.H

    @property
    def QKV(self) -> int:
        """Return the width of q, k and v side by side."""
        return self.HK + 2 * self.GK

    @property
    def QK(self) -> int:
        """Return the width of q and k side by side."""
        return self.HK + self.GK

    @property
    def fused(self) -> tuple[FusedShape, ...]:
        """Return the fused linears in the order of forward."""
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def lora_columns(self) -> int:
        """Return the padded ranks of a layer added up: the width of x A^T of all fused linears."""
        return sum(linear.lora_columns for linear in self.fused)

    @property
    def layer_parameters(self) -> int:
        """Return the frozen parameters of a layer's linears."""
        return sum(linear.parameters for linear in self.fused)

    @property
    def lora_parameters(self) -> int:
        """Return the trainable parameters of all layers."""
        return self.layers * sum(linear.lora_parameters for linear in self.fused)

    @property
    def weight_buffer_bytes(self) -> int:
        """Return the bytes of a layer's extended weights, dequantised."""
        return self.itemsize * sum(linear.weight_elements for linear in self.fused)

    @property
    def head_buffer_bytes(self) -> int:
        """Return the bytes of the head that is converted for the loss, or 0."""
        return self.V * self.D * self.itemsize if self.weights.converts_head else 0


def _fused_shape(
    linears: tuple[LinearShape, ...], lora: LoraConfig | None, device_type: str
) -> FusedShape:
    targets = lora.target_modules if lora else ()
    adapted = [linear for linear in linears if linear.target in targets]
    rank = lora.r if lora else 0
    return FusedShape(
        in_features=linears[0].in_features,
        out_features=sum(linear.out_features for linear in linears),
        biases=sum(linear.bias for linear in linears),
        adapters=len(adapted),
        lora_columns=padded_rank(rank * len(adapted), device_type),
        lora_parameters=sum(rank * (n.in_features + n.out_features) for n in adapted),
    )
