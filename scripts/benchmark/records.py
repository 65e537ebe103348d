"""Records of timed runs: the same keys for minitune and for its peers (tests/referees/peers.py).

A record is a flat dictionary. Its keys, with the unit:

    peer, model, gc, targets, bs, seq, r, attention, optim, graphs
                                         the configuration
    load_s, loaded_gb, trainable         seconds and GiB of loading; number of trainable parameters
    peak_gb, reserved_gb, pinned_gb      peaks in GiB: allocated, reserved, pinned on the host
    ms, min_ms, max_ms, tok_s            a step: median, fastest, slowest; tokens a second
    s_per_step, samples_s, samples_s_all, ga, steps, mean_len, train_s
                                         a run on short samples
    warmup_s, warmup_steps_s             seconds of the first steps
    loss0, lossN                         first and last loss
    gpu, date, versions                  the card, the day, the packages
    planned_gb, planned_ms, host_gb, plan
                                         minitune's plan of the step; not in a peer's record

This file does not import minitune, because a peer's process runs without the checkout. A peer that
patches torch has to be imported before this file.
"""

import argparse
import gc
import random
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

LEARNING_RATE = 2e-4
FIRST_TOKEN = 3  # the ids below are special tokens
ACCUMULATION = 4  # micro-steps of an optimizer step on short samples: 8 samples with --batch 2
SHORT_SAMPLES = 4000  # of the data set of short samples


def short_texts(count: int = SHORT_SAMPLES) -> list[str]:
    """Return texts of random letters, the same at each call.

    Lengths are log-normal and cut to 24..1024 tokens, end token included; the mean is 119.
    """
    rng = random.Random(0)
    lengths = [max(24, min(1024, int(rng.lognormvariate(4.6, 0.6)))) for _ in range(count)]
    return ["".join(chr(rng.randint(97, 122)) for _ in range(n - 1)) for n in lengths]


def short_settings(a: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a run on short samples that minitune's SFTConfig shares with TRL's.

    a: flags of bench.py or peers.py; a.batch is per_device_train_batch_size.
    """
    return {
        "per_device_train_batch_size": a.batch,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": a.steps,
        "warmup_steps": 2,
        "learning_rate": LEARNING_RATE,
        "weight_decay": 0.01,
        "optim": a.optim,
        "seed": 3407,
        "save_strategy": "no",
    }


def synchronize() -> None:
    """Wait until the GPU, if there is one, has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def loading_figures(start: float, trainable: int) -> dict[str, Any]:
    """Return the figures of loading, and count the peak of memory from now on.

    start: time.perf_counter() before loading.
    trainable: number of trainable parameters.
    """
    loaded = None
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        loaded = _gib(torch.cuda.memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_peak_host_memory_stats()
    seconds = round(time.perf_counter() - start, 1)
    return {"load_s": seconds, "loaded_gb": loaded, "trainable": trainable}


def memory_figures(pinned_bytes: int = 0) -> dict[str, Any]:
    """Return the peaks of memory since `loading_figures`, the card and the date.

    pinned_bytes: host memory that was pinned without torch, which does not count it.
    """
    if not torch.cuda.is_available():
        memory = dict.fromkeys(("peak_gb", "reserved_gb", "pinned_gb", "gpu"))
    else:
        host = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)
        memory = {
            "peak_gb": _gib(torch.cuda.max_memory_allocated()),
            "reserved_gb": _gib(torch.cuda.max_memory_reserved()),
            "pinned_gb": _gib(host + pinned_bytes),
            "gpu": torch.cuda.get_device_name(),
        }
    return memory | {"date": time.strftime("%Y-%m-%d")}


def step_figures(
    seconds: Sequence[float], losses: Sequence[float], warmup: int, tokens: int
) -> dict[str, Any]:
    """Return the figures of single steps.

    seconds, losses: one value a step.
    warmup: the number of first steps that are not timed.
    tokens: tokens a step.
    """
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
    """Return the figures of a run on short samples.

    ends: seconds from the start of the run to the end of each step.
    losses: the logged losses.
    warmup: the number of first steps that are not timed.
    samples: samples a step.
    mean_length: mean tokens of a sample.
    """
    warmup_end = ends[warmup - 1]
    step = statistics.median(end - begin for begin, end in pairwise(ends[warmup - 1 :]))
    return {
        "ga": ACCUMULATION,
        "steps": len(ends),
        "s_per_step": round(step, 4),
        "samples_s": round(samples / step, 2),
        "samples_s_all": round(samples * (len(ends) - warmup) / (ends[-1] - warmup_end), 2),
        "mean_len": round(mean_length, 1),
        "tok_s": round(samples * mean_length / step),
        "warmup_s": round(warmup_end, 3),
        "warmup_steps_s": [round(end - begin, 3) for begin, end in pairwise([0.0, *ends[:warmup]])],
        "train_s": round(ends[-1], 3),
        "loss0": round(losses[0], 4) if losses else None,
        "lossN": round(losses[-1], 4) if losses else None,
    }


def _gib(size: int) -> float:
    return round(size / 2**30, 2)
