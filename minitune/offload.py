"""What layers keep for backward, in host memory: copied out while the next layer runs, and back one layer ahead.

    forward     layer 0 | layer 1      | layer 2      | ...            the stream that computes
                          layer 0 out    layer 1 out                   a stream of its own
    backward    layer 2      | layer 1      | layer 0
    layer 2 in  layer 1 in     layer 0 in

One pinned arena of exactly the size that is needed holds all of it, each layer in its own place, so the copies can be
part of a CUDA graph. A tensor that leaves is let go of when its copy is done, which the stream that computes waits for
after one more layer: two layers' tensors are on the device at most.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minitune.pinned import pin
from minitune.recompute import Activations

ALIGN = 512  # bytes


def room(tensors: tuple[Tensor | None, ...]) -> int:
    """Bytes of the arena that these take."""
    return sum(-(-t.nbytes // ALIGN) * ALIGN for t in tensors if t is not None)


@dataclass
class _Stored:
    """A layer's tensors in the arena, and those on the device while they are copied there."""

    places: tuple[Tensor | None, ...]
    returned: tuple[Tensor | None, ...] = ()


class Offload:
    """Takes what layers keep, in forward order, and gives it back in backward order."""

    def __init__(self, nbytes: int, device: torch.device):
        """Raises MemoryError where the host does not have, or does not pin, so much memory."""
        self._device = device
        try:
            self._arena = torch.empty(max(nbytes, ALIGN), dtype=torch.uint8)
        except RuntimeError as error:
            raise MemoryError(f"the host has no {nbytes / 2**30:.2f} GiB of memory") from error
        if device.type == "cuda":
            pin(self._arena, self)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.reset()

    @property
    def nbytes(self) -> int:
        return len(self._arena)

    @property
    def address(self) -> int:
        return self._arena.data_ptr()

    def reset(self) -> None:
        """Begin anew with an empty arena."""
        self._used, self._stored, self._leaving = 0, {}, None

    def put(self, index: int, a: Activations) -> None:
        """Copy out what layer `index` keeps, after `settle`."""
        tensors, places = a.tensors(), []
        if self._used + room(tensors) > self.nbytes:
            raise ValueError(f"an arena of {self.nbytes} bytes has no room for layer {index}: plan with more")
        for t in tensors:
            places.append(None if t is None else self._place(t))
        self._stored[index] = _Stored(tuple(places))
        self._copy(tensors, places)
        self._leaving = tensors

    def settle(self) -> None:
        """Let go of the tensors that left last, when they have left."""
        if self._leaving is not None and self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._leaving = None

    def fetch(self, index: int) -> None:
        """Begin to copy layer `index` back."""
        stored = self._stored[index]
        stored.returned = tuple(None if t is None else torch.empty_like(t, device=self._device) for t in stored.places)
        self._copy(stored.places, stored.returned)

    def take(self, index: int) -> Activations:
        """What layer `index` kept, for which `fetch` is best called some time before."""
        if not self._stored[index].returned:
            self.fetch(index)
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        return Activations(*self._stored.pop(index).returned, known=True)

    def _place(self, t: Tensor) -> Tensor:
        place = self._arena[self._used : self._used + t.nbytes].view(t.dtype).view(t.shape)
        self._used += room((t,))
        return place

    def _copy(self, sources, targets) -> None:
        """On the side stream, after all that the stream that computes has been given so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for source, target in zip(sources, targets, strict=True):
                if source is not None:
                    target.copy_(source, non_blocking=True)
