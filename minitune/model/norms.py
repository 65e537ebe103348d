"""The norms of a decoder layer: before a block, as in Llama, behind it, or both.

    x + attention_out(W_o attention(attention_in(x)))          and the same around the MLP

Where a family has no norm, NoNorm stands, so that the layer reads the same for all families. It
returns what it is given and launches nothing that Llama's layer would not.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from minitune.config.model_config import ModelConfig
from minitune.kernels.rms_norm import add_rms_norm_, rms_norm, rms_norm_backward
from minitune.model.fixed_module import UnhookedModule
from minitune.model.linear import FusedLinear


class RMSNorm(UnhookedModule):
    """RMSNorm: x / sqrt(mean(x^2) + eps) * (weight + offset), for each row of x (N, D)."""

    is_norm = True

    def __init__(self, width: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.shape, self.eps, self.offset = (width,), eps, offset
        self.register_parameter("weight", None)

    def forward(self, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the norm (N, D) of x (N, D), and rstd, the factor of each row, float32 (N,)."""
        return rms_norm(x, self.weight, self.eps, out, self.offset)

    def from_residual(self, s: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the norm of the residual stream s (N, D) in dtype, and rstd."""
        return self(s, out=torch.empty_like(s, dtype=dtype))

    def of_sum_(
        self, x: Tensor, addend: Tensor, residual: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the norm of x + addend, and rstd; add addend to `residual` in place, if given."""
        return add_rms_norm_(x, addend, self.weight, self.eps, residual, out, self.offset)

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
        return rms_norm_backward(dy, x, self.weight, rstd, dresidual, addend, out, self.offset)

    # ---- behind a linear

    def of_output(self, y: Tensor) -> Tensor:
        """Return the norm of a linear's output y (N, D)."""
        return self(y)[0]

    def add_output_(
        self,
        s: Tensor,
        linear: FusedLinear,
        x: Tensor,
        weight: Tensor,
        *,
        out: Tensor | None,
        save_lora_to: Tensor | None,
    ) -> None:
        """Add the norm of the linear's output to the residual stream s (N, D) in place.

        x, weight, save_lora_to: as in FusedLinear.forward_.
        out: receives the output before the norm, which `output_gradient` needs.
        """
        s.add_(self.of_output(linear.forward_(x, weight, out=out, save_lora_to=save_lora_to)))

    def output_gradient(self, dy: Tensor, y: Tensor, linear: FusedLinear) -> Tensor:
        """Return the gradient (N, D + R) of the linear's output y (N, D), with R free columns.

        dy: (N, D or more), the gradient of the norm in the first D columns.
        """
        D = y.shape[1]
        gradient = linear.new_output(y)
        self.backward(dy[:, :D], y, self(y)[1], out=gradient[:, :D])
        return gradient


class NoNorm:
    """The absence of a norm, with the methods of RMSNorm."""

    is_norm = False

    def __call__(self, x: Tensor, out: Tensor) -> tuple[Tensor, None]:
        """Return a copy of x (N, D) in `out`."""
        return out.copy_(x), None

    def of_sum_(
        self, x: Tensor, addend: Tensor, residual: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Return x + addend; add addend to `residual` in place, if given."""
        if residual is not None:
            residual.add_(addend)
        return torch.add(x, addend, out=out), None

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        rstd: None,
        dresidual: Tensor,
        addend: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return dresidual + dy (N, D): both reach x as they are."""
        return torch.add(dresidual, dy, out=out)

    # ---- behind a linear

    def of_output(self, y: Tensor) -> Tensor:
        """Return the linear's output y."""
        return y

    def add_output_(
        self,
        s: Tensor,
        linear: FusedLinear,
        x: Tensor,
        weight: Tensor,
        *,
        out: None,
        save_lora_to: Tensor | None,
    ) -> None:
        """Add the linear's output to the residual stream s (N, D) in place."""
        linear.forward_(x, weight, add_to=s, save_lora_to=save_lora_to)

    def output_gradient(self, dy: Tensor, y: Tensor | None, linear: FusedLinear) -> Tensor:
        """Return the first D + R columns of dy, the gradient of the linear's output."""
        return dy[:, : linear.out_features + linear.lora_columns]


class LayerNorms(NamedTuple):
    """The norms of a layer; the names in the checkpoint are those of Architecture.norms."""

    attention_in: RMSNorm | NoNorm
    attention_out: RMSNorm | NoNorm
    mlp_in: RMSNorm | NoNorm
    mlp_out: RMSNorm | NoNorm

    @classmethod
    def add_to(cls, layer: nn.Module, c: ModelConfig) -> "LayerNorms":
        """Return the norms of a layer, which become its modules under the checkpoint's names."""
        family = c.architecture
        for name in filter(None, family.norms):
            layer.add_module(name, RMSNorm(c.hidden_size, c.rms_norm_eps, family.norm_offset))
        return cls(*(layer.get_submodule(name) if name else NoNorm() for name in family.norms))
