"""The weights of decode steps on a CPU: float32, in the layouts that few rows read fastest.

A step reads all weights once, so its floor is the speed of the memory. The frozen weights are kept
in two layouts. Time of the four matmuls of 30 layers of SmolLM2-135M, one thread of a Xeon with
AVX-512, in November 2026:

                                        1 row     2 rows    8 rows    32 rows
    transposed, contiguous (in, out)    27 ms     41 ms     68 ms     85 ms
    packed by oneDNN                    38 ms     43 ms     50 ms     92 ms
    (out, in), as stored                31 ms     35 ms     80 ms     103 ms

So a single row takes the transposed layout, and a few rows the packed one, which any number of rows
can read. The packed sums of a row do not depend on the number of rows. The packed layout is built
at its first use.

Adapters are not part of the weights. Their A and B are read at each step, so a change of their
values needs no refresh:

    y = multiplier * (x W^T + scaling (x A^T) B^T)
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from minitune.device import free_memory
from minitune.model.adapter_switch import Adapter
from minitune.model.linear import FusedLinear

MAX_PACKED_ROWS = 64
SHARE_OF_MEMORY = 0.5  # of the free memory, that the weights may take
PACKING_ROWS = 8  # that oneDNN is told when it packs; other numbers of rows read the same layout

# Adapters and the rows that use each: all rows, or some.
AdaptersOfRows = Callable[[int], Sequence[tuple[Adapter, slice | list[int]]]]


def cpu_weights_fit(model) -> bool:
    """Return True if a model can decode with CpuWeights: in float32 on a CPU, within the memory."""
    if model.device.type != "cpu" or model.dtype != torch.float32:
        return False
    shapes = [(fused.out_features, fused.in_features) for fused in model.fused_linears()]
    elements = sum(map(math.prod, [*shapes, model.model.embed_tokens.shape]))
    nbytes = elements * model.dtype.itemsize * (2 if _can_pack() else 1)
    return nbytes < SHARE_OF_MEMORY * free_memory(model.device)


def _can_pack() -> bool:
    """Return True if PyTorch's oneDNN may pack weights and keeps float32 sums."""
    mkldnn = torch.backends.mkldnn
    return mkldnn.is_available() and mkldnn.enabled


class CpuWeights:
    """The frozen weights of all fused linears and of the head, beside adapters for each row.

    adapters: the adapters that rows may use.
    adapter_of_row: int32 (slots,), the index of each row's adapter, or a negative number for none.
    """

    def __init__(self, model, adapters: Sequence[Adapter], adapter_of_row: Tensor):
        self._adapters, self._adapter_of_row = adapters, adapter_of_row
        self._frozen = {fused: FrozenWeight(_base_of(fused)) for fused in model.fused_linears()}
        self._head = FrozenWeight(model.head().weight)
        self._weights = self._with_adapters(self._adapters_of)

    def __getitem__(self, fused: FusedLinear) -> "CpuWeight":
        return self._weights[fused]

    def logits(self, h: Tensor, multiplier: float) -> Tensor:
        """Return multiplier * h W^T of the head (rows, V), from h (rows, D)."""
        return self._head.product(h, None, multiplier)

    def refresh_(self) -> None:
        """Do nothing: the values of the adapters are read at each step."""

    def use_adapters_(self, adapters: Sequence[Adapter]) -> None:
        """Make these the adapters that rows may use."""
        self._adapters = adapters

    def prefill_weights(self, adapter: Adapter) -> Mapping[FusedLinear, "CpuWeight"]:
        """Return the weights with one adapter for all rows."""
        return self._with_adapters(lambda rows: [(adapter, slice(None))] if adapter else [])

    def _with_adapters(self, adapters_of: AdaptersOfRows) -> dict[FusedLinear, "CpuWeight"]:
        return {
            fused: CpuWeight(fused, frozen, adapters_of) for fused, frozen in self._frozen.items()
        }

    def _adapters_of(self, rows: int) -> Sequence[tuple[Adapter, slice | list[int]]]:
        """Return the adapters of the first rows, each with its rows."""
        if not self._adapters:
            return ()
        of_row = self._adapter_of_row[:rows].tolist()
        used = sorted(set(of_row))
        if len(used) == 1:
            return [(self._adapters[used[0]], slice(None))] if used[0] >= 0 else ()
        return [
            (self._adapters[index], [i for i, other in enumerate(of_row) if other == index])
            for index in used
            if index >= 0
        ]


def _base_of(fused: FusedLinear) -> Tensor:
    """Return the frozen weight of a fused linear in float32 (out, in)."""
    weight = torch.empty(fused.out_features, fused.in_features)
    fused.dequantize_into_(weight)
    return weight


class FrozenWeight:
    """A weight (out, in) in float32, in the layouts of this file."""

    def __init__(self, weight: Tensor):
        self._transposed = weight.t().contiguous()  # (in, out)
        self._packed: Tensor | None = None
        self._can_pack = _can_pack()

    def product(
        self, x: Tensor, out: Tensor | None, multiplier: float, add_to: Tensor | None = None
    ) -> Tensor:
        """Return multiplier * x W^T (N, out) of x (N, in).

        out: destination of the product.
        add_to: (N, out) that the product is added to instead.
        """
        if 1 < x.shape[0] <= MAX_PACKED_ROWS and self._can_pack:
            y = self._packed_product(x)
            if add_to is not None:
                return add_to.add_(y, alpha=multiplier)
            if multiplier != 1:
                y.mul_(multiplier)
            return y if out is None else out.copy_(y)
        if add_to is not None:
            return add_to.addmm_(x, self._transposed, alpha=multiplier)
        if out is None and multiplier == 1:
            return torch.mm(x, self._transposed)
        if out is None:
            out = x.new_empty(x.shape[0], self._transposed.shape[1])
        return torch.addmm(out, x, self._transposed, beta=0, alpha=multiplier, out=out)

    def _packed_product(self, x: Tensor) -> Tensor:
        """Return x W^T (N, out) from the packed layout."""
        ops = torch.ops.mkldnn
        if self._packed is None:
            self._packed = ops._reorder_linear_weight(self._transposed.t(), PACKING_ROWS)
        return ops._linear_pointwise(x, self._packed, None, "none", [], "")


class CpuWeight:
    """A fused linear as FusedLinear.forward_ runs it: a frozen weight and adapters."""

    def __init__(self, fused: FusedLinear, frozen: FrozenWeight, adapters_of: AdaptersOfRows):
        self._fused, self._frozen, self._adapters_of = fused, frozen, adapters_of

    def forward_(self, x: Tensor, out: Tensor | None, add_to: Tensor | None) -> Tensor:
        """Return multiplier * y (N, out) of x (N, in or more), without the bias.

        out: destination of y.
        add_to: (N, out) that y is added to instead.
        """
        x = x[:, : self._fused.in_features]
        y = self._frozen.product(x, out, self._fused.multiplier, add_to)
        for adapter, rows in self._adapters_of(x.shape[0]):
            self._add_adapter_(y, x, adapter, rows)
        return y

    def _add_adapter_(self, y: Tensor, x: Tensor, adapter: Adapter, rows: slice | list) -> None:
        """Add the branches of an adapter to some rows of y (N, out)."""
        first = 0
        for linear in self._fused.linears:
            columns = y[:, first : first + linear.out_features]
            first += linear.out_features
            if linear not in adapter:
                continue
            lora_A, lora_B, scaling = adapter[linear]
            u = x[rows] @ lora_A.weight.detach().t()  # (n, r)
            factor, b = scaling * self._fused.multiplier, lora_B.weight.detach().t()
            if isinstance(rows, slice):
                columns.addmm_(u, b, alpha=factor)
            else:
                columns[rows] += factor * (u @ b)
