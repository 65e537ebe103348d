"""Pinned host memory of exactly the size that is wanted, which a GPU copies from and to, and reads by itself.

torch's own pinned memory comes in powers of two.
"""

import contextlib
import re
import weakref
from pathlib import Path

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
        raise MemoryError(
            f"the host refuses to pin {memory.nbytes / 2**30:.2f} GiB of memory (CUDA error {code})"
        )
    global _most
    _sizes[memory.data_ptr()] = memory.nbytes
    _most = max(_most, sum(_sizes.values()))
    weakref.finalize(owner, _unpin, memory)


def _unpin(memory: Tensor) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
    _sizes.pop(memory.data_ptr(), None)


def to_device_async(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had: the GPU's own count; on the host what is available within the container's limit."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        allowed = int(total * torch.cuda.get_per_process_memory_fraction(device))
        return min(free + torch.cuda.memory_reserved(device), allowed) - allocated
    available = 4 << 30  # where the system does not say
    with contextlib.suppress(OSError):
        available = (
            int(re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
        )
    group = Path("/")
    with contextlib.suppress(OSError):
        group = Path(Path("/proc/self/cgroup").read_text().rsplit("::", 1)[-1].strip() or "/")
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
            files = Path("/sys/fs/cgroup") / folder.relative_to("/")
            limit, used = (
                int((files / f"memory.{name}").read_text()) for name in ("max", "current")
            )
            available = min(available, limit - used)
    return available
