"""The weights of decode steps on a GPU: read as they are stored, in NF4 or in 16 bit.

kernels/few_row_linear.py multiplies up to 64 rows straight from these weights. A and B of all
adapters are copied to 16 bit once, as training's extended weights hold them, and each row chooses
its adapter. A weight in another format (a GGUF file's) is dequantised at each step into memory that
all layers share.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minitune.kernels.backend import has_tensor_core_kernels, power_of_two
from minitune.kernels.few_row_linear import few_row_linear, few_row_logits
from minitune.kernels.few_row_weights import (
    BLOCKSIZE,
    FewRowAdapters,
    FewRowWeight,
    fits_few_rows,
)
from minitune.model.adapter_switch import Adapter, Branch
from minitune.model.linear import FusedLinear, Linear
from minitune.model.nf4 import NF4

MIN_RANK = 16  # of the kernel


def few_row_step_fits(model) -> bool:
    """Return True if steps of a model can read its weights as they are stored.

    The kernels need a GPU with tensor cores, 16 bit, and rows of whole NF4 blocks.
    """
    widths = {fused.in_features for fused in model.fused_linears()}
    return (
        model.device.type == "cuda"
        and model.dtype in (torch.bfloat16, torch.float16)
        and has_tensor_core_kernels(model.device)
        and all(width % BLOCKSIZE == 0 for width in (*widths, model.config.hidden_size))
    )


class FewRowStep:
    """The weights of all fused linears and of the head, as they are stored.

    adapters: the adapters that rows may use, none of them empty.
    adapter_of_row: int32 (slots,), the index of each row's adapter, or a negative number for none.
    head: (V, D), contiguous.
    """

    def __init__(self, model, adapters: Sequence[Adapter], adapter_of_row: Tensor, head: Tensor):
        self._head = head
        self._copies = AdapterCopies(model.dtype)
        scratch = _Scratch(model.dtype, model.device)
        codes: dict[int, tuple[float, ...]] = {}
        self._weights = {
            fused: FewRowFused(
                fused, self._copies.add(fused, adapters, adapter_of_row), scratch, codes
            )
            for fused in model.fused_linears()
        }
        self.refresh_()

    def __getitem__(self, fused: FusedLinear) -> "FewRowFused":
        return self._weights[fused]

    def logits(self, h: Tensor, multiplier: float) -> Tensor:
        """Return multiplier * h W^T of the head in float32 (rows, V), from h (rows, D)."""
        return few_row_logits(h, self._head, multiplier)

    def prefill_weights(self, adapter: Adapter) -> None:
        """Return None: prompts have many rows, for which each layer is dequantised."""

    def refresh_(self) -> None:
        """Copy the values of the adapters again."""
        self._copies.refresh_()


class AdapterCopies:
    """A and B of adapters in 16 bit, as the kernels read them."""

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self._sources: list[Tensor] = []
        self._targets: list[Tensor] = []

    def add(
        self, fused: FusedLinear, adapters: Sequence[Adapter], adapter_of_row: Tensor
    ) -> FewRowAdapters | None:
        """Return room for the branches of a fused linear, which `refresh_` fills.

        None if no adapter has a branch there.
        """
        branches = [
            (i, j, adapter[linear])
            for i, adapter in enumerate(adapters)
            for j, linear in enumerate(fused.linears)
            if linear in adapter
        ]
        if not branches:
            return None
        rank = power_of_two(max(MIN_RANK, *(_rank(branch) for _, _, branch in branches)))
        count, linears, device = len(adapters), len(fused.linears), adapter_of_row.device
        options = {"dtype": self._dtype, "device": device}
        a = torch.zeros((count, linears, rank, fused.in_features), **options)
        b = torch.zeros((count, fused.out_features, rank), **options)
        scaling = torch.zeros(count)
        for i, j, branch in branches:
            first = sum(linear.out_features for linear in fused.linears[:j])
            rows = slice(first, first + fused.linears[j].out_features)
            scaling[i] = branch.scaling
            self._sources += [branch.lora_A.weight.detach(), branch.lora_B.weight.detach()]
            self._targets += [a[i, j, : _rank(branch)], b[i, rows, : _rank(branch)]]
        return FewRowAdapters(a.flatten(0, 2), b, scaling.to(device), adapter_of_row)

    def refresh_(self) -> None:
        """Copy the values again."""
        if self._targets:
            torch._foreach_copy_(self._targets, self._sources)


def _rank(branch: Branch) -> int:
    """Return the rank of a branch."""
    return branch.lora_A.weight.shape[0]


class _Scratch:
    """Memory for a weight that is dequantised at each step, shared by all layers."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self._dtype, self._device = dtype, device
        self._weights: dict[tuple[int, int], Tensor] = {}

    def weight(self, shape: tuple[int, int]) -> Tensor:
        """Return the memory of a weight (out, in)."""
        if shape not in self._weights:
            self._weights[shape] = torch.empty(shape, dtype=self._dtype, device=self._device)
        return self._weights[shape]


class FewRowFused:
    """The weight of a fused linear for few rows, as FusedLinear.forward_ takes it."""

    def __init__(
        self,
        fused: FusedLinear,
        adapters: FewRowAdapters | None,
        scratch: _Scratch,
        codes: dict[int, tuple[float, ...]],
    ):
        self._fused, self._adapters = fused, adapters
        self._rounded: Tensor | None = None
        parts = tuple(_stored(linear) for linear in fused.linears)
        self._dequantised: Tensor | None = None  # memory, if no kernel reads the stored form
        if not _is_readable(parts, codes):
            shape = fused.out_features, fused.in_features
            self._dequantised = scratch.weight(shape)
            parts = self._dequantised.split([linear.out_features for linear in fused.linears])
        code = _code_of(parts[0], codes) if isinstance(parts[0], NF4) else ()
        self._weight = FewRowWeight(tuple(parts), code)

    def forward_(self, x: Tensor, out: Tensor | None, add_to: Tensor | None) -> Tensor:
        """Return multiplier * y (rows, out) of x (rows, in or more), without the bias.

        out, add_to: as in FusedLinear.forward_.
        """
        fused = self._fused
        if self._dequantised is not None:
            fused.dequantize_into_(self._dequantised)
        x = x[:, : fused.in_features]
        if add_to is not None:
            self._rounded = torch.empty(add_to.shape, dtype=x.dtype, device=x.device)
        options = fused.multiplier, out, add_to, self._rounded
        return few_row_linear(x, self._weight, self._adapters, *options)

    def take_rounded(self) -> Tensor | None:
        """Return the last `add_to` with y added (rows, out), rounded by the same launch, once.

        None if there is none.
        """
        rounded, self._rounded = self._rounded, None
        return rounded


def _stored(linear: Linear) -> nn.Module | Tensor:
    """Return the stored form of a linear's weight."""
    return linear.quantized if linear.is_quantized else linear.weight.detach()


def _is_readable(parts: Sequence, codes: dict[int, tuple[float, ...]]) -> bool:
    """Return True if the kernel reads all parts as they are stored: NF4 of one kind, or 16 bit."""
    kinds = set()
    for part in parts:
        is_nf4 = isinstance(part, NF4)
        if not (is_nf4 or isinstance(part, Tensor)) or not fits_few_rows(part):
            return False
        nested = is_nf4 and part.nested_absmax is not None and part.nested_blocksize
        kinds.add((is_nf4, nested, _code_of(part, codes) if is_nf4 else ()))
    return len(kinds) == 1


def _code_of(part: NF4, codes: dict[int, tuple[float, ...]]) -> tuple[float, ...]:
    """Return the values of the codes on the host.

    codes: the values by the address of the tensor, so that a shared tensor is fetched once.
    """
    key = part.code.data_ptr()
    if key not in codes:
        codes[key] = tuple(part.code.tolist())
    return codes[key]
