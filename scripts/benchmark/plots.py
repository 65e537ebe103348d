"""Plot the peak of GPU memory against the tokens of a step, from the records of bench.py --json.

python scripts/benchmark/plots.py FILE.jsonl... --output memory.png        needs matplotlib
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitune.config.cli import CommandParser, run_command

try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None

Series = dict[str, list[tuple[int, float]]]  # of a model and a system: (tokens, GiB), by tokens


def points(records: Sequence[dict[str, Any]]) -> Series:
    """Return the series of the records, without failed runs and runs on short samples."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        if "error" in record or "samples_s" in record or record["peak_gb"] is None:
            continue
        suffix = ", with host memory" if record.get("host_gb") else ""
        peaks = found.setdefault(f"{record['model']}, {record['peer']}{suffix}", {})
        tokens = record["bs"] * record["seq"]
        peaks[tokens] = min(record["peak_gb"], peaks.get(tokens, float("inf")))
    return {system: sorted(peaks.items()) for system, peaks in found.items()}


def plot(series: Series, path: Path) -> None:
    """Draw a line a series and save the figure.

    Raises: ValueError if matplotlib is missing or there is nothing to draw.
    """
    if not any(series.values()):
        raise ValueError("there is no record of a successful run of steps")
    if Figure is None:
        raise ValueError("matplotlib is missing: pip install matplotlib")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for system, peaks in series.items():
        axes.plot(*zip(*peaks, strict=True), marker="o", label=system)
    axes.set(xscale="log", xlabel="tokens a step", ylabel="peak of GPU memory, GiB", ylim=(0, None))
    tokens = sorted({n for peaks in series.values() for n, _ in peaks})
    axes.set_xticks(tokens, [f"{n:,}" for n in tokens], rotation=30)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    a = parser.parse_args(argv)
    lines = [line for path in a.files for line in path.read_text(encoding="utf-8").splitlines()]
    plot(points([json.loads(line) for line in lines]), a.output)
    print(a.output)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command("plots.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
