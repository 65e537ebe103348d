"""Files and folders that are whole or not there: made under another name beside their place, then renamed.

An interruption or a full disk leaves what was there before; what the file system refuses is a ValueError with the path.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


def require_space(path: Path, needed: int) -> None:
    """ValueError where the disk that is to hold `path` has less than `needed` bytes left."""
    parent = next(
        folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir()
    )
    if (free := shutil.disk_usage(parent).free) < needed:
        raise ValueError(f"{path}: needs {needed:,} bytes, but only {free:,} are left on the disk")


@contextlib.contextmanager
def os_errors_as_value_error(path: str | Path) -> Iterator[None]:
    """What the file system refuses within becomes a ValueError that names `path`."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: could not be written ({error.strerror or error})") from error


def atomic_write_text(path: Path, text: str) -> None:
    """Make a file with this text, or replace one, whole or not at all. ValueError where it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with os_errors_as_value_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # renamed, or never made
            partial.unlink()


@contextlib.contextmanager
def atomic_folder(folder: str | Path, keep_others: bool = True) -> Iterator[Path]:
    """A folder to write into that takes the place of `folder` when the block ends, flushed to disk, or not at all.

    Where `folder` holds files of other names, those stay, and the new ones join them one by one, unless `keep_others`
    is off. A symlink stays one.
    Its files get the mode that a plain open() gives; safetensors makes its own readable by the owner alone.
    Raises ValueError that names `folder` where it cannot be written (no space, no permission).
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose a folder")
    partial, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "old"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not folder.exists():  # a run was killed between the two renames below
            old.rename(folder)
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir()
        yield partial
        mode = partial.stat().st_mode & 0o666  # mkdir took the umask from 0o777
        files = [path for path in partial.rglob("*") if path.is_file()]
        for path in files:
            with contextlib.suppress(PermissionError):  # a file system without modes
                path.chmod(mode)
        for path in (*files, partial):
            _flush(path)
        new = {path.name for path in partial.iterdir()}
        if (
            keep_others
            and folder.exists()
            and any(path.name not in new for path in folder.iterdir())
        ):
            for name in sorted(new):
                (partial / name).replace(folder / name)
        else:
            if folder.exists():  # a folder that is not empty cannot be renamed over
                folder.rename(old)
            partial.rename(folder)
        _flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(
            f"{folder}: could not be written ({reason}); what was there before is unchanged"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)


def _flush(path: Path) -> None:
    """Wait until a file or folder is on disk (folders can be opened for this on POSIX only)."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
