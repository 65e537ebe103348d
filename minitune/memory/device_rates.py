"""The rates of the machine that plans are timed with: matmuls, copies, transfers to the host.

They are measured once, in a fraction of a second, and cached by GPU and torch version in a JSON
file under $XDG_CACHE_HOME or ~/.cache. If that file cannot be read or written, or the environment
names no home, every process measures.
"""

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from minitune.atomic_files import atomic_write_text
from minitune.device import choose_dtype
from minitune.kernels import backend
from minitune.read_files import read_json
from minitune.system_folders import cache_folder

SUSTAINED_MATMUL = 0.94  # of a short burst, on an H200, whose clock falls under load
COPY_EFFICIENCY = 0.83  # of a large copy, reached by kernels of one layer's size
MEASURED = ("matmul", "copy", "to_host", "from_host")
# Attention's share of `matmul` on a GPU whose products in Triton use no tensor cores. An estimate:
# a T4's peak in float32 is an eighth of that in float16, and attention reaches 0.62 on an H200.
FMA_ATTENTION = 0.62 / 8
REPEATS = 5  # of a measurement, of which the fastest counts
CALLS = 4  # of the measured work, in a row


@dataclass(frozen=True)
class DeviceRates:
    """The rates of a machine, a second.

    The defaults are those of one H200 (700 W, PCIe 5), November 2026.

    matmul: floating-point operations of a large matmul.
    copy: bytes read or written on the GPU by kernels of one layer's size.
    to_host, from_host: bytes.
    attention: our attention's operations, as a fraction of `matmul`.
    cudnn: the same of cuDNN's attention.
    launch: seconds of a small kernel in a CUDA graph, with the gap before it.
    start: seconds of a micro-step in which no layer runs.
    """

    matmul: float = 740e12
    copy: float = 3.5e12
    to_host: float = 50e9
    from_host: float = 50e9
    attention: float = 0.62
    cudnn: float = 0.72
    launch: float = 3e-6
    start: float = 0.35e-3


@cache
def machine_rates(device: torch.device) -> DeviceRates:
    """Return the rates of a device: measured or cached for CUDA, the defaults for a CPU.

    The defaults also stand in if no memory is left to measure with.
    """
    if device.type != "cuda":
        return DeviceRates()
    folder = cache_folder()
    path = None if folder is None else folder / "minitune" / "rates.json"
    key = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    cached = {} if path is None else _read(path)
    if key not in cached:
        try:
            cached[key] = measure(device)
        except torch.OutOfMemoryError:
            return DeviceRates()
        torch.cuda.empty_cache()
        if path is not None:
            with contextlib.suppress(ValueError):
                atomic_write_text(path, json.dumps(cached, indent=1))
    return DeviceRates(**cached[key], **_attention_rates(device))


def _attention_rates(device: torch.device) -> dict[str, float]:
    """Return the rates of attention by name if they are not the defaults."""
    if backend.has_tensor_core_kernels(device):
        return {}
    return {"attention": FMA_ATTENTION, "cudnn": FMA_ATTENTION}


def _read(path: Path) -> dict[str, dict[str, float]]:
    """Return the valid entries of the cache; none if it cannot be read."""
    try:
        entries = read_json(path, default={})
    except ValueError:
        return {}
    return {key: rates for key, rates in entries.items() if _valid(rates)}


def _valid(rates: object) -> bool:
    if not isinstance(rates, dict) or set(rates) != set(MEASURED):
        return False
    return all(isinstance(rate, float | int) and rate > 0 for rate in rates.values())


def measure(device: torch.device) -> dict[str, float]:
    """Return the rates by name. Takes about 0.2 s and 0.4 GB."""
    size, dtype = 4096, choose_dtype(None, device)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    source, target = torch.empty(2, 64 << 20, device=device, dtype=dtype)
    host = torch.empty(64 << 20, dtype=dtype, pin_memory=True)
    matmul = _fastest_call(lambda: a @ b, device)
    copy = _fastest_call(lambda: target.copy_(source), device)
    to_host = _fastest_call(lambda: host.copy_(source, non_blocking=True), device)
    from_host = _fastest_call(lambda: source.copy_(host, non_blocking=True), device)
    return {
        "matmul": SUSTAINED_MATMUL * 2 * size**3 / matmul,
        "copy": COPY_EFFICIENCY * 2 * source.nbytes / copy,
        "to_host": host.nbytes / to_host,
        "from_host": host.nbytes / from_host,
    }


def _fastest_call(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, the fastest of several: other processes may interfere."""
    seconds = []
    for _ in range(REPEATS):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(CALLS):
            work()
        torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() - start) / CALLS)
    return min(seconds)
