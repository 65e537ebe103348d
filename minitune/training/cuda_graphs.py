"""Micro-steps as CUDA graphs, and the memory that they run in.

Python takes tens of microseconds to launch a Triton kernel, and a micro-step has thousands: below some 4,000 tokens a
GPU waits for them (an H200 in November 2026, 8B, 950 tokens: 155 ms, and 73 as graphs). A CUDA graph is launched as
one: forward is one, backward another. What they replay are addresses and sizes, so tokens are padded to one of four
sizes an octave (multiples of 64; at most 1/4 more than there are, or 63), inputs are copied to where the graphs read
them, and gradients are added to the `.grad` that was there at the capture. The number of labelled rows varies freely:
the loss lies between the graphs.

A micro-step of a new size is launched plainly, which also compiles what has to be, and captured after that; so the
first of a size takes about twice the time of plain launches. Where a capture fails, a warning says why, and everything
is launched plainly from then on, in the whole process: PyTorch's allocators (2.11) do not recover from it. Plain
launches and graphs of all sizes share one pool of memory: one micro-step runs at a time. One that is larger than all
before begins with a new pool and no graphs, for memory that was cut for smaller tensors is of no use to it. The loss
has its logits in the pool too, where the layers keep nothing meanwhile.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minitune.kernels.backend import cdiv, power_of_two
from minitune.memory.plan import Plan
from minitune.model.linear import weight_buffers
from minitune.model.packed_sequences import PackedSequences

if TYPE_CHECKING:
    from minitune.training.micro_step import MicroStep

MOST_SIZES = 64
MOST_TOKENS = 32768  # of a size: longer ones are launched plainly and unpadded, the GPU being slower than any host


def bucket_size(tokens: int) -> int:
    """The size that so many tokens are padded to: a multiple of a quarter of the power of two below, 64 at least."""
    step = max(power_of_two(tokens) // 8, 64)
    return cdiv(tokens, step) * step


@dataclass
class CapturedStep:
    """The graphs of one size, and what they read."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    inputs: Tensor  # int32 (4, N): ids, positions, start, end
    stream: Tensor  # (N, D), what the layers' forward ends with
    tile: Tensor  # (rows, V), for the logits between forward and backward
    addresses: list[int]


class UnownedTensor:
    """Where a tensor is, without a claim to that memory: in a graph's pool it is there as long as the graph."""

    def __init__(self, t: Tensor):
        self._shape, self._dtype, self._device = t.shape, t.dtype, t.device
        data = (t.data_ptr(), False)
        self.__cuda_array_interface__ = {
            "shape": (t.nbytes,),
            "typestr": "|u1",
            "data": data,
            "version": 3,
        }

    def tensor(self) -> Tensor:
        return torch.as_tensor(self, device=self._device).view(self._dtype).view(self._shape)


@contextlib.contextmanager
def _recording(pool: tuple[int, int]) -> Iterator[torch.cuda.CUDAGraph]:
    """Captures what is launched within."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool)
    try:
        yield graph
    except BaseException:
        CUDAGraphCache.failure = "a capture was interrupted"
        with contextlib.suppress(
            RuntimeError
        ):  # a stream that is not joined; left open, all that follows would fail
            graph.capture_end()
        raise
    graph.capture_end()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's garbage collector, for to free another graph's memory would end a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all graphs, for cuBLAS has 32 MiB for each stream, and keeps it."""
    return torch.cuda.Stream(device)


class CUDAGraphCache:
    """The captured sizes of one MicroStep, and the memory that all of them run in."""

    failure: str | None = None  # why a capture failed in this process

    def __init__(self, device: torch.device):
        self._stream = _stream(device)
        with torch.cuda.stream(self._stream):  # cuBLAS's memory, before a plan counts what there is
            torch.cuda.current_blas_handle()
        self._captured: dict[tuple, CapturedStep] = {}
        self._pool: torch.cuda.MemPool | None = None
        self._top: Tensor | None = None  # of the largest size; smaller ones take its first rows

    def forget(self) -> None:
        """Give up all graphs and their memory, where there are any."""
        if self._pool is None:
            return
        self._captured.clear()
        self._pool = self._top = None
        torch.cuda.empty_cache()

    def run(
        self,
        micro_step: "MicroStep",
        inputs: Tensor,
        packed: PackedSequences,
        loss_of: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The loss that `loss_of(s, top, tile)` finds between forward and backward, with its logits in `tile`."""
        size = inputs.shape[1]
        key = size, *micro_step.model.shared.attention_kwargs(packed).values()
        captured = self._captured.get(key)
        if captured is not None and captured.addresses == micro_step.addresses():
            captured.inputs.copy_(inputs)
            captured.forward.replay()
            loss = loss_of(captured.stream, self._top[:size], captured.tile)
            captured.backward.replay()
            return loss
        plan = self._make_room(micro_step, packed)
        top, packed = self._top[:size], plan.select_attention(packed)
        with self.own_memory():
            s, kept = micro_step.forward(inputs, packed, plan)
            tile = micro_step.model.new_logits_buffer(size)
        loss = loss_of(s, top, tile)
        del s, tile  # their memory is backward's now
        with self.own_memory():
            micro_step.backward(top, kept, packed, plan)
        try:
            self._captured[key] = self._capture(micro_step, inputs, packed, top, plan)
        except RuntimeError as error:  # nothing that was launched in a capture has run
            self.forget()
            CUDAGraphCache.failure = f"capturing a micro-step of {size} tokens failed ({' '.join(str(error).split())[:300]})"
        return loss

    def _make_room(self, micro_step: "MicroStep", packed: PackedSequences) -> Plan:
        """A plan, a pool and a `top` for these samples, and nothing cached beside the pool that it could use."""
        largest, size = 0 if self._top is None else len(self._top), len(packed.positions)
        grows = size > largest
        if grows or len(self._captured) >= MOST_SIZES:
            self.forget()
            model = micro_step.model
            last = model.model.layers[
                -1
            ].projections  # the first layers' may be dequantised already
            weight_buffers(last, model.shared.weights, model.dtype, model.device)
            self._top, self._pool = (
                micro_step.new_residual_gradient(max(size, largest)),
                torch.cuda.MemPool(),
            )
        counted = self._top[:size].nbytes
        if not grows:
            plan = micro_step.planner.plan_for(micro_step.model, packed, counted)
        else:  # the largest step says how much room there is for dequantised weights
            plan = micro_step.planner.plan_for(
                micro_step.model,
                packed,
                counted + micro_step.dense_bytes,
                allow_resident_weights=True,
            )
            micro_step.make_resident(plan.resident_layers)
        torch.cuda.empty_cache()
        return plan

    @contextlib.contextmanager
    def own_memory(self) -> Iterator[None]:
        """Launch on the graphs' stream, with memory from their pool; as ever while there is none."""
        if self._pool is None:
            yield
            return
        outside = torch.cuda.current_stream()
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool):
                yield
        finally:
            outside.wait_stream(self._stream)

    def _capture(
        self,
        micro_step: "MicroStep",
        inputs: Tensor,
        packed: PackedSequences,
        top: Tensor,
        plan: Plan,
    ) -> CapturedStep:
        torch.cuda.synchronize()
        with _no_collection(), torch.cuda.stream(self._stream):
            with _recording(self._pool.id) as forward:
                s, kept = micro_step.forward(inputs, packed, plan)
            with torch.cuda.use_mem_pool(self._pool):
                tile = micro_step.model.new_logits_buffer(len(s))
            places = [UnownedTensor(t).tensor() for t in (s, tile)]
            del s, tile
            with _recording(self._pool.id) as backward:
                micro_step.backward(top, kept, packed, plan)
        torch.cuda.synchronize()
        return CapturedStep(forward, backward, inputs, *places, micro_step.addresses())
