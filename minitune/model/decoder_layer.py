"""The decoder layer, forward and backward written out over the kernels; nothing in it depends on the autograd engine.

    h = norm(x);          q, k, v = W h;      q, k = rope(q, k);       attn = attention(q, k, v);   o = Wo attn
    h_mid = norm(x + o);  gate, up = W h_mid; m = silu(gate) * up;     y = x + o + Wdown m

The residual stream s, which o and Wdown m are added to in place, is float32 from the embedding to the head; x is s
rounded where the layer begins. Were s rounded at each addition, a 1B Llama's gradients in bf16 would err by 0.0325
instead of 0.0281 (README). Backward needs no more of s than x.

Only attention looks from one row to another. What lies before it and after it works on tiles of rows, forward and
backward, so that the wide tensors (h, gate, up, m and their gradients) exist for one tile at a time. What lies after it
is done with a tile in one go, from attention's output to y, and back from dy to the gradient of attention's output.

Legend: D model width, H query heads, G key/value heads, K head width, F ffn width, R columns to spare (linear.py),
N rows = tokens of all samples, packed without padding.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minitune.config.model_config import ModelConfig
from minitune.kernels.attention import attention, attention_backward
from minitune.kernels.attention_common import seqlen_bound
from minitune.kernels.attention_cudnn import CUDNN_MIN_LENGTH
from minitune.kernels.backend import accumulator
from minitune.kernels.rope import rope_
from minitune.kernels.swiglu import swiglu, swiglu_backward
from minitune.model.activations import Activations, SaveLevel, row_tiles
from minitune.model.layers import RMSNorm
from minitune.model.linear import DequantizedLayer, FusedLinear, Linear
from minitune.model.packed_sequences import PackedSequences
from minitune.model.rope import RopeTables


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.width = (
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
        )
        self.scale = c.head_dim**-0.5
        self.q_proj = Linear(c.hidden_size, self.heads * self.width, c.attention_bias)
        self.k_proj = Linear(c.hidden_size, self.kv_heads * self.width, c.attention_bias)
        self.v_proj = Linear(c.hidden_size, self.kv_heads * self.width, c.attention_bias)
        self.o_proj = Linear(self.heads * self.width, c.hidden_size, c.attention_bias)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views q (N, H, K), k and v (N, G, K) of the first columns of qkv (N, (H + 2G) K or more)."""
        sizes = (self.heads, self.kv_heads, self.kv_heads)
        columns = qkv[:, : sum(sizes) * self.width].split([n * self.width for n in sizes], dim=1)
        return tuple(x.unflatten(1, (n, self.width)) for x, n in zip(columns, sizes, strict=True))

    def as_heads(self, x: Tensor) -> Tensor:
        """The view (N, H, K) of the first columns of x (N, H K or more)."""
        return x[:, : self.heads * self.width].unflatten(1, (self.heads, self.width))


class MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)


@dataclass
class LayerContext:
    """What the layers of a model share: RoPE's tables, the dtype that they compute in, the choice of attention, buffers
    for the weights at work."""

    rotary: RopeTables
    dtype: torch.dtype
    attention: str = "auto"
    weights: dict[tuple, Tensor] = field(default_factory=dict)

    def attention_kwargs(self, packed: PackedSequences) -> dict[str, int | None]:
        """What the attention of these samples is told about their lengths; with a `length` it may take cuDNN's."""
        cudnn = self.attention == "auto" and (packed.uniform_seqlen or 0) >= CUDNN_MIN_LENGTH
        return {
            "uniform_seqlen": packed.uniform_seqlen if cudnn else None,
            "max_seqlen": packed.max_seqlen and seqlen_bound(packed.max_seqlen),
        }


def new_residual(x: Tensor) -> Tensor:
    """The residual stream that begins with x (N, D), a tensor of its own in the accumulator's dtype."""
    return x.to(accumulator(x.dtype), copy=True)


class DecoderLayer(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.self_attn = a = Attention(c)
        self.mlp = m = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.width = c.hidden_size
        self.qkv = FusedLinear("qkv", a.q_proj, a.k_proj, a.v_proj)
        self.o = FusedLinear("o", a.o_proj)
        self.gate_up = FusedLinear("gate_up", m.gate_proj, m.up_proj)
        self.down = FusedLinear("down", m.down_proj)

    @property
    def projections(self) -> tuple[FusedLinear, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    def lora_parameters(self) -> list[nn.Parameter]:
        """A and B of each adapted linear in turn, the order of the gradients of `backward`."""
        linears = [linear for projection in self.projections for linear in projection.adapted]
        return [p for linear in linears for p in (linear.lora_A.weight, linear.lora_B.weight)]

    def forward(
        self, s: Tensor, packed: PackedSequences, shared: LayerContext, level: int, tile: int | None
    ) -> Tensor:
        """s (N, D) -> (N, D) under autograd; `level` and `tile` as in `run`."""
        return _DecoderLayer.apply(s, self, packed, shared, level, tile, *self.lora_parameters())

    # ---- forward

    def forward_saving(
        self,
        s: Tensor,
        packed: PackedSequences,
        shared: LayerContext,
        level: int,
        tile: int | None = None,
    ) -> Activations:
        """Take the residual stream s (N, D) through the layer, in place; what is kept of it, as in recompute.Keep.

        tile: rows that the parts besides attention take at a time, None for all. Outside of autograd.
        """
        a = self.new_activations(s, shared.dtype)
        weights = DequantizedLayer(self.projections, shared.weights, shared.dtype, s.device)
        self.attend(a, packed, shared, weights, tile)
        if level >= SaveLevel.QKV:
            a.o = torch.empty_like(a.x)
        if level >= SaveLevel.ALL:
            a.gate_up = self.gate_up.new_output(a.x)
        for rows in row_tiles(len(s), tile):
            self.output(a.rows(rows), weights, s[rows])
        return a.kept(level)

    def new_activations(self, s: Tensor, dtype: torch.dtype) -> Activations:
        """x, which is the residual stream s rounded to dtype, and empty tensors for the low-rank columns."""
        x = s.to(dtype, copy=True)
        names = ("h_low", "attn_low", "h_mid_low", "m_low")
        return Activations(
            x,
            **{
                name: p.new_lora_activation(x)
                for name, p in zip(names, self.projections, strict=True)
            },
        )

    def attend(
        self,
        a: Activations,
        packed: PackedSequences,
        shared: LayerContext,
        weights: DequantizedLayer,
        tile: int | None = None,
    ) -> None:
        """Compute what `a` lacks of q, k, v and of attention's output."""
        attn = self.self_attn
        if a.qkv is None:
            self.rotated_qkv(a, packed.positions, shared.rotary, weights, tile)
        if a.attn is None:
            a.attn = self.o.new_input(a.x)
            out, attention_kwargs = attn.as_heads(a.attn), shared.attention_kwargs(packed)
            _, a.lse = attention(
                *attn.split(a.qkv),
                packed.start,
                packed.end,
                attn.scale,
                out=out,
                **attention_kwargs,
            )

    def rotated_qkv(
        self,
        a: Activations,
        positions: Tensor,
        rotary: RopeTables,
        weights: DequantizedLayer,
        tile: int | None = None,
    ) -> None:
        """a.qkv, with q and k rotated."""
        a.qkv = self.qkv.new_product(a.x)
        for rows in row_tiles(len(a.x), tile):
            part = a.rows(rows)
            h = self.qkv.new_input(part.x)
            self.input_layernorm(part.x, out=h[:, : self.width])
            self.qkv.multiply(h, weights[self.qkv], part.h_low, a.known, out=part.qkv)
        q, k, _ = self.self_attn.split(a.qkv)
        rope_(q, k, rotary.cos, rotary.sin, positions)

    def output(self, a: Activations, weights: DequantizedLayer, s: Tensor) -> None:
        """Add o and Wdown m to the stream s (rows, D), from x and attention's output of these rows."""
        self.until_gate_up(a, weights, s)
        m = self.down.new_input(a.x)
        swiglu(*self.halves(a.gate_up), out=m[:, : self.down.in_features])
        self.down.multiply(m, weights[self.down], a.m_low, a.known, total=s)

    def until_gate_up(
        self, a: Activations, weights: DequantizedLayer, s: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """o (rows, D), the buffer (rows, D + R) of h_mid, filled, and the norm's statistic (rows,); a.gate_up.

        In forward, o is added to the stream s, and a.o and a.gate_up are filled where there is room for them; in
        backward they are known then.
        """
        h_mid, o = self.gate_up.new_input(a.x), a.o
        if o is None or not a.known:
            o = self.o.multiply(a.attn, weights[self.o], a.attn_low, a.known, out=o)
        _, rstd = self.post_attention_layernorm.of_sum(a.x, o, s, out=h_mid[:, : self.width])
        if a.known and a.gate_up is not None:
            self.gate_up.fill(h_mid, weights[self.gate_up], a.h_mid_low)
        else:
            a.gate_up = self.gate_up.new_output(a.x) if a.gate_up is None else a.gate_up
            product = a.gate_up[:, : self.gate_up.out_features]
            self.gate_up.multiply(h_mid, weights[self.gate_up], a.h_mid_low, a.known, out=product)
        return o, h_mid, rstd

    def halves(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """Views gate and up, each (N, F), of a buffer (N, 2F + R)."""
        F = self.down.in_features
        return gate_up[:, :F], gate_up[:, F : 2 * F]

    # ---- backward

    def new_gradient(self, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An empty buffer for `backward`: (rows, D + R), for y's gradient, then that of x + o, then x's."""
        return torch.empty(
            (rows, self.width + max(self.o.lora_columns, self.down.lora_columns)),
            dtype=dtype,
            device=device,
        )

    def backward(
        self,
        dx: Tensor,
        a: Activations,
        packed: PackedSequences,
        shared: LayerContext,
        tile: int | None = None,
        need_dx: bool = True,
    ) -> list[Tensor]:
        """The gradients of A and B of each adapted linear in turn; what `run` did not keep is computed again.

        dx, from `new_gradient`: the gradient of y in its first columns becomes that of x.
        """
        attn, D = self.self_attn, self.width
        weights = DequantizedLayer(self.projections, shared.weights, dx.dtype, dx.device)
        gradients = _Gradients()
        self.attend(a, packed, shared, weights, tile)
        dattn = torch.empty((len(dx), self.o.in_features), dtype=dx.dtype, device=dx.device)
        for rows in row_tiles(len(dx), tile):
            self._backward_to_attention(dx[rows], a.rows(rows), weights, gradients, out=dattn[rows])
        dqkv = self.qkv.new_output(dx)
        dq, dk, dv = attn.split(dqkv)
        attention_backward(
            attn.as_heads(dattn), *attn.split(a.qkv), attn.as_heads(a.attn), a.lse, packed.start, packed.end,
            attn.scale, dq=dq, dk=dk, dv=dv, **shared.attention_kwargs(packed),
        )  # fmt: skip
        rope_(dq, dk, shared.rotary.cos, shared.rotary.sin, packed.positions, inverse=True)
        a.qkv = a.attn = dattn = None
        # q, k, v = W h, h = norm(x)
        for rows in row_tiles(len(dx), tile):
            part, dx_rows = a.rows(rows), dx[rows, :D]
            dh = self.qkv.backward(dqkv[rows], weights[self.qkv], need_dx=need_dx)
            if need_dx or self.qkv.lora_columns:
                h = self.qkv.new_input(part.x)
                _, rstd = self.input_layernorm(part.x, out=h[:, :D])
                self.qkv.fill(h, weights[self.qkv], part.h_low, part.known)
                gradients.add(self.qkv, dqkv[rows], h)
            if need_dx:
                self.input_layernorm.backward(dh, part.x, rstd, dresidual=dx_rows, out=dx_rows)
        return gradients.of(self.projections)

    def _backward_to_attention(
        self,
        dx: Tensor,
        a: Activations,
        weights: DequantizedLayer,
        gradients: "_Gradients",
        out: Tensor,
    ) -> None:
        """dx (rows, D + R) from y's gradient to that of x + o; that of attention's output (rows, H K) into `out`."""
        D, F = self.width, self.down.in_features
        mine = a.gate_up is None  # what is computed again here may be overwritten
        o, h_mid, rstd = self.until_gate_up(a, weights)
        # y = x + o + Wdown m;  m takes the place of its gradient
        dy, m = dx[:, : D + self.down.lora_columns], self.down.new_input(dx)
        self.down.backward(dy, weights[self.down], out=m[:, :F])
        dgate_up = a.gate_up if mine else torch.empty_like(a.gate_up)
        swiglu_backward(
            m[:, :F],
            *self.halves(a.gate_up),
            *self.halves(dgate_up),
            m[:, :F] if self.down.lora_columns else None,
        )
        self.down.fill(m, weights[self.down], a.m_low, a.known)
        gradients.add(self.down, dy, m)
        del m
        # gate, up = W h_mid, h_mid = norm(x + o)
        dh = self.gate_up.backward(dgate_up, weights[self.gate_up])
        gradients.add(self.gate_up, dgate_up, h_mid)
        self.post_attention_layernorm.backward(
            dh, a.x, rstd, dresidual=dx[:, :D], addend=o, out=dx[:, :D]
        )
        # o = Wo attn
        do = dx[:, : D + self.o.lora_columns]
        self.o.backward(do, weights[self.o], out=out)
        gradients.add(self.o, do, a.attn)


class _Gradients:
    """The gradients of A and B, summed over tiles."""

    def __init__(self):
        self._sums: dict[FusedLinear, list[Tensor]] = {}

    def add(self, projection: FusedLinear, dy: Tensor, x: Tensor) -> None:
        """The part of these rows, from the filled buffers of dy and x."""
        if not projection.lora_columns:
            return
        found = [g for pair in projection.gradients(dy, x) for g in pair]
        if projection in self._sums:
            torch._foreach_add_(self._sums[projection], found)
        else:
            self._sums[projection] = found

    def of(self, projections: tuple[FusedLinear, ...]) -> list[Tensor]:
        return [g for projection in projections for g in self._sums.get(projection, ())]


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        s: Tensor,
        layer: DecoderLayer,
        packed: PackedSequences,
        shared: LayerContext,
        level: int,
        tile: int | None,
        *parameters: Tensor,
    ):
        y = s.clone()
        a = layer.forward_saving(y, packed, shared, level, tile)
        ctx.layer, ctx.packed, ctx.shared, ctx.tile = layer, packed, shared, tile
        ctx.save_for_backward(*a.tensors())
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        layer, a = ctx.layer, Activations(*ctx.saved_tensors, known=True)
        dx = layer.new_gradient(len(dy), ctx.shared.dtype, dy.device)
        dx[:, : layer.width] = dy
        gradients = layer.backward(
            dx, a, ctx.packed, ctx.shared, ctx.tile, need_dx=ctx.needs_input_grad[0]
        )
        return dx[:, : layer.width].to(dy.dtype), None, None, None, None, None, *gradients
