"""The run folder: the files of a run, and which of them a new run may replace.

    OUTPUT/config.toml      every setting, resolved; a file for --config
    OUTPUT/metrics.jsonl    one JSON object a logging step or evaluation
    OUTPUT/checkpoint-N/    the state after N optimizer steps (checkpoint.py)
    OUTPUT/adapter/         the result, in PEFT's format
    OUTPUT/merged/          with --merge, base and adapter as one 16-bit model
    OUTPUT/NAME-TYPE.gguf   with --gguf, the same as one file
    OUTPUT/outputs.json     the names of all of these that the run wrote, except checkpoints
    OUTPUT/tokenized/       large datasets as tokens, named by their content (data/token_cache.py)

A run replaces outputs of an earlier run only if asked to. It deletes nothing except the names in
outputs.json and checkpoints, which are folders named checkpoint-N with a state.json. The tokens
belong to no run: each run uses the entries that fit its data, and replaces the others.
"""

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minitune.atomic_files import (
    atomic_write_text,
    os_errors_as_value_error,
)
from minitune.checkpoints.adapter import save_adapter
from minitune.checkpoints.find_model import ADAPTER, checkpoint_step
from minitune.config.cli import toml_text, with_absolute_paths
from minitune.config.sft_config import SFTConfig
from minitune.model.causal_lm import CausalLM
from minitune.read_files import read_json
from minitune.training.checkpoint import STATE, save_checkpoint
from minitune.training.optimizer import FlatAdamW

MERGED, METRICS, CONFIG = "merged", "metrics.jsonl", "config.toml"
OUTPUTS = "outputs.json"
# A folder without outputs.json is from an older version; these names in it are a run's.
NAMES_WITHOUT_LIST = (ADAPTER, MERGED, METRICS, CONFIG)
NUMBER = re.compile("[0-9]+")


# ---- the outputs of a run


def checkpoints(output: str | Path) -> list[Path]:
    """Return the checkpoint-N folders that a run wrote, oldest first."""
    found = [
        folder
        for folder in Path(output).glob("checkpoint-*")
        if checkpoint_step(folder) and (folder / STATE).is_file()
    ]
    return sorted(found, key=checkpoint_step)


def existing_outputs(output: str | Path) -> list[str]:
    """Return the names in a folder that a run wrote, without outputs.json; empty if there are none.

    Raises: ValueError if outputs.json is broken.
    """
    output = Path(output)
    names = [folder.name for folder in checkpoints(output)] + _listed_names(output)
    return [name for name in dict.fromkeys(names) if _exists(output / name)]


def _listed_names(output: Path) -> list[str]:
    """Return the names in outputs.json, or those that an older version may have written."""
    path = output / OUTPUTS
    if not path.is_file():
        return list(NAMES_WITHOUT_LIST)
    names = read_json(path).get("names")
    # overwrite=True deletes these, so a path to another folder must not be among them
    if not isinstance(names, list) or not all(map(_is_file_name, names)):
        raise ValueError(
            f'{path}: expected {{"names": [...]}} with names of files in this folder, found '
            f"{names!r}; remove outputs.json, or choose another output_dir"
        )
    return names


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", "..") and Path(name).name == name


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def add_outputs(output: Path, names: Iterable[str]) -> None:
    """Add names to outputs.json.

    Raises: ValueError if the file cannot be written.
    """
    listed = [name for name in _listed_names(output) if _exists(output / name)]
    listed += [name for name in names if name not in listed]
    atomic_write_text(output / OUTPUTS, json.dumps({"names": listed}, indent=2) + "\n")


def clear_run(output: str | Path) -> None:
    """Delete the outputs of a run, and nothing else.

    Raises: ValueError naming the folder if that fails.
    """
    output = Path(output)
    with os_errors_as_value_error(output):
        for name in existing_outputs(output):
            _delete(output / name)
        (output / OUTPUTS).unlink(missing_ok=True)


def _delete(path: Path) -> None:
    """Delete a file, a folder, or a symlink without its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def delete_checkpoints(output: str | Path, after: int, except_step: int | None = None) -> None:
    """Delete checkpoints of steps later than `after`, except `except_step`.

    A run that is resumed from an earlier step writes its own later checkpoints.
    """
    for folder in checkpoints(output):
        step = checkpoint_step(folder)
        if step > after and step != except_step:
            _delete(folder)


# ---- the choice of the folder


def check_output(
    output: str | Path,
    overwrite: bool,
    resume: bool,
    protected_paths: Iterable[str | Path] = (),
    new_names: Iterable[str] = (),
) -> None:
    """Check that a run may write to folder `output`.

    overwrite, resume: the settings of the run.
    protected_paths: model and data, which must not lie in an output that the run replaces.
    new_names: names of files that the run writes at its end.

    Raises: ValueError if the run would replace anything that it was not told to replace.
    """
    folder = Path(output)
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"output folder {output}: {path} is a file; choose another output_dir")
    found = existing_outputs(folder)
    if found and not (overwrite or resume):
        raise ValueError(
            f"{output} already holds a run ({', '.join(found[:3])}); pass resume=True to continue "
            "it, overwrite=True to replace it, or another output_dir"
        )
    existing = [name for name in new_names if (folder / name).exists()]
    if existing and not (overwrite or resume):
        raise ValueError(
            f"{folder / existing[0]} exists; pass overwrite=True to replace it, or another "
            "output_dir"
        )
    for name in (*found, *existing):
        replaced = (folder / name).resolve()
        for path in protected_paths:
            if Path(path).resolve().is_relative_to(replaced):
                raise ValueError(
                    f"{path} is needed, but lies in {folder / name}, which this run would "
                    "replace; choose another output_dir, or move it first"
                )


def check_checkpoint_names(output: str | Path, total_steps: int) -> None:
    """Check that every checkpoint of a run finds its name free or taken by another checkpoint.

    total_steps: optimizer steps of the run.

    Raises: ValueError naming a folder that no run wrote.
    """
    for folder in Path(output).glob("checkpoint-*"):
        step = checkpoint_step(folder)
        if step and step <= total_steps and not (folder / STATE).is_file():
            raise ValueError(
                f"{folder} has the name of a checkpoint, but no run wrote it: it has no {STATE}; "
                "rename it, or choose another output_dir"
            )


def next_run_folder(parent: str | Path = "runs") -> Path:
    """Make a new numbered folder, runs/1, runs/2 and so on, and return it.

    Raises: ValueError naming `parent` if that fails.
    """
    parent = Path(parent)
    with os_errors_as_value_error(parent):
        parent.mkdir(parents=True, exist_ok=True)
        numbers = [int(path.name) for path in parent.iterdir() if NUMBER.fullmatch(path.name)]
        number = max(numbers, default=0) + 1
        while True:
            try:
                (parent / str(number)).mkdir()
                return parent / str(number)
            except FileExistsError:  # another run has taken the number
                number += 1


def open_run_folder(
    args: SFTConfig,
    resume: bool | str | Path,
    protected_paths: Sequence[str | Path],
    total_steps: int,
) -> tuple[Path, Path | None]:
    """Return the run folder and the checkpoint to continue from, or None to start from step 0.

    A run that starts from step 0 deletes the outputs of an earlier run, if it may.

    resume: True for the newest checkpoint, or the path of a checkpoint.
    protected_paths: as in `check_output`.
    total_steps: optimizer steps of the run.

    Raises: ValueError if the folder holds a run and the settings neither resume nor overwrite it.
    """
    resumes = bool(resume) or args.resume
    if args.output_dir is None:
        if resumes:
            raise ValueError("resume needs output_dir: the folder of the run to continue")
        return next_run_folder(), None
    output = Path(args.output_dir)
    check_output(output, args.overwrite, resumes, protected_paths)
    check_checkpoint_names(output, total_steps)
    if resume and isinstance(resume, str | Path):
        return output, Path(resume)
    saved = checkpoints(output) if resumes else []
    if saved:
        return output, saved[-1]
    if resumes and (output / ADAPTER).exists():
        raise ValueError(
            f"{output} holds an adapter but no checkpoint to resume from; pass overwrite=True "
            "to replace it, or another output_dir"
        )
    if resume:
        raise ValueError(
            f"{output} holds no checkpoint to resume from; call train() without "
            "resume_from_checkpoint, or name the run's folder as output_dir"
        )
    clear_run(output)
    return output, None


# ---- the folder of a run that trains


class RunFolder:
    """The folder of one run.

    output: the folder.
    saved_step: step of the last checkpoint of this run, or of the one it continues from.
    """

    def __init__(self, output: Path, saved_step: int = 0, save_total_limit: int | None = None):
        self.output, self.saved_step = output, saved_step
        self._save_total_limit = save_total_limit

    def write_config(self, settings: dict[str, Any]) -> None:
        """Write config.toml, and list it in outputs.json together with metrics.jsonl.

        The paths become absolute, so the file repeats the run from every working directory.

        Raises: ValueError if a file cannot be written.
        """
        atomic_write_text(self.output / CONFIG, toml_text(with_absolute_paths(settings)))
        add_outputs(self.output, [CONFIG, METRICS])

    def save(
        self,
        model: CausalLM,
        optimizer: FlatAdamW,
        step: int,
        state: dict[str, Any],
        kept_step: int | None = None,
    ) -> None:
        """Write checkpoint-N, and delete the checkpoints that it makes obsolete.

        These are later checkpoints than the one that the run continues from, left by the run
        before, and the oldest beyond save_total_limit.

        step: optimizer steps done, N.
        state: the content of state.json.
        kept_step: the step of the best checkpoint, which stays, or None.

        Raises: ValueError if the checkpoint cannot be written.
        """
        save_checkpoint(model, optimizer, state, self.output / f"checkpoint-{step}")
        with os_errors_as_value_error(self.output):
            delete_checkpoints(self.output, after=self.saved_step, except_step=step)
            for old in self._beyond_limit(kept_step):
                _delete(old)
        self.saved_step = step

    def _beyond_limit(self, kept_step: int | None) -> list[Path]:
        """Return the oldest checkpoints beyond save_total_limit, except the best one.

        The best checkpoint counts, except if the limit is 1: then the newest stays too.
        """
        limit, saved = self._save_total_limit, checkpoints(self.output)
        if limit is None:
            return []
        newest = saved[-limit:]
        if all(checkpoint_step(folder) != kept_step for folder in newest):
            kept = [folder for folder in saved if checkpoint_step(folder) == kept_step]
            newest = kept + saved[-max(1, limit - len(kept)) :]
        return [folder for folder in saved if folder not in newest]

    def last_checkpoint(self) -> Path | None:
        """Return the checkpoint that was saved last, or None if there is none."""
        folder = self.output / f"checkpoint-{self.saved_step}"
        return folder if folder.is_dir() else None

    def finish(self, model: CausalLM, step: int) -> Path:
        """Write the adapter and return its folder.

        Later checkpoints, left by the run that this one continues, are deleted.

        step: optimizer steps done.

        Raises: ValueError if the adapter cannot be written.
        """
        if step > self.saved_step:
            with os_errors_as_value_error(self.output):
                delete_checkpoints(self.output, after=self.saved_step)
        save_adapter(model, self.output / ADAPTER)
        add_outputs(self.output, [ADAPTER])
        return self.output / ADAPTER
