"""Pinned host memory of exactly the size that is wanted, which a GPU copies from and to, and reads by itself.

torch's own pinned memory comes in powers of two.
"""

import contextlib
import weakref

import torch
from torch import Tensor

MAPPED = 2  # cudaHostRegisterMapped: kernels can be given its address

_sizes: dict[int, int] = {}  # bytes by address
_most = 0


def most_pinned() -> int:
    """Bytes that were pinned here at most."""
    return _most


def pin(memory: Tensor, owner: object) -> None:
    """Pin a host tensor's memory for as long as `owner` is there. MemoryError where the host refuses."""
    if code := int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, MAPPED)):
        with contextlib.suppress(RuntimeError):  # the next launch would be told of it
            torch.zeros(1, device="cuda")
        raise MemoryError(f"the host refuses to pin {memory.nbytes / 2**30:.2f} GiB of memory (CUDA error {code})")
    global _most
    _sizes[memory.data_ptr()] = memory.nbytes
    _most = max(_most, sum(_sizes.values()))
    weakref.finalize(owner, _unpin, memory)


def _unpin(memory: Tensor) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
    _sizes.pop(memory.data_ptr(), None)
