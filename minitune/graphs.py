"""A micro-step, forward and backward of packed samples, without the autograd engine; on a GPU, as CUDA graphs.

    x = embedding;  x = layer(x) for each layer, keeping what its level says        graph 1
    loss, dx = final norm, head and cross entropy of the labelled rows              launched as it comes
    dx = layer.backward(dx) for each layer from the last, .grad += dA, dB           graph 2

Python takes tens of microseconds to launch a Triton kernel, and a micro-step has thousands: below some 4,000 tokens a
GPU waits for them (an H200 in November 2026, 8B, 950 tokens: 155 ms, and 73 as graphs). A CUDA graph is launched as
one. What it replays are addresses and sizes, so tokens are padded to one of four sizes an octave (multiples of 64; at
most 1/4 more than there are, or 63), inputs are copied to where the graph reads them, and gradients are added to the
`.grad` that was there at the capture. The number of labelled rows varies freely: the loss lies between the graphs.
Padding is a sample of its own, or, behind a single sample, more of it: nobody sees it, and it has no label.

A micro-step of a new size is launched plainly, which also compiles what has to be, and captured after that; so the
first of a size takes about twice the time of plain launches. Plain launches and graphs of all sizes share one pool of
memory: one micro-step runs at a time. One that is larger than all before begins with a new pool and no graphs, for
memory that was cut for smaller tensors is of no use to it.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minitune.data import Batch
from minitune.kernels.launch import cdiv, power_of_two
from minitune.layers import Packed
from minitune.linear import LayerWeights
from minitune.model import LlamaForCausalLM
from minitune.recompute import Activations

MOST_GRAPHS = 64


def padded_size(tokens: int) -> int:
    """The size that so many tokens are padded to: a multiple of a quarter of the power of two below, 64 at least."""
    step = max(power_of_two(tokens) // 8, 64)
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


class MicroStep:
    """Adds the gradients of a batch to `.grad` of the model's adapters and returns its loss."""

    def __init__(self, model: LlamaForCausalLM, capture: bool = True):
        """capture=False launches everything as it comes; on a CPU there is no other way."""
        self.model = model
        self._parameters = [layer.adapters() for layer in model.model.layers]
        self._graphs = _Graphs(model.device) if capture and model.device.type == "cuda" else None

    @torch.no_grad()
    def __call__(self, batch: Batch, denominator: float) -> Tensor:
        """The batch's token losses over `denominator`, the targets of the whole optimizer step; 0-dim, on the device.

        Raises ValueError for tokens and labels that the model does not have.
        """
        model = self.model
        model.check(batch.input_ids, batch.position_ids)
        rows, targets = (self._send(t) for t in model.labelled_rows(batch.labels, batch.position_ids))
        for parameters in self._parameters:
            for p in parameters:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)

        def loss_into(dx: Tensor, x: Tensor) -> Tensor:
            loss, d = model.labelled_loss(x, rows, targets, denominator)
            dx[:, : x.shape[1]].index_copy_(0, rows, d)
            return loss

        with model.as_current_device():
            if self._graphs is None:
                inputs, about = self._inputs(batch, len(batch.input_ids))
                x, kept = self.forward(inputs, about)
                dx = self.new_dx(x)
                loss = loss_into(dx, x)
                del x
                self.backward(dx, kept, inputs, about)
                return loss
            return self._graphs.run(self, *self._inputs(batch, padded_size(len(batch.input_ids))), loss_into)

    def _inputs(self, batch: Batch, size: int) -> tuple[Tensor, dict]:
        """Ids, positions, start and end, int32 (4, size) on the device, and what attention is told about lengths."""
        ids, positions = _padded(batch, size, self.model.max_seq_length)
        host = Packed.from_positions(positions)
        inputs = self._send(torch.stack([ids.int(), host.positions, host.start, host.end]))
        return inputs, self.model.shared.about(host)

    def _send(self, host: Tensor) -> Tensor:
        """A copy on the model's device that the host does not wait for."""
        if self.model.device.type == "cpu":
            return host
        return host.pin_memory().to(self.model.device, non_blocking=True)

    def new_dx(self, x: Tensor) -> Tensor:
        """Zeros (N, D + R): where the gradient of the last layer's output x (N, D) goes."""
        return self.model.model.layers[-1].down.new_output(x).zero_()

    def forward(self, inputs: Tensor, about: dict, levels: list[int] | None = None) -> tuple[Tensor, list[Activations]]:
        """The last layer's output (N, D), and what each layer keeps."""
        model, kept, packed = self.model, [], Packed(*inputs[1:], **about)
        x = model.model.embed_tokens(inputs[0], model.dtype)
        for layer, level in zip(model.model.layers, levels or model.levels(len(x)), strict=True):
            x, a = layer.run(x, packed, model.shared)
            kept.append(Activations(*a.kept(level)))
            del a  # 8B at 4096 tokens: 0.4 GB that the next layer would otherwise find in use
        return x, kept

    def backward(self, dx: Tensor, kept: list[Activations], inputs: Tensor, about: dict) -> None:
        """From dx of `new_dx`. Uses up `kept`."""
        packed = Packed(*inputs[1:], **about)
        for i in reversed(range(len(kept))):
            layer = self.model.model.layers[i]
            dx, gradients = layer.backward(dx, kept.pop(), packed, self.model.shared, need_dx=i > 0)
            torch._foreach_add_([p.grad for p in self._parameters[i]], gradients)

    def gradients(self) -> list[int]:
        """Where the gradients are."""
        return [p.grad.data_ptr() for parameters in self._parameters for p in parameters]


@dataclass
class _Captured:
    """Two graphs of one size, and what they read and write."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    inputs: Tensor  # int32 (4, N): ids, positions, start, end
    x: Tensor  # (N, D), the last layer's output
    dx: Tensor  # (N, D + R), as the last layer's backward wants it
    gradients: list[int]  # addresses


class _Graphs:
    """The captured sizes of one MicroStep, and the memory that all of them run in."""

    def __init__(self, device: torch.device):
        self._captured: dict[tuple, _Captured] = {}
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.MemPool()
        self._largest = 0

    def run(
        self, micro_step: MicroStep, inputs: Tensor, about: dict, loss_into: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """The loss that `loss_into(dx, x)` finds between forward and backward."""
        key = inputs.shape[1], *about.values()
        captured = self._captured.get(key)
        if captured is not None and captured.gradients == micro_step.gradients():
            captured.inputs.copy_(inputs)
            captured.forward.replay()
            loss = loss_into(captured.dx.zero_(), captured.x)
            captured.backward.replay()
            return loss
        model = micro_step.model
        LayerWeights(model.shared.weights, model.dtype, model.device).reserve(model.model.layers[0].projections)
        if inputs.shape[1] > self._largest or len(self._captured) >= MOST_GRAPHS:
            self._captured.clear()
            self._pool, self._largest = torch.cuda.MemPool(), inputs.shape[1]
        levels = model.levels(inputs.shape[1])
        with self._own_memory():
            x, kept = micro_step.forward(inputs, about, levels)
        dx = micro_step.new_dx(x)
        loss = loss_into(dx, x)
        del x
        with self._own_memory():
            micro_step.backward(dx, kept, inputs, about)
        self._captured[key] = self._capture(micro_step, inputs, about, levels, dx)
        return loss

    @contextlib.contextmanager
    def _own_memory(self) -> Iterator[None]:
        """Launch on the graphs' stream, with memory from their pool."""
        outside = torch.cuda.current_stream()
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            torch.cuda.current_blas_handle()
            with torch.cuda.use_mem_pool(self._pool):
                yield
        outside.wait_stream(self._stream)

    def _capture(self, micro_step: MicroStep, inputs: Tensor, about: dict, levels: list[int], dx: Tensor) -> _Captured:
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        gc.collect()  # freeing another graph's memory meanwhile would end the capture
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            forward.capture_begin(pool=self._pool.id)
            x, kept = micro_step.forward(inputs, about, levels)
            forward.capture_end()
            backward.capture_begin(pool=self._pool.id)
            micro_step.backward(dx, kept, inputs, about)
            backward.capture_end()
        torch.cuda.synchronize()
        return _Captured(forward, backward, inputs, x, dx, micro_step.gradients())
