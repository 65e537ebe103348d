"""GPU memory of a micro-step, in bytes: weights, saved activations, workspace of the running layer.

The formulas follow the tensors of `forward_saving_` and `backward_` (model/decoder_layer.py) in the
order in which they are made and freed. tests/test_memory_replay.py runs a layer on meta tensors and
checks the formulas against the live bytes at the peak. Plans use the formulas, because a search
needs up to 96 peaks, which take 1 ms by formula and 5 s by replay.

All layers count alike. They differ only in the workspace of cuDNN's attention, which layers with a
sliding window lack; the peak is that of a layer without. The bounds of the samples are not counted,
8 bytes a row for each window.

The letters are those of minitune/model/__init__.py: N rows in all, n rows of a tile.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

from minitune.config.model_config import ModelConfig
from minitune.kernels.attention_cudnn import CUDNN_MAX_HEAD_WIDTH, kv_heads_at_once
from minitune.kernels.attention_dkdv import planned_splits
from minitune.kernels.cross_entropy import logits_tile_rows
from minitune.memory.model_shape import ModelShape
from minitune.memory.offload import ALIGN
from minitune.memory.plan import Candidate, Workload
from minitune.model.activations import Activations, SaveLevel

CUBLAS_WORKSPACE = 32 << 20  # bytes; PyTorch reserves them for each stream on Hopper
STREAMS = 2  # the default stream and the stream of the CUDA graphs
ADAMW_BYTES = 8.0  # moments of a trainable parameter, float32
ADAMW_8BIT_BYTES = 2.03  # moments in 8 bit, with their scales
FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Storage:
    """Storage options of the tensors that no plan changes, beside the form of the weights.

    offload_embedding: True if an embedding that is not the head is in host memory.
    eight_bit_moments: True if the optimizer's moments are in 8 bit.
    """

    offload_embedding: bool = False
    eight_bit_moments: bool = False


def static_parts(
    config: ModelConfig, shape: ModelShape, max_seqlen: int, storage: Storage | None = None
) -> tuple[tuple[str, int], ...]:
    """Return (name, bytes) of everything in GPU memory that no plan changes.

    max_seqlen: rows of the longest sample, which the RoPE tables reach to.
    """
    storage = storage or Storage()
    moments = ADAMW_8BIT_BYTES if storage.eight_bit_moments else ADAMW_BYTES
    stored = shape.weights
    weights = stored.linears + stored.head + stored.vectors
    if not shape.tied and not storage.offload_embedding:
        weights += stored.embedding
    # cos and sin of each pair of columns; a factor of the queries if these grow
    rope_columns = sum(rope.rotary_dim + (rope.query_growth > 0) for rope in config.ropes)
    return (
        ("weights", weights),
        ("dequantisation buffer", shape.weight_buffer_bytes),
        ("cuBLAS", STREAMS * CUBLAS_WORKSPACE),
        ("adapter and its gradient", 2 * FLOAT32 * shape.lora_parameters),
        ("optimizer", int(moments * shape.lora_parameters)),
        ("RoPE tables", FLOAT32 * max_seqlen * rope_columns),
    )


class LayerBytes(NamedTuple):
    """The bytes of one layer: its saved activations, its peaks in forward and backward."""

    saved: int
    forward_peak: int
    backward_peak: int


@dataclass(frozen=True)
class MemoryModel:
    """The bytes that a micro-step saves and works with, as functions of the plan's decisions."""

    shape: ModelShape
    workload: Workload

    @property
    def cudnn(self) -> bool:
        """Return True if attention may use cuDNN, which knows no windows and no soft caps."""
        supported = self.shape.K <= CUDNN_MAX_HEAD_WIDTH and not self.shape.caps_scores
        full = any(kind.window is None for kind in self.shape.kinds)
        return self.workload.cudnn and supported and full

    # ---- one layer

    @cached_property
    def _layers(self) -> dict[tuple, LayerBytes]:
        return {}

    def layer_bytes(self, level: SaveLevel, tile_rows: int | None, cudnn: bool) -> LayerBytes:
        """Return the bytes of a layer.

        They are cached, because a search asks for the same layer about 80 times.
        """
        key = level, tile_rows, cudnn
        if key not in self._layers:
            self._layers[key] = LayerBytes(
                self.saved_bytes(level), self.forward_peak(*key), self.backward_peak(*key)
            )
        return self._layers[key]

    def saved_bytes(self, level: SaveLevel) -> int:
        """Return the bytes that a layer saves."""
        shape = self.shape
        elements = shape.D + shape.lora_columns  # x; x A^T of every fused linear
        lse = 0
        if level >= SaveLevel.ATTENTION:
            elements += shape.HK + shape.o.lora_columns  # attention output, beside it o's x A^T
            lse = FLOAT32 * shape.H
        if level >= SaveLevel.QKV:
            elements += shape.QKV + shape.D  # q, k, v; o
            elements += shape.D if shape.norms.mlp_out else 0  # d
        if level >= SaveLevel.ALL:
            elements += 2 * shape.F + shape.gate_up.lora_columns  # gate, up
        return self.workload.tokens * (elements * shape.itemsize + lse)

    def forward_peak(self, level: SaveLevel, tile_rows: int | None, cudnn: bool) -> int:
        """Return the most bytes in use while a layer runs forward.

        They include the residual stream and all that the layer saves.
        """
        shape, N = self.shape, self.workload.tokens
        n = min(tile_rows or N, N)
        D, F = shape.D, shape.F
        # widths with LoRA columns
        h = D + shape.qkv.lora_columns
        attn = shape.HK + shape.o.lora_columns
        h_mid = D + shape.gate_up.lora_columns
        gate_up = 2 * F + shape.gate_up.lora_columns
        m = F + shape.down.lora_columns

        # x; x A^T of every fused linear; q, k, v
        until_qkv = N * (D + shape.lora_columns + shape.QKV)
        until_y = until_qkv + N * attn
        until_attention = until_y + (N * shape.QK if shape.qk_norm else 0)  # q and k normalised
        until_qkv += n * h
        if cudnn:
            until_attention += int(self._cudnn_part() * N * shape.HK)  # its output, to be copied
        # gate and up: of all rows if they are saved, else of a tile
        until_y += (N if level >= SaveLevel.ALL else n) * gate_up
        # o and d: of all rows if they are saved, else of a tile
        tile_o = D
        if level >= SaveLevel.QKV:
            until_y += N * (2 * D if shape.norms.mlp_out else D)
            tile_o = D if shape.norms.attention_out else 0  # o behind its norm
        # A tile's gate and up, if they are not saved, are freed before d is normalised.
        tile_d = D if shape.norms.mlp_out and level >= SaveLevel.ALL else 0
        # A tile's o and h_mid are freed before m.
        until_y += n * max(tile_o + h_mid, m + tile_d)
        peak = max(until_qkv, until_attention, until_y) * shape.itemsize
        return peak + FLOAT32 * N * shape.H + self.residual_bytes  # the middle term is lse

    def backward_peak(self, level: SaveLevel, tile_rows: int | None, cudnn: bool) -> int:
        """Return the most bytes in use while a layer runs backward.

        They include the saved activations, and not dx (N, D + R), which all layers share.
        """
        shape, N, itemsize = self.shape, self.workload.tokens, self.shape.itemsize
        n = min(tile_rows or N, N)
        D = shape.D
        # widths with LoRA columns
        h, dqkv = D + shape.qkv.lora_columns, shape.QKV + shape.qkv.lora_columns
        attn = shape.HK + shape.o.lora_columns
        gate_up = 2 * shape.F + shape.gate_up.lora_columns

        # x; x A^T of every fused linear; o, d, gate and up if they are saved
        throughout = N * (D + shape.lora_columns)
        if level >= SaveLevel.QKV:
            throughout += N * (2 * D if shape.norms.mlp_out else D)
        throughout += N * gate_up if level >= SaveLevel.ALL else 0
        # q, k, v and attn, saved or recomputed; dattn
        until_dqkv = throughout + N * (shape.QKV + attn + shape.HK)

        # From dy to dattn, in tiles.
        with_mlp = until_dqkv * itemsize + self._mlp_backward_peak(level, n)
        # From dattn to dqkv, all rows at once. Norms of the heads write q and k anew; those of the
        # whole projection are computed once more, into a tensor that is freed at once.
        with_dqkv = until_dqkv + N * (dqkv + (shape.QK if shape.qk_norm else 0))
        workspace = self._attention_backward_bytes(cudnn)
        if shape.qk_norm == "projection":
            workspace = max(workspace, N * shape.HK * itemsize)
        with_dqkv = with_dqkv * itemsize + workspace
        # From dqkv to dx, in tiles: dh and h.
        with_dh = (throughout + N * dqkv + n * (D + h)) * itemsize

        # dA and dB, float32. With several tiles, one tile's gradients coexist with their sums.
        qkv_lora, *other_lora = [FLOAT32 * linear.lora_parameters for linear in shape.fused]
        with_dqkv += sum(other_lora)
        with_dh += sum(other_lora) + (2 * qkv_lora if n < N else qkv_lora)
        lse = FLOAT32 * N * shape.H
        return max(with_mlp, with_dqkv, with_dh) + lse

    def _mlp_backward_peak(self, level: SaveLevel, n: int) -> int:
        """Return the most bytes that a tile of n rows takes from dy to dattn.

        They include the gradients of the adapters, and not the activations of all rows.
        """
        shape, norms, D = self.shape, self.shape.norms, self.shape.D
        recomputes_o_and_d = level < SaveLevel.QKV
        # h_mid; gate and up, recomputed, or their gradient beside the saved ones
        width = D + shape.gate_up.lora_columns + 2 * shape.F + shape.gate_up.lora_columns
        width += D if recomputes_o_and_d else 0  # o
        width += D if norms.attention_out else 0  # o behind its norm
        with_m = width + shape.F + shape.down.lora_columns  # m is freed before dh_mid is made
        if norms.mlp_out:
            with_m += D + shape.down.lora_columns  # dd, elsewhere a part of dresidual
            with_m += D if recomputes_o_and_d else 0  # d
        width += D  # dh_mid
        with_do = with_norm = width
        if norms.attention_out:
            with_do += D + shape.o.lora_columns  # elsewhere a part of dresidual
            with_norm = with_do + D  # the norm, computed once more for its rstd

        # (width, bytes of the gradients that are made then) in the order of backward. The first of
        # several tiles has already allocated the sums of all of them.
        _, o_lora, gate_up_lora, down_lora = [FLOAT32 * x.lora_parameters for x in shape.fused]
        steps = ((with_m, down_lora), (width, gate_up_lora), (with_norm, 0), (with_do, o_lora))
        tiled, peak = n < self.workload.tokens, 0
        sums = o_lora + gate_up_lora + down_lora if tiled else 0
        for columns, gradients in steps:
            peak = max(peak, n * columns * shape.itemsize + sums + gradients)
            sums += 0 if tiled else gradients
        return peak

    def _attention_backward_bytes(self, cudnn: bool) -> int:
        """Return the bytes of the workspace of attention's backward."""
        shape, N = self.shape, self.workload.tokens
        if cudnn:
            part = self._cudnn_part()
            elements = shape.HK  # contiguous copy of the output
            # contiguous copy of its gradient, unless one call takes all heads
            elements += shape.HK if part < 1 else 0
            elements += shape.QKV  # contiguous copies of q, k, v
            elements += 4 * shape.HK  # dq in float32; dk, dv for every query head
            return int(part * N * elements) * shape.itemsize
        statistics = 8 * N * shape.H  # lse and the row sums of dout * out, packed in an int64
        splits = self.attention_splits  # each has dk and dv in float32
        return statistics + (2 * splits * N * shape.GK * FLOAT32 if splits > 1 else 0)

    @cached_property
    def attention_splits(self) -> int:
        """Return the number of programs that share a group's query heads in attention's backward.

        It is 1 if the blocks of rows and the groups alone fill the GPU.
        """
        shape = self.shape
        return planned_splits(self.workload.tokens, shape.H, shape.G, shape.K)

    def _cudnn_part(self) -> float:
        """Return the fraction of the heads that one call of cuDNN's attention takes."""
        shape = self.shape
        return kv_heads_at_once(self.workload.tokens, shape.H, shape.G) / shape.G

    # ---- between the layers

    @property
    def residual_bytes(self) -> int:
        """Return the bytes of the residual stream, which is float32 or wider."""
        return self.workload.tokens * self.shape.D * max(self.shape.itemsize, FLOAT32)

    @cached_property
    def residual_gradient_bytes(self) -> int:
        """Return the bytes of dx (N, D + R), the gradient of the residual stream."""
        shape = self.shape
        width = shape.D + max(shape.o.lora_columns, shape.down.lora_columns)
        return self.workload.tokens * width * shape.itemsize

    @cached_property
    def loss_peak(self) -> int:
        """Return the most bytes in use during the loss, the residual stream included."""
        shape, N = self.shape, self.workload.tokens
        rows = min(N, logits_tile_rows(shape.V, shape.itemsize))
        # Per row: the residual stream in float32 (2 D in 16 bit), its norm, dh in float32 (2 D) and
        # rounded. From the second tile on, the previous tile's dh is still allocated.
        width = (7 if rows < N else 6) * shape.D
        tile = rows * (shape.V + width) * shape.itemsize
        return tile + shape.head_buffer_bytes + self.residual_bytes

    # ---- all layers

    def host_bytes(self, candidate: Candidate) -> int:
        """Return the bytes of host memory that the offloaded activations of all layers take."""
        if not candidate.early.offloaded:
            return 0
        padding = len(fields(Activations)) * ALIGN  # every tensor begins at an aligned offset
        layer = self.saved_bytes(candidate.early.level) + padding
        return candidate.early_saving_layers(self.shape.layers) * layer

    def step_bytes(self, candidate: Candidate) -> tuple[int, int]:
        """Return (bytes of the saved activations on the GPU, peak bytes of everything else).

        Static memory (`static_parts`) is not included.
        """
        late_layers, offloaded = candidate.late_layers, candidate.early.offloaded
        early_layers = self.shape.layers - late_layers
        saving_layers = candidate.early_saving_layers(self.shape.layers)
        tile_rows, cudnn = candidate.tile_rows, candidate.cudnn
        early = self.layer_bytes(candidate.early.level, tile_rows, cudnn)
        late = self.layer_bytes(candidate.late_level, tile_rows, cudnn)
        early_saved = 0 if offloaded else early.saved  # on the GPU
        # Copies in flight: the previous layer being offloaded, or the next layer being prefetched.
        in_flight = early.saved if offloaded else 0
        # All late layers except the one that runs. Until they run, copies in flight can use their
        # memory.
        other_late = max(late_layers - 1, 0) * late.saved

        saved = saving_layers * early_saved + late_layers * late.saved
        peak = saved + self.loss_peak
        if early_layers:
            # The other early layers, and the inputs that backward recomputes for a span.
            concurrent = (saving_layers - 1) * early_saved
            concurrent += (candidate.recompute_span - 1) * early.saved
            forward = early.forward_peak + (max(in_flight, other_late) if offloaded else 0)
            backward = early.backward_peak + in_flight
            peak = max(peak, concurrent + max(forward, backward))
        if late_layers:
            concurrent = saving_layers * early_saved + max(in_flight, other_late)
            peak = max(peak, concurrent + max(late.forward_peak, late.backward_peak))
        return saved, peak - saved + self.residual_gradient_bytes
