"""Saved activations in pinned host memory: copied out behind forward, and back ahead of backward.

    forward     layer 0 | layer 1     | layer 2     | ...         the compute stream
                          copy 0 out    copy 1 out                the copy stream

    backward    layer 2 | layer 1 | layer 0                       the compute stream
    copy 2 in   copy 1 in   copy 0 in                             the copy stream

One pinned arena has exactly the planned size. Each layer has its own place in the arena, so a CUDA
graph can capture the copies. A layer's GPU tensors are in flight until their copy is done. The
compute stream waits for a copy only if the next layer needs the memory: a layer may take longer to
copy than to run, as long as the tensors in flight have room (`Plan.in_flight_limit`).
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minitune.device import gib_text, pin
from minitune.model.activations import Activations

ALIGN = 512  # bytes; every tensor begins at a multiple of it


def aligned_nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that these tensors take in the arena."""
    return sum(-(-t.nbytes // ALIGN) * ALIGN for t in tensors)


@dataclass
class _OffloadedLayer:
    """A layer's tensors by name: in the arena, and back on the GPU once they are prefetched."""

    on_host: dict[str, Tensor]
    on_gpu: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _InFlight:
    """GPU tensors of a layer that are being copied out, and the event at the end of the copy."""

    tensors: list[Tensor]
    nbytes: int
    copied: torch.cuda.Event | None  # None on a CPU, which copies at once


class ActivationOffloader:
    """The pinned arena of one model: layers are offloaded in forward order, restored in reverse."""

    def __init__(self, nbytes: int, device: torch.device):
        """Allocate an arena of `nbytes` bytes for activations on `device`.

        Raises: MemoryError if the host lacks the memory or refuses to pin it.
        """
        self._device = device
        try:
            self._arena = torch.empty(max(nbytes, ALIGN), dtype=torch.uint8)
        except RuntimeError as error:
            raise MemoryError(f"the host has no {gib_text(nbytes)} of memory") from error
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            pin(self._arena, self)
            self._stream = torch.cuda.Stream(device)
        self.reset()

    @property
    def nbytes(self) -> int:
        """Return the size of the arena in bytes."""
        return len(self._arena)

    @property
    def address(self) -> int:
        """Return the address of the arena."""
        return self._arena.data_ptr()

    def reset(self) -> None:
        """Empty the arena."""
        self._used_bytes = 0
        self._offloaded: dict[int, _OffloadedLayer] = {}
        self._in_flight: deque[_InFlight] = deque()

    def offload(self, layer: int, a: Activations) -> None:
        """Start to copy the activations of a layer to the host.

        Raises: ValueError if the arena has no room for them.
        """
        named = a.tensors()
        tensors = list(named.values())
        nbytes = aligned_nbytes(tensors)
        free = self.nbytes - self._used_bytes
        if nbytes > free:
            raise ValueError(
                f"an arena of {self.nbytes} bytes has no room for layer {layer}, which offloads "
                f"{nbytes} bytes: {free} are left; plan with more host_bytes"
            )
        on_host = {name: self._next_place(t) for name, t in named.items()}
        self._offloaded[layer] = _OffloadedLayer(on_host)
        self._copy(tensors, on_host.values())
        copied = None if self._stream is None else self._stream.record_event()
        self._in_flight.append(_InFlight(tensors, nbytes, copied))

    def wait_until_in_flight(self, max_bytes: int) -> None:
        """Free the GPU tensors of the oldest copies until at most `max_bytes` are in flight.

        The compute stream waits for these copies; the host does not.
        """
        while sum(layer.nbytes for layer in self._in_flight) > max_bytes:
            oldest = self._in_flight.popleft()
            if oldest.copied is not None:
                torch.cuda.current_stream().wait_event(oldest.copied)

    def prefetch(self, layer: int) -> None:
        """Start to copy the activations of an offloaded layer back to the GPU."""
        offloaded = self._offloaded[layer]
        offloaded.on_gpu = {
            name: torch.empty_like(t, device=self._device) for name, t in offloaded.on_host.items()
        }
        self._copy(offloaded.on_host.values(), offloaded.on_gpu.values())

    def restore(self, layer: int) -> Activations:
        """Return the activations of an offloaded layer, which `prefetch` should have started on."""
        if not self._offloaded[layer].on_gpu:
            self.prefetch(layer)
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        return Activations(**self._offloaded.pop(layer).on_gpu)

    def _next_place(self, t: Tensor) -> Tensor:
        """Return the next free part of the arena, with the shape and dtype of `t`."""
        begin = self._used_bytes
        self._used_bytes += aligned_nbytes([t])
        return self._arena[begin : begin + t.nbytes].view(t.dtype).view(t.shape)

    def _copy(self, sources: Iterable[Tensor], targets: Iterable[Tensor]) -> None:
        """Copy on the copy stream, after everything that the compute stream has launched so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
