"""The files that a run wrote: how they are recognised, and how they are deleted.

    outputs.json      {"names": [...]}: what this run or the one before wrote, except checkpoints
    report.html       ours if it holds the mark of a report, beside outputs of a run; so are
                      report-with-NAME.html, which compare the run with another
    checkpoint-N/     ours if it holds state.json with optimizer_steps, or optimizer.safetensors too
    .NAME.SUFFIX      the leftover of a process that was killed; NAME is one of these names

A name is listed in outputs.json before it is written, so a leftover of a killed process is known
too. A list that holds other names than those that a run can write is a stranger's.

Deleting a folder deletes the files in it whose names are ours. The folder stays if it holds others.
The folder is renamed first, so that a process killed meanwhile leaves no half of a checkpoint.
"""

import json
import re
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from minitune.atomic_files import atomic_write_text, restore_old
from minitune.checkpoints.find_model import ADAPTER, checkpoint_step
from minitune.checkpoints.resolve_model import GGUF_SUFFIX
from minitune.data.templates.folder_templates import TEMPLATE_FOLDER
from minitune.locks import exclusive
from minitune.read_files import read_json
from minitune.training.checkpoint import OPTIMIZER, STATE

MERGED, METRICS, CONFIG, OUTPUTS = "merged", "metrics.jsonl", "config.toml", "outputs.json"
FACTS, REPORT = "run.json", "report.html"
# The head of a report's page holds this mark; only such a file is replaced or deleted.
REPORT_MARK = '<meta name="generator" content="minitune report">'
REPORTS = "report*.html"  # of one run, or of two
IS_REPORT_NAME = re.compile(r"report(-with-.+)?\.html")
MAX_NAME = 50  # characters of a folder's name in the name of a page; 255 bytes are the limit
HEAD_BYTES = 4096  # of a page, in which the mark is sought
TENSORBOARD = "tensorboard"
FIXED_NAMES = (CONFIG, METRICS, FACTS, ADAPTER, MERGED, TENSORBOARD)
# A folder with checkpoints and without outputs.json is an older version's: these are a run's.
NAMES_WITHOUT_LIST = (ADAPTER, METRICS, CONFIG, FACTS)
FILES_IN_FOLDERS = (  # of checkpoints, adapters, merged models and TensorBoard
    "adapter_config.json",
    "adapter_model.safetensors",
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "events.out.tfevents.*",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    OPTIMIZER,
    "special_tokens_map.json",
    STATE,
    "tokenizer*",
    ".*.partial",
)
LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|old|lock|deleted)")


# ---- recognised


def is_own_checkpoint(folder: Path) -> bool:
    """Return True if a folder is a checkpoint-N that a run wrote."""
    if checkpoint_step(folder) is None or not (folder / STATE).is_file():
        return False
    if (folder / OPTIMIZER).is_file():  # its state.json may be damaged
        return True
    try:
        return "optimizer_steps" in read_json(folder / STATE)
    except ValueError:
        return False


def is_report(path: Path) -> bool:
    """Return True if a file is a page that a report was written to."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return REPORT_MARK.encode() in file.read(HEAD_BYTES)
    except OSError:
        return False


def comparison_name(other: Path) -> str:
    """Return the name of a page that compares a run with another, which `other` is the folder of.

    Such a page lies in the folder of the first run.
    """
    return REPORT.replace(".html", f"-with-{other.resolve().name[:MAX_NAME]}.html")


def _reports(output: Path) -> list[Path]:
    """Return the pages in a run folder that reports were written to by default."""
    found = [path for path in output.glob(REPORTS) if IS_REPORT_NAME.fullmatch(path.name)]
    return sorted(path for path in found if is_report(path))


def checkpoints(output: str | Path) -> list[Path]:
    """Return the checkpoint-N folders that a run wrote, oldest first."""
    found = [folder for folder in Path(output).glob("checkpoint-*") if is_own_checkpoint(folder)]
    return sorted(found, key=checkpoint_step)


def existing_outputs(output: str | Path) -> list[str]:
    """Return the names in a folder that a run wrote, without outputs.json; empty if there are none.

    Raises: ValueError if outputs.json is broken, or lists names that no run writes.
    """
    output = Path(output)
    names = [folder.name for folder in checkpoints(output)] + _listed_names(output)
    found = [name for name in dict.fromkeys(names) if exists(output / name)]
    return [*found, *(path.name for path in _reports(output))] if found else found


def _listed_names(output: Path) -> list[str]:
    """Return the names in outputs.json, or those that an older version may have written."""
    path = output / OUTPUTS
    if not exists(path):
        return list(NAMES_WITHOUT_LIST) if checkpoints(output) else []
    names = read_json(path).get("names")
    # overwrite=True deletes these, so a name that no run writes must not be among them
    if not isinstance(names, list) or not all(map(_is_output_name, names)):
        wrong = names
        if isinstance(names, list):
            wrong = next(name for name in names if not _is_output_name(name))
        raise ValueError(
            f"{path}: lists {wrong!r}, which no run writes; remove outputs.json, or choose another "
            "output_dir"
        )
    return names


def _is_output_name(name: Any) -> bool:
    """Return True if a run can write a file or folder of this name."""
    if not isinstance(name, str) or Path(name).name != name:
        return False
    return name in FIXED_NAMES or (name.endswith(GGUF_SUFFIX) and not name.startswith("."))


def exists(path: Path) -> bool:
    """Return True if there is a file, a folder or a link, also a broken one."""
    return path.exists() or path.is_symlink()


def check_free(output: Path, names: Iterable[str]) -> None:
    """Check that the names that a run will write are free, or a run's.

    Raises: ValueError naming a file or folder that no run wrote.
    """
    own = existing_outputs(output)
    for name in names:
        path = output / name
        if exists(path) and name not in own:
            raise ValueError(
                f"{path} exists, but no run wrote it, so it is not replaced; rename it, or choose "
                "another output_dir"
            )
        if name == MERGED and path.is_dir() and (foreign := foreign_files(path)):
            raise ValueError(
                f"{foreign[0]}: no run wrote it, and the merged model would replace its folder; "
                "move it, or choose another output_dir"
            )


def foreign_files(folder: Path) -> list[Path]:
    """Return the files in an output folder whose names no run writes."""
    return sorted(path for path in folder.iterdir() if not _is_own_file(path))


def _is_own_file(path: Path) -> bool:
    if path.is_dir() and not path.is_symlink():
        return path.name == TEMPLATE_FOLDER
    return any(fnmatch(path.name, pattern) for pattern in FILES_IN_FOLDERS)


# ---- listed and deleted


def add_outputs(output: Path, names: Iterable[str]) -> None:
    """Add names to outputs.json; called before they are written.

    Raises: ValueError if the file cannot be written.
    """
    listed = [name for name in _listed_names(output) if exists(output / name)]
    listed += [name for name in names if name not in listed]
    atomic_write_text(output / OUTPUTS, json.dumps({"names": listed}, indent=2) + "\n")


def delete(path: Path) -> None:
    """Delete a file or a folder that a run wrote, or a symlink without its target.

    Files in the folder that no run wrote stay, and so does the folder then.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    doomed = path.with_name(f".{path.name}.deleted")
    if doomed.exists():
        _finish_deletion(doomed, path)
    if not doomed.exists():
        path.rename(doomed)
    _finish_deletion(doomed, path)


def _finish_deletion(doomed: Path, path: Path) -> None:
    """Delete our files in `doomed`, a folder that was `path`. The others go back to `path`."""
    foreign = foreign_files(doomed)
    if not foreign:
        shutil.rmtree(doomed)
        return
    for file in sorted(set(doomed.iterdir()) - set(foreign)):
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
    if not exists(path):
        doomed.rename(path)


def remove_leftovers(output: Path) -> None:
    """Remove what a killed process left, and give back the name of a folder that it had renamed.

    The lock of the run is held. An export that writes into the folder holds its own locks, so its
    partial files stay.
    """
    known = {*FIXED_NAMES, OUTPUTS, *_listed_names(output)}
    found = [LEFTOVER.fullmatch(path.name) for path in output.glob(".*")]
    names = {match["name"] for match in found if match}
    for name in sorted(names):  # the partial folder of a partial folder comes first
        path, whole = output / name, name
        while match := LEFTOVER.fullmatch(whole):
            whole = match["name"]
        is_known = whole in known or IS_REPORT_NAME.fullmatch(whole)
        if is_known or checkpoint_step(output / whole):
            try:
                with exclusive(output / f".{name}.lock", str(path), ""):
                    _remove_leftovers_of(path)
            except ValueError:  # it is being written
                continue


def _remove_leftovers_of(path: Path) -> None:
    partial, old, doomed = (
        path.with_name(f".{path.name}.{kind}") for kind in ("partial", "old", "deleted")
    )
    restore_old(path)
    if doomed.is_dir() and not doomed.is_symlink():  # no run makes such a link
        _finish_deletion(doomed, path)
    for leftover in (partial, old):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
