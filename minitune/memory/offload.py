"""What layers keep for backward, in host memory: copied out while later layers run, and back one layer ahead.

    forward     layer 0 | layer 1      | layer 2      | ...            the stream that computes
                          layer 0 out    layer 1 out                   a stream of its own
    backward    layer 2      | layer 1      | layer 0
    layer 2 in  layer 1 in     layer 0 in

One pinned arena of exactly the size that is needed holds all of it, each layer in its own place, so the copies can be
part of a CUDA graph. A tensor that leaves is let go of when its copy is done. The stream that computes waits for that
where the next layer needs the memory, and no sooner: a layer may take longer to copy than to run, as long as there is
room for the tensors that wait (`Plan.leaving`).
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minitune.device import pin
from minitune.model.activations import Activations

ALIGN = 512  # bytes


def aligned_nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the arena that these take."""
    return sum(-(-t.nbytes // ALIGN) * ALIGN for t in tensors)


@dataclass
class _Stored:
    """A layer's tensors by name, in the arena and on the device that they are copied back to."""

    places: dict[str, Tensor]
    returned: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Leaving:
    """Tensors on the device until they have been copied out, and when that is."""

    tensors: list[Tensor]
    nbytes: int
    done: torch.cuda.Event | None


class ActivationOffloader:
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
        self._used, self._stored = 0, {}
        self._leaving: deque[_Leaving] = deque()

    def offload(self, index: int, a: Activations) -> None:
        """Begin to copy out what layer `index` keeps."""
        named = a.tensors()
        tensors = list(named.values())
        if self._used + aligned_nbytes(tensors) > self.nbytes:
            raise ValueError(
                f"an arena of {self.nbytes} bytes has no room for layer {index}: plan with more"
            )
        places = {name: self._place(t) for name, t in named.items()}
        self._stored[index] = _Stored(places)
        self._copy(tensors, places.values())
        done = None if self._stream is None else self._stream.record_event()
        self._leaving.append(_Leaving(tensors, aligned_nbytes(tensors), done))

    def wait_until_in_flight(self, nbytes: int) -> None:
        """Let go of the tensors that left first, when they have left, until the others take `nbytes` at most."""
        while sum(leaving.nbytes for leaving in self._leaving) > nbytes:
            first = self._leaving.popleft()
            if first.done is not None:
                torch.cuda.current_stream().wait_event(first.done)

    def prefetch(self, index: int) -> None:
        """Begin to copy layer `index` back."""
        stored = self._stored[index]
        stored.returned = {
            name: torch.empty_like(t, device=self._device) for name, t in stored.places.items()
        }
        self._copy(stored.places.values(), stored.returned.values())

    def restore(self, index: int) -> Activations:
        """What layer `index` kept, for which `fetch` is best called some time before."""
        if not self._stored[index].returned:
            self.prefetch(index)
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        return Activations(**self._stored.pop(index).returned)

    def _place(self, t: Tensor) -> Tensor:
        place = self._arena[self._used : self._used + t.nbytes].view(t.dtype).view(t.shape)
        self._used += aligned_nbytes((t,))
        return place

    def _copy(self, sources, targets) -> None:
        """On the side stream, after all that the stream that computes has been given so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
