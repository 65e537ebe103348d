"""Time of single kernels on one GPU, beside PyTorch, torch.compile and other libraries.

Every kernel is first checked on inputs of the shape that is timed, against float32. Its error may
be at most twice that of eager PyTorch in the same dtype.

A timed call keeps its results, on inputs that rotate among sets of four times the L2 cache, so it
finds nothing in the cache that a training step would not find there. About a millisecond of calls
is captured as a CUDA graph, as a training step is, so launches from Python are not timed. The time
of a call is the median of triton.testing.do_bench over replays, divided by the number of calls.
The loss is timed without a graph.

The share of the GPU's peak is relative to a large copy, or a large bf16 matmul, of the same run.
"""

import contextlib
import gc
import importlib
import itertools
import math
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from benchmark.kernel_cases import BF16, CaseGroup, KernelCase, KernelSizes, Maker
from benchmark.table import emit, tell, text_table

COLUMNS = ("eager", "compile", "Liger", "bitsandbytes", "flash", "cuDNN")  # beside ours
RATE_UNITS = {"copy": "TB/s", "matmul": "TFLOP/s"}
# The limit of our error: twice eager's, or NOISE, which float32's rounding explains. Without an
# eager column it is BF16_ROUNDING, which bfloat16's rounding explains.
ALLOWED, NOISE, BF16_ROUNDING = 2.0, 1e-5, 1e-2
# Errors of an installed library that lacks the function or does not take the shape.
PEER_ERRORS = (
    RuntimeError,
    ImportError,
    AttributeError,
    TypeError,
    ValueError,
    AssertionError,
    OSError,
)
# ---- checking and timing one case


def tensors_of(inputs: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dataclass objects."""
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, list | tuple):
        for x in inputs:
            yield from tensors_of(x)
    elif is_dataclass(inputs):
        for item in fields(inputs):
            yield from tensors_of(getattr(inputs, item.name))


def cloned(inputs: tuple) -> tuple:
    """Return copies of the inputs, because some kernels write into theirs."""
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs)


def relative_error(found: Any, exact: Any) -> float:
    """Return the largest ||found - exact|| / ||exact|| of the outputs that both have."""
    worst = 0.0
    for a, b in zip(tensors_of(found), tensors_of(exact), strict=False):
        error = ((a.to(b.dtype) - b).norm() / b.norm().clamp(min=1e-30)).item()
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def rotation(case: KernelCase, l2_bytes: int) -> list[tuple]:
    """Return 2 to 32 sets of inputs, together four times the L2 cache if 32 sets are enough."""
    first = case.inputs()
    size = sum(x.numel() * x.element_size() for x in tensors_of(first))
    count = min(max(math.ceil(4 * l2_bytes / size), 2), 32)
    return [first] + [case.inputs() for _ in range(count - 1)]


def milliseconds(calls: Sequence[Callable[[], Any]], capture: bool) -> float:
    """Return the median time of a call. The calls take turns, on the current stream.

    capture: time a CUDA graph of the calls; the current stream must not be the default one.
    """
    for call in calls:
        call()  # compiles
    torch.cuda.synchronize()
    if not capture:
        turns = itertools.cycle(calls)
        return do_bench(lambda: next(turns)(), warmup=10, rep=100, return_mode="median")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    rounds = max(1, round(1.0 / begin.elapsed_time(end)))
    graph = torch.cuda.CUDAGraph()
    # Without kept results the next call would write to the same address, which is in the cache.
    results: deque = deque(maxlen=len(calls))
    graph.capture_begin()
    try:
        for call in list(calls) * rounds:
            results.append(call())
    finally:
        graph.capture_end()
    return do_bench(graph.replay, warmup=5, rep=40, return_mode="median") / (rounds * len(calls))


def run_case(
    case: KernelCase, peers: dict[str, Maker], l2_bytes: int, timer: Callable = milliseconds
) -> dict[str, Any]:
    """Return the errors and milliseconds of a case by column.

    A peer that fails is left out, with a note on stderr; one without an equivalent returns None.

    peers: makers of other libraries, by column.
    l2_bytes: size of the GPU's L2 cache.
    timer: returns the milliseconds of a call, as `milliseconds` does.
    """
    makers = {"ours": case.makers["ours"]}
    makers |= {k: make for k, make in {**case.makers, **peers}.items() if k in COLUMNS}
    errors: dict[str, float] = {}
    ms: dict[str, float] = {}
    inputs = case.inputs()
    exact = case.exact(*cloned(inputs))
    for column, make in makers.items():
        with _peer_may_fail(case, column):
            if call := make(*cloned(inputs)):
                errors[column] = relative_error(call(), exact)
    del inputs, exact
    sets = rotation(case, l2_bytes)
    for column in errors:
        # A peer that cannot be captured is timed without a graph.
        for capture in (True, False) if case.capture else (False,):
            with _peer_may_fail(case, column):
                ms[column] = timer([makers[column](*inputs) for inputs in sets], capture)
                break
    limit = max(ALLOWED * errors["eager"], NOISE) if "eager" in errors else BF16_ROUNDING
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "ms": ms,
        "error": errors,
        "right": errors["ours"] <= limit,
    }


@contextlib.contextmanager
def _peer_may_fail(case: KernelCase, column: str) -> Iterator[None]:
    """Turn a peer's error into a note on stderr. Our own errors pass."""
    try:
        yield
    except PEER_ERRORS as error:
        if column == "ours":
            raise
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        tell(f"{case.kernel} {case.shape}: {column} failed: {reason[0][:160]}")


# ---- all cases


def time_kernels(
    groups: Sequence[CaseGroup],
    sizes: KernelSizes,
    words: Sequence[str],
    with_peers: bool,
    with_compile: bool,
    json_file: Path | None,
) -> bool:
    """Check and time kernels, and print their table. Return True if all of them are right.

    groups: the functions that yield the cases.
    words: times only the kernels whose name contains one of them; none means all.
    with_peers: time the installed libraries of tests/referees/kernel_peers.py too.
    with_compile: time torch.compile too, which takes the most time.
    json_file: as in `benchmark.table.emit`.

    Raises: ValueError if there is no GPU, or no kernel of that name.
    """
    if not torch.cuda.is_available():
        raise ValueError("--kernels needs a CUDA GPU, and torch finds none")
    peers = _kernel_peers() if with_peers else None
    l2_bytes = torch.cuda.get_device_properties("cuda").L2_cache_size
    torch.manual_seed(0)
    records = []
    with torch.cuda.stream(torch.cuda.Stream()):  # capture needs the stream of autograd's forward
        rates, machine = peak_rates("cuda"), about_the_machine(peers)
        for case in itertools.chain.from_iterable(group(sizes, "cuda") for group in groups):
            if words and not any(word in case.kernel for word in words):
                continue
            tell(f"{case.kernel} {case.shape}")
            theirs = peers.makers(case.kernel) if peers else {}
            if not with_compile:
                case.makers.pop("compile", None)
                theirs.pop("compile", None)
            record = run_case(case, theirs, l2_bytes)
            best = min(
                (ms for column, ms in record["ms"].items() if column != "ours"), default=None
            )
            rate = case.work / record["ms"]["ours"] * 1e3
            record |= {
                "unit": case.unit,
                "rate": rate,
                "of_peak": rate / rates[case.unit],
                "faster": best and best / record["ms"]["ours"],
            }
            records.append(record)
            emit({**record, **machine, "rates": rates}, json_file)
            gc.collect()
            torch.cuda.empty_cache()
    if not records:
        raise ValueError(f"no kernel has {' or '.join(words)} in its name; --kernels times all")
    print(_title(machine, rates))
    print(kernel_table(records))
    return all(record["right"] for record in records)


def _kernel_peers() -> ModuleType:
    sys.path.append(str(Path(__file__).parents[2] / "tests"))
    return importlib.import_module("referees.kernel_peers")


def peak_rates(device: str) -> dict[str, float]:
    """Return the rates of a large copy, bytes/s, and of a large bf16 matmul, FLOP/s."""
    x, y = (torch.empty(2**30, dtype=torch.uint8, device=device) for _ in range(2))
    copy = milliseconds([lambda: y.copy_(x)], capture=False)
    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=BF16) for _ in range(2))
    matmul = milliseconds([lambda: a @ b.t()], capture=False)
    return {"copy": 2 * x.numel() / copy * 1e3, "matmul": 2 * n**3 / matmul * 1e3}


def about_the_machine(peers: ModuleType | None) -> dict[str, Any]:
    """Return the card, the date, and the versions of driver and libraries."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    versions = {"driver": driver, "torch": torch.__version__, "triton": triton.__version__}
    if peers is not None:
        versions |= peers.versions()
    return {"gpu": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"), **versions}


def _title(machine: dict[str, Any], rates: dict[str, float]) -> str:
    facts = ", ".join(
        value if key in ("gpu", "date") else f"{key} {value}" for key, value in machine.items()
    )
    return (
        f"\n{facts}\ncopy {rates['copy'] / 1e12:.2f} TB/s, "
        f"bf16 matmul {rates['matmul'] / 1e12:.0f} TFLOP/s\n"
        "milliseconds; faster: how many times, than the best of the others; relative errors"
    )


def kernel_table(records: Sequence[dict[str, Any]]) -> str:
    """Return the table of kernels: milliseconds by column, rate, share of the peak, and errors."""
    header = ["kernel", "shape", "ours", "rate", "of peak"]
    header += [*COLUMNS, "faster", "error", "eager's error"]
    rows = []
    for record in records:
        ms, error = record["ms"], record["error"]
        others = [f"{ms[column]:.4f}" if column in ms else None for column in COLUMNS]
        faster = f"{record['faster']:.2f}" if record["faster"] else None
        errors = [f"{error[c]:.1e}" if c in error else None for c in ("ours", "eager")]
        if not record["right"]:
            errors[0] += " WRONG"
        rate = f"{record['rate'] / 1e12:.2f} {RATE_UNITS[record['unit']]}"
        peak = f"{record['of_peak']:.2f} {record['unit']}"
        shape = (record["kernel"], record["shape"])
        rows.append([*shape, f"{ms['ours']:.4f}", rate, peak, *others, faster, *errors])
    return text_table(header, rows)
