"""A micro-step, forward and backward of packed samples, without the autograd engine; on a GPU, as CUDA graphs.

    x = embedding;  x = layer(x) for each layer, keeping what its level says        graph 1
    loss, dx = final norm, head and cross entropy of the labelled rows              launched as it comes
    dx = layer.backward(dx) for each layer from the last, .grad += dA, dB           graph 2

Python takes 50 - 90 microseconds to launch a Triton kernel, and a micro-step has thousands: below some 4,000 tokens a
GPU waits for them. A CUDA graph is launched as one. What it replays are addresses and sizes, so tokens are padded to
one of eight sizes an octave (at most 1/8 more than there are, 1/16 on average), inputs are copied to where the graph
reads them, and gradients are added to the `.grad` that was there at the capture. The number of labelled rows varies
freely: the loss lies between the graphs.

A size is captured when it comes for the second time; the first time, it is launched plainly, which also compiles what
has to be. Padding is a sample of its own, or, behind a single sample, more of it: nobody sees it, and it has no label.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minitune.data import Batch
from minitune.kernels.launch import cdiv, power_of_two
from minitune.layers import Packed
from minitune.model import LlamaForCausalLM
from minitune.recompute import Activations

MOST_GRAPHS = 64


def padded_size(tokens: int) -> int:
    """The size that so many tokens are padded to: a multiple of an eighth of the power of two below, 64 at least."""
    step = max(power_of_two(tokens) // 16, 64)
    return cdiv(tokens, step) * step


def _padded(batch: Batch, size: int, longest: int) -> tuple[Tensor, Tensor]:
    """Ids and positions, (size,) each; no position reaches `longest`."""
    ids, positions = batch.input_ids, batch.position_ids
    more = size - len(ids)
    if more == 0:
        return ids, positions
    first = len(ids) if not positions[1:].eq(0).any() and size <= longest else 0
    padding = torch.arange(first, first + more) if first else torch.arange(more) % longest
    return torch.cat([ids, ids.new_zeros(more)]), torch.cat([positions, padding])


@dataclass
class _Captured:
    """Two graphs of one size, and what they read and write."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    inputs: Tensor  # int32 (4, N): ids, positions, start, end
    x: Tensor  # (N, D), the last layer's output
    dx: Tensor  # (N, D + R), as the last layer's backward wants it
    gradients: list[int]  # addresses


class MicroStep:
    """Adds the gradients of a batch to `.grad` of the model's adapters and returns its loss."""

    def __init__(self, model: LlamaForCausalLM, capture: bool = True):
        """capture=False launches everything as it comes; on a CPU there is no other way."""
        self.model = model
        self.capture = capture and model.device.type == "cuda"
        self._parameters = [layer.adapters() for layer in model.model.layers]
        self._seen: set[tuple] = set()
        self._captured: dict[tuple, _Captured] = {}
        self._pool: tuple | None = None

    @torch.no_grad()
    def __call__(self, batch: Batch, denominator: float) -> Tensor:
        """The batch's token losses over `denominator`, the targets of the whole optimizer step; 0-dim, on the device.

        Raises ValueError for tokens and labels that the model does not have.
        """
        model = self.model
        model.check(batch.input_ids, batch.position_ids)
        for parameters in self._parameters:
            for p in parameters:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
        size = padded_size(len(batch.input_ids)) if self.capture else len(batch.input_ids)
        ids, positions = _padded(batch, size, model.max_seq_length)
        host = Packed.from_positions(positions)
        rows, targets = (self._send(t) for t in model.labelled_rows(batch.labels, batch.position_ids))
        inputs = self._send(torch.stack([ids.int(), host.positions, host.start, host.end]))
        key = (size, *model.shared.about(host).values())
        lengths = host.length, host.longest
        with model.as_current_device():
            captured = self._graphs(key, lengths, inputs) if self.capture else None
            if captured is None:
                packed = Packed(*inputs[1:], *lengths)
                x, kept = self._forward(inputs[0], packed, model.levels(size))
                dx = self._new_dx(x)
            else:
                captured.inputs.copy_(inputs)
                captured.forward.replay()
                x, dx = captured.x, captured.dx.zero_()
            loss, d = model.labelled_loss(x, rows, targets, denominator)
            dx[:, : x.shape[1]].index_copy_(0, rows, d)
            if captured is None:
                self._backward(dx, kept, packed)
            else:
                captured.backward.replay()
        return loss

    def _send(self, host: Tensor) -> Tensor:
        """A copy on the model's device that the host does not wait for."""
        if self.model.device.type == "cpu":
            return host
        return host.pin_memory().to(self.model.device, non_blocking=True)

    def _new_dx(self, x: Tensor) -> Tensor:
        return self.model.model.layers[-1].down.new_output(x).zero_()

    def _forward(self, ids: Tensor, packed: Packed, levels: list[int]) -> tuple[Tensor, list[Activations]]:
        model, kept = self.model, []
        x = model.model.embed_tokens(ids, model.dtype)
        for layer, level in zip(model.model.layers, levels, strict=True):
            x, a = layer.run(x, packed, model.shared)
            kept.append(Activations(*a.kept(level)))
        return x, kept

    def _backward(self, dx: Tensor, kept: list[Activations], packed: Packed) -> None:
        """Uses up `kept`."""
        for i in reversed(range(len(kept))):
            layer = self.model.model.layers[i]
            dx, gradients = layer.backward(dx, kept.pop(), packed, self.model.shared, need_dx=i > 0)
            torch._foreach_add_([p.grad for p in self._parameters[i]], gradients)

    def _graphs(self, key: tuple, lengths: tuple, inputs: Tensor) -> _Captured | None:
        """The graphs of a size; None where it comes for the first time."""
        gradients = [p.grad.data_ptr() for parameters in self._parameters for p in parameters]
        captured = self._captured.get(key)
        if captured is not None and captured.gradients == gradients:
            return captured
        if key not in self._seen:
            self._seen.add(key)
            return None
        while len(self._captured) >= MOST_GRAPHS:
            del self._captured[next(iter(self._captured))]
        self._captured[key] = captured = self._capture(inputs.clone(), lengths, gradients)
        return captured

    def _capture(self, inputs: Tensor, lengths: tuple, gradients: list[int]) -> _Captured:
        """Record both graphs. They share their memory with those of other sizes: only one pair runs at a time."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what plain launches had in use is wanted by the graphs now
        packed, levels = Packed(*inputs[1:], *lengths), self.model.levels(inputs.shape[1])
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.Stream()):
            forward.capture_begin(pool=self._pool)
            x, kept = self._forward(inputs[0], packed, levels)
            forward.capture_end()
            self._pool = forward.pool()
            dx = self._new_dx(x)
            backward.capture_begin(pool=self._pool)
            self._backward(dx, kept, packed)
            backward.capture_end()
        torch.cuda.synchronize()
        return _Captured(forward, backward, inputs, x, dx, gradients)
