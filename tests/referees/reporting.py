"""What the commands among the tests share: processes of their own, tables, where and with what something ran."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "unsloth")


def about() -> dict[str, str]:
    """GPU, date and versions."""
    found = {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}
    found["date"] = time.strftime("%Y-%m-%d")
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def run_self(
    *args: str | Path, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """exactness.py once more, in a process of its own."""
    folder = Path(__file__).resolve().parent
    path = os.pathsep.join(filter(None, [str(folder.parents[1]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(folder / "exactness.py"), *map(str, args)]
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )


def checked(process: subprocess.CompletedProcess) -> None:
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{' '.join(process.args[2:5])} failed: {last}")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
