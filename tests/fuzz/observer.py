"""Watch a process that runs mutants: its output, warnings, threads, and the files that it opens.

    with observer.watch(folder):
        ...
    observer.complaints     descriptions of anything that is a fault besides the exception

Complaints are: a file written outside of the mutant's folder, a canary or a file of the system
read, a network socket, another program, a thread that goes on, a changed signal handler, text on
stdout, a panic or traceback on stderr, and a warning of a library.
"""

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

CANARY = "canary.safetensors"  # beside the folders of the mutants; no reader may open it
SYSTEM_FILES = ("/etc/passwd", "/dev/zero")  # hostile names point there
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {  # audit event -> positions of its paths
    "os.mkdir": (0,),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.rename": (0, 1),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "os.link": (1,),
    "os.symlink": (1,),
    "shutil.rmtree": (0,),
}
FORBIDDEN = (
    "socket.connect",
    "subprocess.Popen",
    "os.system",
    "os.posix_spawn",
    "pickle.find_class",
)
STDERR_FAULTS = ("panicked at", "Traceback (most recent call last)", "Exception ignored")
SIGNALS = (signal.SIGALRM, signal.SIGINT, signal.SIGTERM)


class Observer:
    """The watch over one process."""

    def __init__(self, scratch: Path):
        self._folder = str(scratch)
        self._temporary = str(scratch / "tmp")
        self._active = False
        self.complaints: list[str] = []
        self.real_stderr = os.dup(2)
        self._streams = {1: scratch / "stdout", 2: scratch / "stderr"}
        (scratch / "tmp").mkdir()
        for number, path in self._streams.items():
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            os.dup2(file, number)
            os.close(file)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.addaudithook(self._audit)

    @contextlib.contextmanager
    def watch(self, folder: Path, prints: bool = False) -> Iterator[None]:
        """Watch the block; `complaints` then holds the faults.

        folder: the one folder in which files may be written.
        prints: True if the block may write to stdout.
        """
        self.complaints = []
        self._folder = str(folder)
        handlers = [signal.getsignal(number) for number in SIGNALS]
        for number in self._streams:
            os.ftruncate(number, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = self._warn
            self._active = True
            try:
                yield
            finally:
                self._active = False
                self._check_threads()
                if [signal.getsignal(number) for number in SIGNALS] != handlers:
                    self.complaints.append("a signal handler was left changed")
                if signal.setitimer(signal.ITIMER_REAL, 0)[0]:
                    self.complaints.append("a timer was left running")
                self._check_streams(prints)

    def text_of(self, number: int) -> str:
        """Return the text that the block wrote to stdout (1) or stderr (2)."""
        return self._streams[number].read_bytes().decode("utf-8", "replace")

    def _warn(self, message, category, filename, lineno, file=None, line=None) -> None:
        """Note a warning that a library gives."""
        own = issubclass(category, UserWarning) and "site-packages" not in filename
        if not own or "/numpy/" in filename or "/torch/" in filename:
            self.complaints.append(f"{category.__name__}: {message} ({filename}:{lineno})")

    def _check_threads(self) -> None:
        for thread in threading.enumerate():
            if thread is not threading.main_thread():
                thread.join(2)
                if thread.is_alive():
                    self.complaints.append(f"the thread {thread.name} goes on")

    def _check_streams(self, prints: bool) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        if not prints and (text := self.text_of(1)):
            self.complaints.append(f"text on stdout: {text[:200]!r}")
        text = self.text_of(2)
        for fault in STDERR_FAULTS:
            if fault in text:
                place = text.index(fault)
                self.complaints.append(f"on stderr: {text[max(0, place - 80) : place + 400]!r}")

    def _audit(self, event: str, arguments: tuple) -> None:
        if not self._active:
            return
        if event == "open":
            self._check_open(*arguments)
        elif event in CHANGES:
            for position in CHANGES[event]:
                self._check_change(event, arguments[position])
        elif event in FORBIDDEN:
            self.complaints.append(f"{event} {arguments!r}"[:300])

    def _check_open(self, path, mode, flags) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        if isinstance(flags, int) and flags & WRITING:
            self._check_change("open", path)
        name = os.path.realpath(os.fsdecode(path))
        if name in SYSTEM_FILES or os.path.basename(name) == CANARY:
            self.complaints.append(f"{name} was read")

    def _check_change(self, event: str, path) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        # The folder of a link counts, not its target, because these calls act on the link.
        folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
        place = os.path.join(os.path.realpath(folder), name)
        allowed = (self._folder + os.sep, self._temporary, "/dev/null")
        inside = place.startswith(allowed) or place == self._folder
        if not inside and "__pycache__" not in place:
            self.complaints.append(f"{event} outside of the folder: {place}")
