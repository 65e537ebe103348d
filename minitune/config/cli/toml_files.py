"""TOML files: a run writes one as config.toml, `--config` reads one.

A relative path in a TOML file is relative to the file's own folder, so that the file means the same
in every working directory. A run writes absolute paths. A model that is no folder there stays as it
is, because it may be an id org/name.

Runs of older versions wrote paths relative to the working directory of that time. Such a file lies
in its own output_dir, which tells that directory: /a/runs/1/config.toml with output_dir "runs/1"
was written in /a.

The folder of a run may be moved or copied. Its config.toml then names the folder of before, but
--resume continues the run that lies beside the file.
"""

import json
import os
from pathlib import Path
from typing import Any

from minitune.config.cli.settings import known_settings
from minitune.config.cli.wrong_flags import suggestion
from minitune.config.training_config import PATHS
from minitune.read_files import read_toml

MODELS = ("model", "adapter")  # folders or GGUF files; `model` may be an id instead
CONFIG, METRICS = "config.toml", "metrics.jsonl"  # a run writes both into its folder


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings in a TOML file, with absolute paths.

    Raises: ValueError that names the file if it cannot be read or holds an unknown key.
    """
    known = known_settings()
    values = read_toml(path, hint="expected a TOML file of settings")
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{path}: unknown key {name!r}; {suggestion(name, known)}")
        if known[name].types == (tuple,) and isinstance(value, list):
            values[name] = tuple(value)
    return with_absolute_paths(values, _folder_of_paths(Path(path), values))


def with_absolute_paths(values: dict[str, Any], folder: str | Path = ".") -> dict[str, Any]:
    """Return settings whose paths are absolute.

    folder: the folder that relative paths are relative to.
    """
    values = dict(values)
    for name in ("output_dir", *PATHS, *MODELS):
        value = values.get(name)
        if isinstance(value, list | tuple):
            values[name] = tuple(
                _absolute(item, folder) if isinstance(item, str) else item for item in value
            )
        elif isinstance(value, str) and (name != "model" or _exists(value, folder)):
            values[name] = _absolute(value, folder)
    score = values.get("score_answer")
    if isinstance(score, str) and ":" in score:  # FILE.py:FUNCTION
        values["score_answer"] = _absolute(score, folder)
    return values


def _absolute(path: str, folder: str | Path) -> str:
    """Return the absolute path. An empty path, which the settings refuse, stays empty."""
    return path and os.path.abspath(os.path.join(folder, os.path.expanduser(path)))


def _exists(path: str, folder: str | Path) -> bool:
    return os.path.exists(_absolute(path, folder))


def _folder_of_paths(path: Path, values: dict[str, Any]) -> Path:
    """Return the folder that the relative paths of a TOML file are relative to."""
    folder, output = Path(os.path.abspath(path)).parent, values.get("output_dir")
    if isinstance(output, str) and not os.path.isabs(output) and (folder / METRICS).is_file():
        parts = Path(os.path.normpath(output)).parts
        if folder.parts[-len(parts) :] == parts:  # of an older version
            return Path(*folder.parts[: -len(parts)])
    return folder


def moved_run(path: str | Path, output_dir: Any) -> str | None:
    """Return the folder of a run's config.toml if it was moved or copied, otherwise None.

    path: a TOML file. It is a run's own if metrics.jsonl lies beside it.
    output_dir: the setting in the file.
    """
    folder = Path(os.path.abspath(path)).parent
    if Path(path).name != CONFIG or not isinstance(output_dir, str):
        return None
    is_moved = os.path.realpath(output_dir) != os.path.realpath(folder)
    return str(folder) if is_moved and (folder / METRICS).is_file() else None


def toml_text(values: dict[str, Any]) -> str:
    """Return scalars and lists as TOML lines; None does not exist in TOML and is left out."""
    return "".join(
        f"{name} = {_toml_value(value)}\n" for name, value in values.items() if value is not None
    )


def _toml_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, str):  # JSON's escapes are TOML's too, except that TOML also escapes DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
