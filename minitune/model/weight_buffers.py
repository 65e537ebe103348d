"""The extended weights of the layer that runs, in buffers that all layers of a model share."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from minitune.kernels.lora_linear import write_adapters_
from minitune.model.linear import FusedLinear


class WeightBuffers:
    """The buffers for the extended weights of one layer, which all layers of a model share.

    lock: held during every pass over a layer, so that no other thread overwrites the weights. The
        autograd engine runs the backward of CUDA tensors in a thread of its own, so forward and
        backward take the lock separately. A lock orders launches, not streams: threads that use
        one model on a GPU must launch on the same CUDA stream.
    """

    def __init__(self):
        self.lock = threading.RLock()
        self._buffers: dict[tuple, Tensor] = {}

    def __reduce__(self):
        """Copy and pickle as an object without buffers; a lock cannot be copied."""
        return WeightBuffers, ()

    def __len__(self) -> int:
        return len(self._buffers)

    def clear(self) -> None:
        """Free the buffers. They hold parts of the adapters, so another adapter needs new ones."""
        with self.lock:
            self._buffers.clear()

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Return a context with new buffers, as another adapter needs them."""
        with self.lock:
            buffers, self._buffers = self._buffers, {}
            try:
                yield
            finally:
                self._buffers = buffers

    def allocate(
        self, fused_linears: Sequence[FusedLinear], dtype: torch.dtype, device: torch.device
    ) -> dict[FusedLinear, Tensor]:
        """Return the buffer of each fused linear that needs one; allocate the missing buffers."""
        buffers = {}
        for fused in fused_linears:
            if fused.needs_no_buffer:
                continue
            key = (fused.name, fused.lora_columns, dtype)
            if key not in self._buffers:
                self._buffers[key] = fused.new_weight(dtype, device)
            buffers[fused] = self._buffers[key]
        return buffers


class DequantizedLayer:
    """The extended weights of one layer during one pass.

    The adapters are written at once, and each frozen weight at its first use. The weights stand in
    shared buffers, so they are valid until the next pass begins.
    """

    def __init__(
        self,
        fused_linears: Sequence[FusedLinear],
        buffers: WeightBuffers,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self._dtype = dtype
        resident = {fused: fused.resident_weight for fused in fused_linears}
        self._ready = {fused for fused, weight in resident.items() if weight is not None}
        missing = [fused for fused in fused_linears if fused not in self._ready]
        self._weights = resident | buffers.allocate(missing, dtype, device)
        adapted = [fused for fused in fused_linears if fused.lora_columns]
        write_adapters_([fused.lora_write_args(self._weights[fused]) for fused in adapted])

    def __getitem__(self, fused: FusedLinear) -> Tensor:
        if fused not in self._ready:
            if fused.needs_no_buffer:
                self._weights[fused] = fused.linears[0].weight_as(self._dtype)
            else:
                fused.dequantize_into_(self._weights[fused])
            self._ready.add(fused)
        return self._weights[fused]
