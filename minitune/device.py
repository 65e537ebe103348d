"""The device: its choice, free memory, pinned memory, asynchronous copies, and captures.

torch allocates pinned host memory in powers of two. `pin` pins exactly the memory of a given tensor
instead, and maps it, so that kernels can read it over the bus.
"""

import contextlib
import gc
import os
import re
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minitune.cgroups import cgroup_folders
from minitune.kernels.optional_triton import check_triton

CUDA_HOST_REGISTER_MAPPED = 2  # flag of cudaHostRegister: gives the memory a device address
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (7, 5)  # of a GPU, for Triton's kernels and 16-bit tensor cores
BFLOAT16_CAPABILITY = (8, 0)
UNKNOWN_HOST_MEMORY = 4 << 30  # bytes that are assumed if the system does not report them

_pinned: dict[int, int] = {}  # address -> bytes
_most_pinned = 0


def check_torch_defaults() -> None:
    """Check that PyTorch makes tensors in float32 and on the host unless told otherwise.

    Raises: ValueError if torch.set_default_dtype or torch.set_default_device changed that.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    if dtype != torch.float32:
        raise ValueError(
            f"torch's default dtype is {dtype}; call torch.set_default_dtype(torch.float32), and "
            "choose the model's dtype with from_pretrained(dtype=...)"
        )
    if device.type != "cpu":
        raise ValueError(
            f"torch's default device is {device}; call torch.set_default_device(None), and choose "
            "the model's device with from_pretrained(device=...)"
        )


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """Return a device that can be used; a CUDA device always has an index.

    device: cpu, cuda or cuda:N; None chooses a GPU if there is one.

    Raises: ValueError if the device is not supported or not there, or if a GPU has no Triton or is
        older than MIN_CAPABILITY.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(
            f"device {device!r} does not exist; choose cpu, cuda, or a numbered GPU such as cuda:1"
        ) from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device {chosen.type!r} is not supported; choose cpu or cuda")
    if chosen.type == "cpu":
        return chosen
    count = torch.cuda.device_count()
    if count <= (chosen.index or 0):
        other = "device='cpu'" if count == 0 else f"device='cuda:{count - 1}'"
        raise ValueError(
            f"device {chosen} was asked for, but torch sees {count} CUDA GPUs; choose {other}"
        )
    check_triton(chosen)
    index = torch.cuda.current_device() if chosen.index is None else chosen.index
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        found, least = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
        raise ValueError(
            f"{torch.cuda.get_device_name(index)} has compute capability {found}, but the kernels "
            f"need {least}, that of a T4; choose a newer GPU, or device='cpu'"
        )
    return torch.device("cuda", index)


def choose_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in.

    dtype: a torch dtype or its name; None chooses float32 on a CPU, bfloat16 on a GPU, and float16
        on a GPU without bfloat16.

    Raises: ValueError if the dtype is not supported, or if the GPU has no bfloat16.
    """
    if dtype is None:
        on_gpu = torch.bfloat16 if is_bfloat16_supported(device) else torch.float16
        dtype = torch.float32 if device.type == "cpu" else on_gpu
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype not in DTYPES:
        names = ", ".join(map(str, DTYPES))
        raise ValueError(f"dtype {dtype} is not supported; choose one of {names}")
    if dtype == torch.bfloat16 and not is_bfloat16_supported(device):
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16, which needs compute "
            "capability 8.0; pass dtype='float16', which is the default there"
        )
    return dtype


def is_bfloat16_supported(device: torch.device | None = None) -> bool:
    """Return True if a device computes in bfloat16: a CPU, or a GPU of capability 8.0 or higher.

    device: the device; None takes a GPU if there is one.
    """
    device = choose_device(device)
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY


def gib_text(nbytes: float) -> str:
    """Return a number of bytes as a text such as "1.50 GiB"."""
    return f"{nbytes / 2**30:.2f} GiB"


def to_device_async(host: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on the device; the host does not wait for the copy."""
    if device.type != "cuda":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def pin(memory: Tensor, owner: object) -> None:
    """Pin the memory of a host tensor for the lifetime of `owner`.

    Raises: MemoryError if the host refuses.
    """
    global _most_pinned
    cudart = torch.cuda.cudart()
    address, nbytes = memory.data_ptr(), memory.nbytes
    code = int(cudart.cudaHostRegister(address, nbytes, CUDA_HOST_REGISTER_MAPPED))
    if code:
        with contextlib.suppress(RuntimeError):  # CUDA reports the error again at the next launch
            torch.zeros(1, device="cuda")
        raise MemoryError(
            f"the host refuses to pin {gib_text(nbytes)} of memory (CUDA error {code})"
        )
    _pinned[address] = nbytes
    _most_pinned = max(_most_pinned, sum(_pinned.values()))
    weakref.finalize(owner, _unpin, memory)


def _unpin(memory: Tensor) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
    _pinned.pop(memory.data_ptr(), None)


def most_pinned() -> int:
    """Return the peak of the bytes that `pin` pinned."""
    return _most_pinned


def read_files_ahead(paths: Sequence[Path]) -> None:
    """Ask the system to read files from disk, unless they fill half of the free memory.

    Reading 1.5 GB that were not in the page cache took 1.7 s instead of 3.5 (November 2026).
    """
    nbytes = sum(path.stat().st_size for path in paths)
    if not hasattr(os, "posix_fadvise") or nbytes > free_memory(torch.device("cpu")) / 2:
        return
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process can still allocate.

    On a GPU they lie within the process's memory fraction, on the host within its cgroup's limit.
    """
    return _free_gpu_memory(device) if device.type == "cuda" else _free_host_memory()


def _free_gpu_memory(device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device))
    # memory that the allocator holds but does not use is free too
    obtainable = free + torch.cuda.memory_reserved(device)
    return min(obtainable, allowed) - torch.cuda.memory_allocated(device)


def _free_host_memory() -> int:
    available = UNKNOWN_HOST_MEMORY
    with contextlib.suppress(OSError):
        line = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
        if line:
            available = int(line[1]) * 1024
    for folder in cgroup_folders("memory"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
            limit = int((folder / "memory.max").read_text())
            used = int((folder / "memory.current").read_text())
            available = min(available, limit - used)
    return available


class MemoryUse(NamedTuple):
    """The bytes that this process uses: of the GPU's memory if it trains there, else of the host's.

    now, peak: at the moment, and at most so far; 0 if the system does not say it.
    host_peak: the peak of the host's memory.
    """

    now: int
    peak: int
    host_peak: int
    is_gpu: bool


def memory_use(device: torch.device) -> MemoryUse:
    """Return the memory that this process uses on a device, without waiting for the device."""
    status = ""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
    now, peak = (
        int(found[1]) * 1024 if (found := re.search(rf"{name}:\s*(\d+) kB", status)) else 0
        for name in ("VmRSS", "VmHWM")
    )
    if device.type != "cuda":
        return MemoryUse(now, peak, peak, is_gpu=False)
    allocated, most = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return MemoryUse(allocated, most, peak, is_gpu=True)


@contextlib.contextmanager
def gc_disabled() -> Iterator[None]:
    """Disable garbage collection while a CUDA graph is captured.

    Freeing another graph's memory would abort the capture.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
