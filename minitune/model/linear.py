"""The frozen linear with its LoRA branch, and the linears that share an input as one matmul.

A decoder layer has seven linears and four matmuls: q, k, v are one, gate and up another. A matmul's extended weight,
which holds the adapters beside the frozen values (kernels/lora_linear.py), is written once a layer and pass into a
buffer that all layers share: dequantised weights of one layer exist at a time (8B in bf16: 0.44 GB), but for those that
are kept so on purpose (`resident`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minitune.config.training_config import LoraConfig
from minitune.kernels.dequantize import dequantize_nf4
from minitune.kernels.lora_linear import (
    fill_lora_columns_,
    lora_gradients,
    lora_linear_,
    lora_linear_backward_,
    padded_rank,
    write_adapters_,
)
from minitune.model.nf4 import NF4


class Linear(nn.Module):
    """A frozen linear, in NF4 or as stored, with an optional LoRA branch: y = W x + bias + s B A x.

    One of `nf4` and `weight` is set by the loader. A (R, in) and B (out, R) are fp32 parameters under PEFT's names,
    lora_A.weight and lora_B.weight. What multiplies is a Projection.
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

    @property
    def is_quantized(self) -> bool:
        return self.nf4 is not None

    @property
    def rank(self) -> int:
        return 0 if self.lora_A is None else self.lora_A.weight.shape[0]

    def weight_as(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The frozen weight in dtype (out, in), written into `out` where that is given."""
        if self.is_quantized:
            return self.nf4.dequantize(dtype, out)
        weight = self.weight.detach()
        return weight.to(dtype) if out is None else out.copy_(weight)

    def adapter(self) -> tuple[Tensor | None, Tensor | None]:
        """A (R, in) and B (out, R), or a pair of None."""
        if self.lora_A is None:
            return None, None
        return self.lora_A.weight.detach(), self.lora_B.weight.detach()

    def add_lora(self, lora: LoraConfig, device: torch.device, generator: torch.Generator) -> None:
        """Attach a branch that changes nothing yet: A as PEFT draws it (Kaiming uniform, a = sqrt 5), B zero."""
        self.lora_A = nn.Linear(
            self.in_features, lora.r, bias=False, device="meta", dtype=torch.float32
        )
        self.lora_B = nn.Linear(
            lora.r, self.out_features, bias=False, device="meta", dtype=torch.float32
        )
        bound = (
            self.in_features**-0.5
        )  # kaiming_uniform with a = sqrt 5: gain sqrt(1/3) times sqrt(3 / fan_in)
        a = torch.empty(lora.r, self.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A.weight = nn.Parameter(a.to(device))
        self.lora_B.weight = nn.Parameter(torch.zeros(self.out_features, lora.r, device=device))
        self.scaling = lora.scaling


class FusedLinear:
    """Linears that share an input, multiplied as one extended weight (out + R, in + R) (kernels/lora_linear.py).

    R, the columns to spare, holds the ranks of all their adapters; it is 0 where there is none. Inputs and gradients of
    outputs come in buffers that are R columns wider than what they hold.
    """

    def __init__(self, name: str, *linears: Linear):
        self.name, self.linears = name, linears
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        self.resident: Tensor | None = (
            None  # the extended weight, while it is kept beside the stored one
        )

    @property
    def adapted(self) -> list[Linear]:
        return [linear for linear in self.linears if linear.rank]

    @property
    def lora_columns(self) -> int:
        ranks = [linear.rank for linear in self.adapted]
        return padded_rank(sum(ranks), self.adapted[0].lora_A.weight.device.type) if ranks else 0

    @property
    def needs_no_buffer(self) -> bool:
        """Whether one linear in 16 or 32 bit without an adapter is all there is: it needs no buffer."""
        first = self.linears[0]
        return len(self.linears) == 1 and not first.rank and not first.is_quantized

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Of the extended weight, (out + R, in + R)."""
        return self.out_features + self.lora_columns, self.in_features + self.lora_columns

    @property
    def scaling(self) -> float:
        return max(
            linear.scaling for linear in self.linears
        )  # one LoraConfig: the same for all that are adapted

    def new_input(self, like: Tensor) -> Tensor:
        """An empty buffer (N, in + R), as many rows as `like`."""
        return torch.empty(
            (len(like), self.in_features + self.lora_columns), dtype=like.dtype, device=like.device
        )

    def new_output(self, like: Tensor) -> Tensor:
        """An empty buffer (N, out + R), as many rows as `like`."""
        return torch.empty(
            (len(like), self.out_features + self.lora_columns), dtype=like.dtype, device=like.device
        )

    def new_weight(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer for the extended weight, zero where neither W nor A nor B will stand."""
        return torch.zeros(self.weight_shape, dtype=dtype, device=device)

    def make_resident(self, dtype: torch.dtype, device: torch.device) -> None:
        """Have the extended weight beside the stored one, where that is another, until `resident` is None again."""
        if self.needs_no_buffer:
            return
        self.resident = self.new_weight(dtype, device)
        self.write_base(self.resident)

    def write_base(self, weight: Tensor) -> None:
        """The frozen weights into their place in an extended weight."""
        rows = weight[: self.out_features, : self.in_features]
        if all(linear.is_quantized for linear in self.linears):
            dequantize_nf4([linear.nf4 for linear in self.linears], weight.dtype, out=rows)
            return
        for linear, part in zip(
            self.linears, rows.split([n.out_features for n in self.linears]), strict=True
        ):
            linear.weight_as(weight.dtype, out=part)

    def adapters_for(self, weight: Tensor) -> tuple[Tensor, list, int, int]:
        """What `write_adapters_` is to write into an extended weight: the adapters as they are now."""
        adapters = [(*linear.adapter(), linear.out_features) for linear in self.linears]
        return weight, adapters, self.out_features, self.in_features

    def new_lora_activation(self, like: Tensor) -> Tensor | None:
        """An empty (N, R) for what x A^T gives, None where there is no adapter."""
        return (
            torch.empty((len(like), self.lora_columns), dtype=like.dtype, device=like.device)
            if self.lora_columns
            else None
        )

    def new_product(self, like: Tensor) -> Tensor:
        """An empty (N, out)."""
        return torch.empty((len(like), self.out_features), dtype=like.dtype, device=like.device)

    def multiply(
        self,
        x: Tensor,
        weight: Tensor,
        low: Tensor | None,
        known: bool,
        out: Tensor | None = None,
        total: Tensor | None = None,
    ) -> Tensor:
        """y (N, out) of x in its buffer (N, in + R), whose spare columns are filled on the way.

        out: where y goes; or total, fp32: what it is added to.
        low (N, R): what they are filled with where that is `known`, and otherwise a copy of it for later.
        """
        y = lora_linear_(
            x, weight, self.out_features, self.scaling, out, total, low if known else None
        )
        if low is not None and not known:
            low.copy_(x[:, self.in_features :])
        row = 0
        for linear in self.linears:
            if linear.bias is not None:
                y[:, row : row + linear.out_features] += linear.bias.detach().to(y.dtype)
            row += linear.out_features
        return y

    def fill(self, x: Tensor, weight: Tensor, low: Tensor | None, known: bool = True) -> None:
        """Fill the spare columns of x (N, in + R), where there are any, with `low` or, if it is not `known`, anew."""
        if known and low is not None:
            x[:, self.in_features :].copy_(low)
        elif low is not None:
            fill_lora_columns_(x, weight[self.out_features :, : self.in_features], self.scaling)

    def backward(
        self, dy: Tensor, weight: Tensor, out: Tensor | None = None, need_dx: bool = True
    ) -> Tensor | None:
        """dx (N, in) of dy in its buffer (N, out + R), whose spare columns are filled on the way."""
        return lora_linear_backward_(dy, weight, self.in_features, self.scaling, out, need_dx)

    def gradients(self, dy: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(dA, dB), fp32, of each adapted linear, from dy and x in their filled buffers."""
        return lora_gradients(
            dy, x, [(linear.out_features, linear.rank) for linear in self.linears]
        )


class DequantizedLayer:
    """The extended weights of one layer during one pass: all adapters at once, and each frozen weight at its first use.

    The buffers belong to the model: what the layer before left in them is overwritten.
    """

    def __init__(
        self,
        projections: Sequence[FusedLinear],
        buffers: dict[tuple, Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self._dtype = dtype
        self._weights = weight_buffers(projections, buffers, dtype, device)
        self._ready = {p for p in projections if p.resident is not None}
        write_adapters_(
            [p.adapters_for(weight) for p, weight in self._weights.items() if p.lora_columns]
        )

    def __getitem__(self, projection: FusedLinear) -> Tensor:
        if projection not in self._ready:
            if projection.needs_no_buffer:
                self._weights[projection] = projection.linears[0].weight_as(self._dtype)
            else:
                projection.write_base(self._weights[projection])
            self._ready.add(projection)
        return self._weights[projection]


def weight_buffers(
    projections: Sequence[FusedLinear],
    buffers: dict[tuple, Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[FusedLinear, Tensor]:
    """Where the extended weights of a layer stand or are to be written: in `buffers`, where missing ones are added."""
    weights = {}
    for p in projections:
        if p.needs_no_buffer:
            continue
        key = (p.name, p.lora_columns, dtype)
        if p.resident is None and key not in buffers:
            buffers[key] = p.new_weight(dtype, device)
        weights[p] = buffers[key] if p.resident is None else p.resident
    return weights
