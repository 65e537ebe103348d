"""The README's example of embedding: nothing is written, nothing is printed, nothing is needed."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from test_readme import MODEL, TEXT
from tiny import make_tiny_model
from training_runs import RECORDS, new_trainer

import minitune
from minitune import TrainerControl, TrainerState

ROOT = Path(__file__).parents[1]
EXAMPLE = TEXT.partition("## Embed it")[2].partition("```python\n")[2].partition("```")[0]
NO_FILE = 0  # bytes that a file may have; a larger one is an error


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Change to a folder that holds the model alone."""
    make_tiny_model(tmp_path / MODEL)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    minitune.quiet(False)


def files_below(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_the_example_has_about_forty_lines():
    assert 35 <= len(EXAMPLE.splitlines()) <= 45


def test_a_program_without_streams_home_or_files_trains_twice_and_answers(workplace):
    (workplace / "text.py").write_text(EXAMPLE)
    reader, writer = os.pipe()
    before = files_below(workplace)
    program = str(ROOT / "tests" / "embedding_program.py")
    command = [sys.executable, "-B", program, "text.py", str(writer)]
    shell = ["sh", "-c", '"$0" "$@" <&- >&- 2>&-', *command]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TMPDIR": "/no/such/folder"}
    process = subprocess.Popen(
        shell,
        env=environment,
        pass_fds=[writer],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (NO_FILE, NO_FILE)),
    )
    os.close(writer)
    with os.fdopen(reader) as pipe:
        report = json.load(pipe)
    assert process.wait() == 0 and "error" not in report, report
    assert report["streams"] == [None, None, None]
    assert report["events"] == []
    assert {"open", "os.mkdir"} <= set(report["misdeeds"])
    assert len(report["answers"]) == 2 and len(report["losses"]) == 2 * 8
    assert files_below(workplace) == before


def test_the_example_prints_nothing_on_open_descriptors(workplace, capfd, caplog):
    caplog.set_level("INFO", "minitune")
    variables = {}
    exec(compile(EXAMPLE, "README.md", "exec"), variables)
    assert capfd.readouterr() == ("", "")
    assert all(isinstance(text, str) for text in variables["answers"])
    losses = variables["losses"]
    assert len(losses) == 16 and losses[7] < losses[0] and losses[15] < losses[8]
    assert sum("step 8/8" in record.getMessage() for record in caplog.records) == 2


def test_the_callback_of_the_example_ends_the_run_at_the_step_that_it_names(smallest, tmp_path):
    variables = {}
    exec(compile(EXAMPLE.partition("def message")[0], "README.md", "exec"), variables)
    shown = []

    def show(step, loss):
        shown.append((step, loss))
        return "stop" if step == 2 else None

    trainer = new_trainer(
        smallest,
        tmp_path / "run",
        max_steps=4,
        logging_steps=1,
        eval_strategy="steps",
        eval_dataset=RECORDS[:2],
    )
    trainer.add_callback(variables["Progress"](show))
    assert trainer.train().global_step == 2
    history = trainer.state.log_history
    assert sum("eval_loss" in record for record in history) == 2
    assert shown == [(record["step"], record["loss"]) for record in history if "loss" in record]
    assert len(shown) == 2
    minitune.quiet(False)


def test_the_callback_of_the_example_keeps_the_stop_of_another():
    variables = {}
    exec(compile(EXAMPLE.partition("def message")[0], "README.md", "exec"), variables)
    minitune.quiet(False)
    control = TrainerControl(should_training_stop=True)
    callback = variables["Progress"](lambda step, loss: None)
    callback.on_log(None, TrainerState(), control, {"loss": 1.0})
    assert control.should_training_stop
