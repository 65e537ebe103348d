"""The README's Python and its commands run as written, one after the other, on a small model."""

import re
import shlex
from pathlib import Path

import pytest
from tiny import make_tiny_model

import minitune
from minitune.commands.__main__ import main
from minitune.gguf.export import convert_folder

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = "models/SmolLM2-135M-Instruct"


def blocks(language: str) -> list[str]:
    """Return the README's code blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Change to a folder with the README's model, GGUF file and data; the model is a tiny one."""
    monkeypatch.chdir(tmp_path)
    make_tiny_model(tmp_path / MODEL)
    convert_folder(tmp_path / MODEL, tmp_path / f"{MODEL}.Q4_1.gguf", "q4_1", verify=False)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    yield tmp_path
    minitune.quiet(False)


def test_the_python_runs_block_by_block(workplace):
    variables = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), variables)


def test_every_command_runs(workplace, capsys):
    commands = [
        shlex.split(line, comments=True)
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith("minitune ")
    ]
    assert len(commands) > 5
    for _, *argv in commands:
        assert main(argv) == 0, f"{shlex.join(argv)}: {capsys.readouterr().err}"
