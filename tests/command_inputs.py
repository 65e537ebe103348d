"""The files and arguments of a small training run from the command line."""

import functools
import json
from pathlib import Path

from demonstration import demo
from tiny import make_tiny_model

from minitune.commands.train import Demonstration, main

# The command as scripts/train.py calls it.
train = functools.partial(
    main, program="train.py", demonstration=Demonstration(demo.DEFAULTS, demo.run)
)


def write_inputs(folder: Path) -> Path:
    """Write model/, data.jsonl, broken.jsonl and unknown.jsonl into `folder` and return it."""
    make_tiny_model(folder / "model")
    records = []
    for i in range(12):
        question = {"role": "user", "content": f"number {i}"}
        answer = {"role": "assistant", "content": f"it is {i}"}
        records.append({"messages": [question, answer]})
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "data.jsonl").write_text("".join(lines))
    (folder / "broken.jsonl").write_text(lines[0] + "{not JSON\n")
    (folder / "unknown.jsonl").write_text('{"question": "?"}\n')
    return folder


def train_arguments(inputs: Path, output: Path, *more: str) -> list[str]:
    """Return the arguments of a run of two steps on the CPU."""
    return [
        *("--model", str(inputs / "model")),
        *("--data", str(inputs / "data.jsonl")),
        *("--max-seq-length", "128"),
        *("--device", "cpu"),
        *("--max-steps", "2"),
        *("--output-dir", str(output)),
        *more,
    ]
