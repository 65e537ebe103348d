"""A plot of peak GPU memory against context length, from what bench.py --json wrote: a line a system.

python scripts/benchmark/plots.py FILE.jsonl... --output memory.png        needs matplotlib
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def points(records: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(tokens, GiB) of each model and system, shortest first, without runs that failed and those of short samples."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        if "error" not in record and "samples_s" not in record and record["peak_gb"] is not None:
            place = ", with host memory" if record.get("host_gb") else ""
            lengths = found.setdefault(f"{record['model']}, {record['peer']}{place}", {})
            tokens = record["bs"] * record["seq"]
            lengths[tokens] = min(record["peak_gb"], lengths.get(tokens, float("inf")))
    return {system: sorted(lengths.items()) for system, lengths in found.items()}


def plot(series: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Raises ValueError where matplotlib is missing or there is nothing to draw."""
    if not any(series.values()):
        raise ValueError("there is no record of a run that went well")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("matplotlib is missing: pip install matplotlib") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for system, lengths in series.items():
        axes.plot(*zip(*lengths, strict=True), marker="o", label=system)
    axes.set(xscale="log", xlabel="tokens a step", ylabel="peak of GPU memory, GiB", ylim=(0, None))
    tokens = sorted({n for lengths in series.values() for n, _ in lengths})
    axes.set_xticks(tokens, [f"{n:,}" for n in tokens], rotation=30)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    a = parser.parse_args(argv)
    try:
        lines = [line for path in a.files for line in path.read_text(encoding="utf-8").splitlines()]
        plot(points([json.loads(line) for line in lines]), a.output)
    except (ValueError, KeyError, OSError) as error:
        print(f"plots.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(a.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
