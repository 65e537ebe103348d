"""Time every kernel on one GPU, beside the same work in torch, torch.compile and, with --peers, in other libraries.

    python scripts/benchmark/kernel_timing.py --peers                 everything
    python scripts/benchmark/kernel_timing.py --only attention        kernels whose name contains one of the words
    python scripts/benchmark/kernel_timing.py --no-compile            without torch.compile, which takes most of the time

A line a kernel and shape: milliseconds; the share of what the GPU can do, which is a large copy or a large bf16 matmul
in this same run; the milliseconds of the others, "-" where there is no equivalent or it is not installed; how many
times faster we are than the best of them; and the relative error, ours and eager PyTorch's, both against float32.

Before it is timed, every kernel is checked on inputs of the same shape. An error more than twice that of eager PyTorch
is marked, and the exit code is 1.

A call is some launches and its results are kept, on inputs that rotate among sets that together are four times the L2
cache, so that nothing is found there that a training step would not find. About a millisecond of such calls is captured
as a CUDA graph, as a training step is, so that no one is charged for being launched from Python; the figure is the
median of triton.testing.do_bench over its replays, divided by the number of calls. The loss is timed without a graph.
"""

import argparse
import contextlib
import gc
import importlib
import itertools
import json
import math
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from torch import Tensor

from benchmark.elementwise_cases import (
    Maker,
    MemoryModel,
    Row,
    dequantize_rows,
    norm_rows,
    optimizer_rows,
    rope_rows,
    swiglu_rows,
)
from benchmark.matmul_cases import attention_rows, lora_rows, loss_rows, matmul_rows

GROUPS = (
    dequantize_rows,
    norm_rows,
    rope_rows,
    swiglu_rows,
    attention_rows,
    loss_rows,
    matmul_rows,
    lora_rows,
    optimizer_rows,
)
COLUMNS = ("eager", "compile", "Liger", "bitsandbytes", "flash", "cuDNN")  # beside ours
# Our error: at most twice eager's, or what float32's rounding explains; without an eager one, what bfloat16's explains.
ALLOWED, NOISE, ROUNDING = 2.0, 1e-5, 1e-2
# What another library may raise that is installed in a version without the function, or does not take the shape.
PEER_ERRORS = (
    RuntimeError,
    ImportError,
    AttributeError,
    TypeError,
    ValueError,
    AssertionError,
    OSError,
)


# ---- checking and timing one row


def tensors_of(inputs: Any) -> Iterator[Tensor]:
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, list | tuple):
        for x in inputs:
            yield from tensors_of(x)
    elif is_dataclass(inputs):
        for field in fields(inputs):
            yield from tensors_of(getattr(inputs, field.name))


def cloned(inputs: tuple) -> tuple:
    """Some kernels write into their inputs; each gets its own."""
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs)


def relative_error(found: Any, exact: Any) -> float:
    """The largest of the outputs' ||found - exact|| / ||exact||, over as many outputs as both have."""
    worst = 0.0
    for a, b in zip(tensors_of(found), tensors_of(exact), strict=False):
        error = ((a.to(b.dtype) - b).norm() / b.norm().clamp(min=1e-30)).item()
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def rotation(row: Row, l2_bytes: int) -> list[tuple]:
    """Sets of inputs of the row's shape, which together are four times the cache, but at most 32 and at least 2."""
    first = row.inputs()
    size = sum(x.numel() * x.element_size() for x in tensors_of(first))
    return [first] + [
        row.inputs() for _ in range(min(max(math.ceil(4 * l2_bytes / size), 2), 32) - 1)
    ]


def milliseconds(calls: Sequence[Callable[[], Any]], capture: bool) -> float:
    """The median time of a call, the calls taken in turn, on the current stream, which is not the default one."""
    from triton.testing import do_bench

    for call in calls:
        call()  # compiles
    torch.cuda.synchronize()
    if not capture:
        turn = itertools.cycle(calls)
        return do_bench(lambda: next(turn)(), warmup=10, rep=100, return_mode="median")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    rounds = max(1, round(1.0 / begin.elapsed_time(end)))
    graph = torch.cuda.CUDAGraph()
    results: deque = deque(
        maxlen=len(calls)
    )  # or the next call would write to the same place, which is in the cache
    graph.capture_begin()
    try:
        for call in list(calls) * rounds:
            results.append(call())
    finally:
        graph.capture_end()
    return do_bench(graph.replay, warmup=5, rep=40, return_mode="median") / (rounds * len(calls))


def run_row(
    row: Row, peers: dict[str, Maker], l2_bytes: int, timer: Callable = milliseconds
) -> dict[str, Any]:
    """The row's record: errors and milliseconds by column. A peer that fails is left out, and says why on stderr."""
    makers = {"ours": row.makers["ours"]}
    makers |= {k: make for k, make in {**row.makers, **peers}.items() if k in COLUMNS}
    errors: dict[str, float] = {}
    ms: dict[str, float] = {}
    inputs = row.inputs()
    exact = row.exact(*cloned(inputs))
    for column, make in makers.items():
        with _tolerated(row, column):
            if call := make(*cloned(inputs)):  # else it has no equivalent at this shape
                errors[column] = relative_error(call(), exact)
    del inputs, exact
    sets = rotation(row, l2_bytes)
    for column in errors:
        for capture in (True, False) if row.capture else (False,):
            with _tolerated(row, column):
                ms[column] = timer([makers[column](*inputs) for inputs in sets], capture)
                break
    allowed = max(ALLOWED * errors["eager"], NOISE) if "eager" in errors else ROUNDING
    return {
        "kernel": row.kernel,
        "shape": row.shape,
        "ms": ms,
        "error": errors,
        "right": errors["ours"] <= allowed,
    }


@contextlib.contextmanager
def _tolerated(row: Row, column: str) -> Iterator[None]:
    """Peers may fail here, with a note; we may not."""
    try:
        yield
    except PEER_ERRORS as error:
        if column == "ours":
            raise
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        print(f"{row.kernel} {row.shape}: {column} failed: {reason[0][:160]}", file=sys.stderr)


# ---- the machine


def peak_rates(device: str) -> dict[str, float]:
    """What this GPU reaches in a large copy, bytes/s, and a large bf16 matmul, FLOP/s."""
    x, y = (torch.empty(2**30, dtype=torch.uint8, device=device) for _ in range(2))
    copy = milliseconds([lambda: y.copy_(x)], capture=False)
    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    matmul = milliseconds([lambda: a @ b.t()], capture=False)
    return {"copy": 2 * x.numel() / copy * 1e3, "matmul": 2 * n**3 / matmul * 1e3}


def about_the_machine(peers: Any) -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    import triton

    versions = {"driver": driver, "torch": torch.__version__, "triton": triton.__version__}
    if peers is not None:
        versions |= peers.versions()
    return {"gpu": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"), **versions}


# ---- the table


def header(machine: dict[str, Any], rates: dict[str, float]) -> str:
    speeds = (
        f"copy {rates['copy'] / 1e12:.2f} TB/s, bf16 matmul {rates['matmul'] / 1e12:.0f} TFLOP/s"
    )
    titles = [f"{'kernel':<22}{'shape':<28}{'ms':>8}{'of peak':>14}"]
    titles += [f"{column:>13}" for column in COLUMNS] + [f"{'faster':>8}{'error':>10}{'eager':>10}"]
    return ", ".join(f"{k} {v}" if k not in ("gpu", "date") else v for k, v in machine.items()) + (
        f"\n{speeds}; ms, of peak, ms of the others, times faster than the best of them, relative errors\n"
        + "".join(titles)
    )


def line(record: dict[str, Any]) -> str:
    ms, error = record["ms"], record["error"]
    cells = [f"{record['kernel']:<22}{record['shape']:<28}{ms['ours']:>8.4f}"]
    cells.append(f"{record['of_peak']:>7.2f} {record['unit']:<6}")
    cells += [f"{ms[column]:>13.4f}" if column in ms else f"{'-':>13}" for column in COLUMNS]
    cells.append(f"{record['faster']:>8.2f}" if record["faster"] else f"{'-':>8}")
    cells += [
        f"{error[column]:>10.1e}" if column in error else f"{'-':>10}"
        for column in ("ours", "eager")
    ]
    return "".join(cells) + ("" if record["right"] else "   MORE THAN TWICE EAGER'S ERROR")


def bench(args: argparse.Namespace) -> int:
    start, device = time.perf_counter(), "cuda"
    peers = None
    if args.peers:
        sys.path.append(str(Path(__file__).parents[2] / "tests"))
        peers = importlib.import_module("referees.kernel_peers")
    torch.manual_seed(0)
    records = []
    with torch.cuda.stream(torch.cuda.Stream()):  # graphs are captured where autograd's forward ran
        rates, machine = peak_rates(device), about_the_machine(peers)
        print(header(machine, rates), flush=True)
        for row in itertools.chain.from_iterable(group(MemoryModel(), device) for group in GROUPS):
            if args.only and not any(word in row.kernel for word in args.only):
                continue
            theirs = peers.makers(row.kernel) if peers is not None else {}
            if args.no_compile:
                row.makers.pop("compile", None)
                theirs.pop("compile", None)
            record = run_row(row, theirs, torch.cuda.get_device_properties(device).L2_cache_size)
            best = min(
                (ms for column, ms in record["ms"].items() if column != "ours"), default=None
            )
            record |= {
                "unit": row.unit,
                "of_peak": row.work / record["ms"]["ours"] * 1e3 / rates[row.unit],
                "faster": best and best / record["ms"]["ours"],
            }
            records.append(record)
            print(line(record), flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    if not records:
        raise ValueError(
            f"no kernel has {' or '.join(args.only)} in its name; without --only all of them are timed"
        )
    print(f"{len(records)} rows in {time.perf_counter() - start:.0f} s")
    lines = [json.dumps({**record, **machine, "rates": rates}) for record in records]
    print("\n".join(f"RESULT {text}" for text in lines))
    if args.json:
        args.json.write_text("\n".join(lines) + "\n")
    return 0 if all(record["right"] for record in records) else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="time other libraries too (tests/referees/kernel_peers.py)",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="kernels whose name contains one of these words"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the records there, one JSON object a line"
    )
    args = parser.parse_args(argv)
    try:
        if not torch.cuda.is_available():
            raise ValueError("no CUDA GPU is to be seen; the kernels are timed on one")
        return bench(args)
    except (ValueError, OSError) as error:
        print(f"kernel_timing.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
