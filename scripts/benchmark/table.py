"""Runs of the benchmark in processes of their own, and the tables of their records.

Each record comes from its own process, one at a time, so no system sees another's memory or caches.
A process without a result becomes a line of the table that says why. Records are emitted as they
come: a RESULT line on stdout and a line of the --json file.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark.cases import CASES, Case
from minitune.atomic_files import os_errors_as_value_error
from minitune.kernels.attention_cudnn import CUDNN_MIN_LENGTH
from minitune.progress import print_line

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts" / "bench.py"
PEERS = ROOT / "tests" / "referees" / "peers.py"
PEER_NAMES = ("unsloth", "hf", "liger")
MARK = "RESULT "
TABLE_COLUMNS = (
    "row",
    "configuration",
    "mode",
    "attention",
    "time",
    "peak",
    "host",
    "peer",
    "peer's time",
    "peer's peak",
    "ratio",
    "date",
    "card",
)
TABLE_LEGEND = f"""
time: ms a step, or samples/s of short samples. peak, host: GiB of GPU memory, of offloaded
activations in host memory. ratio: how many times as fast as the fastest peer. Samples below
{CUDNN_MIN_LENGTH} tokens run once: their attention is our own with either setting."""
STEP_COLUMNS = {"ms": "ms", "min": "min_ms", "max": "max_ms", "tok/s": "tok_s"}
SHORT_COLUMNS = {
    "s/step": "s_per_step",
    "samples/s": "samples_s",
    "over all": "samples_s_all",
    "tok/s": "tok_s",
}

Record = dict[str, Any]


# ---- processes


def emit(record: Record, json_file: Path | None) -> None:
    """Print a record as a RESULT line; append it to `json_file`, one record a line, unless None."""
    line = json.dumps(record)
    print(MARK + line, flush=True)
    if json_file is not None:
        with os_errors_as_value_error(json_file), json_file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def child_record(command: Sequence[str | Path], timeout: float, **options: Any) -> Record:
    """Return the record that a Python process prints, or {"error": one line} if it prints none.

    command: a script or "-c", and its arguments.
    timeout: seconds.
    options: arguments of subprocess.run.
    """
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
    output = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    last = output[-1][:300] if output else "no output"
    return {"error": f"exit code {done.returncode}: {last}"}


def peer_record(peer: str, model: Path, options: Sequence[str], timeout: float) -> Record:
    """Return a peer's record on a checkpoint, or {"peer", "model", "error"} if it fails.

    The process starts in an empty folder and without the checkout on its path. transformers takes
    any importable folder `kernels` for the package of that name, and fails.
    """
    parts = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folders = [str(Path(part).resolve()) for part in parts if part]
    path = os.pathsep.join(folder for folder in folders if folder != str(ROOT))
    command = [PEERS, peer, model.resolve(), *options]
    with tempfile.TemporaryDirectory() as empty:
        environment = os.environ | {"PYTHONPATH": path}
        record = child_record(command, timeout, cwd=empty, env=environment)
    return {"peer": peer, "model": model.name} | record


def run_cases(
    models: Path,
    numbers: Sequence[int],
    attentions: Sequence[str],
    peers: Sequence[str],
    counts: Sequence[str],
    timeout: float,
    json_file: Path | None,
) -> bool:
    """Run the numbered cases and print their table. Return True if every run gave a result.

    models: folder of 8b/, 1b/ and 135m/; a missing one is written.
    attentions: settings of --attention; short samples run with the last one.
    counts: the flags --steps and --warmup, or none.
    timeout: seconds of one process.
    json_file: as in `emit`.

    Raises: ValueError if a checkpoint cannot be written.
    """
    for shape in dict.fromkeys(CASES[number].shape for number in numbers):
        _make_checkpoint(models / shape, shape, timeout)
    lines, complete = [], True
    try:
        for number in numbers:
            case = CASES[number]
            model, flags = models / case.shape, [*case.flags(), *_step_flags(case, counts)]
            theirs = []
            for peer in filter(case.measures, peers):
                tell(f"row {number}, {peer}")
                theirs.append(peer_record(peer, model, [*flags, *case.peer_flags()], timeout))
                emit({"row": number} | theirs[-1], json_file)
            for attention in attentions if case.tokens >= CUDNN_MIN_LENGTH else attentions[-1:]:
                tell(f"row {number}, minitune, attention {attention}")
                command = [BENCH, "--model", model, *flags, *case.own_flags(attention)]
                ours = {"peer": "minitune", "attention": attention}
                ours |= child_record(command, timeout)
                emit({"row": number} | ours, json_file)
                lines.append(_case_line(number, ours, theirs))
                complete &= not any("error" in record for record in (ours, *theirs))
    finally:
        print(TABLE_LEGEND)
        print(text_table(TABLE_COLUMNS, lines), flush=True)
    return complete


def _make_checkpoint(folder: Path, shape: str, timeout: float) -> None:
    if (folder / "config.json").exists():
        return
    tell(f"making {folder}")
    made = child_record([BENCH, "--make", shape, folder], timeout)
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} could not be made: {made['error']}")


def _step_flags(case: Case, counts: Sequence[str]) -> list[str]:
    """Return --steps and --warmup: the user's, or the case's own if it has any."""
    if counts or case.steps is None:
        return list(counts)
    return ["--steps", str(case.steps), "--warmup", str(case.steps)]


def tell(text: str) -> None:
    """Print a line of progress on stderr."""
    print_line(text)


# ---- tables


def text_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a text table with aligned columns; None becomes a dash."""
    lines = [list(header), *(["-" if cell is None else str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def comparison(records: Sequence[Record]) -> str:
    """Return the table of one configuration's records. The last is ours; ratios are against it."""
    short = any("samples_s" in record for record in records)
    columns = {
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
        ratio = _ratio(records[-1], record) if speed(record) else f"failed ({record['error']})"
        rows.append([*(record.get(key) for key in columns.values()), ratio])
    return text_table([*columns, "ratio"], rows)


def profile_table(milliseconds: dict[str, float]) -> str:
    """Return a profile as a table: ms and share of a step, the largest first and idle last."""
    total = sum(milliseconds.values())
    order = sorted(milliseconds, key=lambda name: (name == "idle", -milliseconds[name]))
    rows = [
        [name, f"{milliseconds[name]:.2f}", f"{100 * milliseconds[name] / total:.1f}%"]
        for name in order
    ]
    return text_table(["group", "ms", "share"], [*rows, ["a step", f"{total:.2f}", "100.0%"]])


def speed(record: Record) -> float | None:
    """Return steps a second, or samples a second of short samples; None if the run failed."""
    if "error" in record:
        return None
    return record["samples_s"] if "samples_s" in record else 1e3 / record["ms"]


def _case_line(number: int, ours: Record, theirs: Sequence[Record]) -> list[Any]:
    """Return a line of the table: a configuration, our figures, and those of the peers."""
    case = CASES[number]
    best = max(theirs, key=lambda record: speed(record) or 0, default={"error": "no peer"})
    return [
        number,
        case,
        case.mode,
        ours["attention"],
        _time(ours),
        ours.get("peak_gb"),
        ours.get("host_gb"),
        "; ".join(record["peer"] for record in theirs) or None,
        "; ".join(_time(record) for record in theirs) or None,
        "; ".join(str(record.get("peak_gb", "-")) for record in theirs) or None,
        _ratio(ours, best),
        ours.get("date"),
        ours.get("gpu"),
    ]


def _time(record: Record) -> str:
    if "error" in record:
        return f"failed ({record['error']})"
    return f"{record['samples_s']:g}" if "samples_s" in record else f"{record['ms']:g}"


def _ratio(ours: Record, theirs: Record) -> str | None:
    """Return how many times as fast ours is, or None if one of the two failed."""
    if speed(ours) is None or speed(theirs) is None:
        return None
    return f"{speed(ours) / speed(theirs):.2f}x"
