"""The building blocks of a decoder layer, and the state of a pass over it.

The dimension letters are those of decoder_layer.py.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minitune.config.model_config import ModelConfig
from minitune.device import pin
from minitune.kernels.attention_common import seqlen_bound
from minitune.kernels.attention_cudnn import CUDNN_MIN_LENGTH
from minitune.kernels.embedding import embed
from minitune.kernels.rms_norm import add_rms_norm_, rms_norm, rms_norm_backward
from minitune.model.linear import DequantizedLayer, FusedLinear, WeightBuffers
from minitune.model.packed_sequences import PackedSequences
from minitune.model.rope import RopeTables


class Embedding(nn.Module):
    """The embedding table (V, D), on the model's device or in pinned host memory."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.shape = (rows, width)
        self.register_parameter("weight", None)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows (N, D) of ids (N,) in dtype."""
        return embed(ids, self.weight.detach(), dtype)

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
    """The shape of the attention heads. DecoderLayer adds q_proj, k_proj, v_proj and o_proj."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.H, self.G, self.K = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.scale = self.K**-0.5

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
    """State shared by all layers: RoPE tables, compute dtype, attention backend, weight buffers."""

    rope: RopeTables
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
        device = self.rope.cos.device
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
