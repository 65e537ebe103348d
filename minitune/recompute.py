"""Which intermediates of a decoder layer are kept for backward, and which are computed again.

The base is frozen, so no weight gradient needs the input of a base linear; only the LoRA branches do, and their inputs
are cheap to redo. What is worth keeping, in bytes a token a layer for an 8B Llama in bf16 (D 4096, G*K 1024, F 14336),
each row in addition to those above it:

    level  kept                             bytes  computed again in backward
    0      x, the layer's input              8 K   q, k, v, attention, o, gate, up; never down: nothing needs its output
    1      attention output, its logsumexp  16 K   q, k, v, o, gate, up
    2      x after attention                24 K   q, k, v, gate, up
    3      q, k, v after RoPE               36 K   gate, up
    4      gate, up                         92 K   nothing but elementwise operations

Forward and recomputation run the same function (`DecoderLayer.complete`), so every level gives the same bits.
"""

import contextlib
import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

KEEP_INPUT, KEEP_ALL = 0, 4


@dataclass
class Activations:
    """The intermediates of one layer for N packed tokens; None is what has to be computed again."""

    x: Tensor  # (N, D)
    attn: Tensor | None = None  # (N, H, K)
    lse: Tensor | None = None  # (H, N) fp32
    x_mid: Tensor | None = None  # (N, D), after attention's residual
    q: Tensor | None = None  # (N, H, K), rotated
    k: Tensor | None = None  # (N, G, K), rotated
    v: Tensor | None = None  # (N, G, K)
    gate: Tensor | None = None  # (N, F)
    up: Tensor | None = None  # (N, F)

    def kept(self, level: int) -> tuple[Tensor | None, ...]:
        """All fields in order, those that `level` does not keep as None."""
        names = [f.name for f in fields(self)]
        size = {0: 1, 1: 3, 2: 4, 3: 7, 4: 9}[level]
        return tuple(getattr(self, name) if i < size else None for i, name in enumerate(names))


def level_of(use_gradient_checkpointing: bool | str) -> int:
    """The level that a `use_gradient_checkpointing` argument means: True, "unsloth" and "auto" recompute, False keeps.

    Raises ValueError for anything else.
    """
    if use_gradient_checkpointing in (True, "unsloth", "auto"):
        return KEEP_INPUT
    if use_gradient_checkpointing is False:
        return KEEP_ALL
    raise ValueError(
        f"use_gradient_checkpointing is {use_gradient_checkpointing!r}; choose True, False, 'unsloth' or 'auto'"
    )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had: the GPU's own count; on the host what is available within the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = 4 << 30  # where the system does not say
    with contextlib.suppress(OSError):
        available = int(re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        available = min(available, limit - used)
    return available
