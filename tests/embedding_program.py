"""A program without a console, a home or a folder for files runs a text; tests/test_embedding.py.

    python -B tests/embedding_program.py TEXT.py PIPE

TEXT.py is executed with the standard descriptors closed. PIPE is the number of a descriptor that
receives a JSON object: the answers of the text, the events that write, and the text's error. The
events of one misdeed of each kind show that the program would notice them.
"""

import contextlib
import json
import os
import pwd
import sys
import tempfile
from pathlib import Path
from typing import Any

WRITING = ("os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "shutil.")
_events: list[str] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Note an event that makes, changes or removes a file."""
    if event == "open":
        path, _, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and path != os.devnull:
            _events.append(f"open {path}")
    elif event.startswith(WRITING) or event == "tempfile.mkstemp":
        _events.append(f"{event} {arguments}")


def no_entry(*_: Any) -> None:
    """Find no entry of the user."""
    raise KeyError("no such user")


def misdeeds() -> list[str]:
    """Return the events of attempts to write."""
    _events.clear()
    for attempt in (lambda path: os.open(path, os.O_CREAT), os.mkdir):
        with contextlib.suppress(OSError):
            attempt("/no/such/folder/file")
    return [event.split()[0] for event in _events]


def main() -> None:
    """Execute the text and report."""
    text, pipe = Path(sys.argv[1]).read_text(encoding="utf-8"), int(sys.argv[2])
    pwd.getpwuid = pwd.getpwnam = no_entry
    tempfile._candidate_tempdir_list = lambda: ["/no/such/folder"]
    sys.modules["dill"] = None  # of no package of the run time; torch imports it if it is there
    sys.addaudithook(watch)
    variables: dict[str, Any] = {}
    report: dict[str, Any] = {"streams": [sys.stdin, sys.stdout, sys.stderr]}
    try:
        exec(compile(text, sys.argv[1], "exec"), variables)
        report |= {"answers": variables["answers"], "losses": variables["losses"]}
    except BaseException as error:
        report["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        report["events"] = _events.copy()
        report["misdeeds"] = misdeeds()
        os.write(pipe, json.dumps(report).encode())


if __name__ == "__main__":
    main()
