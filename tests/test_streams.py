"""Streams that are missing or fail end no work."""

import os
import sys
import warnings

import pytest
from broken_streams import BROKEN, UnknownEncoding, closed, work
from command_inputs import train, train_arguments, write_inputs
from training_runs import new_trainer, train_with_ctrl_c

from minitune.commands.__main__ import main
from minitune.data.tokenization.library_errors import no_panic_trace
from minitune.progress import ProgressBar, labelled, print_line, print_message, warn


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return a folder with a tiny model and its data."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


# ---- the package


@pytest.mark.parametrize("kind", ["none", "closed", "failing"])
@pytest.mark.usefixtures("python_warnings")
def test_every_public_call_works_whatever_the_streams_do(smallest, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sys, "stderr", BROKEN[kind]())
    monkeypatch.setattr(sys, "stdout", BROKEN[kind]())
    work(smallest, tmp_path, verify=False)  # which runs llama.cpp


@pytest.mark.parametrize("kind", BROKEN)
def test_bars_and_lines_pass_by_a_stream_that_fails(monkeypatch, kind):
    monkeypatch.setattr(sys, "stderr", BROKEN[kind]())
    with ProgressBar("loading", 100, show=True) as bar:
        bar.update(50)
        print_line("a line with an ö")
        bar.update(50)
    print_message("note", labelled("label", "a text"))


def test_lines_are_ascii_for_an_encoding_that_does_not_exist(monkeypatch):
    monkeypatch.setattr(sys, "stderr", UnknownEncoding())
    print_line("a line with an ö")
    assert sys.stderr.getvalue() == "a line with an \\xf6\n"


@pytest.mark.usefixtures("python_warnings")
def test_a_warning_fails_for_a_filter_and_not_for_a_closed_stream(monkeypatch):
    monkeypatch.setattr(sys, "stderr", closed())
    warn("a fact")
    warnings.simplefilter("error")
    with pytest.raises(UserWarning, match="a fact"):
        warn("a fact")


def test_a_warning_names_the_line_of_the_caller():
    def caller():
        warn("a fact", stacklevel=2)

    with pytest.warns(UserWarning, match="a fact") as caught:
        caller()
    assert caught[0].filename == __file__


@pytest.mark.parametrize("stream", ["stderr", "__stderr__"])
def test_a_signal_writes_nothing_into_a_descriptor_that_was_no_stderr(
    smallest, tmp_path, monkeypatch, capfd, stream
):
    monkeypatch.setattr(sys, stream, None)
    train_with_ctrl_c(new_trainer(smallest, tmp_path, max_steps=3), step=1)
    assert "stopping after" not in capfd.readouterr().err


def test_loading_leaves_a_descriptor_alone_that_was_no_stderr(monkeypatch, capfd):
    monkeypatch.setattr(sys, "__stderr__", None)
    with no_panic_trace():
        os.write(2, b"a text of a file")
    assert capfd.readouterr().err == "a text of a file"


# ---- commands


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
def test_commands_work_without_a_stream(inputs, tmp_path, monkeypatch, capsys, stream):
    data = ["--model", str(inputs / "model"), "--data", str(inputs / "data.jsonl")]
    monkeypatch.setattr(sys, stream, None)
    assert main(["data", "show", *data, "--html", str(tmp_path / "page.html")]) == 0
    assert main(["plan", *data[:2]]) == 0
    assert ("--- sample" in capsys.readouterr().out) == (stream != "stdout")
    assert train(train_arguments(inputs, tmp_path / "run", "--show", "1")) == 0
    printed = capsys.readouterr()
    assert printed.out == ""  # print(file=None) would write to stdout
    assert ("--- sample" in printed.err) == (stream != "stderr")


def test_generate_without_stdin_asks_for_the_prompt(inputs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["generate", "--model", str(inputs / "model"), "--device", "cpu"]) == 2
    assert "stdin is closed, and there is no prompt; pass --prompt TEXT" in capsys.readouterr().err
