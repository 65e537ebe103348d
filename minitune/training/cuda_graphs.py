"""The pass as CUDA graphs, captured once for each size and replayed from then on.

Python takes tens of microseconds to launch a Triton kernel, and a micro-step has thousands.
Below about 4,000 tokens a micro-step is launch-bound: the GPU waits for these launches. An H200
(November 2026, 8B, 950 tokens) takes 155 ms eagerly and 73 ms with graphs. The host launches a
graph with a single call. One graph holds the forward pass, another the backward pass.

A slow host is launch-bound at more tokens too. Therefore micro-steps of up to MAX_CAPTURED_TOKENS
tokens are captured. Above this limit the GPU takes longer than any host.

Graphs replay fixed addresses and sizes. Therefore

- tokens are padded to a multiple of 64, one of four sizes between two powers of two; the padding is
  at most a quarter of the tokens, or 63 tokens;
- inputs are copied to the tensor that the graph reads;
- the graph adds gradients to the `.grad` tensors that existed when it was captured.

The loss lies between the two graphs, so the number of labelled rows may vary freely.

The first micro-step of a size runs eagerly, which also compiles its kernels, and is captured
afterwards: it takes about twice the time of an eager step.

Memory: eager passes and graphs of all sizes share one pool, because one micro-step runs at a time.
A micro-step larger than all before starts a new pool and drops all graphs, because the allocator
has split the old pool's blocks for smaller tensors, and larger tensors do not fit into them. The
buffers of the loss lie in the pool too, because no layer runs during the loss.

A capture that fails poisons PyTorch's allocators (2.11) for the process: everything is launched
eagerly from then on, and a warning says why. So a capture begins only if there is room for it.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from minitune.device import free_memory, gc_disabled, gib_text
from minitune.kernels.backend import cdiv, power_of_two
from minitune.memory.plan import Plan
from minitune.model.loss import LossBuffers
from minitune.model.packed_sequences import PackedSequences
from minitune.progress import warn
from minitune.training.forward_backward import ForwardBackward, LossFunction

MAX_CAPTURED_SIZES = 64
# Larger micro-steps run eagerly and unpadded, because the GPU takes longer than any host.
MAX_CAPTURED_TOKENS = 32768
# Retries of a step or a capture that lacks memory, each with a smaller plan.
MAX_SMALLER_PLANS = 4
ADVICE = (
    "to keep CUDA graphs, lower micro_step_tokens, or memory_budget if "
    "use_gradient_checkpointing is 'unsloth'"
)

_disabled_reason: str | None = None


def capture_disabled_reason() -> str | None:
    """Return why nothing can be captured in this process any more, or None if captures work."""
    return _disabled_reason


def _disable_capture(reason: str) -> None:
    global _disabled_reason
    _disabled_reason = reason


def bucket_size(tokens: int) -> int:
    """Return the size that `tokens` tokens are padded to.

    It is a multiple of an eighth of the next power of two, and at least 64.
    """
    step = max(power_of_two(tokens) // 8, 64)
    return cdiv(tokens, step) * step


def capture_reserve(pool_bytes: int) -> int:
    """Return the free bytes that a capture needs beside a pool of `pool_bytes` bytes.

    A capture allocates the tensors of the eager pass once more, from the blocks which that pass
    left in the pool. The blocks may fit together less well: a 64th of the pool is allowed for that.
    The driver stores some thousand kernel launches: 64 MiB are allowed for them.
    """
    return pool_bytes // 64 + (64 << 20)


class CaptureKey(NamedTuple):
    """The sizes that are fixed in a graph."""

    tokens: int
    uniform_seqlen: int | None
    max_seqlen: int | None


@dataclass
class CapturedStep:
    """The two graphs of one size, and the tensors that they read and write.

    inputs: ids, positions, start and end, int32 (4, N).
    residual: the residual stream (N, D) at the end of forward.
    loss_buffers: for the loss between forward and backward.
    pointers: `ForwardBackward.captured_pointers` at the capture.
    """

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    inputs: Tensor
    residual: Tensor
    loss_buffers: LossBuffers
    pointers: list[int]


class UnownedTensor:
    """The address of a tensor in a graph's pool.

    It does not keep the memory allocated. The address is valid as long as the graph exists.
    """

    def __init__(self, t: Tensor):
        self._shape = t.shape
        self._dtype = t.dtype
        self._device = t.device
        self.__cuda_array_interface__ = {
            "shape": (t.nbytes,),
            "typestr": "|u1",
            "data": (t.data_ptr(), False),
            "version": 3,
        }

    def tensor(self) -> Tensor:
        """Return a tensor at this address."""
        return torch.as_tensor(self, device=self._device).view(self._dtype).view(self._shape)


@contextlib.contextmanager
def _record_graph(pool: tuple[int, int]) -> Iterator[torch.cuda.CUDAGraph]:
    """Capture the launches of the `with` block in a graph."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool)
    try:
        yield graph
    except BaseException:
        _disable_capture("a capture was interrupted")
        # The capture must end, or every later launch fails. It ends with an error if another
        # stream has not been joined.
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        raise
    graph.capture_end()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of all graphs: cuBLAS keeps a workspace of 32 MiB for each stream."""
    return torch.cuda.Stream(device)


class CUDAGraphCache:
    """The captured sizes of one `ForwardBackward`, and the memory that they share."""

    def __init__(self, passes: ForwardBackward):
        self._passes = passes
        self._stream: torch.cuda.Stream | None = None
        self._captured: dict[CaptureKey, CapturedStep] = {}
        self._pool: torch.cuda.MemPool | None = None
        # The gradient of the residual stream at the largest size. Smaller sizes use its first rows.
        self._dresidual: Tensor | None = None
        self._smaller_plans = 0
        self._no_room: str | None = None

    @property
    def disabled_reason(self) -> str | None:
        """Why this cache captures nothing any more, or None."""
        return capture_disabled_reason() or self._no_room

    def prepare(self) -> None:
        """Allocate cuBLAS's workspace on the graphs' stream, before a plan counts the memory."""
        self._stream = _capture_stream(self._passes.model.device)
        with torch.cuda.stream(self._stream):
            torch.cuda.current_blas_handle()

    def clear(self) -> None:
        """Drop all graphs and free their memory."""
        if self._pool is None:
            return
        self._captured.clear()
        self._pool = self._dresidual = None
        torch.cuda.empty_cache()

    def run(self, inputs: Tensor, packed: PackedSequences, compute_loss: LossFunction) -> Tensor:
        """Replay the graphs of this size, or run eagerly and capture them; return the loss.

        inputs: ids and `tensors()` of the samples, int32 (4 or more, N), on the device.
        """
        size = inputs.shape[1]
        key = CaptureKey(size, **self._passes.model.layer_context.attention_kwargs(packed))
        captured = self._captured.get(key)
        if captured is not None and captured.pointers == self._passes.captured_pointers():
            captured.inputs.copy_(inputs)
            captured.forward.replay()
            loss = compute_loss(captured.residual, self._dresidual[:size], captured.loss_buffers)
            captured.backward.replay()
            return loss
        plan = self._prepare_pool(packed)
        dresidual = self._dresidual[:size]
        loss = self._passes.run(inputs, packed, plan, compute_loss, dresidual, self.memory_pool)
        if missing := self._missing_memory():
            self._make_room(size, missing)
            return loss
        try:
            self._captured[key] = self._capture(
                inputs, plan.select_attention(packed), dresidual, plan
            )
        except RuntimeError as error:  # no launch of a failed capture has run
            self.clear()
            message = " ".join(str(error).split())[:300]
            advice = f"; {ADVICE}" if _is_out_of_memory(error) else ""
            _disable_capture(f"capturing a micro-step of {size} tokens failed ({message}){advice}")
        return loss

    @contextlib.contextmanager
    def memory_pool(self) -> Iterator[None]:
        """Launch on the graphs' stream and allocate from their pool, if there is a pool."""
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

    def _prepare_pool(self, packed: PackedSequences) -> Plan:
        """Return a plan for these samples; provide a pool and a gradient buffer for it.

        A micro-step larger than all before gets a new pool. Its plan says how many weights stay
        dequantised. No memory is left cached outside the pool, because the pool cannot use it.
        """
        passes = self._passes
        largest = 0 if self._dresidual is None else len(self._dresidual)
        size = len(packed.positions)
        grows = size > largest
        if grows or len(self._captured) >= MAX_CAPTURED_SIZES:
            self.clear()
            passes.allocate_weight_buffers()
            self._dresidual = passes.new_residual_gradient(max(size, largest))
            self._pool = torch.cuda.MemPool()
        already_allocated = self._dresidual[:size].nbytes
        if grows:
            already_allocated += passes.resident_bytes
        plan = passes.planner.plan_for(
            passes.model, packed, already_allocated, allow_resident_weights=grows
        )
        if grows:
            passes.keep_resident(plan.resident_layers)
        torch.cuda.empty_cache()
        return plan

    def _missing_memory(self) -> int:
        """Return how many bytes the GPU lacks for a capture, or 0 if there is room.

        Memory that the allocator has cached outside the pool does not count: a capture can neither
        use nor free it.
        """
        device = self._passes.model.device
        needed = capture_reserve(sum(segment["total_size"] for segment in self._pool.snapshot()))
        if _unreserved_memory(device) < needed:
            torch.cuda.empty_cache()
        return max(0, needed - _unreserved_memory(device))

    def _make_room(self, size: int, missing: int) -> None:
        """Drop all graphs and plan the next micro-step with less memory.

        If that is not possible, say in `disabled_reason` that this cache captures nothing any more.
        """
        self.clear()
        planner = self._passes.planner
        device = self._passes.model.device
        shortage = (
            f"{device} lacks {missing / 2**20:.0f} MiB to capture a micro-step of {size} tokens"
        )
        if planner.level is not None or self._smaller_plans == MAX_SMALLER_PLANS:
            self._no_room = f"{shortage}; {ADVICE}"
            return
        self._smaller_plans += 1
        # A sixteenth of the limit is added for the gaps between the blocks of the new pool.
        less = missing + planner.memory_limit(device) // 16
        before, after = planner.plan_with_less(device, less)
        warn(
            f"{shortage}; planning with {gib_text(after)} from now on, "
            f"not {gib_text(before)} ({ADVICE})",
            stacklevel=2,
        )

    def _capture(
        self, inputs: Tensor, packed: PackedSequences, dresidual: Tensor, plan: Plan
    ) -> CapturedStep:
        """Capture the pass in two graphs, in the pool."""
        passes = self._passes
        torch.cuda.synchronize()
        with gc_disabled(), torch.cuda.stream(self._stream):
            with _record_graph(self._pool.id) as forward:
                s, saved = passes.forward(inputs, packed, plan)
            with torch.cuda.use_mem_pool(self._pool):
                buffers = passes.model.new_loss_buffers(len(s))
            residual = UnownedTensor(s).tensor()
            unowned = (t if t is None else UnownedTensor(t).tensor() for t in buffers)
            loss_buffers = LossBuffers(*unowned)
            del s, buffers  # backward uses their memory, as in the eager pass
            with _record_graph(self._pool.id) as backward:
                passes.backward(dresidual, saved, packed, plan)
        torch.cuda.synchronize()
        pointers = passes.captured_pointers()
        return CapturedStep(forward, backward, inputs, residual, loss_buffers, pointers)


def _unreserved_memory(device: torch.device) -> int:
    """Return the bytes that the allocator may still take from the driver."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_memory(device) - cached


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
