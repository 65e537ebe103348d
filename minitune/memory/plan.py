"""The plan of a micro-step: the saved activations of each layer, their place, the rows of a tile.

A plan of N tokens decides:

- the SaveLevel of each layer (model/activations.py);
- whether a layer's saved activations stay on the GPU or are offloaded to host memory (offload.py);
- the rows of a tile, in which the wide parts of a layer run (model/decoder_layer.py);
- whether attention may use cuDNN;
- the number of layers whose weights stay dequantised.

Layers are alike, so a few numbers describe a candidate. The late layers save `late_level` on the
GPU, because backward needs them first. The early layers save `early`, in host memory if that helps.

search.py searches the candidates. memory_model.py counts their bytes, time_model.py their seconds.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from minitune.device import gib_text
from minitune.kernels.attention_cudnn import CUDNN_MIN_LENGTH
from minitune.model.activations import LayerPlan, SaveLevel
from minitune.model.packed_sequences import PackedSequences

PEAK = "peak"
LEVEL_TEXT = {
    SaveLevel.NOTHING: "nothing",
    SaveLevel.INPUT: "the input",
    SaveLevel.ATTENTION: "the input and attention",
    SaveLevel.QKV: "everything up to the MLP",
    SaveLevel.ALL: "everything",
}


@dataclass(frozen=True)
class Workload:
    """The work of a micro-step.

    tokens: rows N of all samples.
    max_seqlen: rows of the longest sample; attention's time is planned as if all were so long.
    cudnn: True if attention may use cuDNN.
    """

    tokens: int
    max_seqlen: int
    cudnn: bool = False

    @classmethod
    def of_samples(cls, tokens: int, max_seqlen: int) -> "Workload":
        """Return the work of `tokens` rows in samples of `max_seqlen`.

        Raises: ValueError if a sample is longer than the micro-step, or empty.
        """
        if not 0 < max_seqlen <= tokens:
            raise ValueError(
                f"samples of {max_seqlen} tokens in micro-steps of {tokens}: expected 1 to {tokens}"
            )
        return cls(tokens, max_seqlen, cudnn=tokens == max_seqlen >= CUDNN_MIN_LENGTH)


@dataclass(frozen=True)
class Candidate:
    """A plan that the search looks at.

    late_level: SaveLevel of the last `late_layers` layers, on the GPU.
    early: plan of the layers before them.
    late_layers: number of late layers.
    tile_rows: rows of a tile; None runs all rows at once.
    cudnn: True if attention may use cuDNN.
    recompute_span: early layers in a span; only the first of a span saves, backward recomputes the
        inputs of the others from it.
    """

    late_level: SaveLevel
    early: LayerPlan
    late_layers: int
    tile_rows: int | None
    cudnn: bool = False
    recompute_span: int = 1

    def layer_plans(self, layers: int) -> tuple[LayerPlan, ...]:
        """Return the plan of each of `layers` layers."""
        nothing = LayerPlan(SaveLevel.NOTHING)
        early = [
            nothing if i % self.recompute_span else self.early
            for i in range(layers - self.late_layers)
        ]
        return (*early, *[LayerPlan(self.late_level)] * self.late_layers)

    def early_saving_layers(self, layers: int) -> int:
        """Return how many of `layers` layers save `early`: the first of each span."""
        return -(-(layers - self.late_layers) // self.recompute_span)


@dataclass(frozen=True)
class Plan:
    """The decisions for a micro-step, and the memory and time that it is expected to take.

    layers: plan of each layer.
    tile_rows: rows of a tile; None runs all rows at once.
    host_bytes: host memory of the offloaded activations.
    cudnn: True if attention may use cuDNN.
    resident_layers: layers, from the first on, whose weights are kept dequantised.
    saved_bytes: GPU memory of the saved activations, included in `parts`.
    parts: (name, bytes) of everything in GPU memory at the peak.
    seconds: time of forward, loss and backward.
    """

    layers: tuple[LayerPlan, ...]
    tile_rows: int | None = None
    host_bytes: int = 0
    cudnn: bool = False
    resident_layers: int = 0
    saved_bytes: int = 0
    parts: tuple[tuple[str, int], ...] = ()
    seconds: float = math.nan

    @property
    def peak(self) -> int:
        """Return the most bytes of GPU memory that are allocated at a time."""
        return sum(size for _, size in self.parts)

    def in_flight_limit(self, i: int) -> int:
        """Return how many offloaded bytes may still be in flight while layer i runs.

        They may occupy the memory that later layers will fill with saved activations, less one
        layer, which the plan counts as workspace. Up to the first layer that saves on the GPU, one
        offloaded layer may be in flight in any case.
        """
        offloading = sum(layer.offloaded for layer in self.layers)
        on_gpu = sum(
            not layer.offloaded and layer.level != SaveLevel.NOTHING for layer in self.layers
        )
        later = len(self.layers) - 1 - i
        limit = 0
        if offloading and 0 < i <= len(self.layers) - on_gpu:
            limit = self.host_bytes // offloading
        if on_gpu:
            limit = max(limit, self.saved_bytes * min(later, on_gpu - 1) // on_gpu)
        return limit

    def select_attention(self, packed: PackedSequences) -> PackedSequences:
        """Return `packed`, without its uniform length if the plan has no room for cuDNN."""
        return packed if self.cudnn else replace(packed, uniform_seqlen=None)

    def memory_rows(self) -> list[tuple[str, int]]:
        """Return (name, bytes) of each part of the GPU's memory, the peak, and the host memory."""
        return [*self.parts, (PEAK, self.peak), ("host memory", self.host_bytes)]

    def __str__(self) -> str:
        """Return the saved activations and their place in words."""
        return "; ".join(self._phrases())

    def _phrases(self) -> Iterator[str]:
        for layer, count in Counter(self.layers).items():
            subject = "1 layer saves" if count == 1 else f"{count} layers save"
            place = " in host memory" if layer.offloaded else ""
            yield f"{subject} {LEVEL_TEXT[layer.level]}{place}"
        if self.tile_rows:
            yield f"tiles of {self.tile_rows:,} rows"
        if self.resident_layers:
            plural = "s" if self.resident_layers > 1 else ""
            yield f"weights of {self.resident_layers} layer{plural} kept dequantised"


def plan_table(plan: Plan, tokens: int, budget: int) -> str:
    """Return a plan as lines of a label and a text.

    tokens: rows of the micro-step.
    budget: bytes of GPU memory.
    """
    over = "" if plan.peak <= budget else f", more than the budget of {gib_text(budget)}"
    rows = [
        (name, f"{gib_text(size):>12}{over if name == PEAK else ''}")
        for name, size in plan.memory_rows()
    ]
    speed = f"{tokens / plan.seconds:,.0f} tokens/s at the speed of one H200"
    rows.append(("time", f"{1e3 * plan.seconds:8.0f} ms, {speed}"))
    rows.append(("layers", str(plan)))
    return "\n".join(f"{label:<26}{text}" for label, text in rows)
