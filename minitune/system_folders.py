"""The folders of the user and of the system: home, cache, temporary files.

A container may have no home: neither HOME nor an entry for its user. A system with a read-only root
may have no folder for temporary files. This file imports nothing else of the package.
"""

import os
import tempfile
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """Return a path with the user's home in place of ~, or the path as it is without a home."""
    return Path(os.path.expanduser(path))


def cache_folder() -> Path | None:
    """Return $XDG_CACHE_HOME or ~/.cache, or None if the user has no home."""
    folder = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
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
