"""Memory and time of a training step, known before it runs; and the plan that takes the least time within a budget.

What there is to decide, for a micro-step of N tokens: what each layer keeps for backward and whether that waits on the
GPU or on the host (recompute.py, offload.py), and how many rows the wide parts of a layer take at a time (decoder.py).
Layers are alike, so a plan is a few numbers: the last ones keep level `near` on the GPU, where backward needs it first;
those before them keep level `far`, on the host where that helps. Each combination is priced with as many `near` layers
as fit, and the fastest is taken; in memory that is left then, the weights of the first layers stay dequantised.

Memory is counted in sizes.py. Time adds up what is multiplied and what is moved, at the rates of the machine (`Rates`);
copies to and from the host run beside the layers, which wait where a copy falls behind by more than there is room for.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace

from minitune.model.activations import LayerPlan, SaveLevel
from minitune.model.packed_sequences import PackedSequences

LEVEL_TEXT = (  # by level, from nothing on
    "nothing", "their input", "input and attention", "everything up to the MLP", "everything",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a micro-step does, and what that is expected to take."""

    layers: tuple[LayerPlan, ...]
    tile: int | None = None
    host_bytes: int = 0
    cudnn: bool = False  # whether attention may be cuDNN's
    dense: int = 0  # layers, the first ones, whose weights stay dequantised
    parts: tuple[tuple[str, int], ...] = ()  # what the GPU's memory is for, in bytes
    seconds: float = math.nan  # of forward and backward

    @property
    def peak(self) -> int:
        """Bytes of GPU memory allocated at most."""
        return sum(size for _, size in self.parts)

    def in_flight_limit(self, i: int) -> int:
        """Bytes that may still be on their way to the host while layer i runs.

        As much as the layers after i will keep on the GPU, where nothing is yet, less one layer's, which the plan
        counts in what a layer works with. Or one layer's, up to the first of those that keep theirs on the GPU.
        """
        offloaded = sum(keep.offloaded for keep in self.layers)
        near = sum(not keep.offloaded and keep.level != SaveLevel.NOTHING for keep in self.layers)
        after = len(self.layers) - 1 - i
        one = self.host_bytes // offloaded if 0 < i <= len(self.layers) - near and offloaded else 0
        return max(one, self.kept * min(after, near - 1) // near if near else 0)

    @property
    def kept(self) -> int:
        """Bytes of what layers keep on the GPU."""
        return dict(self.parts).get("activations", 0)

    def samples(self, packed: PackedSequences) -> PackedSequences:
        """As attention is to see them: without the length that cuDNN's wants, where that is not planned with."""
        return packed if self.cudnn else replace(packed, uniform_seqlen=None)

    def __str__(self) -> str:
        """What is kept where, in words."""
        kept = Counter(self.layers)
        words = [
            f"{count} {'layer keeps' if count == 1 else 'layers keep'} {LEVEL_TEXT[keep.level + 1]}"
            f"{' on the host' if keep.offloaded else ''}"
            for keep, count in kept.items()
        ]
        words += [f"tiles of {self.tile:,} rows"] if self.tile else []
        words += (
            [f"weights of {self.dense} layer{'s' * (self.dense > 1)} stay dequantised"]
            if self.dense
            else []
        )
        return "; ".join(words)


@dataclass(frozen=True)
class Candidate:
    """The last `count` layers keep level `near` on the GPU; of those before them every `segment`-th keeps `far`, and
    the others nothing."""

    near: int
    far: LayerPlan
    count: int
    tile: int | None
    cudnn: bool = False
    segment: int = 1

    def layers(self, L: int) -> tuple[LayerPlan, ...]:
        far = tuple(
            LayerPlan(SaveLevel.NOTHING) if i % self.segment else self.far
            for i in range(L - self.count)
        )
        return far + (LayerPlan(self.near),) * self.count

    def keepers(self, L: int) -> int:
        """How many layers keep `far`."""
        return -(-(L - self.count) // self.segment)
