"""Frozen linears with LoRA branches, and the fused matmuls that run them.

A decoder layer has seven linears but four matmuls: q, k, v run as one, and so do gate and up. Each
matmul reads an extended weight, which holds the frozen values and the adapters side by side
(kernels/lora_linear.py). Every pass over a layer writes the extended weights into buffers that all
layers share, so only one layer is dequantised at a time (8B in bf16: 0.44 GB). Resident weights are
the exception: they stay dequantised on purpose.

The dimension letters are those of minitune/model/__init__.py.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from minitune.config.training_config import LoraConfig
from minitune.kernels.lora_linear import (
    fill_lora_columns_,
    lora_gradients,
    lora_linear_,
    lora_linear_backward_,
    padded_rank,
)
from minitune.model.fixed_module import NamedLinear, UnhookedModule
from minitune.model.quantized_weight import QuantizedWeight


class Linear(UnhookedModule):
    """A frozen linear with an optional LoRA branch: y = W x + bias + scaling * B A x.

    The loader sets `quantized` if W is stored in few bits, and `weight` otherwise. A (r, in) and
    B (out, r) are float32 parameters under PEFT's names, lora_A.weight and lora_B.weight.
    FusedLinear runs the matmul.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.has_bias = bias
        self.quantized: QuantizedWeight | None = None
        self.register_parameter("weight", None)  # (out, in)
        self.register_parameter("bias", None)  # (out,)
        self.lora_A: nn.Linear | None = None
        self.lora_B: nn.Linear | None = None
        self.scaling = 0.0

    @property
    def is_quantized(self) -> bool:
        """Return True if W is stored in few bits."""
        return self.quantized is not None

    @property
    def rank(self) -> int:
        """Return r, or 0 without an adapter."""
        lora_A = self.lora_A  # once: a module finds its parts in slow ways
        return 0 if lora_A is None else lora_A.weight.shape[0]

    def weight_as(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return the frozen weight (out, in) in dtype, written into `out` if `out` is given."""
        if self.is_quantized:
            return self.quantized.dequantize(dtype, out)
        weight = self.weight.detach()
        return weight.to(dtype) if out is None else out.copy_(weight)

    def frozen_tensors(self) -> list[Tensor]:
        """Return the tensors of W and of the bias."""
        parts = vars(self.quantized).values() if self.is_quantized else [self.weight]
        return [part for part in (*parts, self.bias) if isinstance(part, Tensor)]

    def adapter(self) -> tuple[Tensor | None, Tensor | None]:
        """Return A (r, in) and B (out, r), or (None, None) without an adapter."""
        if self.lora_A is None:
            return None, None
        return self.lora_A.weight.detach(), self.lora_B.weight.detach()

    def add_lora(self, lora: LoraConfig, device: torch.device, generator: torch.Generator) -> None:
        """Attach an adapter that changes nothing yet: PEFT's initial A, and B = 0.

        PEFT draws A from Kaiming uniform with a = sqrt(5). Its gain sqrt(1/3) times its factor
        sqrt(3 / in) gives the bound 1 / sqrt(in).
        """
        self.lora_A = _meta_linear(self.in_features, lora.r)
        self.lora_B = _meta_linear(lora.r, self.out_features)
        bound = self.in_features**-0.5
        a = torch.empty(lora.r, self.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A.weight = nn.Parameter(a.to(device))
        self.lora_B.weight = nn.Parameter(torch.zeros(self.out_features, lora.r, device=device))
        self.scaling = lora.scaling


def _meta_linear(in_features: int, out_features: int) -> NamedLinear:
    """Return a float32 linear without bias and without memory, which gives a weight its name."""
    return NamedLinear(in_features, out_features, bias=False, device="meta", dtype=torch.float32)


class FusedLinear:
    """Linears that share an input, run as one matmul with an extended weight (out + R, in + R).

    R is the padded rank: it holds the ranks of all adapters, and is 0 without adapters. Inputs and
    output gradients come in buffers with R more columns, the LoRA columns.

    multiplier: factor of the output; the matmuls apply it (Granite's residual multiplier).
    """

    def __init__(self, name: str, linears: Sequence[Linear], multiplier: float = 1.0):
        self.name = name
        self.linears = tuple(linears)
        self.multiplier = multiplier
        self.in_features = self.linears[0].in_features
        self.out_features = sum(linear.out_features for linear in self.linears)
        self.resident_weight: Tensor | None = None  # the extended weight while it stays dequantised

    @property
    def adapted(self) -> list[Linear]:
        """Return the linears that have an adapter."""
        return [linear for linear in self.linears if linear.rank]

    @property
    def is_trained(self) -> bool:
        """Return True if an adapter has a parameter that is not frozen."""
        factors = [factor for x in self.adapted for factor in (x.lora_A, x.lora_B)]
        return any(factor.weight.requires_grad for factor in factors)

    @property
    def lora_columns(self) -> int:
        """Return R, the padded rank."""
        rank = sum(linear.rank for linear in self.linears)
        return padded_rank(rank, self.adapted[0].lora_A.weight.device.type) if rank else 0

    @property
    def needs_no_buffer(self) -> bool:
        """Return True if the stored weight is used directly: one plain linear, no adapter."""
        first = self.linears[0]
        return len(self.linears) == 1 and not first.rank and not first.is_quantized

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Return the shape of the extended weight, (out + R, in + R)."""
        return self.out_features + self.lora_columns, self.in_features + self.lora_columns

    @property
    def scaling(self) -> float:
        """Return the scaling of the adapters, which share one LoraConfig."""
        return max(linear.scaling for linear in self.linears)

    # ---- buffers

    def new_input(self, like: Tensor) -> Tensor:
        """Return an empty buffer (N, in + R) with the rows, dtype and device of `like`."""
        return _empty(like, self.in_features + self.lora_columns)

    def new_input_without_lora(self, like: Tensor) -> Tensor:
        """Return an empty (N, in) with the rows, dtype and device of `like`."""
        return _empty(like, self.in_features)

    def new_output(self, like: Tensor) -> Tensor:
        """Return an empty buffer (N, out + R) with the rows, dtype and device of `like`."""
        return _empty(like, self.out_features + self.lora_columns)

    def new_output_without_lora(self, like: Tensor) -> Tensor:
        """Return an empty (N, out) with the rows, dtype and device of `like`."""
        return _empty(like, self.out_features)

    def new_lora_activation(self, like: Tensor) -> Tensor | None:
        """Return an empty (N, R) for scaling * x A^T, or None without an adapter."""
        return _empty(like, self.lora_columns) if self.lora_columns else None

    def new_weight(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a buffer for the extended weight, with zeros outside of W, A and B."""
        with torch.inference_mode(False):  # the buffer outlives the caller's inference mode
            return torch.zeros(self.weight_shape, dtype=dtype, device=device)

    # ---- the extended weight

    def make_resident(self, dtype: torch.dtype, device: torch.device) -> None:
        """Dequantise the weight once, into `resident_weight`, until that is None again.

        Do nothing if the stored weight is used directly.
        """
        if self.needs_no_buffer:
            return
        weight = self.new_weight(dtype, device)
        self.dequantize_into_(weight)
        self.resident_weight = weight  # Assign last, because another thread may read it.

    def dequantize_into_(self, weight: Tensor) -> None:
        """Write the frozen weights into their part of an extended weight."""
        frozen = weight[: self.out_features, : self.in_features]
        row = 0
        for kind, linears in groupby(self.linears, lambda linear: type(linear.quantized)):
            linears = list(linears)
            sizes = [linear.out_features for linear in linears]
            rows = frozen[row : row + sum(sizes)]
            row += sum(sizes)
            if issubclass(kind, QuantizedWeight):
                stacked = [linear.quantized for linear in linears]
                kind.dequantize_stacked(stacked, weight.dtype, out=rows)
            else:
                for linear, part in zip(linears, rows.split(sizes), strict=True):
                    linear.weight_as(weight.dtype, out=part)

    def lora_write_args(self, weight: Tensor) -> tuple[Tensor, list, int, int]:
        """Return the target with which `write_adapters_` writes A and B into an extended weight."""
        adapters = [(*linear.adapter(), linear.out_features) for linear in self.linears]
        return weight, adapters, self.out_features, self.in_features

    # ---- matmuls

    def forward_(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        out: Tensor | None = None,
        add_to: Tensor | None = None,
        saved_lora: Tensor | None = None,
        save_lora_to: Tensor | None = None,
    ) -> Tensor:
        """Return multiplier * y (N, out) of x (N, in + R), and fill the LoRA columns of x in place.

        weight: the extended weight, or a weight of decode steps, which fills no LoRA columns.
        out: destination of y (N, out).
        add_to: float32 (N, out) that y is added to instead.
        saved_lora: scaling * x A^T (N, R) from an earlier pass; None to compute it.
        save_lora_to: (N, R) that receives a copy of scaling * x A^T.
        """
        if isinstance(weight, Tensor):
            y = lora_linear_(
                x, weight, self.out_features, self.scaling, out, add_to, saved_lora, self.multiplier
            )
        else:
            y = weight.forward_(x, out, add_to)
        if save_lora_to is not None:
            save_lora_to.copy_(x[:, self.in_features :])
        first = 0
        for linear in self.linears:
            if linear.bias is not None:
                columns = y[:, first : first + linear.out_features]
                columns.add_(linear.bias.detach(), alpha=self.multiplier)
            first += linear.out_features
        return y

    def fill_lora_columns_(self, x: Tensor, weight: Tensor, saved_lora: Tensor | None) -> None:
        """Fill the LoRA columns of x (N, in + R) with scaling * x A^T, as `forward_` does.

        saved_lora: scaling * x A^T (N, R) from an earlier pass; None to compute it.
        """
        if saved_lora is not None:
            x[:, self.in_features :].copy_(saved_lora)
        elif self.lora_columns:
            fill_lora_columns_(x, weight[self.out_features :, : self.in_features], self.scaling)

    def backward_(
        self, dy: Tensor, weight: Tensor, out: Tensor | None = None, need_dx: bool = True
    ) -> Tensor | None:
        """Return dx (N, in) of dy (N, out + R), and fill the LoRA columns of dy in place.

        out: destination of dx.
        need_dx: if False, fill only the LoRA columns (for `gradients`) and return None.
        """
        return lora_linear_backward_(
            dy, weight, self.in_features, self.scaling, out, need_dx, self.multiplier
        )

    def gradients(self, dy: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return (dA, dB) of each adapted linear, in float32.

            dA = multiplier * (scaling * dy B)^T x     the LoRA columns of dy times x
            dB = multiplier * dy^T (scaling * x A^T)   dy times the LoRA columns of x

        dy, x: (N, out + R) and (N, in + R), with filled LoRA columns.
        """
        splits = [(linear.out_features, linear.rank) for linear in self.linears]
        return lora_gradients(dy, x, splits, self.multiplier)


def _empty(like: Tensor, columns: int) -> Tensor:
    """Return an empty (N, columns) with the rows, dtype and device of `like`."""
    return torch.empty((len(like), columns), dtype=like.dtype, device=like.device)


class LoraGradients:
    """The gradients of A and B, summed over the tiles of a layer.

    A fused linear whose adapters are all frozen gets none.
    """

    def __init__(self, fused_linears: Sequence[FusedLinear]):
        self._fused_linears = fused_linears
        self._trained = {fused for fused in fused_linears if fused.is_trained}
        self._sums: dict[FusedLinear, list[Tensor]] = {}

    def add(self, fused: FusedLinear, dy: Tensor, x: Tensor) -> None:
        """Add the part of one tile, dy (n, out + R) and x (n, in + R) with filled LoRA columns."""
        if fused not in self._trained:
            return
        gradients = [g for pair in fused.gradients(dy, x) for g in pair]
        if fused in self._sums:
            torch._foreach_add_(self._sums[fused], gradients)
        else:
            self._sums[fused] = gradients

    def in_turn(self) -> list[Tensor | None]:
        """Return dA and dB of each adapted linear in turn, or None in the place of each."""
        gradients: list[Tensor | None] = []
        for fused in self._fused_linears:
            gradients += self._sums.get(fused) or [None] * (2 * len(fused.adapted))
        return gradients
