"""The building blocks of a decoder layer, and the state of a pass over it.

The dimension letters are those of decoder_layer.py.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minitune.config.layer_kinds import LayerKind
from minitune.config.model_config import ModelConfig
from minitune.device import pin
from minitune.kernels.attention_common import seqlen_bound
from minitune.kernels.attention_cudnn import CUDNN_MIN_LENGTH
from minitune.kernels.embedding import embed
from minitune.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_backward_
from minitune.kernels.rms_norm import add_rms_norm_, rms_norm, rms_norm_backward
from minitune.kernels.rope import rope_
from minitune.model.linear import DequantizedLayer, FusedLinear, WeightBuffers
from minitune.model.packed_sequences import PackedSequences
from minitune.model.rope import RopeTables


class Embedding(nn.Module):
    """The embedding table (V, D), on the model's device or in pinned host memory.

    multiplier: factor of the rows that are read.
    """

    def __init__(self, rows: int, width: int, multiplier: float = 1.0):
        super().__init__()
        self.shape, self.multiplier = (rows, width), multiplier
        self.register_parameter("weight", None)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows (N, D) of ids (N,) in dtype."""
        return embed(ids, self.weight.detach(), dtype, self.multiplier)

    def to_host(self) -> None:
        """Move the table into pinned host memory, from which a GPU reads single rows.

        Raises: MemoryError if the host refuses to pin so much memory.
        """
        table = torch.empty(self.shape, dtype=self.weight.dtype)
        table.copy_(self.weight.detach())
        pin(table, self)
        self.weight = nn.Parameter(table, requires_grad=False)


class RMSNorm(nn.Module):
    """RMSNorm: x / sqrt(mean(x^2) + eps) * weight, for each row of x (N, D)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.shape, self.eps = (width,), eps
        self.register_parameter("weight", None)

    def forward(self, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the norm (N, D) of x (N, D), and rstd, the factor of each row, float32 (N,)."""
        return rms_norm(x, self.weight, self.eps, out)

    def from_residual(self, s: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the norm of the residual stream s (N, D) in dtype, and rstd."""
        return self(s, out=torch.empty_like(s, dtype=dtype))

    def of_sum_(
        self, x: Tensor, addend: Tensor, residual: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the norm of x + addend, and rstd; add addend to `residual` in place, if given."""
        return add_rms_norm_(x, addend, self.weight, self.eps, residual, out)

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        rstd: Tensor,
        dresidual: Tensor | None = None,
        addend: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return the gradient (N, D) of the norm's input, from dy (N, D).

        x: the input, or the part x of the input x + addend.
        dresidual: gradient that reaches the input past the norm, and is added; it may be `out`.
        """
        return rms_norm_backward(dy, x, self.weight, rstd, dresidual, addend, out)


class Attention(nn.Module):
    """The attention heads of a layer. DecoderLayer adds the linears of q, k, v and o.

    q and k are rotated by RoPE in place, in the projection's output qkv. With `qk_norm` (Qwen3)
    each head is normalised before. Backward then needs the heads before the norm, so qkv keeps
    them, and `heads_of` normalises and rotates them into a new tensor each time.
    """

    def __init__(self, c: ModelConfig, kind: LayerKind):
        super().__init__()
        self.H, self.G, self.K = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.scale = c.attention_scale
        self.window, self.rope = kind
        self.qk_norm = c.qk_norm
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def rotate_(self, qkv: Tensor, p: "LayerPass") -> None:
        """Rotate q and k of qkv (N, (H + 2 G) K) in place, unless `heads_of` does."""
        if not self.qk_norm:
            self._rope_(qkv, p)

    def heads_of(self, qkv: Tensor, p: "LayerPass") -> tuple[Tensor, Tensor, Tensor]:
        """Return q (N, H, K), k and v (N, G, K) as attention reads them, from a rotated qkv."""
        q, k, v = self.split_heads(qkv)
        if self.qk_norm:
            q, k = qk_norm_rope(self._queries_and_keys(qkv), *self._norm_arguments(p)).split(
                [self.H, self.G], dim=1
            )
        return q, k, v

    def heads_backward_(self, dqkv: Tensor, qkv: Tensor, p: "LayerPass") -> None:
        """Turn the gradients of `heads_of` in dqkv into those of the projection, in place."""
        if self.qk_norm:
            qk_norm_rope_backward_(
                self._queries_and_keys(dqkv), self._queries_and_keys(qkv), *self._norm_arguments(p)
            )
        else:
            # The transpose of a rotation is the rotation by the opposite angle.
            self._rope_(dqkv, p, inverse=True)

    def attention_arguments(self, p: "LayerPass") -> dict:
        """Return the arguments that attention and its backward share, beside the tensors."""
        packed = p.packed.seen_through(self.window)
        lengths = p.context.attention_kwargs(packed)
        return {"start": packed.start, "end": packed.end, "scale": self.scale, **lengths}

    def _rope_(self, qkv: Tensor, p: "LayerPass", inverse: bool = False) -> None:
        """Rotate the rotated columns of q and k in qkv in place, if the layer has RoPE."""
        if self.rope is None:
            return
        tables = p.context.ropes[self.rope]
        q, k, _ = (x[..., : tables.rotary_dim] for x in self.split_heads(qkv))
        cos, sin, positions = tables.cos, tables.sin, p.packed.positions
        rope_(q, k, cos, sin, positions, inverse, tables.query_scale)

    def _queries_and_keys(self, qkv: Tensor) -> Tensor:
        """Return a view (N, H + G, K) of the query and key heads."""
        heads = self.H + self.G
        return qkv[:, : heads * self.K].unflatten(1, (heads, self.K))

    def _norm_arguments(self, p: "LayerPass") -> tuple:
        """Return the arguments that norm and backward share."""
        tables, weights = p.context.ropes[self.rope], (self.q_norm.weight, self.k_norm.weight)
        return self.H, *weights, self.q_norm.eps, tables.cos, tables.sin, p.packed.positions

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return views q (N, H, K), k and v (N, G, K) of qkv (N, (H + 2 G) K or more)."""
        heads = (self.H, self.G, self.G)
        columns = qkv[:, : sum(heads) * self.K].split([n * self.K for n in heads], dim=1)
        return tuple(x.unflatten(1, (n, self.K)) for x, n in zip(columns, heads, strict=True))

    def query_heads(self, x: Tensor) -> Tensor:
        """Return a view (N, H, K) of the first columns of x (N, H K or more)."""
        return x[:, : self.H * self.K].unflatten(1, (self.H, self.K))


@dataclass
class LayerContext:
    """State shared by all layers: RoPE tables, compute dtype, attention backend, weight buffers.

    ropes: the tables of each rotation in `ModelConfig.ropes`.
    """

    ropes: tuple[RopeTables, ...]
    dtype: torch.dtype
    attention: str = "auto"  # "auto" or "triton"
    weight_buffers: WeightBuffers = field(default_factory=WeightBuffers)

    def attention_kwargs(self, packed: PackedSequences) -> dict[str, int | None]:
        """Return attention's length arguments; `uniform_seqlen` is set only if cuDNN may run."""
        cudnn = self.attention == "auto" and (packed.uniform_seqlen or 0) >= CUDNN_MIN_LENGTH
        return {
            "uniform_seqlen": packed.uniform_seqlen if cudnn else None,
            "max_seqlen": packed.max_seqlen and seqlen_bound(packed.max_seqlen),
        }

    @contextmanager
    def layer_pass(
        self,
        fused_linears: Sequence[FusedLinear],
        packed: PackedSequences,
        tile_rows: int | None = None,
    ) -> Iterator["LayerPass"]:
        """Yield a pass over the layer of these linears, alone with the weight buffers."""
        device = packed.positions.device
        with self.weight_buffers.lock:
            weights = DequantizedLayer(fused_linears, self.weight_buffers, self.dtype, device)
            yield LayerPass(packed, self, weights, tile_rows)


@dataclass(frozen=True)
class LayerPass:
    """One pass over one layer, forward or backward.

    tile_rows: rows of a tile, or None for a single tile of all rows.
    """

    packed: PackedSequences
    context: LayerContext
    weights: DequantizedLayer
    tile_rows: int | None = None
