"""Decode steps as CUDA graphs, one for each number of rows and width of the page table.

A step of an 8B model has several hundred launches. Python takes longer for them than the GPU for
the step, so the host launches a graph with a single call.

Rows are padded to a power of two. The padding reads and writes page 0. A graph reads and writes the
buffers of the engine at fixed addresses, and the weights and pages of the model, so it is dropped
with any of them. The first step of a size runs eagerly, which compiles its kernels too, and is
captured afterwards. All graphs share one pool: none of them leaves results there.
"""

import contextlib
from collections.abc import Callable
from functools import cache

import torch

from minitune.device import free_memory, gc_disabled
from minitune.progress import warn

CAPTURE_RESERVE = 256 << 20  # bytes that must be free for a capture: tensors and stored launches

_disabled = False  # after a capture failed, because PyTorch's allocators are poisoned then


class DecodeGraphs:
    """The captured steps of one set of buffers."""

    def __init__(self):
        self._graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph | None] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: tuple[int, ...], step: Callable[[], None], device: torch.device) -> None:
        """Run the step of a size, by its graph if there is one; otherwise capture it too.

        step: launches the step, which reads and writes tensors outside the pool only.
        """
        if self._graphs.get(key) is not None:
            self._graphs[key].replay()
            return
        step()
        if _disabled or free_memory(device) < CAPTURE_RESERVE:
            return
        torch.cuda.synchronize(device)
        with gc_disabled(), torch.cuda.stream(_capture_stream(device)):
            self._graphs[key] = _captured(step, self._pool)


def _captured(step: Callable[[], None], pool: tuple[int, int]) -> torch.cuda.CUDAGraph | None:
    """Return the launches of `step` as a graph; None, with a warning, if the capture fails."""
    global _disabled
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads may allocate meanwhile.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        step()
        graph.capture_end()
        return graph
    except BaseException as error:
        _disabled = True
        with contextlib.suppress(RuntimeError):  # the capture must end, or every launch fails
            graph.capture_end()
        reason = " ".join(str(error).split())[:300] or "it was interrupted"
        warn(
            f"capturing a decode step failed ({reason}); generation runs without CUDA graphs from "
            "now on, which is slower; start a new process to have them again",
            stacklevel=2,
        )
        if not isinstance(error, RuntimeError):
            raise
        return None  # no launch of a failed capture has run


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all captures of a GPU."""
    return torch.cuda.Stream(device)
