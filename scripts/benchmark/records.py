"""What the records of bench.py and of its peers (tests/referees/peers.py) share, so that both count alike.

Nothing here needs minitune, and torch is imported when it is used: a peer may have to be imported before it.
"""

import gc
import random
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

LEARNING_RATE = 2e-4
FIRST_TOKEN = 3  # those below are special
ACCUMULATION = 4  # of --short: with --batch 2, 8 samples an optimizer step


def short_texts(count: int) -> list[str]:
    """Random letters; with their end token they have 24 to 1024 tokens, log-normally, most about 100."""
    rng = random.Random(0)
    lengths = [max(24, min(1024, int(rng.lognormvariate(4.6, 0.6)))) for _ in range(count)]
    return ["".join(chr(rng.randint(97, 122)) for _ in range(n - 1)) for n in lengths]


def wait() -> None:
    """Until the GPU, if there is one, has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def start_counting(start: float, trainable: int) -> dict[str, Any]:
    """What the record says of loading, which began at `start`; the peak of memory counts from here."""
    import torch

    loaded = None
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        loaded = _gib(torch.cuda.memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_peak_host_memory_stats()
    return {
        "load_s": round(time.perf_counter() - start, 1),
        "loaded_gb": loaded,
        "trainable": trainable,
    }


def _pinned() -> int:
    """Bytes of pinned host memory: the most that torch had, and what is registered besides."""
    import torch

    torchs = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)
    try:
        from minitune.device import most_pinned
    except ImportError:  # in a peer's process
        return torchs
    return torchs + most_pinned()


def memory_and_place() -> dict[str, Any]:
    """The memory that was taken so far, in GiB, on what, and when."""
    import torch

    gpu = torch.cuda.is_available()
    return {
        "peak_gb": _gib(torch.cuda.max_memory_allocated()) if gpu else None,
        "reserved_gb": _gib(torch.cuda.max_memory_reserved()) if gpu else None,
        "pinned_gb": _gib(_pinned()) if gpu else None,
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "date": time.strftime("%Y-%m-%d"),
    }


def step_figures(
    seconds: Sequence[float], losses: Sequence[float], warmup: int, tokens: int
) -> dict[str, Any]:
    """The figures of steps that took `seconds`, `tokens` tokens each, the first `warmup` of them apart."""
    timed = seconds[warmup:]
    return {
        "ms": round(1e3 * statistics.median(timed), 2),
        "min_ms": round(1e3 * min(timed), 2),
        "max_ms": round(1e3 * max(timed), 2),
        "tok_s": round(tokens / statistics.median(timed)),
        "warmup_s": round(sum(seconds[:warmup]), 3),
        "warmup_steps_s": [round(second, 3) for second in seconds[:warmup]],
        "loss0": round(losses[0], 4),
        "lossN": round(losses[-1], 4),
    }


def short_figures(
    ends: Sequence[float], losses: Sequence[float], warmup: int, samples: int, mean_length: float
) -> dict[str, Any]:
    """The figures of a run of --short whose steps, `samples` samples each, were done `ends` seconds after its start."""
    step = statistics.median(end - begin for begin, end in pairwise(ends[warmup - 1 :]))
    return {
        "ga": ACCUMULATION,
        "steps": len(ends),
        "s_per_step": round(step, 4),
        "samples_s": round(samples / step, 2),
        "samples_s_all": round(samples * (len(ends) - warmup) / (ends[-1] - ends[warmup - 1]), 2),
        "mean_len": round(mean_length, 1),
        "tok_s": round(samples * mean_length / step),
        "warmup_s": round(ends[warmup - 1], 3),
        "warmup_steps_s": [round(end - begin, 3) for begin, end in pairwise([0.0, *ends[:warmup]])],
        "train_s": round(ends[-1], 3),
        "loss0": round(losses[0], 4) if losses else None,
        "lossN": round(losses[-1], 4) if losses else None,
    }


def _gib(size: int) -> float:
    return round(size / 2**30, 2)
