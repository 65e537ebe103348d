"""The weights of decode steps on a CPU: float32, in the layouts that few rows read fastest.

A step reads all weights once, so its floor is the speed of the memory. The frozen weights are kept
in several layouts. Time of all products of a step of SmolLM2-135M, two threads of a Xeon with
AVX-512, medians of ten in turn, 27 November 2026:

                                     1 row   3 rows  4 rows  8 rows  12 rows  16 rows  32 rows
    transposed, contiguous (in, out)  22 ms   28 ms   32 ms   54 ms    50 ms    56 ms    73 ms
    packed by MKL for 8 rows                  32 ms   32 ms   35 ms
    packed by MKL for 16 rows                 39 ms   40 ms   45 ms    39 ms    40 ms
    packed by oneDNN                  33 ms   29 ms   30 ms   40 ms    39 ms    47 ms    66 ms

So 5 to 16 rows take a layout packed by MKL, for which they are filled up to 8 or 16 rows, and all
others the transposed one. A packed layout is built at its first use, if the memory had room for it.
oneDNN's is not used: its sums run longer, so its errors against float64 are 1.4 times those of a
training step's products.

Adapters are not part of the weights. Their A and B are read at each step, so a change of their
values needs no refresh:

    y = multiplier * (x W^T + scaling (x A^T) B^T)
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from minitune.device import free_memory
from minitune.model.adapter_switch import Adapter
from minitune.model.linear import FusedLinear

SHARE_OF_MEMORY = 0.5  # of the free memory, that the weights may take
MIN_PACKED_ROWS = 5  # fewer rows take the transposed layout
PACKINGS = (8, 16)  # the numbers of rows that MKL packs for

# Adapters and the rows that use each: all rows, or some.
AdaptersOfRows = Callable[[int], Sequence[tuple[Adapter, slice | list[int]]]]


def cpu_weights_fit(model) -> bool:
    """Return True if a model can decode with CpuWeights: in float32 on a CPU, within the memory."""
    if model.device.type != "cpu" or model.dtype != torch.float32:
        return False
    return _layouts_that_fit(model) >= 1


def _layouts_that_fit(model) -> int:
    """Return the number of layouts for which the memory has room."""
    shapes = [(fused.out_features, fused.in_features) for fused in model.fused_linears()]
    elements = sum(map(math.prod, [*shapes, model.model.embed_tokens.shape]))
    room = SHARE_OF_MEMORY * free_memory(model.device)
    return int(room // (elements * model.dtype.itemsize))


def _can_pack() -> bool:
    """Return True if PyTorch has the products of weights that MKL packed."""
    return torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")


class CpuWeights:
    """The frozen weights of all fused linears and of the head, beside adapters for each row.

    adapters: the adapters that rows may use.
    adapter_of_row: int32 (slots,), the index of each row's adapter, or a negative number for none.
    """

    def __init__(self, model, adapters: Sequence[Adapter], adapter_of_row: Tensor):
        self._adapters, self._adapter_of_row = adapters, adapter_of_row
        packings = PACKINGS[: max(_layouts_that_fit(model) - 1, 0)] if _can_pack() else ()
        self._frozen = {
            fused: FrozenWeight(_base_of(fused), packings) for fused in model.fused_linears()
        }
        self._head = FrozenWeight(model.head().weight, packings)
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
    """A weight (out, in) in float32, in the layouts of this file.

    packings: the numbers of rows that it may be packed for, in ascending order.
    """

    def __init__(self, weight: Tensor, packings: Sequence[int]):
        self._transposed = weight.t().contiguous()  # (in, out)
        self._packed: dict[int, Tensor] = {}  # by the rows that they are packed for
        self._packings = packings

    def product(
        self, x: Tensor, out: Tensor | None, multiplier: float, add_to: Tensor | None = None
    ) -> Tensor:
        """Return multiplier * x W^T (N, out) of x (N, in).

        out: destination of the product.
        add_to: (N, out) that the product is added to instead.
        """
        if self._packings and MIN_PACKED_ROWS <= x.shape[0] <= self._packings[-1]:
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
        """Return x W^T (N, out) of few rows from a packed layout."""
        N, weight = x.shape[0], self._transposed.t()
        rows = next(rows for rows in self._packings if rows >= N)
        if rows not in self._packed:
            self._packed[rows] = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
        if rows > N:
            x = functional.pad(x, (0, 0, 0, rows - N))
        return torch.ops.mkl._mkl_linear(x, self._packed[rows], weight, None, rows)[:N]


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
