"""Decode steps as CUDA graphs, one for each number of rows and width of the page table.

A step of an 8B model has several hundred launches. Python takes longer for them than the GPU for
the step, so the host launches a graph with a single call.

Rows are padded to a power of two. The padding reads and writes page 0. A graph reads and writes the
buffers of the engine at fixed addresses, and the weights and pages of the model, so it is dropped
with any of them. The first step of a size runs eagerly, which compiles its kernels too, and is
captured afterwards. All graphs share one pool: none of them leaves results there.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from functools import cache

import torch

from minitune.device import free_memory
from minitune.progress import warn

CAPTURE_RESERVE = 256 << 20  # bytes that must be free for a capture: tensors and stored launches

_disabled = False  # after a capture failed, because PyTorch's allocators are poisoned then


class DecodeGraphs:
    """The captured steps of one set of buffers."""

    def __init__(self):
        self._graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: tuple[int, ...], step: Callable[[], None], device: torch.device) -> None:
        """Run the step of a size, by its graph if there is one; otherwise capture it too.

        step: launches the step, which reads and writes tensors outside the pool only.
        """
        if key in self._graphs:
            self._graphs[key].replay()
            return
        step()
        if _disabled or free_memory(device) < CAPTURE_RESERVE:
            return
        torch.cuda.synchronize(device)
        try:
            with _gc_disabled(), torch.cuda.stream(_capture_stream(device)):
                graph = _captured(step, self._pool)
        except RuntimeError as error:  # no launch of a failed capture has run
            message = " ".join(str(error).split())[:300]
            warn(
                f"capturing a decode step failed ({message}); generation runs without CUDA graphs "
                "from now on, which is slower; start a new process to have them again",
                stacklevel=2,
            )
            return
        self._graphs[key] = graph


def _captured(step: Callable[[], None], pool: tuple[int, int]) -> torch.cuda.CUDAGraph:
    """Return the launches of `step` as a graph."""
    global _disabled
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool)
    try:
        step()
    except BaseException:
        _disabled = True
        with contextlib.suppress(RuntimeError):  # the capture must end, or every launch fails
            graph.capture_end()
        raise
    graph.capture_end()
    return graph


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all captures of a GPU."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _gc_disabled() -> Iterator[None]:
    """Disable garbage collection: freeing another graph's memory would abort the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
