"""Timed generation of minitune: speed, memory, the profile of a step, and the floor of its time.

Besides the keys of decode_records.py, each number of sequences has:

    cache_gb, cache_budget_gb            the key/value cache after the calls, and its budget
    held_gb, freed_gb                    GiB above the loaded model: after the calls, and after
                                         model.free_generation_memory()
    captures                             CUDA graphs that a later call captured
    early_dequantizations                dequantisation launches before a later call's first
                                         attention; the first layer of its prefill launches one
    step_dequantizations                 dequantisation launches of a decode step
    read_gb, floor_ms, of_floor          bytes that a step reads: weights, adapter, head, and keys
                                         and values of the mean length; their time at the rate of a
                                         copy; the floor's share of step_ms
    profile, kernels                     milliseconds of a step by group; the longest kernels, as
                                         [name, launches a step, milliseconds a step]

The profile is the difference of two calls that differ in PROFILED_STEPS tokens.
"""

import argparse
import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType

from benchmark.decode_records import random_prompts, randomize_b_, time_generation
from benchmark.kernel_timing import peak_rates
from benchmark.records import memory_figures
from benchmark.step_profile import group_of, own_kernels
from benchmark.step_timing import configuration, load
from benchmark.table import Record, text_table
from minitune import LanguageModel
from minitune.config.training_config import parse_bytes
from minitune.memory.stored_weights import StoredWeights
from minitune.model.decoding.kv_cache import PAGE, KVCache

GIB = 2**30
PROFILED_STEPS = 8
LONGEST_KERNELS = 12
Kernel = tuple[str, float]  # name, microseconds


def time_decoding(a: argparse.Namespace) -> Record:
    """Return the record of generation with each of the numbers of sequences `a.decode`."""
    model, _, loading = load(a, 2 * a.r)
    randomize_b_([p for name, p in model.trainable_parameters() if ".lora_B." in name])
    on_gpu = torch.cuda.is_available()
    copy_rate = None
    if on_gpu:
        copy_rate = peak_rates("cuda")["copy"]
        torch.cuda.empty_cache()
    loaded = _allocated()
    record = configuration(a) | loading | {"prompt": a.prompt_tokens, "new": a.new_tokens}
    record |= {"copy_tb_s": round(copy_rate / 1e12, 3) if on_gpu else None, "decode": {}}
    for sequences in a.decode:
        figures = _figures(model, a, sequences, copy_rate)
        held = _allocated() - loaded
        model.free_generation_memory()
        freed = _allocated() - loaded
        if on_gpu:
            figures |= {"held_gb": round(held / GIB, 3), "freed_gb": round(freed / GIB, 3)}
        record["decode"][str(sequences)] = figures
    memory = memory_figures()
    return record | {key: memory[key] for key in ("gpu", "date")}


def _figures(
    model: LanguageModel, a: argparse.Namespace, sequences: int, copy_rate: float | None
) -> dict[str, Any]:
    """Return the figures of one number of sequences, with the profile if there is a GPU."""

    def generate(prompts: list[list[int]], new_tokens: int) -> None:
        budget = {"cache_memory": a.cache_memory} if a.cache_memory else {}
        answers = model.generate(prompts, max_new_tokens=new_tokens, eos_token_ids=[], **budget)
        assert all(len(answer) == new_tokens for answer in answers)

    vocab = model.config.vocab_size
    figures = time_generation(generate, a, sequences, vocab, a.new_tokens)
    figures |= _cache_figures(model, a)
    prompts = random_prompts(sequences, a.prompt_tokens, vocab)
    with counted_captures() as captures:
        generate(prompts, a.new_tokens)
    figures["captures"] = captures["count"]
    if copy_rate is None:
        return figures
    read = bytes_of_step(model, sequences, a.prompt_tokens + a.new_tokens // 2)
    floor = 1e3 * read / copy_rate
    figures |= {
        "read_gb": round(read / GIB, 3),
        "floor_ms": round(floor, 3),
        "of_floor": round(floor / figures["step_ms"], 3),
    }
    one = kernels_of(lambda: generate(prompts, 1))
    more = kernels_of(lambda: generate(prompts, 1 + PROFILED_STEPS))
    return figures | step_profile(one, more, figures["step_ms"], own_kernels())


def _cache_figures(model: LanguageModel, a: argparse.Namespace) -> dict[str, Any]:
    """Return the size of the cache that the calls have left, and its budget."""
    budget = parse_bytes(a.cache_memory) if a.cache_memory else None
    memory = model.decode_engine._memory
    nbytes = 0 if memory is None else memory.cache.keys.nbytes + memory.cache.values.nbytes
    return {
        "cache_gb": round(nbytes / GIB, 3),
        "cache_budget_gb": None if budget is None else round(budget / GIB, 3),
    }


def _allocated() -> int:
    """Return the bytes in use on the GPU, 0 without one."""
    gc.collect()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


@contextmanager
def counted_captures() -> Iterator[Counter]:
    """Count the CUDA graphs that are captured meanwhile, under "count"."""
    found, begin = Counter(count=0), torch.cuda.CUDAGraph.capture_begin

    def counted(self, *args: Any, **kwargs: Any) -> None:
        found["count"] += 1
        begin(self, *args, **kwargs)

    torch.cuda.CUDAGraph.capture_begin = counted
    try:
        yield found
    finally:
        torch.cuda.CUDAGraph.capture_begin = begin


def bytes_of_step(model: LanguageModel, sequences: int, length: int) -> int:
    """Return the bytes that a decode step has to read.

    length: mean tokens of a sequence that the cache holds.
    """
    weights = StoredWeights.of_model(model)
    # The adapter is read in the compute dtype.
    adapter = sum(p.numel() for _, p in model.trainable_parameters()) * model.dtype.itemsize
    cached = sequences * length * KVCache.page_nbytes(model.config, model.dtype) // PAGE
    return weights.linears + weights.vectors + weights.head + adapter + cached


def kernels_of(work: Callable[[], object]) -> list[Kernel]:
    """Return the kernels of a call in the order of their starts; a first call is not profiled."""
    work()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        torch.cuda.synchronize()
    events = [
        event
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    events.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us()) for event in events]


def step_profile(
    one: Sequence[Kernel], more: Sequence[Kernel], step_ms: float, own: dict[str, str]
) -> dict[str, Any]:
    """Return the profile of a decode step.

    one, more: kernels of a call of one token, and of one of PROFILED_STEPS more.
    step_ms: milliseconds of a step as it really runs.
    own: the result of `own_kernels`.
    """
    launches, times = (_difference(one, more, by) for by in (lambda us: 1.0, lambda us: us / 1e3))
    groups: Counter[str] = Counter()
    for name, milliseconds in times.items():
        groups[_group(name, own)] += milliseconds
    profile = {name: round(value, 4) for name, value in groups.most_common()}
    longest = [
        [name[:80], round(launches[name], 2), round(milliseconds, 4)]
        for name, milliseconds in times.most_common(LONGEST_KERNELS)
    ]
    counts = Counter()
    for name, count in launches.items():
        counts[_group(name, own)] += count
    return {
        "early_dequantizations": early_dequantizations(more, own),
        "step_dequantizations": round(counts["dequantisation"], 2),
        "profile": profile | {"idle": round(step_ms - sum(profile.values()), 4)},
        "kernels": longest,
    }


def _difference(
    one: Sequence[Kernel], more: Sequence[Kernel], value: Callable[[float], float]
) -> Counter[str]:
    """Return the sum of value(microseconds) by kernel of one step."""
    sums: Counter[str] = Counter()
    for kernels, sign in ((more, 1), (one, -1)):
        for name, microseconds in kernels:
            sums[name] += sign * value(microseconds) / PROFILED_STEPS
    return sums


def _group(name: str, own: dict[str, str]) -> str:
    """Return the group of a kernel; a step's matmuls of cuBLAS are the head's up to 64 rows."""
    group = group_of(name, "", (), own, vocab=0, max_rank=0)
    return "cuBLAS" if group == "base matmuls" and name not in own else group


def early_dequantizations(kernels: Sequence[Kernel], own: dict[str, str]) -> int:
    """Return the dequantisation launches before the first launch of attention."""
    groups = [_group(name, own) for name, _ in kernels]
    first = groups.index("attention") if "attention" in groups else len(groups)
    return groups[:first].count("dequantisation")


# ---- tables


def decode_table(records: Sequence[Record]) -> str:
    """Return the table of generation; ratios are those of the last record, ours, to the others."""
    columns = {
        "tok/s": "tok_s",
        "first token s": "first_token_s",
        "step ms": "step_ms",
        "floor ms": "floor_ms",
        "of floor": "of_floor",
        "peak GiB": "peak_gb",
        "cache": "cache_gb",
        "held": "held_gb",
        "freed": "freed_gb",
        "captures": "captures",
        "early deq.": "early_dequantizations",
        "step deq.": "step_dequantizations",
        "first call s": "first_call_s",
    }
    ours, rows = records[-1].get("decode", {}), []
    for record in records:
        if "error" in record:
            rows.append([record["peer"], f"failed ({record['error']})"])
        for sequences, figures in record.get("decode", {}).items():
            if "error" in figures:
                rows.append([record["peer"], sequences, f"failed ({figures['error']})"])
                continue
            own = ours.get(sequences, {}).get("tok_s")
            ratio = f"{own / figures['tok_s']:.2f}x" if own else None
            cells = (figures.get(key) for key in columns.values())
            rows.append([record["peer"], sequences, *cells, ratio])
    header = ["system", "sequences", *columns, "ratio"]
    return text_table(header, [row + [""] * (len(header) - len(row)) for row in rows])


def kernel_table(figures: dict[str, Any]) -> str:
    """Return the longest kernels of a decode step."""
    return text_table(["kernel", "launches", "ms"], figures["kernels"])
