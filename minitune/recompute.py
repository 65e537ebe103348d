"""Which intermediates of a decoder layer are kept for backward, and which are computed again.

The base is frozen, so no weight gradient needs the input of a base linear; only the LoRA branches do, and their inputs
are cheap to redo. What is worth keeping, in bytes a token a layer for an 8B Llama in bf16 (D 4096, G*K 1024, F 14336),
each row in addition to those above it:

    level  kept                             bytes  computed again in backward
    -      nothing                                 its input, through the layers below, and all of the next line
    0      x, the layer's input              8 K   q, k, v, attention, o, gate, up; never down: nothing needs its output
    1      attention output, its logsumexp  16 K   q, k, v, o, gate, up
    2      o, what attention adds to x      24 K   q, k, v, gate, up
    3      q, k, v after RoPE               36 K   gate, up
    4      gate, up                         92 K   nothing but elementwise operations

What the thin halves of the LoRA branches give, x A^T, is always kept: 0.5 K. Forward and recomputation run the same
functions (`DecoderLayer.attend`, `until_gate_up`), so every level from 0 on gives the same bits; not so where gate and
up are kept of some rows and computed again of the others. Layers that keep nothing get their input from x instead of
the float32 residual stream, rounded once more than in forward.
"""

import contextlib
import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

KEEP_NOTHING, KEEP_INPUT, KEEP_ATTENTION, KEEP_O, KEEP_QKV, KEEP_ALL = range(-1, 5)


@dataclass(frozen=True)
class Keep:
    """What a layer keeps for backward, and whether it waits in host memory.

    wide: of so many rows, the first ones, gate and up are kept as well, which level 4 does of all.
    """

    level: int
    on_host: bool = False
    wide: int = 0


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
    wide: Tensor | None = None  # (W, 2 F), gate and up of the first W rows
    known: bool = False  # whether what is there has been computed, or is only room for it

    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, f.name) for f in fields(self) if f.name != "known")

    def kept(self, level: int) -> "Activations":
        """What `level` keeps, and `wide`."""
        count = {0: 5, 1: 7, 2: 8, 3: 9, 4: 10}[level]
        return Activations(*self.tensors()[:count], wide=self.wide, known=True)

    def rows(self, rows: slice) -> "Activations":
        """Views of some rows of all of them but lse."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("lse", "known")}
        return Activations(**{name: t[rows] for name, t in tensors.items() if t is not None}, known=self.known)


def row_tiles(rows: int, tile: int | None) -> list[slice]:
    """So many rows in tiles of `tile`, the last one shorter; None: all in one."""
    tile = tile or max(rows, 1)
    return [slice(i, min(i + tile, rows)) for i in range(0, rows, tile)]


def level_of(use_gradient_checkpointing: bool | str) -> int | None:
    """The level that a `use_gradient_checkpointing` argument means; None, for "unsloth" and "auto": what fits.

    True recomputes, False keeps everything. Raises ValueError for anything else.
    """
    if use_gradient_checkpointing in ("unsloth", "auto"):
        return None
    if use_gradient_checkpointing is True:
        return KEEP_INPUT
    if use_gradient_checkpointing is False:
        return KEEP_ALL
    raise ValueError(
        f"use_gradient_checkpointing is {use_gradient_checkpointing!r}; choose True, False, 'unsloth' or 'auto'"
    )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had: the GPU's own count; on the host what is available within the container's limit."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        allowed = int(total * torch.cuda.get_per_process_memory_fraction(device))
        return min(free + torch.cuda.memory_reserved(device), allowed) - allocated
    available = 4 << 30  # where the system does not say
    with contextlib.suppress(OSError):
        available = int(re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    group = Path("/")
    with contextlib.suppress(OSError):
        group = Path(Path("/proc/self/cgroup").read_text().rsplit("::", 1)[-1].strip() or "/")
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
            files = Path("/sys/fs/cgroup") / folder.relative_to("/")
            limit, used = (int((files / f"memory.{name}").read_text()) for name in ("max", "current"))
            available = min(available, limit - used)
    return available
