"""Pinned host memory of exactly the size that is wanted, which a GPU copies from and to, and reads by itself.

torch's own pinned memory comes in powers of two.
"""

import weakref

import torch
from torch import Tensor

MAPPED = 2  # cudaHostRegisterMapped: kernels can be given its address

_sizes: dict[int, int] = {}  # bytes by address


def pinned_bytes() -> int:
    """How much is pinned now."""
    return sum(_sizes.values())


def pin(memory: Tensor, owner: object) -> None:
    """Pin a host tensor's memory for as long as `owner` is there. MemoryError where the host refuses."""
    if code := int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, MAPPED)):
        raise MemoryError(f"the host refuses to pin {memory.nbytes / 2**30:.2f} GiB of memory (CUDA error {code})")
    _sizes[memory.data_ptr()] = memory.nbytes
    weakref.finalize(owner, _unpin, memory)


def _unpin(memory: Tensor) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
    _sizes.pop(memory.data_ptr(), None)
