"""The run folder: what a run writes, which checkpoint it continues from, and what must not have changed meanwhile.

    OUTPUT/config.toml      every setting, resolved; a file for --config
    OUTPUT/metrics.jsonl    one JSON object a logging step or evaluation
    OUTPUT/checkpoint-N/    after N optimizer steps (checkpoint.py)
    OUTPUT/adapter/         the result, in PEFT's format
    OUTPUT/merged/          with --merge, base and adapter as one 16-bit model

Nothing of an earlier run is replaced unless that was asked for, and files that no run wrote are never touched.
"""

import shutil
from pathlib import Path
from typing import Any

from minitune.config import SFTConfig

# What has to be the same for a resumed run to go on where it was, and what may differ with a warning.
SAME_ORDER = ("seed", "samples_per_step", "packing", "max_length", "data")
SAME_MATHEMATICS = (
    "model", "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "total_steps", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
)  # fmt: skip


def checkpoints(output: str | Path) -> list[Path]:
    """The checkpoint-N folders of a run, oldest first."""
    found = [p for p in Path(output).glob("checkpoint-*") if p.name.split("-")[-1].isdigit() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.split("-")[-1]))


def holds_run(output: str | Path) -> list[str]:
    """Names of what a run wrote into a folder; empty where there is none."""
    names = [p.name for p in checkpoints(output)]
    return names + [
        name for name in ("adapter", "merged", "metrics.jsonl", "config.toml") if (Path(output) / name).exists()
    ]


def check_output(output: str | Path, overwrite: bool, resume: bool) -> None:
    """ValueError where `output` cannot become, or already is, a run folder and neither option says what to do."""
    if Path(output).exists() and not Path(output).is_dir():
        raise ValueError(f"output folder {output} is a file")
    if (found := holds_run(output)) and not (overwrite or resume):
        raise ValueError(
            f"{output} already holds a run ({', '.join(found[:3])}); pass --resume to continue it, --overwrite to "
            "replace it, or another --output-dir"
        )


def clear_run(output: str | Path) -> None:
    """Remove what a run wrote into a folder, and nothing else."""
    for name in holds_run(output):
        path = Path(output) / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def next_run_folder(parent: str | Path = "runs") -> Path:
    """A new numbered folder, made: runs/1, runs/2, ..."""
    parent = Path(parent)
    parent.mkdir(parents=True, exist_ok=True)
    number = max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0) + 1
    while True:
        try:
            (parent / str(number)).mkdir()
            return parent / str(number)
        except FileExistsError:  # another run took it meanwhile
            number += 1


def open_run(args: SFTConfig, resume: bool | str | Path) -> tuple[Path, Path | None]:
    """The run folder, and the checkpoint in it to continue from, or None to start from the beginning.

    resume: True for the newest checkpoint, a path for that one. Raises ValueError where the folder holds a run and the
    settings don't say what becomes of it. Changes nothing but that a numbered folder is made where output_dir is None.
    """
    wanted = bool(resume) or args.resume
    if args.output_dir is None:
        if wanted:
            raise ValueError("resume needs output_dir: the folder of the run to continue")
        return next_run_folder(), None
    output = Path(args.output_dir)
    check_output(output, args.overwrite, wanted)
    if isinstance(resume, (str, Path)):
        return output, Path(resume)
    saved = checkpoints(output) if wanted else []
    if wanted and not saved and (output / "adapter").exists():
        raise ValueError(f"{output} holds an adapter but no checkpoint to resume from; pass --overwrite to replace it")
    return output, saved[-1] if saved else None


def changed_settings(source: Path, before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between a checkpoint's settings and today's, in words, where the run can go on with it; else "".

    Raises ValueError where the difference would change which samples come next.
    """
    changed = [name for name in SAME_ORDER + SAME_MATHEMATICS if before.get(name) != now[name]]
    words = ", ".join(f"{name} {before.get(name)} -> {now[name]}" for name in changed)
    if wrong := [name for name in changed if name in SAME_ORDER]:
        raise ValueError(
            f"{source} cannot be continued: {words}; another {wrong[0]} changes which samples are left. Use the same, "
            "or start anew with --overwrite"
        )
    return words
