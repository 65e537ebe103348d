"""Check this machine and a model: versions, GPU, kernels, gradients, resume, exports and rates.

    minitune doctor                                   with a small random model
    minitune doctor --model DIR|FILE.gguf|runs/1      with the first layers of a model
    minitune doctor --model DIR --json                one JSON object on stdout, and nothing else

A row is a check, its result and its figures. No check begins after two minutes; those left over are
skipped by name. The exit code is 1 if a check fails and 2 if the command line is wrong. No file
stays on the disk except the caches that a run fills too: Triton's kernels and the GPU's rates.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from minitune.checkpoints.find_model import find_model
from minitune.config.cli import (
    Settings,
    in_flags,
    parse_flags,
    run_command,
    settings_from_flags,
    settings_parser,
)
from minitune.device import choose_device, choose_dtype
from minitune.doctor.examine import examine
from minitune.doctor.report import Report, Row
from minitune.doctor.subject import Request
from minitune.threads import use_free_cores

DESCRIPTION = "Check this machine and a model, in about two minutes."
DOCTOR_SETTINGS = (
    "model",
    "adapter",
    "device",
    "dtype",
    "load_in_4bit",
    "r",
    "lora_alpha",
    "target_modules",
    "use_rslora",
)
FAILED = 1  # exit code


def main(argv: Sequence[str] | None = None, program: str = "minitune doctor") -> int:
    """Run the command and return its exit code."""
    return run_command(program, _run, argv, program)


def _run(argv: Sequence[str] | None, program: str) -> int:
    flags = parse_flags(_parser(program), argv)
    as_json = flags.pop("json", False)
    request = _request(settings_from_flags(flags))
    use_free_cores(request.device)
    report = Report(show=_show_nothing if as_json else _show)
    examine(request, report)
    print(json.dumps(_to_json(request, report), indent=2) if as_json else report.summary())
    return FAILED if report.has_failed else 0


def _parser(program: str) -> argparse.ArgumentParser:
    parser = settings_parser(program, DESCRIPTION, names=DOCTOR_SETTINGS)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the table"
    )
    return parser


def _request(settings: Settings) -> Request:
    """Return the checked wishes of a command line.

    Raises: ValueError if a model, an adapter or a device is not there.
    """
    run = settings.run
    if run.adapter is not None and run.model is None:
        raise ValueError("--adapter needs its base model: --model DIR --adapter DIR")
    if run.model is not None:
        find_model(run.model, run.adapter)
    device = choose_device(run.device)
    return Request(
        model=run.model,
        adapter=run.adapter,
        device=device,
        dtype=choose_dtype(run.dtype, device),
        load_in_4bit=run.load_in_4bit,
        lora=settings.lora,
    )


def _show(row: Row) -> None:
    print(in_flags(row.line()), flush=True)


def _show_nothing(_: Row) -> None:
    """Show no row: the object at the end holds them all."""


def _to_json(request: Request, report: Report) -> dict[str, Any]:
    settings = {
        "model": request.model,
        "device": str(request.device),
        "dtype": str(request.dtype).removeprefix("torch."),
    }
    return settings | report.to_json()


if __name__ == "__main__":
    sys.exit(main())
