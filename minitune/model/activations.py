"""The activations that a decoder layer saves for backward.

The base is frozen, so no weight gradient needs the input of a base linear. Only the LoRA branches
need their inputs, and these are cheap to recompute. Each level saves its row and all rows above.
The bytes are per token and layer of an 8B Llama in bf16 (D 4096, G*K 1024, F 14336):

    level      saves                             bytes  recomputed in backward
    NOTHING    nothing                            0     x from the layers below, and the next line
    INPUT      x, the layer's input               8 K   q, k, v, attention, o, gate, up
    ATTENTION  attention's output and logsumexp  16 K   q, k, v, o, gate, up
    QKV        o; q, k, v                        36 K   gate, up
    ALL        gate, up                          92 K   only elementwise operations

Backward never recomputes down_proj, because nothing needs its output. INPUT also saves the LoRA
activations x A^T, 0.5 K. Recomputation repeats the operations of forward on the same tiles, so all
levels from INPUT on give the same bits. A layer that saves nothing gets its input from the bf16 x
below it and not from the float32 residual stream: one more rounding than in forward.
"""

from dataclasses import dataclass, field, fields
from enum import IntEnum

from torch import Tensor


class SaveLevel(IntEnum):
    """The activations that a layer saves; each level adds to those below it."""

    NOTHING = -1
    INPUT = 0
    ATTENTION = 1
    QKV = 2
    ALL = 3


@dataclass(frozen=True)
class LayerPlan:
    """The activations that one layer saves.

    offloaded: True if they go to pinned host memory until backward.
    """

    level: SaveLevel
    offloaded: bool = False


# The metadata of an activation: the lowest level that saves it.
FROM_INPUT = {"saved_from": SaveLevel.INPUT}
FROM_ATTENTION = {"saved_from": SaveLevel.ATTENTION}
FROM_QKV = {"saved_from": SaveLevel.QKV}
FROM_ALL = {"saved_from": SaveLevel.ALL}


@dataclass
class Activations:
    """The activations of one layer for N packed tokens; backward recomputes those that are None.

    The letters are those of minitune/model/__init__.py; R is that of the fused linear in question.

    x: (N, D), the layer's input.
    qkv_lora, o_lora, gate_up_lora, down_lora: (N, R), scaling * input A^T of each fused linear.
    attn: (N, H K + R), attention's output.
    lse: float32, attention's logsumexp of each row and head.
    o: (N, D), the output of W_o.
    d: (N, D), the output of W_down, if a norm behind it needs it.
    qkv: (N, (H + 2 G) K), from DecoderLayer.compute_qkv.
    gate_up: (N, 2 F + R).
    """

    x: Tensor = field(metadata=FROM_INPUT)
    qkv_lora: Tensor | None = field(default=None, metadata=FROM_INPUT)
    o_lora: Tensor | None = field(default=None, metadata=FROM_INPUT)
    gate_up_lora: Tensor | None = field(default=None, metadata=FROM_INPUT)
    down_lora: Tensor | None = field(default=None, metadata=FROM_INPUT)
    attn: Tensor | None = field(default=None, metadata=FROM_ATTENTION)
    lse: Tensor | None = field(default=None, metadata=FROM_ATTENTION)
    o: Tensor | None = field(default=None, metadata=FROM_QKV)
    d: Tensor | None = field(default=None, metadata=FROM_QKV)
    qkv: Tensor | None = field(default=None, metadata=FROM_QKV)
    gate_up: Tensor | None = field(default=None, metadata=FROM_ALL)

    def tensors(self) -> dict[str, Tensor]:
        """Return name -> tensor of the activations that are not None."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: t for name, t in values.items() if t is not None}

    def saved_by(self, level: SaveLevel) -> "Activations":
        """Return the activations that `level` saves."""
        names = {f.name for f in fields(self) if level >= f.metadata["saved_from"]}
        return Activations(**{name: t for name, t in self.tensors().items() if name in names})

    def rows(self, rows: slice) -> "Activations":
        """Return views of some rows of every activation except lse, which attention alone reads."""
        views = {name: t[rows] for name, t in self.tensors().items() if name != "lse"}
        return Activations(**views)


def row_tiles(rows: int, tile_rows: int | None) -> list[slice]:
    """Return the slices that cut `rows` rows into tiles of `tile_rows`; None is a single tile."""
    step = tile_rows or max(rows, 1)
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]
