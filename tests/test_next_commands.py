"""A finished command shows the commands to type next, and these work when they are pasted."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_inputs import train_arguments, write_inputs
from tiny import make_tiny_model

from minitune import FastLanguageModel
from minitune.commands import export
from minitune.commands.next_commands import after_export, command_line

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def paste(command: list, folder: Path) -> subprocess.CompletedProcess:
    """Run a command in a folder; `python` is this one, and `minitune` needs no installation."""
    words = [sys.executable if word == "python" else str(word) for word in command]
    if words[0] == "minitune":
        words[:1] = [sys.executable, "-m", "minitune.commands"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done


def next_commands(stderr: str) -> list[list[str]]:
    """Return the words of the commands behind the label `next`."""
    lines = stderr.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("next "))
    commands = [lines[first][11:]]
    for line in lines[first + 1 :]:
        if not line.startswith(" " * 11):
            break
        commands.append(line[11:])
    return [shlex.split(command) for command in commands]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder, with a space in its name, that holds a tiny model and data."""
    folder = tmp_path_factory.mktemp("my files")
    write_inputs(folder)
    record = json.loads((folder / "data.jsonl").read_text().splitlines()[0])
    record["messages"].insert(0, {"role": "system", "content": 'It\'s a $HOME of "numbers".'})
    (folder / "with system.jsonl").write_text(json.dumps(record) + "\n")
    return folder


def test_the_commands_after_training_run_when_they_are_pasted(folder):
    data = ("--data", "with system.jsonl")
    arguments = train_arguments(Path("."), Path("run 1"), "--r", "2", "--no-load-in-4bit", *data)
    done = paste(["python", ROOT / "scripts" / "train.py", *arguments], folder)
    generate, exported, report = next_commands(done.stderr)
    assert generate[:2] == [Path(sys.executable).name, str(ROOT / "scripts" / "generate.py")]
    assert generate[2:] == [
        *("--model", "run 1", "--no-load-in-4bit", "--device", "cpu"),
        *("--system", 'It\'s a $HOME of "numbers".', "--prompt", "number 0"),
    ]
    assert exported[1:] == [
        str(ROOT / "scripts" / "export.py"),
        *("--model", "run 1", "--output", "run 1/gguf", "--quantization-method", "q4_k_m"),
    ]
    paste([*generate, "--max-new-tokens", "3"], folder)
    assert report[1:] == [str(ROOT / "scripts" / "report.py"), "run 1"]
    assert paste(report, folder).stdout == "run 1/report.html\n"
    done = paste(exported, folder)
    assert [Path(line).suffix for line in done.stdout.splitlines()] == [".gguf"]
    assert next_commands(done.stderr) == [["llama-server", "-m", done.stdout.strip()]]
    text = " ".join(done.stderr.split())
    assert "merging the adapter into the 16-bit weights of" in text and "--ollama" in text


def test_a_run_that_writes_gguf_shows_the_line_of_llama_cpp_and_the_nf4_setting(folder):
    arguments = train_arguments(Path("."), Path("nf4"), "--r", "2", "--gguf", "q8_0")
    done = paste(["minitune", "train", *arguments, "--dtype", "float16"], folder)
    generate, server, _ = next_commands(done.stderr)
    assert shlex.join(generate).count(" --model nf4 --dtype float16 --device cpu ") == 1
    assert server[:2] == ["llama-server", "-m"] and (folder / server[2]).is_file()
    assert "--merge-base nf4 answers as in training" in " ".join(done.stderr.split())


def test_a_command_line_has_the_form_in_which_this_one_was_started(monkeypatch):
    python = Path(sys.executable).name
    for program, started, expected in (
        ("minitune train", "/usr/bin/minitune", "minitune export 'a b'"),
        ("minitune train", "/x/__main__.py", f"{python} -m minitune.commands export 'a b'"),
        ("train.py", "scripts/train.py", f"{python} scripts/export.py 'a b'"),
    ):
        monkeypatch.setattr(sys, "argv", [started])
        assert command_line(program, "export", "a b") == expected


def test_ollama_create_is_shown_for_a_modelfile_and_otherwise_how_to_get_one():
    gguf, modelfile = Path("out/My-Q8_0.gguf"), Path("out/Modelfile")
    with_modelfile = after_export("minitune export", [gguf, modelfile])
    assert "ollama create my-q8_0 -f out/Modelfile" in with_modelfile
    assert "--ollama" not in with_modelfile
    assert "--ollama" in after_export("minitune export", [gguf])
    assert after_export("minitune export", []) is None


def test_export_prints_paths_on_stdout_and_everything_else_on_stderr(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["minitune"])
    base = make_tiny_model(tmp_path / "base")
    model, _ = FastLanguageModel.from_pretrained(base, device="cpu", load_in_4bit=False)
    FastLanguageModel.get_peft_model(model, r=2).save_pretrained(tmp_path / "adapter")
    capsys.readouterr()
    merged = tmp_path / "merged"
    assert export.main(["--model", str(tmp_path / "adapter"), "--merged", str(merged)]) == 0
    out, error = capsys.readouterr()
    assert out == f"{merged}\n"
    assert "merging " in error and f"minitune generate --model {merged}" in error
