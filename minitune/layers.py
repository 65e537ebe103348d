"""The parts of a Llama: embedding, norm, the frozen linear with its LoRA branch, and the decoder layer.

A decoder layer is one autograd function whose forward and backward are written out below over the kernels; nothing
inside a layer depends on the autograd engine, and the backward reads like the derivation:

    h1 = norm(x);  q, k, v = W h1;  q, k = rope(q, k);  attn = attention(q, k, v);  x_mid = x + Wo attn
    h2 = norm(x_mid);  gate, up = W h2;  m = silu(gate) * up;  y = x_mid + Wdown m

Legend: B batch, T tokens, D model width, H query heads, G key/value heads, K head width, F ffn width, V vocabulary,
R LoRA rank, N rows = tokens of all samples, packed without padding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minitune.config import LINEARS, LoraConfig, ModelConfig
from minitune.kernels.attention import attention, attention_backward
from minitune.kernels.lora_linear import lora_linear, lora_linear_backward
from minitune.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from minitune.kernels.rope import rope_
from minitune.kernels.swiglu import swiglu, swiglu_backward
from minitune.nf4 import NF4
from minitune.recompute import Activations


@dataclass(frozen=True)
class Packed:
    """Where each of N packed tokens stands: its position in its sample, and its sample's bounds; int32 (N,)."""

    positions: Tensor
    start: Tensor
    end: Tensor

    @classmethod
    def from_positions(cls, positions: Tensor) -> "Packed":
        """From positions (N,) that restart at 0 with each sample; everything follows from them, without a sync."""
        positions = positions.to(torch.int32)
        index = torch.arange(len(positions), dtype=torch.int32, device=positions.device)
        first = torch.where(positions == 0, index, len(positions))  # a sample's first row; N elsewhere
        following = torch.cat([first[1:], first.new_full((min(1, len(first)),), len(first))])
        end = following.flip(0).cummin(0).values.flip(0)
        return cls(positions, index - positions, end)

    def to(self, device: torch.device) -> "Packed":
        return Packed(*(t.to(device, non_blocking=True) for t in (self.positions, self.start, self.end)))


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

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, D) -> its norm (N, D) and the reciprocal root mean square of each row, fp32 (N,)."""
        return rms_norm(x, self.weight, self.eps)

    def after_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s = x + residual, norm(s), and the reciprocal root mean square of s's rows."""
        return add_rms_norm(x, residual, self.weight, self.eps)

    def backward(self, dy: Tensor, x: Tensor, rstd: Tensor, dresidual: Tensor | None = None) -> Tensor:
        """dx of the norm, plus the gradient that the residual carries."""
        return rms_norm_backward(dy, x, self.weight, rstd, dresidual)


class Linear(nn.Module):
    """A frozen linear, in NF4 or as stored, with an optional LoRA branch: y = W x + bias + s B A x.

    One of `nf4` and `weight` is set by the loader. A (R, in) and B (out, R) are fp32 parameters under PEFT's names,
    lora_A.weight and lora_B.weight.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.has_bias = in_features, out_features, bias
        self.nf4: NF4 | None = None
        self.register_parameter("weight", None)  # (out, in)
        self.register_parameter("bias", None)  # (out,)
        self.lora_A: nn.Linear | None = None
        self.lora_B: nn.Linear | None = None
        self.scaling = 0.0
        self.resident: Tensor | None = None  # the dense weight, while it is kept beside the NF4 one

    @property
    def is_quantized(self) -> bool:
        return self.nf4 is not None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The frozen weight in dtype (out, in)."""
        if self.resident is not None and self.resident.dtype == dtype:
            return self.resident
        return self.nf4.dequantize(dtype) if self.is_quantized else self.weight.detach().to(dtype)

    def add_lora(self, lora: LoraConfig, device: torch.device, generator: torch.Generator) -> None:
        """Attach a branch that changes nothing yet: A as PEFT draws it (Kaiming uniform, a = sqrt 5), B zero."""
        self.lora_A = nn.Linear(self.in_features, lora.r, bias=False, device="meta", dtype=torch.float32)
        self.lora_B = nn.Linear(lora.r, self.out_features, bias=False, device="meta", dtype=torch.float32)
        bound = self.in_features**-0.5  # kaiming_uniform with a = sqrt 5: gain sqrt(1/3) times sqrt(3 / fan_in)
        a = torch.empty(lora.r, self.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A.weight = nn.Parameter(a.to(device))
        self.lora_B.weight = nn.Parameter(torch.zeros(self.out_features, lora.r, device=device))
        self.scaling = lora.scaling

    def adapter(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """A and B in the compute dtype, or a pair of None."""
        if self.lora_A is None:
            return None, None
        return self.lora_A.weight.detach().to(dtype), self.lora_B.weight.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, in) -> (N, out), outside of autograd."""
        return self.apply_to(x, self.dense(x.dtype))

    def apply_to(self, x: Tensor, weight: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.detach().to(x.dtype)
        return lora_linear(x, weight, bias, *self.adapter(x.dtype), self.scaling)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.width = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.scale = c.head_dim**-0.5
        self.q_proj = Linear(c.hidden_size, self.heads * self.width, c.attention_bias)
        self.k_proj = Linear(c.hidden_size, self.kv_heads * self.width, c.attention_bias)
        self.v_proj = Linear(c.hidden_size, self.kv_heads * self.width, c.attention_bias)
        self.o_proj = Linear(self.heads * self.width, c.hidden_size, c.attention_bias)


class MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)


class DecoderLayer(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def linears(self) -> dict[str, Linear]:
        """The seven linears by name, in the order of LINEARS."""
        owner = dict.fromkeys(LINEARS[:4], self.self_attn) | dict.fromkeys(LINEARS[4:], self.mlp)
        return {name: getattr(module, name) for name, module in owner.items()}

    def adapted(self) -> list[Linear]:
        return [linear for linear in self.linears().values() if linear.lora_A is not None]

    def forward(self, x: Tensor, packed: Packed, rotary: Rotary, level: int) -> Tensor:
        """x (N, D) -> (N, D); `level` says what is kept for backward (recompute.py)."""
        parameters = [p for linear in self.adapted() for p in (linear.lora_A.weight, linear.lora_B.weight)]
        return _DecoderLayer.apply(x, self, packed, rotary, level, *parameters)

    def qkv(self, h: Tensor, positions: Tensor, rotary: Rotary, weights: "DenseWeights") -> tuple[Tensor, ...]:
        """Rotated q (N, H, K), rotated k and v (N, G, K) of the normalised input h (N, D)."""
        a = self.self_attn
        q, k, v = (weights.apply(linear, h).view(len(h), -1, a.width) for linear in (a.q_proj, a.k_proj, a.v_proj))
        rope_(q, k, rotary.cos, rotary.sin, positions)
        return q, k, v

    def output(self, a: Activations, weights: "DenseWeights") -> Tensor:
        """The layer's output (N, D) from its complete activations."""
        return a.x_mid + weights.apply(self.mlp.down_proj, swiglu(a.gate, a.up))

    def complete(self, a: Activations, packed: Packed | None, rotary: Rotary, weights: "DenseWeights") -> None:
        """Compute what `a` lacks: everything in forward, what was not kept in backward."""
        attn = self.self_attn
        if a.q is None:
            a.q, a.k, a.v = self.qkv(self.input_layernorm(a.x)[0], packed.positions, rotary, weights)
        if a.attn is None:
            a.attn, a.lse = attention(a.q, a.k, a.v, packed.start, packed.end, attn.scale)
        if a.x_mid is None:
            o = weights.apply(attn.o_proj, a.attn.flatten(1))
            a.x_mid, h, _ = self.post_attention_layernorm.after_add(o, a.x)
        elif a.gate is None:
            h, _ = self.post_attention_layernorm(a.x_mid)
        if a.gate is None:
            a.gate, a.up = (weights.apply(linear, h) for linear in (self.mlp.gate_proj, self.mlp.up_proj))


class DenseWeights:
    """The dense weights of one layer during one pass: each is dequantised once, at its first use."""

    def __init__(self, dtype: torch.dtype, keep: bool):
        self.dtype, self.keep = dtype, keep  # forward uses each weight once and keeps none
        self._weights: dict[Linear, Tensor] = {}

    def __getitem__(self, linear: Linear) -> Tensor:
        if linear in self._weights:
            return self._weights[linear]
        weight = linear.dense(self.dtype)
        if self.keep:
            self._weights[linear] = weight
        return weight

    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        return linear.apply_to(x, self[linear])


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layer: DecoderLayer, packed: Packed, rotary: Rotary, level: int, *parameters: Tensor):
        weights = DenseWeights(x.dtype, keep=False)
        a = Activations(x)
        layer.complete(a, packed, rotary, weights)
        ctx.layer, ctx.packed, ctx.rotary = layer, packed, rotary
        ctx.save_for_backward(*a.kept(level))
        return layer.output(a, weights)

    @staticmethod
    def backward(ctx, dy: Tensor):
        layer, packed, rotary = ctx.layer, ctx.packed, ctx.rotary
        attn, mlp = layer.self_attn, layer.mlp
        a = Activations(*ctx.saved_tensors)
        weights = DenseWeights(dy.dtype, keep=True)
        layer.complete(a, packed, rotary, weights)
        gradients: dict[Linear, tuple[Tensor, Tensor]] = {}

        def backward(linear: Linear, dy: Tensor, x: Tensor, dx: Tensor | None = None, need_dx: bool = True) -> Tensor:
            """dx of one linear, added onto `dx`; its adapter's gradients go to `gradients`."""
            adapter = linear.adapter(dy.dtype)
            dx, da, db = lora_linear_backward(dy, x, weights[linear], *adapter, linear.scaling, dx=dx, need_dx=need_dx)
            gradients[linear] = da, db
            return dx

        # y = x_mid + Wdown m
        dy = dy.contiguous()
        dm = backward(mlp.down_proj, dy, swiglu(a.gate, a.up))
        dgate, dup, _ = swiglu_backward(dm, a.gate, a.up)
        # gate, up = W h2, h2 = norm(x_mid)
        h, rstd = layer.post_attention_layernorm(a.x_mid)
        dh = backward(mlp.gate_proj, dgate, h)
        dh = backward(mlp.up_proj, dup, h, dx=dh)
        dx = layer.post_attention_layernorm.backward(dh, a.x_mid, rstd, dresidual=dy)
        # x_mid = x + Wo attn
        dattn = backward(attn.o_proj, dx, a.attn.flatten(1)).view_as(a.attn)
        dq, dk, dv = attention_backward(dattn, a.q, a.k, a.v, a.attn, a.lse, packed.start, packed.end, attn.scale)
        rope_(dq, dk, rotary.cos, rotary.sin, packed.positions, inverse=True)
        # q, k, v = W h1, h1 = norm(x); the first layer's input wants no gradient
        h, rstd = layer.input_layernorm(a.x)
        dh, need = None, ctx.needs_input_grad[0]
        for linear, d in ((attn.q_proj, dq), (attn.k_proj, dk), (attn.v_proj, dv)):
            dh = backward(linear, d.flatten(1), h, dx=dh, need_dx=need)
        dx = layer.input_layernorm.backward(dh, a.x, rstd, dresidual=dx) if need else None
        return dx, None, None, None, None, *(g for linear in layer.adapted() for g in gradients[linear])
