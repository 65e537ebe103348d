"""The folders of the user and of the system: home, cache, temporary files.

A container may have no home: neither HOME nor an entry for its user. A system with a read-only root
may have no folder for temporary files. This file imports nothing else of the package.

A home that only the system's list of users names is read, and never written: a service that runs
without HOME expects no files there.
"""

import os
import tempfile
from pathlib import Path

HOMES = ("HOME", "USERPROFILE")  # of POSIX and of Windows


def expanded(path: str | Path) -> Path:
    """Return a path with the user's home in place of ~, or the path as it is without a home."""
    return Path(os.path.expanduser(path))


def cache_folder() -> Path | None:
    """Return $XDG_CACHE_HOME or ~/.cache, or None if the environment names neither."""
    named = os.environ.get("XDG_CACHE_HOME")
    if not named and not any(os.environ.get(name) for name in HOMES):
        return None
    folder = expanded(named or "~/.cache")
    return None if folder.parts[:1] == ("~",) else folder


def temporary_folder() -> Path:
    """Return the folder for temporary files.

    Raises: ValueError if none can be written.
    """
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:
        raise ValueError(
            f"no folder for temporary files can be written ({error.strerror or error}); set the "
            "environment variable TMPDIR to a folder that can"
        ) from None
