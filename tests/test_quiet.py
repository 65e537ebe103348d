"""Streams that are missing or fail, and the switch that sends lines to a logger."""

import io
import logging
import os
import re
import signal
import sys
import warnings
from pathlib import Path

import pytest
from command_inputs import train, train_arguments, write_inputs
from tiny import make_tiny_model
from training_runs import RECORDS, new_trainer, train_with_ctrl_c

import minitune
from minitune import FastLanguageModel, SFTConfig, SFTTrainer, TextStreamer, get_chat_template
from minitune.commands.__main__ import COMMANDS, main
from minitune.data.tokenization.library_errors import no_panic_trace
from minitune.gguf.export import convert_folder
from minitune.progress import ProgressBar, is_quiet, print_line, print_message, warn

PACKAGE = Path(__file__).parents[1] / "minitune"
LONG = " ".join(f"word{i}" for i in range(60))


class Failing:
    """A stream like a window that was destroyed: it only has `write`, which raises."""

    def write(self, text):
        raise RuntimeError("the window was destroyed")


class Terminal(io.StringIO):
    """A terminal that keeps its text."""

    def isatty(self):
        return True


class FailingTerminal(Terminal):
    """A terminal that is gone."""

    def write(self, text):
        raise OSError(5, "Input/output error")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def detached():
    stream = io.TextIOWrapper(io.BytesIO())
    stream.detach()
    return stream


BROKEN = {
    "none": lambda: None,
    "closed": closed,
    "detached": detached,
    "failing": Failing,
    "gone": FailingTerminal,
    "ascii": lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii"),
}


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


@pytest.fixture
def python_warnings(monkeypatch):
    """Show each warning as Python does without pytest."""

    def show(message, category, filename, number, file=None, line=None):
        sys.stderr.write(warnings.formatwarning(message, category, filename, number, line))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show)
        yield


def work(folder, output, verify=True):
    """Load, train, evaluate, answer, and save in every form."""
    model, tokenizer = FastLanguageModel.from_pretrained(folder, 128, device="cpu", progress=True)
    model = FastLanguageModel.get_peft_model(model, r=4)
    FastLanguageModel.get_peft_model(model, r=4)  # a warning
    tokenizer = get_chat_template(tokenizer, "chatml")
    args = SFTConfig(output / "run", max_steps=2, logging_steps=1, sample_prompts=("Grüße",))
    trainer = SFTTrainer(model, args, RECORDS, RECORDS[:2], tokenizer)
    trainer.train()
    trainer.evaluate()
    inputs = tokenizer("Grüße aus Köln", return_tensors="pt")
    streamer = TextStreamer(tokenizer)
    answer = model.generate(**inputs, max_new_tokens=2, streamer=streamer)
    assert answer.shape[1] > inputs["input_ids"].shape[1]
    model.print_trainable_parameters()
    model.save_pretrained(output / "adapter")
    model.save_pretrained_merged(output / "merged", tokenizer)
    model.save_pretrained_gguf(output / "gguf", tokenizer, progress=True, verify=verify)
    model.save_pretrained_gguf(output / "lora", tokenizer, save_method="lora")
    model.load_adapter(output / "adapter", tokenizer)


# ---- streams


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


def test_a_streamer_prints_to_stdout_also_if_the_package_is_quiet(smallest, quiet, capsys, caplog):
    tokenizer = FastLanguageModel.from_pretrained(smallest, device="cpu")[1]
    streamer = TextStreamer(tokenizer)
    streamer.put(tokenizer("an answer", return_tensors="pt")["input_ids"])
    streamer.end()
    assert capsys.readouterr().out == "an answer\n" and not caplog.records


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


# ---- the switch


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
    assert texts[-1].endswith("because this program is no Python interpreter")


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


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
def test_commands_work_without_a_stream(inputs, tmp_path, monkeypatch, capsys, stream):
    data = ["--model", str(inputs / "model"), "--data", str(inputs / "data.jsonl")]
    monkeypatch.setattr(sys, stream, None)
    assert main(["data", "show", *data, "--html", str(tmp_path / "page.html")]) == 0
    assert main(["plan", *data[:2]]) == 0
    assert train(train_arguments(inputs, tmp_path / "run", "--show", "1")) == 0
    assert "--- sample" not in capsys.readouterr().out or stream != "stdout"


def test_generate_without_stdin_asks_for_the_prompt(inputs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["generate", "--model", str(inputs / "model"), "--device", "cpu"]) == 2
    assert "stdin is closed, and there is no prompt; pass --prompt TEXT" in capsys.readouterr().err


# ---- the source


def test_only_one_file_writes_to_stderr_or_warns():
    for path in PACKAGE.rglob("*.py"):
        text, inside = path.read_text(encoding="utf-8"), path.relative_to(PACKAGE)
        if inside in (Path("progress.py"), Path("gguf/llama_cpp_probe.py")):
            continue
        assert "warnings.warn(" not in text and "file=sys.stderr" not in text, inside
        prints = re.search(r"(?<![.\w])print\(", text)
        assert not prints or inside.parts[0] == "commands" or "LenientStream" in text, inside
