"""What a training step has in GPU memory, in bytes: weights, what layers keep, and what is in use while one runs.

Tensor by tensor, in the order in which a layer makes and drops them (decoder.py), and without a model: the shape, the
rank and the linears with an adapter say it all. plan.py chooses by these numbers.
"""

from dataclasses import dataclass

from minitune.config.architectures import LORA_TARGETS
from minitune.config.model_config import ModelConfig
from minitune.config.training_config import LoraConfig
from minitune.kernels.attention_cudnn import kv_heads_at_once
from minitune.kernels.cross_entropy import logits_tile_rows
from minitune.kernels.lora_linear import padded_rank
from minitune.memory.offload import ALIGN
from minitune.memory.plan import Candidate, Workload
from minitune.model.activations import LayerPlan, SaveLevel
from minitune.model.nf4 import BLOCKSIZE, NESTED_BLOCKSIZE

NF4_BYTES = 0.5 + 1 / BLOCKSIZE + 4 / (BLOCKSIZE * NESTED_BLOCKSIZE)  # a parameter
CUBLAS_BYTES = 32 << 20  # that PyTorch gives cuBLAS for each stream on Hopper; there are two


@dataclass(frozen=True)
class MemoryModel:
    """The widths that memory and time depend on, in elements; spare columns by projection: q k v, o, gate up, down."""

    layers: int
    D: int
    F: int
    HK: int
    GK: int
    H: int
    V: int
    lora_columns: tuple[int, int, int, int]
    adapter: int  # trainable parameters
    itemsize: int
    tied: bool

    @classmethod
    def of(
        cls, config: ModelConfig, lora: LoraConfig | None, itemsize: int, device_type: str = "cuda"
    ) -> "MemoryModel":
        D, F, K = config.hidden_size, config.intermediate_size, config.head_dim
        HK, GK = config.num_attention_heads * K, config.num_key_value_heads * K
        shapes = {  # (in, out)
            "q_proj": (D, HK), "k_proj": (D, GK), "v_proj": (D, GK), "o_proj": (HK, D),
            "gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D),
        }  # fmt: skip
        r, targets = (lora.r, lora.target_modules) if lora else (0, ())
        groups = (LORA_TARGETS[:3], LORA_TARGETS[3:4], LORA_TARGETS[4:6], LORA_TARGETS[6:])
        lora_columns = tuple(
            padded_rank(r * sum(name in targets for name in group), device_type) for group in groups
        )
        adapter = config.num_hidden_layers * sum(r * sum(shapes[name]) for name in targets)
        return cls(
            config.num_hidden_layers, D, F, HK, GK, config.num_attention_heads, config.vocab_size, lora_columns, adapter,
            itemsize, config.tie_word_embeddings,
        )  # fmt: skip

    @property
    def of_layer(self) -> int:
        """Parameters of a layer's linears."""
        return self.D * (self.HK + 2 * self.GK) + self.HK * self.D + 3 * self.D * self.F

    @property
    def buffers(self) -> int:
        """Bytes of the extended weights of one layer."""
        D, F, HK, GK = self.D, self.F, self.HK, self.GK
        shapes = ((HK + 2 * GK, D), (D, HK), (2 * F, D), (D, F))
        return self.itemsize * sum(
            (m + s) * (n + s) for (m, n), s in zip(shapes, self.lora_columns, strict=True)
        )

    @property
    def embeddings(self) -> int:
        """Bytes of embedding and head."""
        return self.V * self.D * self.itemsize * (1 if self.tied else 2)

    def kept(self, level: int) -> int:
        """Bytes a token that a layer keeps; without an arena's rounding."""
        q, o, g, d = self.lora_columns
        added = (
            self.D + q + o + g + d,
            self.HK + o,
            self.D + self.HK + 2 * self.GK,
            2 * self.F + g,
        )
        return sum(added[: level + 1]) * self.itemsize + (
            4 * self.H if level >= SaveLevel.ATTENTION else 0
        )

    def forward(self, level: int, N: int, T: int, cudnn: bool) -> int:
        """Bytes at most in use while a layer runs forward in tiles of T rows: the residual stream, x, what it keeps."""
        q, o, g, d = self.lora_columns
        D, F, QKV = self.D, self.F, self.HK + 2 * self.GK
        low = q + o + g + d
        before = N * (D + low + QKV) + T * (D + q)
        held = N * (D + low + QKV + self.HK + o)
        attention = held + (
            int(self._at_once(N) * N * self.HK) if cudnn else 0
        )  # its output, before it is copied
        o_rows, wide = (N if level >= SaveLevel.QKV else T), (N if level >= SaveLevel.ALL else T)
        after = held + o_rows * D + wide * (2 * F + g) + T * max(D + g, F + d)
        return max(before, attention, after) * self.itemsize + 4 * N * self.H + self.stream(N)

    def backward(self, level: int, N: int, T: int, cudnn: bool) -> int:
        """The same backward, without the gradient that is passed down the layers."""
        q, o, g, d = self.lora_columns
        D, F, HK, QKV = self.D, self.F, self.HK, self.HK + 2 * self.GK
        held = N * (
            D + q + o + g + d + QKV + HK + o
        )  # x, low-rank columns, q k v, attention's output
        held += N * D * (level >= SaveLevel.QKV) + N * (2 * F + g) * (level >= SaveLevel.ALL)
        after = held + N * HK + T * (D * (level < SaveLevel.QKV) + D + g + 2 * F + g + F + d)
        attention = held + N * (HK + QKV + q)
        if cudnn:  # dense copies of attention's output and its gradient, those of q, k, v, and what cuDNN works with
            part = self._at_once(N)
            attention += int(part * N * (HK * (1 + (part < 1)) + QKV + 4 * HK))
        before = held - N * (QKV + HK + o) + N * (QKV + q) + T * (2 * D + q)
        return max(after, attention, before) * self.itemsize + 12 * N * self.H

    def _at_once(self, N: int) -> float:
        """The part of the heads that cuDNN's attention takes at a time."""
        G = self.H * self.GK // self.HK
        return kv_heads_at_once(N, self.H, G) / G

    def loss(self, N: int) -> int:
        """Bytes of the loss, the residual stream that it looks at included."""
        rows = min(N, logits_tile_rows(self.V, self.itemsize))
        return rows * (self.V + 6 * self.D) * self.itemsize + self.stream(N)

    def stream(self, N: int) -> int:
        """Bytes of the residual stream."""
        return N * self.D * max(self.itemsize, 4)


def static_parts(
    sizes: MemoryModel,
    config: ModelConfig,
    moments: float = 8,
    load_in_4bit: bool = True,
    positions: int = 2048,
    offload_embedding: bool = False,
) -> tuple[tuple[str, int], ...]:
    """What is there whatever the plan. moments: bytes a trainable parameter, 8 or (8-bit) 2.03."""
    linears = sizes.layers * sizes.of_layer * (NF4_BYTES if load_in_4bit else sizes.itemsize)
    embeddings = sizes.embeddings // (2 if offload_embedding and not sizes.tied else 1)
    weights = int(linears) + embeddings + (2 * sizes.layers + 1) * sizes.D * sizes.itemsize
    return (
        ("weights", weights),
        ("dequantisation buffer", sizes.buffers),
        ("cuBLAS", 2 * CUBLAS_BYTES),
        ("adapter and its gradient", 8 * sizes.adapter),
        ("optimizer", int(moments * sizes.adapter)),
        ("RoPE tables", 4 * positions * config.head_dim),
    )


def _host_bytes(sizes: MemoryModel, load: Workload, choice: Candidate) -> int:
    layer = _kept(sizes, load, choice.early) + 10 * ALIGN  # ten tensors, each on a line of the arena
    return choice.early_saving_layers(sizes.layers) * layer if choice.early.offloaded else 0


def _kept(sizes: MemoryModel, load: Workload, keep: LayerPlan) -> int:
    """Bytes that a layer keeps."""
    return load.tokens * sizes.kept(keep.level)


def _memory(sizes: MemoryModel, load: Workload, choice: Candidate) -> tuple[int, int]:
    """Bytes of what layers keep on the GPU, and of what else is in use when most is."""
    N, before, far = load.tokens, sizes.layers - choice.late_layers, choice.early
    T = min(choice.tile_rows or N, N)
    near_bytes, far_bytes = N * sizes.kept(choice.late_level), _kept(sizes, load, far)
    held = 0 if far.offloaded else far_bytes
    copied = (
        far_bytes if far.offloaded else 0
    )  # the layer before, on its way out, or the one to come, on its way in
    others = (choice.late_layers - 1) * near_bytes if choice.late_layers else 0
    keepers = choice.early_saving_layers(sizes.layers)
    kept = keepers * held + choice.late_layers * near_bytes
    peak = kept + sizes.loss(N)
    if before:
        beside = (keepers - 1) * held + (choice.recompute_span - 1) * far_bytes
        forward = sizes.forward(far.level, N, T, choice.cudnn)
        forward += max(copied, others if far.offloaded else 0)  # Plan.in_flight_limit
        backward = copied + sizes.backward(far.level, N, T, choice.cudnn)
        peak = max(peak, beside + max(forward, backward))
    if choice.late_layers:
        beside = keepers * held + max(copied, others)
        work = max(way(choice.late_level, N, T, choice.cudnn) for way in (sizes.forward, sizes.backward))
        peak = max(peak, beside + work)
    top = N * (sizes.D + max(sizes.lora_columns[1], sizes.lora_columns[3])) * sizes.itemsize
    return kept, peak - kept + top
