"""What this GPU multiplies, copies and sends to the host in a second: measured in a fraction of one, once, and cached.

The cache is a JSON file under $XDG_CACHE_HOME or ~/.cache, by GPU and version of torch; where it cannot be read or
written, every process measures for itself.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from minitune.atomic_files import atomic_write_text

SUSTAINED_MATMUL = 0.94  # of a short burst of matmuls, on an H200 whose clock falls under load
COPY_EFFICIENCY = 0.83  # of the speed of a large copy, by kernels of one layer's size
MEASURED = ("matmul", "copy", "to_host", "from_host")


@dataclass(frozen=True)
class DeviceRates:
    """What the machine does in a second: floating-point operations of a large matmul, bytes of a copy on the GPU, bytes
    to and from the host. The defaults are one H200's (700 W, PCIe 5), November 2026."""

    matmul: float = 740e12
    copy: float = 3.5e12  # as kernels of one layer's size reach it
    to_host: float = 50e9
    from_host: float = 50e9
    attention: float = 0.62  # of the rate of a matmul, our own
    cudnn: float = 0.72  # cuDNN's
    launch: float = 3e-6  # seconds of a small kernel in a graph, with the gap before it
    start: float = 0.35e-3  # seconds of a micro-step in which no layer runs


@cache
def machine_rates(device: torch.device) -> DeviceRates:
    """The rates of a CUDA device; the defaults where there is no memory to measure with."""
    path = (
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        / "minitune"
        / "rates.json"
    )
    key = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    known = _read(path)
    if key not in known:
        try:
            known[key] = measure(device)
        except torch.OutOfMemoryError:
            return DeviceRates()
        torch.cuda.empty_cache()
        with contextlib.suppress(OSError, ValueError):
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(path, json.dumps(known, indent=1))
    return DeviceRates(**known[key])


def _read(path: Path) -> dict[str, dict[str, float]]:
    """What the cache holds, as far as it makes sense."""
    try:
        known = json.loads(path.read_text())
        return {
            k: v
            for k, v in known.items()
            if set(v) == set(MEASURED) and all(x > 0 for x in v.values())
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def measure(device: torch.device) -> dict[str, float]:
    """Rates by name. Takes about 0.2 s and 0.4 GB."""
    a, b = torch.randn(2, 4096, 4096, device=device, dtype=torch.bfloat16)
    flat = torch.empty(2, 64 << 20, device=device, dtype=torch.bfloat16)
    host = torch.empty(64 << 20, dtype=torch.bfloat16, pin_memory=True)
    return {
        "matmul": SUSTAINED_MATMUL * 2 * 4096**3 / _seconds(lambda: a @ b, device),
        "copy": COPY_EFFICIENCY
        * 2
        * host.nbytes
        / _seconds(lambda: flat[1].copy_(flat[0]), device),
        "to_host": host.nbytes / _seconds(lambda: host.copy_(flat[0], non_blocking=True), device),
        "from_host": host.nbytes / _seconds(lambda: flat[0].copy_(host, non_blocking=True), device),
    }


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Of one call, the fastest of some, each of them several in a row: another process may be at work meanwhile."""
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(4):
            work()
        torch.cuda.synchronize(device)
        found.append((time.perf_counter() - start) / 4)
    return min(found)
