"""Which intermediates of a decoder layer are kept for backward, and which are computed again.

The base is frozen, so no weight gradient needs the input of a base linear; only the LoRA branches do, and their inputs
are cheap to redo. What is worth keeping, in bytes a token a layer for an 8B Llama in bf16 (D 4096, G*K 1024, F 14336),
each row in addition to those above it:

    level  kept                             bytes  computed again in backward
    -      nothing                                 its input, through the layers below, and all of the next line
    0      x, the layer's input              8 K   q, k, v, attention, o, gate, up; never down: nothing needs its output
    1      attention output, its logsumexp  16 K   q, k, v, o, gate, up
    2      o; q, k, v after RoPE            36 K   gate, up
    3      gate, up                         92 K   nothing but elementwise operations

What the thin halves of the LoRA branches give, x A^T, is always kept: 0.5 K. Forward and recomputation run the same
functions (`DecoderLayer.attend`, `until_gate_up`), so every level from 0 on gives the same bits. Layers that keep nothing get their input from x instead of
the float32 residual stream, rounded once more than in forward.
"""

from dataclasses import dataclass, fields
from enum import IntEnum

from torch import Tensor


class SaveLevel(IntEnum):
    """What a layer saves for backward, each level in addition to those below it."""

    NOTHING = -1
    INPUT = 0
    ATTENTION = 1
    QKV = 2
    ALL = 3


@dataclass(frozen=True)
class LayerPlan:
    """What a layer keeps for backward, and whether it waits in host memory."""

    level: int
    offloaded: bool = False


@dataclass
class Activations:
    """The intermediates of one layer for N packed tokens; None is what has to be computed again.

    R stands for the columns to spare beside the input of a matmul with LoRA branches (linear.py).
    """

    x: Tensor  # (N, D)
    h_low: Tensor | None = None  # (N, R), s h A^T of q, k, v
    attn_low: Tensor | None = None  # (N, R), s attn A^T of o
    h_mid_low: Tensor | None = None  # (N, R), s h_mid A^T of gate and up
    m_low: Tensor | None = None  # (N, R), s m A^T of down
    attn: Tensor | None = None  # (N, H K + R), the output of attention
    lse: Tensor | None = None  # fp32, a number a row and head
    o: Tensor | None = None  # (N, D), what attention adds to the residual stream
    qkv: Tensor | None = None  # (N, (H + 2 G) K), q and k rotated
    gate_up: Tensor | None = None  # (N, 2 F + R)
    known: bool = False  # whether what is there has been computed, or is only room for it

    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, f.name) for f in fields(self) if f.name != "known")

    def kept(self, level: int) -> "Activations":
        """What `level` keeps."""
        count = (5, 7, 9, 10)[level]
        return Activations(*self.tensors()[:count], known=True)

    def rows(self, rows: slice) -> "Activations":
        """Views of some rows of all of them but lse."""
        tensors = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("lse", "known")
        }
        return Activations(
            **{name: t[rows] for name, t in tensors.items() if t is not None}, known=self.known
        )


def row_tiles(rows: int, tile: int | None) -> list[slice]:
    """So many rows in tiles of `tile`, the last one shorter; None: all in one."""
    tile = tile or max(rows, 1)
    return [slice(i, min(i + tile, rows)) for i in range(0, rows, tile)]
