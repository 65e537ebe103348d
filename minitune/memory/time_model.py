"""Time of a micro-step: the operations and bytes of each layer over the rates of the machine.

A layer's time is the sum of its matmuls, its attention, the bytes that its other kernels move, and
its launches. Copies to and from host memory run beside the layers; a layer waits if they fall
behind.

The factors count the kernels of `forward_saving_` and `backward_` (model/decoder_layer.py). The
letters are those of minitune/model/__init__.py: N rows in all, n rows of a tile.
"""

from collections.abc import Callable
from dataclasses import dataclass

from minitune.config.layer_kinds import LayerKind
from minitune.memory.device_rates import DeviceRates
from minitune.memory.memory_model import MemoryModel
from minitune.memory.plan import Candidate
from minitune.model.activations import SaveLevel

HALF_RATE_ROWS = 32  # rows at which a matmul reaches half of its rate
HEAD_EXTRA_WIDTH = 256  # a narrow head's matmul takes as long as one so much wider at full rate
LORA_READ_EFFICIENCY = 0.71  # of the rate of a copy, at which a matmul with R columns reads

# Elements that the elementwise kernels move a row. s counts twice, because it is float32. Layers
# without norms before their blocks (OLMo 2) move the same within 3 D elements.
FORWARD_D = (
    3  # x = s rounded: s read, x written
    + 2  # input norm: x read, h written
    + 7  # second norm: x and o read, h_mid written, s read and written
    + 3  # down adds to s: s read and written, instead of D written once
)
FORWARD_F = 3  # gated activation: gate and up read, m written
BACKWARD_D = (
    3  # second norm once more: x and o read, h_mid written
    + 5  # its backward: dh_mid, x, o and dx read, dx written
    + 2  # input norm once more: x read, h written
    + 4  # its backward: dh, x and dx read, dx written
)
BACKWARD_F = 6  # activation's backward: dm, gate and up read, their gradients and m written
# The same for norms behind o and down. Forward reads o and writes it anew; d is written,
# normalised, and added to s. Backward normalises o once more, and both once more for their rstd.
FORWARD_OUT_NORMS = 2 + 4
BACKWARD_OUT_NORMS = 2 + 2 * (2 + 3)
# Elements of RoPE and of the norms of q and k, for each column of q and k: in forward, in backward.
# None: RoPE reads and writes q and k, and their gradients.
# "head": one kernel for both. Backward reads q and k, writes them normalised and rotated, and reads
#   them once more beside dq and dk.
# "projection": norm and RoPE. Backward has them twice, as the norm for its rstd, beside RoPE of dq
#   and dk and the norm's backward.
# Heads that are rotated in part count as whole: for 96 of 128 columns that is 0.5% of a layer.
ROTATION = {None: (2, 2), "head": (2, 5), "projection": (4, 11)}

# Operations of attention, for each element of HK, row and row of its sample: q k^T and p v, of half
# of the rows because it is causal. Backward takes three times as long: it has 2.5 times the
# products, and recomputes scores.
ATTENTION_OPERATIONS = 2
ATTENTION_BACKWARD = 3
# Backward of wider heads than 128 columns takes longer by this factor: on an H200 in November 2026,
# 8192 rows took 3.04 ms with 8 heads of 256, and 3.35 ms with 32 heads of 128.
WIDE_HEADS_BACKWARD = 1.8
# Attention takes longer by this factor if scores have a soft cap: on the same card 127.3 ms, not
# 71.5, for forward and backward of 32,768 rows with 32 heads of 128.
SOFT_CAP = 1.78

# Passes over the logits (rows, V): a matmul writes them, the loss reads them twice and writes their
# gradient, a matmul reads that.
LOGITS_PASSES = 5

# Launches of a layer, once a pass.
FORWARD_LAUNCHES = (
    1  # x
    + 1  # adapters into the extended weights
    + 4  # dequantisation, a fused linear each
    + 1  # attention
)
BACKWARD_LAUNCHES = (
    1  # adapters
    + 4  # dequantisation
    + 2  # attention: dq; dk and dv
    + 1  # gradients added to .grad
)
# Launches for each tile of rows.
FORWARD_TILE_LAUNCHES = 2 + 1 + 4  # norms, gated activation, matmuls
BACKWARD_TILE_LAUNCHES = 2 + 1 + 2 + 4  # norms once more, gated activation, norms, matmuls
# cuBLAS splits the sum over rows of dA and dB, and adds the parts up in a kernel of its own.
LORA_GRADIENT_LAUNCHES = 2


@dataclass(frozen=True)
class TimeModel:
    """The seconds of a micro-step as a function of the plan's decisions."""

    memory: MemoryModel
    rates: DeviceRates

    def seconds(self, candidate: Candidate) -> float:
        """Return the time of forward, loss and backward."""
        layers = self.memory.shape.layers
        options, early = (candidate.tile_rows, candidate.cudnn), candidate.early
        early_layers = layers - candidate.late_layers
        saving_layers = candidate.early_saving_layers(layers)
        forward = self._layer_mean(self.forward_seconds, *options)
        backward = [
            self._layer_mean(self.backward_seconds, max(level, SaveLevel.INPUT), *options)
            for level in (early.level, candidate.late_level)
        ]

        seconds = self.rates.start + self.loss_seconds
        seconds += layers * forward + self.offload_wait(candidate, forward)
        seconds += candidate.late_layers * backward[1]
        # Inside a span, backward recomputes each input by one more forward.
        seconds += (early_layers - saving_layers) * forward
        early_backward = backward[0]
        if early.offloaded:
            prefetch = self.memory.saved_bytes(early.level) / self.rates.from_host
            # A layer that saves is prefetched while a span of layers runs.
            early_backward = max(early_backward, prefetch / candidate.recompute_span)
            # Without late layers, no backward runs beside the first prefetch.
            seconds += prefetch if candidate.late_layers == 0 else 0.0
        return seconds + early_layers * early_backward

    def _layer_mean(self, seconds: Callable[..., float], *options: object) -> float:
        """Return the mean of `seconds(kind, *options)` over the layers.

        Kinds alternate from layer to layer, so early and late layers count as one mix.
        """
        counts = self.memory.shape.kind_counts
        return sum(n * seconds(kind, *options) for kind, n in counts) / self.memory.shape.layers

    def forward_seconds(self, kind: LayerKind, tile_rows: int | None, cudnn: bool) -> float:
        """Return the time of a layer's forward."""
        shape = self.memory.shape
        moved = FORWARD_D * shape.D + FORWARD_F * shape.F + self._rotation(kind)[0] * shape.QK
        moved += FORWARD_OUT_NORMS * shape.D if shape.norms.mlp_out else 0
        # x A^T reads the input of each fused linear with an adapter.
        lora_read = sum(linear.in_features for linear in shape.fused if linear.adapters)
        return (
            self._matmul_seconds(shape.layer_parameters, tile_rows)
            + self.attention_seconds(kind, cudnn)
            + self.dequantise_seconds
            + self._move_seconds(moved)
            + self._move_seconds(lora_read) / LORA_READ_EFFICIENCY
            + self.forward_launches(kind, tile_rows) * self.rates.launch
        )

    def backward_seconds(
        self, kind: LayerKind, level: SaveLevel, tile_rows: int | None, cudnn: bool
    ) -> float:
        """Return the time of a layer's backward, which recomputes all that `level` does not save.

        The elementwise kernels of recomputation are not counted: 1.5 of 8B's 316 ms.
        """
        shape = self.memory.shape
        moved = BACKWARD_D * shape.D + BACKWARD_F * shape.F + self._rotation(kind)[1] * shape.QK
        moved += BACKWARD_OUT_NORMS * shape.D if shape.norms.mlp_out else 0
        # dA reads the input; dy B and dB read the gradient of the output.
        lora_read = sum(
            linear.in_features + 2 * linear.out_features
            for linear in shape.fused
            if linear.adapters
        )
        parameters = shape.layer_parameters
        seconds = self.attention_backward_seconds(kind, cudnn)
        if level < SaveLevel.ATTENTION:
            seconds += self.attention_seconds(kind, cudnn)
        if level < SaveLevel.QKV:
            parameters += shape.qkv.parameters + shape.o.parameters
            parameters += shape.down.parameters if shape.norms.mlp_out else 0
        if level < SaveLevel.ALL:
            parameters += shape.gate_up.parameters
        return (
            seconds
            + self._matmul_seconds(parameters, tile_rows)
            + self.dequantise_seconds
            + self._move_seconds(moved)
            + self._move_seconds(lora_read) / LORA_READ_EFFICIENCY
            + self.backward_launches(kind, level, tile_rows) * self.rates.launch
        )

    def forward_launches(self, kind: LayerKind, tile_rows: int | None) -> int:
        """Return the kernels of a layer's forward."""
        linears, norms = self.memory.shape.fused, self.memory.shape.norms
        tile_launches = FORWARD_TILE_LAUNCHES
        # x A^T into the columns beside x, and saved from there.
        tile_launches += 2 * sum(linear.adapters > 0 for linear in linears)
        tile_launches += sum(linear.biases for linear in linears)
        tile_launches += norms.mlp_in is None  # adds to s and to x in two kernels
        tile_launches += norms.attention_out is not None
        tile_launches += 2 * (norms.mlp_out is not None)  # the norm; its sum with s
        layer_launches = FORWARD_LAUNCHES + self._rotation_launches(kind)
        return layer_launches + self._tiles(tile_rows) * tile_launches

    def backward_launches(self, kind: LayerKind, level: SaveLevel, tile_rows: int | None) -> int:
        """Return the kernels of a layer's backward."""
        shape, tiles = self.memory.shape, self._tiles(tile_rows)
        fused = sum(linear.adapters > 0 for linear in shape.fused)
        adapters = sum(linear.adapters for linear in shape.fused)
        layer_launches, tile_launches = BACKWARD_LAUNCHES, BACKWARD_TILE_LAUNCHES
        tile_launches += fused  # dy B
        tile_launches += fused - (shape.o.adapters > 0)  # saved x A^T; o's input has it already
        # dA of a fused linear, dB of a linear
        tile_launches += LORA_GRADIENT_LAUNCHES * (fused + adapters)
        if shape.norms.attention_out:
            tile_launches += 3  # o behind its norm; the norm once more; its backward
        if shape.norms.mlp_out:
            tile_launches += 2  # the norm once more; its backward
        rotation = self._rotation_launches(kind)
        layer_launches += rotation  # their backward
        layer_launches += 2 * (shape.qk_norm == "projection")  # the norms once more
        layer_launches += self.memory.attention_splits > 1  # adds up dk and dv of the splits
        # With norms of the heads, q and k are rotated wherever attention reads them.
        rotated_again = rotation if shape.qk_norm else 0
        layer_launches += rotated_again
        if level < SaveLevel.ATTENTION:
            layer_launches += 1 + rotated_again  # attention
        if level < SaveLevel.QKV:
            layer_launches += rotation - rotated_again
            tile_launches += 1 + 2  # input norm; matmuls of qkv and o
            tile_launches += shape.qkv.biases + shape.o.biases
            tile_launches += (shape.qkv.adapters > 0) + (shape.o.adapters > 0)  # saved x A^T
            if shape.norms.mlp_out:  # d: gated activation, saved x A^T, matmul
                tile_launches += 1 + (shape.down.adapters > 0) + 1 + shape.down.biases
        if level < SaveLevel.ALL:
            tile_launches += 1 + shape.gate_up.biases  # matmul of gate and up
        # From the second tile on, the gradients of a fused linear are added up.
        return layer_launches + tiles * tile_launches + (tiles - 1) * fused

    def _rotation(self, kind: LayerKind) -> tuple[int, int]:
        """Return the elements that RoPE and norms move for each column of q and k, as ROTATION."""
        qk_norm = self.memory.shape.qk_norm
        return ROTATION[qk_norm] if kind.rope is not None or qk_norm else (0, 0)

    def _rotation_launches(self, kind: LayerKind) -> int:
        """Return the kernels that normalise and rotate q and k, once."""
        rotates = kind.rope is not None
        return {None: rotates, "head": 1, "projection": 2 + rotates}[self.memory.shape.qk_norm]

    @property
    def dequantise_seconds(self) -> float:
        """Return the time to dequantise a layer: stored weights are read, plain ones written."""
        shape = self.memory.shape
        written = shape.layer_parameters * shape.itemsize
        return (shape.weights.linears / shape.layers + written) / self.rates.copy

    @property
    def loss_seconds(self) -> float:
        """Return the time of the loss, as if every row had a label."""
        shape, N = self.memory.shape, self.memory.workload.tokens
        # Two matmuls, two operations each: the logits, and the gradient of their input.
        seconds = 4 * N * (shape.D + HEAD_EXTRA_WIDTH) * shape.V / self.rates.matmul
        seconds += self._move_seconds(LOGITS_PASSES * shape.V)
        if shape.weights.converts_head:
            seconds += (shape.weights.head + shape.head_buffer_bytes) / self.rates.copy
        return seconds

    def offload_wait(self, candidate: Candidate, forward: float) -> float:
        """Return the time that forward waits for copies to host memory.

        forward: seconds of a layer's forward.

        Copies lag behind the layers. Until the in-flight limit is reached nothing waits; after that
        each layer waits for one copy. The rest is awaited after the last layer.
        """
        saving_layers = candidate.early_saving_layers(self.memory.shape.layers)
        if not candidate.early.offloaded or not saving_layers:
            return 0.0
        early_bytes = self.memory.saved_bytes(candidate.early.level)
        late_bytes = self.memory.saved_bytes(candidate.late_level)
        late_layers = candidate.late_layers
        copied_a_layer = forward * self.rates.to_host  # bytes, while one layer runs
        copied_a_span = candidate.recompute_span * copied_a_layer
        # In flight when the last early layer that saves has run, if nothing waited.
        lag = saving_layers * max(early_bytes - copied_a_span, 0.0) + min(
            early_bytes, copied_a_span
        )
        # Plan.in_flight_limit, in whole layers.
        limit = max((late_layers - 1) * late_bytes, early_bytes) // early_bytes * early_bytes
        # In flight after the late layers, which copies run beside; the last one counts only if it
        # is alone, because the limit is 0 from there on.
        running_beside = max(late_layers - 1, min(late_layers, 1))
        rest = min(lag, limit) - running_beside * copied_a_layer
        return (max(lag - limit, 0.0) + max(rest, 0.0)) / self.rates.to_host

    def attention_seconds(self, kind: LayerKind, cudnn: bool) -> float:
        """Return the time of attention's forward. cuDNN's attention has no windows."""
        workload = self.memory.workload
        seqlen = min(workload.max_seqlen, workload.tokens)
        window = min(kind.window or seqlen, seqlen)
        # Twice the mean number of rows that a row sees: seqlen without a window.
        seen = window * (2 - window / seqlen)
        with_cudnn = cudnn and kind.window is None
        efficiency = self.rates.cudnn if with_cudnn else self.rates.attention
        operations = ATTENTION_OPERATIONS * workload.tokens * seen * self.memory.shape.HK
        if self.memory.shape.caps_scores:
            operations *= SOFT_CAP
        return operations / (self.rates.matmul * efficiency)

    def attention_backward_seconds(self, kind: LayerKind, cudnn: bool) -> float:
        """Return the time of attention's backward."""
        factor = WIDE_HEADS_BACKWARD if self.memory.shape.K > 128 else 1
        return factor * ATTENTION_BACKWARD * self.attention_seconds(kind, cudnn)

    def _tiles(self, tile_rows: int | None) -> int:
        N = self.memory.workload.tokens
        return -(-N // min(tile_rows or N, N))

    def _matmul_seconds(self, parameters: int, tile_rows: int | None) -> float:
        """Return the time of matmuls with weights of `parameters` elements, in tiles."""
        N = self.memory.workload.tokens
        n = min(tile_rows or N, N)
        return 2 * N * parameters * (n + HALF_RATE_ROWS) / n / self.rates.matmul

    def _move_seconds(self, elements: int) -> float:
        """Return the time to read or write so many elements of every row."""
        shape, N = self.memory.shape, self.memory.workload.tokens
        return N * elements * shape.itemsize / self.rates.copy
