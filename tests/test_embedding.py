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

import minitune

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
    assert len(report["answers"]) == 2 and len(report["history"]) == 2 * (8 + 1)
    assert files_below(workplace) == before


def test_the_example_prints_nothing_on_open_descriptors(workplace, capfd, caplog):
    caplog.set_level("INFO", "minitune")
    variables = {}
    exec(compile(EXAMPLE, "README.md", "exec"), variables)
    assert capfd.readouterr() == ("", "")
    assert all(isinstance(text, str) for text in variables["answers"])
    losses = [numbers["loss"] for numbers in variables["history"] if "loss" in numbers]
    assert len(losses) == 16 and losses[7] < losses[0] and losses[15] < losses[8]
    assert sum("step 8/8" in record.getMessage() for record in caplog.records) == 2
