"""The benchmark's table: each row's shape, with every kernel our own and with the fastest, and a peer beside it.

Each figure comes from a process of its own, one at a time, so no system sees another's memory or caches. A process that
leaves no result is a line in the table that says why. Figures are printed, and written to --json FILE, as they come.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minitune.kernels.attention_cudnn import CUDNN_MIN_LENGTH

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts" / "bench.py"
PEERS = ROOT / "tests" / "referees" / "peers.py"
PEER_NAMES = ("unsloth", "hf", "liger")
PEER_CHECKPOINTING = {"true": "default", "auto": "default", "false": "none"}
MARK = "RESULT "
STEP_COLUMNS = {"ms": "ms", "min": "min_ms", "max": "max_ms", "tok/s": "tok_s"}
SHORT_COLUMNS = {
    "s/step": "s_per_step",
    "samples/s": "samples_s",
    "over all": "samples_s_all",
    "tok/s": "tok_s",
}

Record = dict[str, Any]


class Row(NamedTuple):
    """aim and peak are what we want to reach on an H100 80GB: ms a step (short: samples/s), GiB allocated.

    checkpointing: the peer's; ours is "auto" where there is a budget. That is a twentieth more than the peak, because
    plans leave as much of it (short: less, for the sizes that come; with a limit: less, as memory is reserved that is
    not allocated). host: the host memory that activations may wait in, with the embedding there too; frugal: 8-bit
    moments.
    """

    shape: str
    targets: str
    batch: int
    tokens: int
    checkpointing: str
    aim: float
    peak: float
    budget: str | None = None
    short: bool = False
    host: str | None = None
    frugal: bool = False
    r: int = 16
    limit: str | None = None  # memory that the GPU is to have; no peer runs in it
    steps: int | None = None  # of each, timed and before, where a step takes long

    def __str__(self) -> str:
        if self.short:
            return f"{self.shape.upper()}, short samples"
        kind = "kept" if self.checkpointing == "false" else f"within {self.peak} GiB"
        kind = f"on a GPU of {self.limit}" if self.limit else kind
        kind += (", and the host" if self.host else "") + (", frugal" if self.frugal else "")
        return f"{self.shape.upper()}, {self.targets}, {self.batch} x {self.tokens}, {kind}"


LONGEST = {"host": "110GiB", "frugal": True, "r": 32, "steps": 1}
ROWS = {
    1: Row("8b", "qkvo", 2, 2048, "auto", 300, 7.6, "8GiB"),
    2: Row("8b", "all", 2, 2048, "auto", 315, 8.2, "8.6GiB"),
    3: Row("8b", "all", 2, 2048, "false", 240, 21, "22.1GiB"),
    4: Row("8b", "all", 1, 8192, "auto", 715, 10.5, "11.05GiB"),
    5: Row("1b", "all", 2, 2048, "false", 55, 5.41, "5.69GiB"),
    6: Row("135m", "all", 4, 1024, "false", 25, 2.2, "2.31GiB"),
    7: Row("8b", "all", 2, 2048, "auto", 90, 10, "10GiB", short=True),
    8: Row("1b", "all", 2, 2048, "auto", 400, 3, "3GiB", short=True),
    9: Row("8b", "qkvo", 2, 2048, "auto", 280, 6.47, "6.81GiB", host="64GiB"),
    10: Row("8b", "all", 2, 2048, "auto", 295, 7.03, "7.4GiB", host="64GiB"),
    11: Row("8b", "all", 1, 8192, "auto", 640, 8.05, "8.4GiB", host="64GiB"),
    12: Row("8b", "all", 2, 2048, "auto", 388, 5.8, "6.1GiB", host="64GiB", frugal=True),
    13: Row("8b", "all", 1, 32768, "auto", 3900, 14.24, "14.9GiB", host="64GiB", steps=3),
    14: Row("8b", "all", 1, 200_000, "auto", 111_000, 24, "21.5GiB", limit="24GiB", **LONGEST),
    15: Row("8b", "all", 1, 24_000, "auto", 4000, 8, "7.7GiB", limit="8GiB", **LONGEST),
    16: Row("8b", "all", 1, 8192, "auto", 878, 6.8, "7.15GiB", host="64GiB", frugal=True),
    17: Row(
        "8b", "all", 1, 32768, "auto", 5073, 8.45, "8.9GiB", host="64GiB", frugal=True, steps=3
    ),
}


def text_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns as wide as they need to be; None is a dash."""
    lines = [list(header), *(["-" if cell is None else str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def child(command: Sequence[str | Path], timeout: float, **options) -> Record:
    """The record of a benchmark in a process of its own, or {"error": one line} where it left none."""
    try:
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            capture_output=True,
            text=True,
            timeout=timeout,
            **options,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {timeout:g} s"}
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()] or [
        "nothing was said"
    ]
    return {"error": f"exit code {done.returncode}: {said[-1][:300]}"}


def peer_record(peer: str, model: Path, options: Sequence[str], timeout: float) -> Record:
    """A peer's record on the same checkpoint; without one, {"peer": its name, "error": why}.

    It starts in an empty folder and without the checkout on the path: transformers takes a folder named `kernels` that
    it can import for the package of that name, and fails.
    """
    folders = [
        str(Path(folder).resolve())
        for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if folder
    ]
    path = os.pathsep.join(folder for folder in folders if folder != str(ROOT))
    with tempfile.TemporaryDirectory() as empty:
        command = [PEERS, peer, model.resolve(), *options]
        return {"peer": peer, "model": model.name} | child(
            command, timeout, cwd=empty, env=os.environ | {"PYTHONPATH": path}
        )


def run_table(
    models: Path,
    numbers: Sequence[int],
    attentions: Sequence[str],
    peers: Sequence[str],
    counts: Sequence[str],
    timeout: float,
    emit: Callable[[Record], None],
) -> bool:
    """Run the rows, print their table, and return whether all went well.

    models: the folder of 8b/, 1b/ and 135m/, made where they are missing; counts: flags for --steps and --warmup.
    Raises ValueError where one cannot be made.
    """
    for shape in dict.fromkeys(ROWS[number].shape for number in numbers):
        if not (models / shape / "config.json").exists():
            _tell(f"making {models / shape}")
            made = child([BENCH, "--make", shape, models / shape], timeout)
            if not (models / shape / "config.json").exists():
                raise ValueError(f"{models / shape} could not be made: {made['error']}")
    lines, good = [], True
    try:
        for number in numbers:
            row, model = ROWS[number], models / ROWS[number].shape
            options = [
                "--batch",
                row.batch,
                "--tokens",
                row.tokens,
                "--targets",
                row.targets,
                "--r",
                row.r,
                *counts,
            ]
            options += (
                ["--steps", row.steps, "--warmup", row.steps] if row.steps and not counts else []
            )
            options = [*map(str, options), *(["--short"] if row.short else [])]
            theirs = []
            for peer in peers:
                if row.limit or (row.short and peer != "unsloth"):
                    continue
                _tell(f"row {number}, {peer}")
                mode = (
                    [] if row.short else ["--checkpointing", PEER_CHECKPOINTING[row.checkpointing]]
                )
                theirs.append(peer_record(peer, model, [*options, *mode], timeout))
                emit({"row": number} | theirs[-1])
            for attention in attentions if row.tokens >= CUDNN_MIN_LENGTH else attentions[-1:]:
                _tell(f"row {number}, minitune, attention {attention}")
                mode = [
                    "--attention",
                    attention,
                    "--checkpointing",
                    "auto" if row.budget else row.checkpointing,
                ]
                mode += ["--memory-limit", row.limit] if row.limit else []
                mode += ["--memory-budget", row.budget] if row.budget else []
                mode += ["--host-memory", row.host, "--offload-embedding"] if row.host else []
                mode += ["--optim", "adamw_8bit"] if row.frugal else []
                ours = {"peer": "minitune", "attention": attention}
                ours |= child([BENCH, "--model", model, *options, *mode], timeout)
                emit({"row": number} | ours)
                lines.append(_line(number, row, ours, theirs))
                good &= not any("error" in record for record in (ours, *theirs))
    finally:
        print(
            "\nms a step (short samples: samples/s); ratio: how many times as fast as the fastest peer; peak in GiB;"
        )
        print(
            f"aims are for an H100 80GB; below {CUDNN_MIN_LENGTH} tokens attention is our own either way, and runs once"
        )
        header = [
            "row",
            "what",
            "attention",
            "ours",
            "peer",
            "ratio",
            "aim",
            "peak",
            "peer's peak",
            "peak aim",
        ]
        print(text_table(header, lines), flush=True)
    return good


def comparison(records: Sequence[Record]) -> str:
    """The records of one configuration as a table, ours last; the ratio is how many times as fast ours is."""
    short = any("samples_s" in record for record in records)
    shown = {
        "system": "peer",
        "attention": "attention",
        "checkpointing": "gc",
        **(SHORT_COLUMNS if short else STEP_COLUMNS),
        "peak GiB": "peak_gb",
        "reserved": "reserved_gb",
        "pinned": "pinned_gb",
        "loaded": "loaded_gb",
        "warm-up s": "warmup_s",
    }
    rows = []
    for record in records:
        ratio = (
            f"{speed(records[-1]) / speed(record):.2f}x"
            if speed(record)
            else f"failed ({record['error']})"
        )
        rows.append([*(record.get(key) for key in shown.values()), ratio])
    return text_table([*shown, "ratio"], rows)


def shares(milliseconds: dict[str, float]) -> str:
    """A profile as a table: ms a step and share of it, the largest first, idle last."""
    total = sum(milliseconds.values())
    order = sorted(milliseconds, key=lambda name: (name == "idle", -milliseconds[name]))
    rows = [
        [name, f"{milliseconds[name]:.2f}", f"{100 * milliseconds[name] / total:.1f}%"]
        for name in order
    ]
    return text_table(["group", "ms", "share"], [*rows, ["a step", f"{total:.2f}", "100.0%"]])


def speed(record: Record) -> float | None:
    """Steps or samples a second, whatever the record counts; None where it failed."""
    if "error" in record:
        return None
    return record["samples_s"] if "samples_s" in record else 1e3 / record["ms"]


def _line(number: int, row: Row, ours: Record, theirs: list[Record]) -> list[Any]:
    def figure(record: Record) -> str:
        if "error" in record:
            return f"failed ({record['error']})"
        return f"{record['samples_s']:g}" if row.short else f"{record['ms']:g}"

    best = max(theirs, key=lambda record: speed(record) or 0, default=None)
    ratio = None
    if best is not None and speed(best) and speed(ours):
        ratio = f"{speed(ours) / speed(best):.2f}x"
    other = "; ".join(f"{record['peer']} {figure(record)}" for record in theirs) or None
    peaks = ours.get("peak_gb"), best and best.get("peak_gb")
    return [
        number,
        row,
        ours["attention"],
        figure(ours),
        other,
        ratio,
        f"{row.aim:g}",
        *peaks,
        f"{row.peak:g}",
    ]


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
