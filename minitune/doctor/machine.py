"""The machine: GPU, driver, memory, the compiler and the folders that a run needs."""

import ctypes
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch

from minitune.device import BFLOAT16_CAPABILITY, free_memory, gib_text
from minitune.doctor.report import Finding, failed, judged, passed, skipped
from minitune.kernels.optional_triton import triton

DRIVER = Path("/proc/driver/nvidia/version")
MIN_GPU_MEMORY = 1 << 30  # bytes that the checks need on a GPU
MIN_HOST_MEMORY = 1 << 30
NO_GPU = "the model is on the CPU"


def check_gpu(device: torch.device, dtype: torch.dtype) -> Finding:
    """Name the GPU; fail if there is one that torch cannot use, or that lacks the dtype."""
    if device.type == "cpu":
        is_there = any(Path("/dev").glob("nvidia[0-9]*"))
        if is_there and not torch.cuda.is_available():
            return failed(
                f"there is an NVIDIA GPU, but torch {torch.__version__} finds none; install a CUDA "
                "build of torch that the driver supports"
            )
        return skipped(NO_GPU)
    name = torch.cuda.get_device_name(device)
    capability = torch.cuda.get_device_capability(device)
    has_dtype = dtype != torch.bfloat16 or capability >= BFLOAT16_CAPABILITY
    number = ".".join(map(str, capability))
    return judged(has_dtype, f"{name}, compute capability {number}", name=name, capability=number)


def check_driver(device: torch.device) -> Finding:
    """Compare the CUDA version of the driver with that of torch."""
    if device.type == "cpu":
        return skipped(NO_GPU)
    supported, built = _supported_cuda() // 1000, torch.version.cuda
    text = f"{_driver_version()}, CUDA {supported}; torch is built for CUDA {built}"
    return judged(supported >= int(built.split(".")[0]), text, driver=_driver_version())


def _supported_cuda() -> int:
    """Return the CUDA version of the driver, 12080 for 12.8. torch has loaded the driver."""
    driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    version = ctypes.c_int()
    if error := driver.cuDriverGetVersion(ctypes.byref(version)):
        raise OSError(f"the driver gives no CUDA version (error {error})")
    return version.value


def _driver_version() -> str:
    """Return the version of NVIDIA's kernel module."""
    try:
        found = re.search(r" ([0-9]+(?:\.[0-9]+)+) ", DRIVER.read_text(encoding="utf-8"))
    except OSError:
        found = None
    return f"driver {found[1]}" if found else "driver of unknown version"


def check_gpu_memory(device: torch.device) -> Finding:
    """Fail if the GPU has no room for the checks."""
    if device.type == "cpu":
        return skipped(NO_GPU)
    free, total = free_memory(device), torch.cuda.get_device_properties(device).total_memory
    text = f"{gib_text(free)} of {gib_text(total)} free"
    return judged(free >= MIN_GPU_MEMORY, text, free_bytes=free)


def check_host_memory() -> Finding:
    """Fail if the host has no room for the checks."""
    free = free_memory(torch.device("cpu"))
    return judged(free >= MIN_HOST_MEMORY, f"{gib_text(free)} free", free_bytes=free)


def check_compiler(device: torch.device) -> Finding:
    """Find the C compiler as Triton does: $CC, gcc or clang."""
    if device.type == "cpu":
        return skipped(f"{NO_GPU}, and only Triton's kernels need a C compiler")
    named = os.environ.get("CC")
    found = shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang")
    if found is None:
        missing = f"$CC is {named}, which is not found" if named else "no gcc and no clang"
        return failed(f"{missing}; Triton compiles its launchers with it: install gcc")
    return passed(found)


def check_triton_cache(device: torch.device) -> Finding:
    """Write into the folder of Triton's compiled kernels, or the nearest folder that exists."""
    if device.type == "cpu":
        return skipped(NO_GPU)
    folder = Path(triton.knobs.cache.dir)
    existing = next(place for place in (folder, *folder.parents) if place.is_dir())
    return _check_writable(folder, existing, "set TRITON_CACHE_DIR to a folder that is")


def check_temporary_folder() -> Finding:
    """Write into the temporary folder."""
    try:
        folder = Path(tempfile.gettempdir())
    except OSError as error:
        return failed(f"{error}; set TMPDIR to a writable folder")
    return _check_writable(folder, folder, "set TMPDIR to a folder that is")


def check_disk(folder: Path, needed: int) -> Finding:
    """Fail if the disk of the temporary folder has no room for the files of the checks."""
    free = shutil.disk_usage(folder).free
    text = f"{gib_text(free)} free in {folder.parent}; the checks write {gib_text(needed)}"
    return judged(free >= needed, text, free_bytes=free, needed_bytes=needed)


def _check_writable(folder: Path, existing: Path, remedy: str) -> Finding:
    """Write and remove a small file in the folder `existing`, which is `folder` or above it."""
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        return failed(f"{folder} is not writable ({error.strerror or error}); {remedy}")
    return passed(f"{folder} is writable")
