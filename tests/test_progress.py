"""Bars and lines on a terminal, in a notebook, in a pipe, and without stderr."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import types

import pytest

from minitune import progress
from minitune.progress import Output, ProgressBar, duration, labelled, output_kind, print_line

LONG = " ".join(f"word{i}" for i in range(60))
TERMINAL_PROGRAM = f"""
import time
from minitune.progress import ProgressBar, labelled, output_width, print_line
print_line(labelled("label", {LONG!r}))
with ProgressBar("loading", 40_000_000) as outer:
    for _ in range(4):
        outer.update(10_000_000)
        with ProgressBar("evaluating", 7, "sample") as inner:
            inner.update(3)
            time.sleep(0.11)
            inner.update(4)
        time.sleep(0.11)
        outer.update(1)
        print_line("a line")
with ProgressBar("training", 300, "step", done=100, has_text=True) as bar:
    for _ in range(2):
        time.sleep(0.11)
        bar.set_text("1:02:03 left, loss 1.234, 123,456 tok/s, 12.3 GiB, peak 20.1")
        bar.update()
"""


class NotATerminal:
    """A stream that keeps its text, like the stderr of a notebook."""

    def __init__(self):
        self.text, self.closed = "", False

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return False


def run_in_terminal(program, columns):
    """Return the text that a Python program writes to a terminal of so many columns."""
    main, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    process = subprocess.Popen([sys.executable, "-c", program], stderr=child, env=environment)
    os.close(child)
    text = b""
    try:
        while part := os.read(main, 4096):
            text += part
    except OSError:  # the program has ended
        pass
    os.close(main)
    assert process.wait() == 0
    return text.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [60, 80])
def test_bars_and_lines_fit_the_terminal_and_leave_one_bar(columns):
    text = run_in_terminal(TERMINAL_PROGRAM, columns)
    drawn = [part.rstrip() for line in text.split("\n") for part in line.split("\r")]
    assert max(map(len, drawn)) <= columns
    assert sum("loading" in line for line in drawn) >= 2
    assert any("evaluating" in line and "7/7" in line for line in drawn)
    kept = [line.split("\r")[-1].rstrip() for line in text.split("\n")]
    assert kept.count("a line") == 4
    assert sum("loading" in line or "evaluating" in line for line in kept) == 0
    assert any("102/300, 1:02:03 left, loss 1.234" in line for line in kept)


def test_text_hangs_below_its_label_and_keeps_long_words_whole(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = labelled("label", f"{LONG} {'x' * 90}").split("\n")
    assert lines[0].startswith("label      word0") and max(map(len, lines[:-1])) <= 80
    assert all(line.startswith(" " * 11) and line[11] != " " for line in lines[1:])
    assert " ".join(line[11:] for line in lines) == f"{LONG} {'x' * 90}"


def test_a_pipe_gets_few_lines_with_amount_and_time_left(monkeypatch, capsys):
    now = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(progress, "time", clock)
    with ProgressBar("loading", 2_000_000_000, show=True) as bar:
        for _ in range(1000):
            now[0] += 0.3
            bar.update(2_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "loading    10%, 200 MB of 2.00 GB, 4:30 left"
    assert len(lines) == 9
    with ProgressBar("tokenizing", None, "record", show=True) as bar:
        for _ in range(1000):
            now[0] += 1
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "tokenizing 10 records done" and 20 < len(lines) < 50


def test_a_pipe_gets_nothing_from_short_work_or_without_being_asked(capsys):
    for show in (None, True, False):
        with ProgressBar("loading", 100, "tensor", show) as bar:
            bar.update(50)
            bar.update(50)
    assert capsys.readouterr().err == ""


def test_a_notebook_gets_a_bar_and_lines(monkeypatch):
    notebook = type("OutStream", (NotATerminal,), {"__module__": "ipykernel.iostream"})()
    monkeypatch.setattr(sys, "stderr", notebook)
    assert output_kind() == Output.NOTEBOOK and progress.is_shown(None)
    with ProgressBar("loading", 100) as bar:
        bar.update(100)
        print_line("a line")
    assert "\rloading:" in notebook.text and "a line\n" in notebook.text
    assert "\x1b" not in notebook.text  # a browser knows no cursor movements


@pytest.mark.parametrize("closed", [True, False])
def test_nothing_is_shown_or_raised_without_stderr(monkeypatch, capsys, closed):
    stream = NotATerminal()
    stream.closed = closed
    monkeypatch.setattr(sys, "stderr", stream if closed else None)
    with ProgressBar("loading", 100, show=True) as bar:
        bar.update(100)
        print_line("a line")
    assert not progress.is_shown(True)
    assert stream.text == "" and capsys.readouterr().out == ""


def test_durations_read_as_on_a_clock():
    assert [duration(s) for s in (0.4, 59.6, 725, 3723.2)] == ["0:00", "1:00", "12:05", "1:02:03"]
