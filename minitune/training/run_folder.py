"""The choice of the run folder: its files, its lock, and which files a new run may replace.

    OUTPUT/config.toml      every setting, resolved; a file for --config
    OUTPUT/metrics.jsonl    one JSON object a logging step or evaluation
    OUTPUT/run.json         facts of the run for its report (run_facts.py)
    OUTPUT/checkpoint-N/    the state after N optimizer steps (checkpoint.py)
    OUTPUT/adapter/         the result, in PEFT's format
    OUTPUT/merged/          with --merge, base and adapter as one 16-bit model
    OUTPUT/NAME-TYPE.gguf   with --gguf, the same as one file
    OUTPUT/report.html      with --report or `minitune report`, the run as a page
    OUTPUT/outputs.json     the names of all of these that the run wrote, except checkpoints
    OUTPUT/tokenized/       large datasets as tokens, named by their content (data/token_cache.py)
    OUTPUT/.run.lock        while a run trains: its process id and host (locks.py)

A run replaces outputs of an earlier run only if asked to, and never a file or folder that no run
wrote (own_files.py). The tokens belong to no run: each run uses the entries that fit its data, and
replaces the others. A lock refuses a second run in the folder.

A program in Python may train without a folder: output_dir=None and save_strategy="no". Such a run
writes nothing. The adapter is in the model, and the records are in trainer.state. A command always
has a folder, because its result would be lost.

On a GPU, other folders are written however a run is saved:

    ~/.cache/minitune/rates.json    the rates of the GPU, once (memory/device_rates.py)
    ~/.triton/cache                 by Triton: the compiled kernels; TRITON_CACHE_DIR moves it
    ~/.nv/ComputeCache              by the CUDA driver; CUDA_CACHE_PATH moves it
    TMPDIR                          by Triton, while a kernel is compiled

Without HOME and XDG_CACHE_HOME, rates.json is not written. A base that is a GGUF file has its small
files in TMPDIR until the process ends (gguf/base/model_files.py).
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from minitune.atomic_files import os_errors_as_value_error
from minitune.checkpoints.find_model import ADAPTER, checkpoint_step
from minitune.config.sft_config import SFTConfig
from minitune.locks import check_not_held, exclusive
from minitune.progress import print_message
from minitune.training.checkpoint import STATE
from minitune.training.own_files import (
    CONFIG,
    FACTS,
    METRICS,
    OUTPUTS,
    check_free,
    checkpoints,
    delete,
    existing_outputs,
    foreign_files,
    is_own_checkpoint,
    remove_leftovers,
)

LOCK = ".run.lock"
RUNS = "runs"  # folder of the runs without output_dir
NUMBER = re.compile("[0-9]+")
REMEDY = "wait for its end, or choose another output_dir"
NO_LOCKS = "the file system of {} has no locks, so a second run in this folder would not be refused"


# ---- the outputs of a run before


def clear_run(output: str | Path) -> None:
    """Delete the outputs of a run, and nothing else.

    Raises: ValueError naming the folder if that fails.
    """
    output = Path(output)
    with os_errors_as_value_error(output):
        for name in existing_outputs(output):
            delete(output / name)
        (output / OUTPUTS).unlink(missing_ok=True)


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

    Raises: ValueError if another run trains in the folder, or the run would replace anything that
        it was not told to replace.
    """
    folder = Path(output)
    with os_errors_as_value_error(folder):
        check_not_held(folder / LOCK, _other_run(folder), REMEDY)
    _check_outputs(folder, overwrite, resume, protected_paths, new_names)


def _other_run(output: Path) -> str:
    return f"{output}: another run trains in this folder"


def _check_outputs(
    folder: Path,
    overwrite: bool,
    resume: bool,
    protected_paths: Iterable[str | Path],
    new_names: Iterable[str] = (),
) -> None:
    """Check the files in a folder as `check_output` does."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"output folder {folder}: {path} is a file; choose another output_dir")
    found = existing_outputs(folder)
    if found and not (overwrite or resume):
        raise ValueError(
            f"{folder} already holds a run ({', '.join(found[:3])}); pass resume=True to continue "
            "it, overwrite=True to replace it, or another output_dir"
        )
    check_free(folder, [CONFIG, METRICS, FACTS, ADAPTER, *new_names])
    for name in found:
        replaced = os.path.realpath(folder / name)  # Path.resolve fails at a link to itself
        for path in protected_paths:
            if Path(os.path.realpath(path)).is_relative_to(replaced):
                raise ValueError(
                    f"{path} is needed, but lies in {folder / name}, which this run would "
                    "replace; choose another output_dir, or move it first"
                )


def check_checkpoint_names(output: str | Path, total_steps: int) -> None:
    """Check that no checkpoint of a run replaces a file that no run wrote.

    A folder may hold files of other names, as of a user in an old checkpoint: they stay there.

    total_steps: optimizer steps of the run.

    Raises: ValueError naming a folder that no run wrote.
    """
    for folder in Path(output).glob("checkpoint-*"):
        step = checkpoint_step(folder)
        if not step or step > total_steps or is_own_checkpoint(folder):
            continue
        is_folder = folder.is_dir() and not folder.is_symlink()
        if not is_folder or len(foreign_files(folder)) < len(list(folder.iterdir())):
            raise ValueError(
                f"{folder} has the name of a checkpoint, but no run wrote it: it has no {STATE} of "
                "a run; rename it, or choose another output_dir"
            )


def next_run_folder(parent: str | Path = RUNS) -> Path:
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


def is_saved(args: SFTConfig, by_command: bool) -> bool:
    """Return True if a run has a folder.

    by_command: a command trains, so the result would be lost without a folder.
    """
    return by_command or args.output_dir is not None or args.save_strategy != "no"


def check_folder_settings(args: SFTConfig, resume: bool | str | Path, by_command: bool) -> None:
    """Check that a run has the folder that its settings need.

    resume: as in `open_run_folder`.
    by_command: as in `is_saved`.

    Raises: ValueError naming the setting that needs a folder.
    """
    if args.output_dir is None and (resume or args.resume):
        raise ValueError("resume needs output_dir: the folder of the run to continue")
    if is_saved(args, by_command):
        return
    if args.report_to == "tensorboard" and args.logging_dir is None:
        raise ValueError(
            "report_to 'tensorboard' writes files, but without output_dir and with save_strategy "
            "'no' the run has no folder; name logging_dir, or output_dir"
        )


def run_output(args: SFTConfig, by_command: bool) -> Path | None:
    """Return the run folder of the settings, a new numbered one, or None for a run without files.

    by_command: as in `is_saved`.
    """
    if args.output_dir is not None:
        return Path(args.output_dir)
    return next_run_folder() if is_saved(args, by_command) else None


@contextlib.contextmanager
def locked_run_folder(output: Path) -> Iterator[None]:
    """Make a run folder, and refuse other runs in it during the block.

    A folder that is still empty at the end is removed, if it was made here.

    Raises: ValueError if another run trains in it, or it cannot be written.
    """
    for path in (output, *output.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"output folder {output}: {path} is a file; choose another output_dir")
    is_new = not output.exists()
    with contextlib.ExitStack() as stack:
        with os_errors_as_value_error(output):
            output.mkdir(parents=True, exist_ok=True)
            if is_new:
                stack.callback(_remove_empty, output)
            lock = exclusive(output / LOCK, _other_run(output), REMEDY)
            if not stack.enter_context(lock):
                print_message("note", NO_LOCKS.format(output))
        yield


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it holds files, or has gone
        folder.rmdir()


def open_run_folder(
    output: Path,
    args: SFTConfig,
    resume: bool | str | Path,
    protected_paths: Sequence[str | Path],
    total_steps: int,
) -> Path | None:
    """Return the checkpoint to continue from, or None to start from step 0.

    A run that starts from step 0 deletes the outputs of an earlier run, if it may.

    output: the run folder, which is locked.
    resume: True for the newest checkpoint, or the path of a checkpoint.
    protected_paths: as in `check_output`.
    total_steps: optimizer steps of the run.

    Raises: ValueError if the folder holds a run and the settings neither resume nor overwrite it.
    """
    resumes = bool(resume) or args.resume
    with os_errors_as_value_error(output):
        remove_leftovers(output)
    _check_outputs(output, args.overwrite, resumes, protected_paths)
    check_checkpoint_names(output, total_steps)
    if resume and isinstance(resume, str | Path):
        return Path(resume)
    saved = checkpoints(output) if resumes else []
    if saved:
        return saved[-1]
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
    if resumes:
        print_message("note", f"{output} holds no checkpoint to resume: the run starts at step 0")
    clear_run(output)
    return None
