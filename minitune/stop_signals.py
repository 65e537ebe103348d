"""Signals that end a process: Ctrl-C, SIGTERM (a scheduler), SIGHUP (a terminal that closes).

    Ctrl-C    SIGINT    KeyboardInterrupt    exit code 130
    SIGTERM             Stopped              exit code 143
    SIGHUP              Stopped              exit code 129; Windows has none

An exception runs the `finally` blocks, so partial files and temporary folders are removed. A
handler is replaced only in the main thread, and only if it is the default one. A second signal has
its default effect again. This file imports nothing else of the package.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

TERMINATING = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
NAMES = {signal.SIGINT: "Ctrl-C"}  # where the name of the signal is not the user's word
FIRST_EXIT_CODE = 128  # plus the number of the signal


class Stopped(SystemExit):
    """The end of the process that a signal asks for; its code is 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(FIRST_EXIT_CODE + number)
        self.number = number


def stop(number: int) -> BaseException:
    """Return the exception that stands for a signal."""
    return KeyboardInterrupt() if number == signal.SIGINT else Stopped(number)


def signal_of(error: KeyboardInterrupt | Stopped) -> int:
    """Return the number of the signal that an exception stands for."""
    return error.number if isinstance(error, Stopped) else signal.SIGINT


def signal_name(number: int) -> str:
    """Return a signal's name for a person."""
    return NAMES.get(number) or signal.Signals(number).name


@contextlib.contextmanager
def stops_raised() -> Iterator[None]:
    """Raise Stopped on SIGTERM and SIGHUP in the block."""
    with _handlers(TERMINATING, _raise_stop):
        yield


def _raise_stop(number: int, frame: object) -> None:
    for other in TERMINATING:
        if signal.getsignal(other) is _raise_stop:
            signal.signal(other, signal.SIG_DFL)
    raise Stopped(number)


@contextlib.contextmanager
def deferred_stops(tell: Callable[[str], None]) -> Iterator[list[int]]:
    """Turn the first signal into an entry of the yielded list; a second one ends at once.

    The training loop looks at the list after each optimizer step.

    tell: called by the handler with a line for a person.
    """
    caught: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, *TERMINATING)}

    def remember(number: int, frame: object) -> None:
        caught.append(number)
        for other, handler in previous.items():
            if signal.getsignal(other) is remember:
                signal.signal(other, handler)
        again = signal_name(number)
        tell(f"\nstopping after this optimizer step; {again} again stops at once\n")

    with _handlers(list(previous), remember):
        yield caught


@contextlib.contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """Turn the first Ctrl-C into an entry of the yielded list; a second one ends at once."""
    caught: list[int] = []

    def remember(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(number, signal.default_int_handler)

    with _handlers([signal.SIGINT], remember):
        yield caught


@contextlib.contextmanager
def _handlers(numbers: Sequence[int], handler: Callable[[int, object], None]) -> Iterator[None]:
    """Handle signals in the block, and put the handlers before back at its end.

    A handler that is neither the default one nor ours belongs to the caller and stays.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    default = (signal.SIG_DFL, signal.default_int_handler, _raise_stop)
    previous = {
        number: signal.getsignal(number)
        for number in numbers
        if in_main_thread and signal.getsignal(number) in default
    }
    for number in previous:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            if signal.getsignal(number) in (handler, *default):
                signal.signal(number, before)
