"""Shared by exactness.py and loss_curves.py: child processes, tables, the machine and versions."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from referees.versions import installed_versions

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "unsloth")


def machine_and_versions() -> dict[str, str]:
    """Return the GPU, the date and the versions."""
    found = {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}
    found["date"] = time.strftime("%Y-%m-%d")
    return found | installed_versions(PACKAGES)


def as_text(facts: dict[str, str]) -> str:
    """Return the result of `machine_and_versions` as a line."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def run_self(
    *args: str | Path, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """Run a command of exactness.py in a process of its own."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(FOLDER / "exactness.py"), *map(str, args)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )


def require_success(process: subprocess.CompletedProcess) -> None:
    """Raise ValueError with the last line of its stderr if a process failed."""
    if process.returncode:
        raise ValueError(f"{' '.join(process.args[2:5])} failed: {last_line(process)}")


def last_line(process: subprocess.CompletedProcess) -> str:
    """Return the last line of a process's stderr."""
    return (process.stderr.strip().splitlines() or ["no message"])[-1]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def seeded(seed: int) -> torch.Generator:
    """Return a generator on the CPU."""
    return torch.Generator().manual_seed(seed)
