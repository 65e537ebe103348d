"""The JSONL file of answers, written so that an interruption loses no answer that was written.

    answers.jsonl.partial    a line on what the answers depend on, then a line an answer
    answers.jsonl            the answers, when all are there

Each chunk is flushed to disk behind the partial file. A resumed run removes a line that was cut,
compares the first line with its own settings, and goes on behind the last answer.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from minitune.atomic_files import atomic_file, os_errors_as_value_error
from minitune.locks import exclusive
from minitune.progress import print_line
from minitune.read_files import parse_json
from minitune.stop_signals import Stopped

SUFFIXES = (".jsonl", ".ndjson")
COPIED_BYTES = 1 << 20  # at once


def json_line(value: Any) -> bytes:
    """Return a value as a line of JSON in UTF-8.

    Raises: ValueError if a number is NaN or infinite.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return f"{text}\n".encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return f"{json.dumps(value, allow_nan=False)}\n".encode()


def check_name(path: Path, source: str) -> None:
    """Raise ValueError if an output is the input, or its name is not that of JSON lines."""
    if path.exists() and Path(source).exists() and path.samefile(source):
        raise ValueError(f"{path} is the file of the prompts too; choose another name for --output")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: answers are JSON lines; name {path.with_suffix('.jsonl')}")


class AnswerOutput:
    """The output of a file of prompts.

    identity: everything that the answers depend on, by the flag that sets it.
    total: number of answers of the whole file.
    done: number of answers that are written.
    is_finished: True if the whole file is there already.
    """

    def __init__(self, path: Path, identity: dict[str, Any], total: int, program: str):
        self.path, self.total, self.done, self.is_finished = path, total, 0, False
        self._partial = path.with_name(f"{path.name}.partial")
        self._identity, self._program = identity, program
        self._context, self._file = contextlib.ExitStack(), None

    def open(self, overwrite: bool, resume: bool) -> None:
        """Take the lock, and open the partial file behind its last answer.

        overwrite: replace the file, and the partial one.
        resume: go on with the partial file if there is one; a finished file stays as it is.

        Raises: ValueError if the file is there already, or the partial one has other settings.
        """
        if overwrite and resume:
            raise ValueError("--resume and --overwrite exclude each other")
        with os_errors_as_value_error(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self.path.with_name(f".{self._partial.name}.lock")
            task = f"{self.path}: another process is writing it"
            held = exclusive(lock, task, "wait for its end, or choose another name")
            self._context.enter_context(held)
            try:
                self._open(overwrite, resume)
            except BaseException:
                self.close()
                raise

    def _open(self, overwrite: bool, resume: bool) -> None:
        if self._partial.exists() and not overwrite:
            if not resume:
                raise ValueError(
                    f"{self._partial} holds the answers of a run that was stopped; go on with "
                    f"{self._program} --resume, or begin again with --overwrite"
                )
            file = self._context.enter_context(self._partial.open("r+b"))
            self.done = self._read_partial(file)
            self._file = file
            print_line(f"resuming behind {self.done:,} of {self.total:,} prompts")
            return
        if self.path.exists() and not overwrite:
            if not resume:
                raise ValueError(
                    f"{self.path} exists; choose another name, or replace it with "
                    f"{self._program} --overwrite"
                )
            self.is_finished = True
            print_line(f"{self.path}: all answers are there already")
            return
        self._file = self._context.enter_context(self._partial.open("w+b"))
        self._append([self._identity])

    def _read_partial(self, file: BinaryIO) -> int:
        """Return the number of answers in the partial file, and cut what follows the last one.

        Raises: ValueError if the settings differ.
        """
        first = file.readline()
        end, count = len(first), 0
        for line in file:
            if line.endswith(b"\n"):
                end, count = end + len(line), count + 1
        begin = f"{self._partial}: begin again with {self._program} --overwrite"
        if not first.endswith(b"\n") or count > self.total:
            raise ValueError(f"{begin}, because the file is damaged")
        before = parse_json(first.decode())
        now = parse_json(json_line(self._identity).decode())
        if before != now:
            differ = [
                key for key in now if not isinstance(before, dict) or before.get(key) != now[key]
            ]
            raise ValueError(f"{begin}, because another {' and '.join(differ)} gave these answers")
        file.truncate(end)
        file.seek(end)
        return count

    def write(self, records: Iterable[dict]) -> None:
        """Append answers to the partial file, and flush it to disk."""
        lines = list(records)
        self._append(lines)
        self.done += len(lines)

    def _append(self, values: Iterable[Any]) -> None:
        with os_errors_as_value_error(self._partial):
            self._file.write(b"".join(map(json_line, values)))
            self._file.flush()
            os.fsync(self._file.fileno())

    def explain(self, error: BaseException) -> None:
        """Say on stderr how to go on after an error or a stop."""
        if not self.done:
            return
        print_line(
            f"{self._partial}: {self.done:,} of {self.total:,} prompts are answered; the same "
            "command with --resume goes on"
        )
        if isinstance(error, KeyboardInterrupt | Stopped):
            error.add_note("resumable")  # so that run_command says no more

    def finish(self) -> Path:
        """Give the answers their name, and return it."""
        with atomic_file(self.path) as target, target.open("wb") as file:
            self._file.seek(0)
            self._file.readline()
            while block := self._file.read(COPIED_BYTES):
                file.write(block)
        self._file.close()  # Windows removes no open file
        self._partial.unlink()
        return self.path

    def close(self) -> None:
        """Close the partial file, which is removed if it holds no answer, and release the lock."""
        if self._file is not None and not self.done:
            self._file.close()
            with contextlib.suppress(OSError):
                self._partial.unlink()
        self._context.close()
