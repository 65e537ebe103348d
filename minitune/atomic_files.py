"""Files and folders that are written whole or not at all.

A writer fills a partial file or folder beside the destination. The partial one is flushed to disk
with fsync before it is renamed. After an interruption, a full disk or a power loss, the destination
holds either its previous content or all of the new content.

A lock beside the destination refuses a second writer. File system errors become ValueErrors that
name the path.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minitune.locks import exclusive

# Some file systems cannot open or flush a folder; the files in it are flushed all the same.
UNFLUSHABLE_FOLDER_ERRORS = (errno.EACCES, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an indented JSON file in UTF-8. Not atomic: for files inside an atomic folder."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def require_space(path: Path, needed: int) -> None:
    """Raise ValueError if the disk of `path` has less than `needed` bytes left."""
    free = shutil.disk_usage(existing_folder(path)).free
    if free < needed:
        raise ValueError(
            f"{path}: needs {needed:,} bytes, but only {free:,} are left on the disk; free space, "
            "or choose a folder on another disk"
        )


def require_space_together(needed: Mapping[Path, int]) -> None:
    """Raise ValueError if the bytes needed by several paths do not fit on their disks together."""
    paths: dict[int, list[Path]] = {}
    for path in needed:
        paths.setdefault(existing_folder(path).stat().st_dev, []).append(path)
    for on_disk in paths.values():
        require_space(on_disk[0], sum(needed[path] for path in on_disk))


def existing_folder(path: Path) -> Path:
    """Return the nearest folder above a path, or the path, that exists."""
    candidates = (path.absolute(), *path.absolute().parents)
    return next(folder for folder in candidates if folder.is_dir())


@contextlib.contextmanager
def os_errors_as_value_error(path: str | Path) -> Iterator[None]:
    """Turn an OSError of the block into a ValueError that names `path`."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: could not be written ({error.strerror or error})") from error


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield the path of a partial file, which becomes `path` when the block has written it.

    The file is flushed to disk before it is renamed. If the block raises, `path` keeps its previous
    content and the partial file is removed. A missing parent folder is made.

    Raises: ValueError naming `path` if the file or its folder cannot be written.
    """
    with atomic_files([path]) as (partial,):
        yield partial


@contextlib.contextmanager
def atomic_files(paths: Sequence[str | Path]) -> Iterator[list[Path]]:
    """Yield the paths of partial files in one folder, which get their names when all are written.

    Each file is treated as in `atomic_file`. None is renamed before all are flushed to disk.

    Raises: ValueError naming the path, or the folder of several, if a file cannot be written.
    """
    paths = [Path(path) for path in paths]
    partials = [path.with_name(f".{path.name}.partial") for path in paths]
    folder = paths[0].parent
    named = paths[0] if len(paths) == 1 else folder
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}"
        raise ValueError(f"{paths[0]}: its folder could not be made ({reason})") from None
    try:
        with os_errors_as_value_error(named), _locked(paths):
            try:
                yield partials
                for partial in partials:
                    flush_to_disk(partial)
                for partial, path in zip(partials, paths, strict=True):
                    partial.replace(path)
                flush_to_disk(folder)
            finally:
                for partial in partials:
                    with contextlib.suppress(OSError):  # already renamed, or never made
                        partial.unlink()
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it holds the files
                folder.rmdir()


@contextlib.contextmanager
def _locked(paths: Sequence[Path]) -> Iterator[None]:
    """Hold the locks of destinations.

    Raises: ValueError if another process writes one of them.
    """
    with contextlib.ExitStack() as stack:
        for path in paths:
            lock = path.with_name(f".{path.name}.lock")
            task = f"{path}: another process is writing it"
            stack.enter_context(exclusive(lock, task, "wait for its end, or choose another name"))
        yield


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8 as in `atomic_file`.

    Raises: ValueError naming `path` if the file or its folder cannot be written.
    """
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_folder(folder: str | Path, keep_others: bool = True) -> Iterator[Path]:
    """Yield the path of a partial folder, which becomes `folder` when the block has filled it.

    keep_others: True keeps files of other names in `folder` and replaces the new ones one by one;
        False replaces the whole folder.

    A symlink to a folder stays a symlink. Files get the mode that open() gives, because safetensors
    makes its files readable by the owner alone.

    Raises: ValueError naming `folder` if it cannot be written (no space, no permission).
    """
    folder = Path(os.path.realpath(folder))  # Path.resolve fails at a link to itself
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose a folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked([folder]), _filled(folder, keep_others) as partial:
            yield partial
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{folder}: could not be written ({reason}); its previous content is unchanged"
        ) from error


@contextlib.contextmanager
def _filled(folder: Path, keep_others: bool) -> Iterator[Path]:
    """Yield a partial folder, which becomes `folder` as in `atomic_folder`."""
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    try:
        restore_old(folder)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        yield partial
        _set_modes_and_flush(partial)
        if keep_others and _has_other_files(folder, partial):
            _move_files(partial, folder)
        else:
            _swap(partial, folder, old)
        flush_to_disk(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        restore_old(folder)


def flush_to_disk(path: Path) -> None:
    """Wait until a file or folder is on disk. Folders can be flushed on POSIX only."""
    posix = os.name == "posix"
    if path.is_dir():
        if posix:
            _flush_folder(path)
        return
    _fsync(path, os.O_RDONLY if posix else os.O_RDWR)


def _flush_folder(folder: Path) -> None:
    try:
        _fsync(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in UNFLUSHABLE_FOLDER_ERRORS:
            raise


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_modes_and_flush(partial: Path) -> None:
    """Give the files in `partial` the mode that open() gives, and flush them to disk."""
    mode = partial.stat().st_mode & 0o666  # mkdir applied the umask to 0o777
    files = [path for path in partial.rglob("*") if path.is_file()]
    for path in files:
        with contextlib.suppress(PermissionError):  # a file system without modes
            path.chmod(mode)
        flush_to_disk(path)
    flush_to_disk(partial)


def _has_other_files(folder: Path, partial: Path) -> bool:
    """Return True if `folder` holds names that `partial` lacks."""
    if not folder.exists():
        return False
    return bool(
        {path.name for path in folder.iterdir()} - {path.name for path in partial.iterdir()}
    )


def _move_files(partial: Path, folder: Path) -> None:
    """Move the content of `partial` into `folder` one by one, replacing files of the same name."""
    for path in sorted(partial.iterdir()):
        path.replace(folder / path.name)
    flush_to_disk(folder)


def _swap(partial: Path, folder: Path, old: Path) -> None:
    """Rename `partial` to `folder`, and first an existing `folder` to `old`."""
    if folder.exists():  # rename() refuses a destination folder that is not empty
        folder.rename(old)
    partial.rename(folder)


def restore_old(folder: Path) -> None:
    """Give a folder its name back if a process was killed between the renames of `_swap`."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)
