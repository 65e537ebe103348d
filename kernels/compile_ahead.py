"""Compilation of kernels before their first launch, side by side in threads.

Triton compiles a kernel at its first launch. A training step has about 25 kernels. One after the
other they take 11 s on the host of an H100 (November 2026). Triton's passes, ptxas and the C
compiler run without Python's lock, so threads compile on all cores while the weights load.

    compile_ahead(rehearse, device)     runs `rehearse` in a thread of its own
    a launch in that thread             hands its kernel to the other threads, and runs nothing
    a launch in any other thread        waits for the kernels of the rehearsal

`rehearse` launches kernels on tensors of the meta device, which have shapes and strides but no
data. A meta tensor stands for a tensor on a GPU whose memory begins at a multiple of 16 bytes.

Results do not depend on this file. A kernel that no rehearsal launched compiles at its launch. A
failure here is a warning.
"""

import contextlib
import os
import subprocess
import warnings
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextvars import ContextVar, copy_context
from threading import Semaphore

import torch

from .optional_triton import triton

MAX_THREADS = 16
NEEDED = (
    "it needs a C compiler with a linker ($CC, gcc or clang), and a cache folder that can be "
    "written ($TRITON_CACHE_DIR)"
)

_is_rehearsal: ContextVar[bool] = ContextVar("is_rehearsal", default=False)
_pools: list["CompilePool"] = []


def stands_for_gpu(x: torch.Tensor) -> bool:
    """Return True if x is a meta tensor of a rehearsal."""
    return x.is_meta and _is_rehearsal.get()


if triton is not None:

    class Kernel(triton.JITFunction):
        """A kernel whose launches run nothing in a rehearsal."""

        def run(self, *args, grid, warmup, **kwargs):
            """Launch the kernel, and compile it before if that has not been done.

            Raises: ValueError if this machine lacks what Triton needs to compile.
            """
            if _is_rehearsal.get():
                warmup = True
            else:
                finish_compiling()
            try:
                return super().run(*args, grid=grid, warmup=warmup, **kwargs)
            except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and "C compiler" not in str(error):
                    raise
                raise ValueError(
                    f"Triton could not compile the kernel {self.__name__} ({error}); {NEEDED}"
                ) from error


def jit(function: Callable) -> Callable:
    """Decorate a kernel; this is triton.jit with compilation ahead of the launch."""
    if triton is None:
        return function
    return triton.jit(function) if triton.knobs.runtime.interpret else Kernel(function)


class CompilePool(ThreadPoolExecutor):
    """Threads that compile the kernels of one rehearsal and load them onto one GPU.

    `submit` waits until a thread is idle. So no kernel is queued, and the interpreter exits when
    the running threads have finished their kernels.
    """

    def __init__(self, device: torch.device, warn: Callable[[str], None]):
        threads = min(os.cpu_count() or 1, MAX_THREADS)
        super().__init__(threads + 1, "compile-ahead")  # one more for the rehearsal
        self._idle = Semaphore(threads)
        self._device, self._warn = device, warn

    def start(self, rehearse: Callable[[], None]) -> None:
        """Run `rehearse` in one of the threads."""
        self._rehearsal = super().submit(copy_context().run, self._rehearse, rehearse)
        self._rehearsal.add_done_callback(self._warn_of_failure)
        self._rehearsal.add_done_callback(lambda _: self.shutdown(wait=False))

    def finish(self) -> None:
        """Wait for the rehearsal and for its kernels."""
        wait([self._rehearsal])

    def submit(self, compile_kernel: Callable) -> Future:
        """Compile a kernel in an idle thread; Triton calls this at a launch of the rehearsal."""
        self._idle.acquire()
        try:
            kernel = super().submit(self._compile_and_load, compile_kernel)
        except RuntimeError as error:  # the interpreter exits
            raise CancelledError from error
        kernel.add_done_callback(lambda _: self._idle.release())
        kernel.add_done_callback(self._warn_of_failure)
        return kernel

    def _rehearse(self, rehearse: Callable[[], None]) -> None:
        _is_rehearsal.set(True)
        # The mode's end waits for all kernels. Errors are reported by `_warn_of_failure`.
        with (
            triton.AsyncCompileMode(self, ignore_errors=True),
            torch.cuda.device(self._device),
        ):
            rehearse()

    def _compile_and_load(self, compile_kernel: Callable) -> object:
        kernel = compile_kernel()
        with torch.cuda.device(self._device):
            # Building the launcher runs the C compiler in Triton 3.6.
            _ = kernel.run
        return kernel

    def _warn_of_failure(self, future: Future) -> None:
        error = future.exception()
        if error is not None and not isinstance(error, CancelledError):
            kind = type(error).__name__
            self._warn(f"a kernel was not compiled ahead of its launch: {kind}: {error}")


def compile_ahead(
    rehearse: Callable[[], None],
    device: torch.device,
    warn: Callable[[str], None] = warnings.warn,
) -> None:
    """Begin to compile the kernels that `rehearse` launches, for a GPU, and return at once.

    rehearse: launches kernels on tensors of the meta device.
    warn: called with a text if a kernel cannot be compiled.
    """
    pool = CompilePool(device, warn)
    pool.start(rehearse)
    _pools.append(pool)


def finish_compiling() -> None:
    """Wait until all kernels are compiled that rehearsals have launched or will launch.

    Loading a kernel from another thread would end the capture of a CUDA graph with an error.
    """
    for pool in tuple(_pools):
        pool.finish()
        with contextlib.suppress(ValueError):  # another thread has waited as well
            _pools.remove(pool)
