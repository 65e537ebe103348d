"""The parts of a Llama: where packed tokens stand, RoPE's tables, embedding, norm, and the decoder layer.

A decoder layer is one autograd function whose forward and backward are written out below over the kernels; nothing
inside a layer depends on the autograd engine, and the backward reads like the derivation:

    h1 = norm(x);  q, k, v = W h1;  q, k = rope(q, k);  attn = attention(q, k, v);  x_mid = x + Wo attn
    h2 = norm(x_mid);  gate, up = W h2;  m = silu(gate) * up;  y = x_mid + Wdown m

Legend: B batch, T tokens, D model width, H query heads, G key/value heads, K head width, F ffn width, V vocabulary,
R LoRA rank, N rows = tokens of all samples, packed without padding.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minitune.config import ModelConfig
from minitune.kernels.attention import attention, attention_backward
from minitune.kernels.attention_cudnn import WORTHWHILE
from minitune.kernels.packed import bound_of
from minitune.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from minitune.kernels.rope import rope_
from minitune.kernels.swiglu import swiglu, swiglu_backward
from minitune.linear import LayerWeights, Linear, Projection
from minitune.recompute import Activations


@dataclass(frozen=True)
class Packed:
    """Where each of N packed tokens stands: its position in its sample, and its sample's bounds; int32 (N,)."""

    positions: Tensor
    start: Tensor
    end: Tensor
    length: int | None = None  # of every sample, where the host knows that they all have the same
    longest: int | None = None  # rows of the longest sample or a bound on them, where the host knows one

    @classmethod
    def from_positions(cls, positions: Tensor) -> "Packed":
        """From positions (N,) that restart at 0 with each sample; everything follows from them, without a sync."""
        positions = positions.to(torch.int32)
        index = torch.arange(len(positions), dtype=torch.int32, device=positions.device)
        first = torch.where(positions == 0, index, len(positions))  # a sample's first row; N elsewhere
        following = torch.cat([first[1:], first.new_full((min(1, len(first)),), len(first))])
        end = following.flip(0).cummin(0).values.flip(0)
        length = longest = None
        if positions.device.type == "cpu" and len(positions):
            longest = int(positions.max()) + 1
            count = int((positions == 0).sum())
            expected = torch.arange(len(positions) // count, dtype=torch.int32).repeat(count)
            length = len(positions) // count if torch.equal(expected, positions) else None
        return cls(positions, index - positions, end, length, longest)

    def to(self, device: torch.device) -> "Packed":
        tensors = (t.to(device, non_blocking=True) for t in (self.positions, self.start, self.end))
        return Packed(*tensors, self.length, self.longest)


@dataclass(frozen=True)
class Rotary:
    """cos and sin of every position's angles, fp32 (positions, K/2)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def build(cls, config: ModelConfig, positions: int, device: torch.device) -> "Rotary":
        """In fp32 throughout, as the models were trained; linear and llama3 scaling (arXiv 2407.21783, sec. 3.2)."""
        frequencies = 1.0 / _rope_periods(config) / rope_divisors(config)
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
        return cls(angles.cos().to(device), angles.sin().to(device))


def _rope_periods(config: ModelConfig) -> Tensor:
    """theta^(2i / K), fp32 (K/2,): positions a radian, before scaling."""
    return config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)


def rope_divisors(config: ModelConfig) -> Tensor:
    """What RoPE's frequencies are divided by, fp32 (K/2,): 1 where the model has no scaling.

    llama3: wavelengths shorter than original/high_freq_factor stay, those longer than original/low_freq_factor are
    stretched by `factor`, and between them the two are blended.
    """
    scaling, half = config.rope_scaling, config.head_dim // 2
    if scaling is None:
        return torch.ones(half)
    if scaling["rope_type"] == "linear":
        return torch.full((half,), scaling["factor"])
    wavelengths = 2 * torch.pi * _rope_periods(config)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    return 1 / ((1 - blend.clamp(0, 1)) / scaling["factor"] + blend.clamp(0, 1))


class Embedding(nn.Module):
    def __init__(self, rows: int, width: int):
        super().__init__()
        self.shape = (rows, width)
        self.register_parameter("weight", None)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.weight[ids].to(dtype)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.shape, self.eps = (width,), eps
        self.register_parameter("weight", None)

    def forward(self, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (N, D) -> its norm (N, D) and the reciprocal root mean square of each row, fp32 (N,)."""
        return rms_norm(x, self.weight, self.eps, out)

    def after_add(self, x: Tensor, residual: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """s = x + residual, norm(s), and the reciprocal root mean square of s's rows."""
        return add_rms_norm(x, residual, self.weight, self.eps, out)

    def backward(
        self, dy: Tensor, x: Tensor, rstd: Tensor, dresidual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """dx of the norm, plus the gradient that the residual carries."""
        return rms_norm_backward(dy, x, self.weight, rstd, dresidual, out)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.width = c.num_attention_heads, c.num_key_value_heads, c.head_dim
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
class Shared:
    """What the layers of a model share: RoPE's tables, the choice of attention, buffers for the weights at work."""

    rotary: Rotary
    attention: str = "auto"
    weights: dict[tuple, Tensor] = field(default_factory=dict)

    def about(self, packed: Packed) -> dict[str, int | None]:
        """What the attention of these samples is told about their lengths; with a `length` it may take cuDNN's."""
        cudnn = self.attention == "auto" and (packed.length or 0) >= WORTHWHILE
        return {"length": packed.length if cudnn else None, "longest": packed.longest and bound_of(packed.longest)}


class DecoderLayer(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.self_attn = a = Attention(c)
        self.mlp = m = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.width = c.hidden_size
        self.qkv = Projection("qkv", a.q_proj, a.k_proj, a.v_proj)
        self.o = Projection("o", a.o_proj)
        self.gate_up = Projection("gate_up", m.gate_proj, m.up_proj)
        self.down = Projection("down", m.down_proj)

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    def adapters(self) -> list[nn.Parameter]:
        """A and B of each adapted linear in turn, the order of the gradients of `backward`."""
        linears = [linear for projection in self.projections for linear in projection.adapted]
        return [p for linear in linears for p in (linear.lora_A.weight, linear.lora_B.weight)]

    def forward(self, x: Tensor, packed: Packed, shared: Shared, level: int) -> Tensor:
        """x (N, D) -> (N, D) under autograd; `level` says what is kept for backward (recompute.py)."""
        return _DecoderLayer.apply(x, self, packed, shared, level, *self.adapters())

    def run(self, x: Tensor, packed: Packed, shared: Shared, out: Tensor | None = None) -> tuple[Tensor, Activations]:
        """x (N, D) -> (N, D), in `out` where that is given, and all that lies between; outside of autograd."""
        weights, a = LayerWeights(shared.weights, x.dtype, x.device), Activations(x)
        self.complete(a, packed, shared, weights)
        return self.output(a, weights, out), a

    def rotated_qkv(self, a: Activations, positions: Tensor, rotary: Rotary, weights: LayerWeights) -> None:
        """a.qkv, with q and k rotated, and its input a.h."""
        a.h = self.qkv.new_input(a.x)
        _, a.rstd = self.input_layernorm(a.x, out=a.h[:, : self.width])
        a.qkv, a.h_low = self.qkv.multiply(a.h, weights[self.qkv], a.h_low)
        q, k, _ = self.self_attn.split(a.qkv)
        rope_(q, k, rotary.cos, rotary.sin, positions)

    def complete(self, a: Activations, packed: Packed | None, shared: Shared, weights: LayerWeights) -> None:
        """Compute what `a` lacks: everything in forward, what was not kept in backward."""
        attn, D = self.self_attn, self.width
        if a.qkv is None:
            self.rotated_qkv(a, packed.positions, shared.rotary, weights)
        if a.attn is None:
            a.attn = self.o.new_input(a.x)
            q, k, v = attn.split(a.qkv)
            out, about = attn.as_heads(a.attn), shared.about(packed)
            _, a.lse = attention(q, k, v, packed.start, packed.end, attn.scale, out=out, **about)
        if a.x_mid is None:
            o, a.attn_low = self.o.multiply(a.attn, weights[self.o], a.attn_low)
            a.h_mid = self.gate_up.new_input(a.x)
            a.x_mid, _, a.rstd_mid = self.post_attention_layernorm.after_add(o, a.x, out=a.h_mid[:, :D])
            del o
        if a.gate_up is None:
            if a.h_mid is None:
                a.h_mid = self.gate_up.new_input(a.x)
                self.post_attention_layernorm(a.x_mid, out=a.h_mid[:, :D])
            a.gate_up = self.gate_up.new_output(a.x)
            out = a.gate_up[:, : self.gate_up.out_features]
            _, a.h_mid_low = self.gate_up.multiply(a.h_mid, weights[self.gate_up], a.h_mid_low, out)

    def output(self, a: Activations, weights: LayerWeights, out: Tensor | None = None) -> Tensor:
        """The layer's output (N, D) from its complete activations, in `out` where that is given."""
        m = self.down.new_input(a.x)
        swiglu(*self.halves(a.gate_up), out=m[:, : self.down.in_features])
        y, a.m_low = self.down.multiply(m, weights[self.down], out=out, residual=a.x_mid)
        return y

    def halves(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """Views gate and up, each (N, F), of a buffer (N, 2F + R)."""
        F = self.down.in_features
        return gate_up[:, :F], gate_up[:, F : 2 * F]

    def backward(
        self, dy: Tensor, a: Activations, packed: Packed, shared: Shared, need_dx: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """dx and the gradients of A and B of each adapted linear in turn, from dy; a.x of `a` is enough.

        dy and dx are in buffers (N, D + R), as `down` of this layer and of the one below want them.
        """
        attn, D, F = self.self_attn, self.width, self.down.in_features
        weights = LayerWeights(shared.weights, dy.dtype, dy.device)
        mine = a.gate_up is None  # what is computed again here may be overwritten
        self.complete(a, packed, shared, weights)

        # y = x_mid + Wdown m;  m takes the place of its gradient
        m = self.down.new_input(dy)
        self.down.backward(dy, weights[self.down], out=m[:, :F])
        dgate_up = a.gate_up if mine else torch.empty_like(a.gate_up)
        swiglu_backward(
            m[:, :F], *self.halves(a.gate_up), *self.halves(dgate_up), m[:, :F] if self.down.spare else None
        )
        self.down.fill(m, a.m_low)
        gradients = [self.down.gradients(dy, m)]
        del m
        # gate, up = W h2, h2 = norm(x_mid)
        dh = self.gate_up.backward(dgate_up, weights[self.gate_up])
        h = self._normalised(a.h_mid, self.post_attention_layernorm, a.x_mid, self.gate_up, a.h_mid_low)
        gradients.append(self.gate_up.gradients(dgate_up, h))
        del dgate_up
        a.gate_up = a.h_mid = None
        dx = self.o.new_output(dy)
        norm, residual = self.post_attention_layernorm, dy[:, :D]
        norm.backward(dh, a.x_mid, a.rstd_mid, dresidual=residual, out=dx[:, :D])
        # x_mid = x + Wo attn
        dattn = self.o.backward(dx, weights[self.o])
        gradients.append(self.o.gradients(dx, a.attn))
        dqkv = self.qkv.new_output(dy)
        dq, dk, dv = attn.split(dqkv)
        attention_backward(
            attn.as_heads(dattn), *attn.split(a.qkv), attn.as_heads(a.attn), a.lse, packed.start, packed.end,
            attn.scale, dq=dq, dk=dk, dv=dv, **shared.about(packed),
        )  # fmt: skip
        rope_(dq, dk, shared.rotary.cos, shared.rotary.sin, packed.positions, inverse=True)
        # q, k, v = W h1, h1 = norm(x)
        dh = self.qkv.backward(dqkv, weights[self.qkv], need_dx=need_dx)
        h = self._normalised(a.h, self.input_layernorm, a.x, self.qkv, a.h_low)
        gradients.append(self.qkv.gradients(dqkv, h))
        if need_dx:
            residual, dx = dx[:, :D], self.down.new_output(dy)
            self.input_layernorm.backward(dh, a.x, a.rstd, dresidual=residual, out=dx[:, :D])
        return dx if need_dx else None, [g for pairs in reversed(gradients) for pair in pairs for g in pair]

    def _normalised(
        self, h: Tensor | None, norm: RMSNorm, x: Tensor, projection: Projection, low: Tensor | None
    ) -> Tensor:
        """The input of a projection in its filled buffer: `h`, or computed again from x where an adapter needs it."""
        if h is None:
            h = projection.new_input(x)
            if low is not None:
                norm(x, out=h[:, : self.width])
                projection.fill(h, low)
        return h


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layer: DecoderLayer, packed: Packed, shared: Shared, level: int, *parameters: Tensor):
        y, a = layer.run(x, packed, shared)
        ctx.layer, ctx.packed, ctx.shared = layer, packed, shared
        ctx.save_for_backward(*a.kept(level))
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        layer, a = ctx.layer, Activations(*ctx.saved_tensors)
        wide = layer.down.new_output(dy)
        wide[:, : layer.width] = dy
        dx, gradients = layer.backward(wide, a, ctx.packed, ctx.shared, need_dx=ctx.needs_input_grad[0])
        return None if dx is None else dx[:, : layer.width], None, None, None, None, *gradients
