"""The switch that sends lines and warnings to a logger."""

import logging
import re
import signal
import sys
import warnings
from pathlib import Path

import pytest
from broken_streams import Terminal, work
from command_inputs import train, train_arguments, write_inputs
from tiny import make_tiny_model
from training_runs import new_trainer, train_with_ctrl_c

import minitune
from minitune import FastLanguageModel, SFTTrainer, TextStreamer
from minitune.commands.__main__ import COMMANDS, main
from minitune.gguf.export import convert_folder
from minitune.progress import ProgressBar, is_quiet, print_line, print_message, warn
from minitune.training.log import metrics_line

PACKAGE = Path(__file__).parents[1] / "minitune"
LONG = " ".join(f"word{i}" for i in range(60))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return a folder with a tiny model and its data."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def quiet(caplog):
    """Quiet the package during a test, and keep the records."""
    caplog.set_level(logging.INFO, "minitune")
    minitune.quiet()
    yield
    minitune.quiet(False)


# ---- the switch


def test_a_streamer_prints_to_stdout_also_if_the_package_is_quiet(smallest, quiet, capsys, caplog):
    tokenizer = FastLanguageModel.from_pretrained(smallest, device="cpu")[1]
    streamer = TextStreamer(tokenizer)
    streamer.put(tokenizer("an answer", return_tensors="pt")["input_ids"])
    streamer.end()
    assert capsys.readouterr().out == "an answer\n" and not caplog.records


def test_a_quiet_package_prints_nothing_and_logs_each_line_once(
    smallest, tmp_path, quiet, capfd, caplog, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    work(smallest, tmp_path)
    printed = capfd.readouterr()
    assert printed.err == "" and "trainable" not in printed.out  # only the streamer's answer
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert {record.name for record in caplog.records} == {"minitune"}
    texts = [text for _, text in lines]
    for label in ("model", "data", "step 1/2", "trainable params:", "prompt", "saved"):
        assert any(text.startswith(label) for text in texts), label
    levels = {level for level, text in lines if "has this adapter already" in text}
    assert levels == {"WARNING"}
    once = ("model ", "step 1/2", "trainable", "verified", "the model has this adapter")
    for begin in once:
        found = [text for text in texts if text.startswith(begin)]
        assert len(found) == len(set(found)) > 0, (begin, found)
    assert not any("\n" in text or text != text.strip() for text in texts)


def test_nothing_is_printed_without_a_handler_and_streams_come_back(capfd, monkeypatch):
    for name in ("", "minitune"):  # pytest adds handlers to the root
        keeping = [h for h in logging.getLogger(name).handlers if type(h) is logging.NullHandler]
        monkeypatch.setattr(logging.getLogger(name), "handlers", keeping)
    minitune.quiet()
    print_message("warning", "a warning")
    warn("another warning")
    with ProgressBar("loading", 10, show=True) as bar:
        bar.update(10)
    minitune.quiet(False)
    assert capfd.readouterr() == ("", "")
    print_message("warning", "a warning")
    assert capfd.readouterr() == ("", "warning: a warning\n")


def test_logged_lines_are_not_wrapped_and_have_fitting_levels(quiet, caplog, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    print_message("warning", LONG)
    print_message("note", LONG)
    print_line(minitune.progress.labelled("label", LONG) + "\n\n" + "last 100%")
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", LONG),
        ("INFO", LONG),
        ("INFO", f"label      {LONG}"),
        ("INFO", "last 100%"),
    ]


def test_a_logged_step_keeps_its_gaps_whatever_the_width(quiet, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    record = {"step": 1, "epoch": 0.5, "loss": 1.0}
    assert metrics_line(record, 2) == "step 1/2  epoch 0.50  loss 1.0000"
    minitune.quiet(False)
    assert metrics_line(record, 2) == "step 1/2 loss 1.0000"


def test_long_work_is_logged_as_in_a_pipe_if_it_was_asked_for(quiet, caplog, monkeypatch):
    monkeypatch.setattr(minitune.progress, "LINE_SECONDS", 0.0)
    for show in (True, None, False):
        with ProgressBar("loading", 100, show=show) as bar:
            bar.update(50)
    assert [record.getMessage()[:14] for record in caplog.records] == ["loading    50%"]


def test_a_bar_that_is_drawn_vanishes_when_the_package_becomes_quiet(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with ProgressBar("training", 100, has_text=True) as bar:
        assert "0/100" in sys.stderr.getvalue()
        minitune.quiet()
        cleared = sys.stderr.getvalue()
        assert cleared.endswith("\r") and cleared.split("\r")[-2].strip() == ""
        bar.update(50)
        bar.set_text("a text")
    minitune.quiet(False)
    assert sys.stderr.getvalue() == cleared


def test_a_signal_is_told_by_the_last_line_only(smallest, tmp_path, quiet, capfd, caplog):
    train_with_ctrl_c(new_trainer(smallest, tmp_path, max_steps=3), step=1)
    assert capfd.readouterr() == ("", "")
    interrupted = [r.getMessage() for r in caplog.records if "interrupted" in r.getMessage()]
    assert len(interrupted) == 1 and "interrupted after step 2 of 3" in interrupted[0]


def test_a_check_before_and_after_writing_a_file_warns_once(tmp_path, quiet, caplog, monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)  # runs no interpreter
    folder = make_tiny_model(tmp_path / "model", tokenizer="spm", vocab=448)
    convert_folder(folder, tmp_path / "model.gguf", "q8_0", progress=True)
    texts = [record.getMessage() for record in caplog.records]
    assert sum("to every conversation, but the chat template" in text for text in texts) == 1
    reasons = ("this program is no Python interpreter", "nor xllamacpp is installed")
    assert "not run in llama.cpp" in texts[-1] and texts[-1].endswith(reasons)


# ---- commands


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_the_flag(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert re.search(r"^  --quiet ", capsys.readouterr().out, re.MULTILINE)


def test_quiet_commands_print_results_on_stdout_and_nothing_else(inputs, tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO, "minitune")
    output = str(tmp_path / "run")
    assert train(train_arguments(inputs, output, "--quiet")) == 0
    assert capfd.readouterr() == ("", "")
    assert not is_quiet() and "step 2/2" in caplog.text
    prompt = ["--model", output, "--device", "cpu", "--prompt", "Hi", "--max-new-tokens", "2"]
    assert main(["generate", "--quiet", *prompt]) == 0
    answer = capfd.readouterr()
    assert answer.out.endswith("\n") and answer.err == ""
    gguf = str(tmp_path / "model.gguf")
    assert main(["export", "--model", output, "--output", gguf, "--no-verify", "--quiet"]) == 0
    assert capfd.readouterr() == (f"{gguf}\n", "")


def test_a_quiet_command_still_says_why_it_ends(inputs, tmp_path, capfd, monkeypatch):
    broken = train_arguments(inputs, tmp_path / "run", "--quiet", "--learning-rate", "-1")
    assert train(broken) == 2
    assert capfd.readouterr().err.startswith("train.py: error: --learning-rate is -1")

    def interrupted(self, samples):
        signal.raise_signal(signal.SIGINT)
        return accumulate(self, samples)

    accumulate = SFTTrainer.accumulate
    monkeypatch.setattr(SFTTrainer, "accumulate", interrupted)
    assert train(train_arguments(inputs, tmp_path / "run", "--quiet")) == 130
    assert capfd.readouterr().err == "train.py: stopped by Ctrl-C\n"


@pytest.mark.parametrize("flag", ["--show", "--check-base"])
def test_a_quiet_training_refuses_flags_that_only_print(inputs, tmp_path, capsys, flag):
    values = [flag, "1"] if flag == "--show" else [flag]
    assert train(train_arguments(inputs, tmp_path / "run", "--quiet", *values)) == 2
    error = f"train.py: error: --quiet hides what {flag} shows; leave one out\n"
    assert capsys.readouterr().err == error
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("python_warnings")
def test_the_warnings_of_other_packages_are_logged_by_a_quiet_command(capfd, caplog):
    def command():
        minitune.quiet()
        warnings.warn("another package's", DeprecationWarning, stacklevel=1)

    assert minitune.config.cli.run_command("minitune train", command) == 0
    assert capfd.readouterr().err == ""
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", "another package's")
    ]


# ---- the source


def test_only_one_file_writes_to_stderr_or_warns():
    for path in PACKAGE.rglob("*.py"):
        text, inside = path.read_text(encoding="utf-8"), path.relative_to(PACKAGE)
        if inside in (Path("progress.py"), Path("gguf/llama_cpp_probe.py")):
            continue
        assert "warnings.warn(" not in text and "file=sys.stderr" not in text, inside
        prints = re.search(r"(?<![.\w])print\(", text)
        assert not prints or inside.parts[0] == "commands" or "LenientStream" in text, inside
