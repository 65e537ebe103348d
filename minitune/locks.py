"""Locks on files, so that two processes do not write the same folder at the same time.

The system releases a lock when its process ends, also after kill -9. The lock's file holds the
process id and the host of its holder, and is removed when the lock is released. A file that a
killed process left is no lock.

POSIX has flock, which also excludes two trainers of one process. Windows has msvcrt.locking. A
network file system without flock has no locks: `exclusive` then yields False. This file imports
nothing else of the package.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

HELD = (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
LOCKED_BYTE = 1 << 30  # of msvcrt.locking; beyond the content, which others may then read
MAX_HOLDER = 256  # bytes of process id and host
NO_LINK = getattr(os, "O_NOFOLLOW", 0)

_held: set[int] = set()  # descriptors of the locks that this process holds


@contextlib.contextmanager
def exclusive(path: Path, task: str, remedy: str) -> Iterator[bool]:
    """Hold the lock of a file during the block; yield False if the file system has no locks.

    path: the lock's file, in a folder that exists.
    task, remedy: beginning and end of the error.

    Raises: ValueError that names the holder if the lock is held; OSError if the file cannot be
        made.
    """
    try:
        descriptor, is_locked = _acquire(path)
    except BlockingIOError:
        raise ValueError(f"{task} ({_holder(path)}); {remedy}") from None
    owner = os.getpid()
    _held.add(descriptor)
    try:
        if is_locked:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{owner} {socket.gethostname()}\n".encode())
        yield is_locked
    finally:
        if os.getpid() == owner:  # a forked process that leaves the block holds no lock
            _held.discard(descriptor)
            _release(path, descriptor)


def check_not_held(path: Path, task: str, remedy: str) -> None:
    """Raise ValueError as `exclusive` does if the lock of a file is held."""
    if path.exists():
        with exclusive(path, task, remedy):
            pass


def _acquire(path: Path) -> tuple[int, bool]:
    """Return the descriptor of a lock's file, and False if the file system has no locks.

    Raises: BlockingIOError if the lock is held.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
        try:
            is_locked = _lock(descriptor)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor, is_locked
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has just removed the file


def _lock(descriptor: int) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        if error.errno in HELD:
            raise BlockingIOError(error.errno, os.strerror(error.errno)) from None
        raise
    return True


def _release(path: Path, descriptor: int) -> None:
    """Remove a lock's file, and close it. Windows removes no open file."""
    with contextlib.suppress(OSError):  # its folder has gone, or another process has opened it
        if fcntl is None:
            os.close(descriptor)
            path.unlink()
        elif os.path.samestat(os.fstat(descriptor), path.stat()):
            path.unlink()
    if fcntl is not None:
        os.close(descriptor)


def _holder(path: Path) -> str:
    """Return the holder of a lock for a person."""
    try:
        content = path.read_bytes()[:MAX_HOLDER]
    except OSError:
        content = b""
    process, _, host = content.decode(errors="replace").strip().partition(" ")
    if not process.isdecimal():
        return "another process"
    if host != socket.gethostname():
        return f"process {process} on {host!a}"
    return "this process" if int(process) == os.getpid() else f"process {process}"


def _close_inherited() -> None:
    """Close the descriptors that a forked process has of its parent's locks.

    Otherwise a lock would outlive its holder in the forked process.
    """
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)
