"""The building blocks of a decoder layer, and the state of a pass over it.

The dimension letters are those of minitune/model/__init__.py.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from minitune.config.layer_kinds import LayerKind
from minitune.config.model_config import ModelConfig
from minitune.device import pin
from minitune.kernels.attention import attention, attention_backward
from minitune.kernels.attention_common import seqlen_bound
from minitune.kernels.attention_cudnn import CUDNN_MIN_LENGTH
from minitune.kernels.backend import accumulator
from minitune.kernels.embedding import embed
from minitune.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_backward_
from minitune.kernels.rope import rope_
from minitune.model.fixed_module import UnhookedModule
from minitune.model.ggml_weight import GgmlWeight
from minitune.model.linear import FusedLinear
from minitune.model.norms import RMSNorm
from minitune.model.packed_sequences import PackedSequences
from minitune.model.quantized_weight import set_frozen_weight
from minitune.model.rope import RopeTables
from minitune.model.weight_buffers import DequantizedLayer, WeightBuffers


def new_residual(x: Tensor) -> Tensor:
    """Return a residual stream that begins with x (N, D): a copy in the accumulator's dtype."""
    return x.to(accumulator(x.dtype), copy=True)


class Embedding(UnhookedModule):
    """The embedding table (V, D), on the model's device or in pinned host memory.

    The loader sets `quantized` if the table is stored in few bits, and `weight` otherwise.

    multiplier: factor of the rows that are read.
    """

    def __init__(self, rows: int, width: int, multiplier: float = 1.0):
        super().__init__()
        self.shape, self.multiplier = (rows, width), multiplier
        self.quantized: GgmlWeight | None = None
        self.register_parameter("weight", None)

    @property
    def table(self) -> Tensor:
        """Return the memory of the table: its values, or the bytes of its blocks."""
        return self.weight.detach() if self.quantized is None else self.quantized.blocks

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows (N, D) of ids (N,) in dtype."""
        if self.quantized is not None:
            return self.quantized.rows(ids, dtype, self.multiplier)
        return embed(ids, self.table, dtype, self.multiplier)

    def to_host(self) -> None:
        """Move the table into pinned host memory, from which a GPU reads single rows.

        Raises: MemoryError if the host refuses to pin so much memory.
        """
        table = self.table.cpu()
        pin(table, self)
        if self.quantized is not None:
            table = replace(self.quantized, blocks=table)
        set_frozen_weight(self, table)


class Attention(UnhookedModule):
    """The attention heads of a layer. DecoderLayer adds the linears of q, k, v and o.

    q and k are rotated by RoPE in place, in the projection's output qkv. With `qk_norm` each head
    (Qwen3) or the whole projection (OLMo 2) is normalised before. Backward then needs the heads
    before the norm, so qkv keeps them, and `heads_of` normalises and rotates them into a new tensor
    each time.
    """

    def __init__(self, c: ModelConfig, kind: LayerKind):
        super().__init__()
        self.H, self.G, self.K = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.scale, self.softcap = c.attention_scale, c.score_softcap
        self.window, self.rope = kind
        self.qk_norm = c.architecture.qk_norm
        if self.qk_norm is not None:
            offset = c.architecture.norm_offset
            q_width, k_width = c.head_norm_sizes()
            self.q_norm = RMSNorm(q_width, c.rms_norm_eps, offset)
            self.k_norm = RMSNorm(k_width, c.rms_norm_eps, offset)

    def rotate_(self, qkv: Tensor, p: "LayerPass") -> None:
        """Rotate q and k of qkv (N, (H + 2 G) K) in place, unless `heads_of` does."""
        if self.qk_norm is None:
            q, k, _ = self.split_heads(qkv)
            self._rope_(q, k, p)

    def heads_of(self, qkv: Tensor, p: "LayerPass") -> tuple[Tensor, Tensor, Tensor]:
        """Return q (N, H, K), k and v (N, G, K) as attention reads them, from a rotated qkv."""
        q, k, v = self.split_heads(qkv)
        if self.qk_norm == "head":
            heads = qk_norm_rope(self._queries_and_keys(qkv), *self._norm_arguments(p))
            q, k = heads.split([self.H, self.G], dim=1)
        elif self.qk_norm == "projection":
            q, k = (norm(x.flatten(1))[0].view_as(x) for norm, x in self._norms_of(q, k))
            self._rope_(q, k, p)
        return q, k, v

    def heads_backward_(self, dqkv: Tensor, qkv: Tensor, p: "LayerPass") -> None:
        """Turn the gradients of `heads_of` in dqkv into those of the projection, in place."""
        if self.qk_norm == "head":
            qk_norm_rope_backward_(
                self._queries_and_keys(dqkv), self._queries_and_keys(qkv), *self._norm_arguments(p)
            )
            return
        # The transpose of a rotation is the rotation by the opposite angle.
        dq, dk, _ = self.split_heads(dqkv)
        self._rope_(dq, dk, p, inverse=True)
        if self.qk_norm == "projection":
            q, k, _ = self.split_heads(qkv)
            for (norm, x), dy in zip(self._norms_of(q, k), (dq, dk), strict=True):
                x, dy = x.flatten(1), dy.flatten(1)  # views: the heads lie side by side
                norm.backward(dy, x, norm(x)[1], out=dy)

    def attend(self, qkv: Tensor, p: "LayerPass", out: Tensor) -> Tensor:
        """Write attention's output of a rotated qkv to out (N, H, K), and return its logsumexp."""
        return self.attend_heads(*self.heads_of(qkv, p), p, out)

    def attend_heads(self, q: Tensor, k: Tensor, v: Tensor, p: "LayerPass", out: Tensor) -> Tensor:
        """Write attention's output of `heads_of` to out (N, H, K), and return its logsumexp."""
        return attention(q, k, v, out=out, **self._attention_arguments(p))[1]

    def attend_backward_(
        self, dout: Tensor, out: Tensor, lse: Tensor, qkv: Tensor, p: "LayerPass", dqkv: Tensor
    ) -> None:
        """Fill dqkv with the gradient of the projection, from dout (N, H, K)."""
        dq, dk, dv = self.split_heads(dqkv)  # (N, H, K), (N, G, K), (N, G, K)
        q, k, v = self.heads_of(qkv, p)
        arguments = self._attention_arguments(p)
        attention_backward(dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, **arguments)
        self.heads_backward_(dqkv, qkv, p)

    def _attention_arguments(self, p: "LayerPass") -> dict:
        """Return the arguments that attention and its backward share, beside the tensors."""
        packed = p.packed.seen_through(self.window)
        lengths = p.context.attention_kwargs(packed)
        scores = {"scale": self.scale, "softcap": self.softcap}
        return {"start": packed.start, "end": packed.end, **scores, **lengths}

    def _rope_(self, q: Tensor, k: Tensor, p: "LayerPass", inverse: bool = False) -> None:
        """Rotate the rotated columns of q and k in place, if the layer has RoPE."""
        if self.rope is None:
            return
        tables = p.context.ropes[self.rope]
        q, k = (x[..., : tables.rotary_dim] for x in (q, k))
        cos, sin, positions = tables.cos, tables.sin, p.packed.positions
        rope_(q, k, cos, sin, positions, inverse, tables.query_scale)

    def _norms_of(self, q: Tensor, k: Tensor) -> tuple:
        """Return q and k, each with its norm."""
        return (self.q_norm, q), (self.k_norm, k)

    def _queries_and_keys(self, qkv: Tensor) -> Tensor:
        """Return a view (N, H + G, K) of the query and key heads."""
        heads = self.H + self.G
        return qkv[:, : heads * self.K].unflatten(1, (heads, self.K))

    def _norm_arguments(self, p: "LayerPass") -> tuple:
        """Return the arguments that norm and backward share."""
        tables, norm = p.context.ropes[self.rope], self.q_norm
        weights, angles = (norm.weight, self.k_norm.weight), (tables.cos, tables.sin)
        return self.H, *weights, norm.eps, *angles, p.packed.positions, norm.offset

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
