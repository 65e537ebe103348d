"""Places that lack something: no home, no temporary folder, no stderr, not POSIX, no Triton."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_inputs import write_inputs

from minitune.checkpoints.resolve_model import resolve_model
from minitune.config.cli.running import run_command
from minitune.kernels import backend
from minitune.memory import device_rates
from minitune.system_folders import cache_folder, expanded, temporary_folder

ROOT = Path(__file__).parents[1]
# Modules that Windows or macOS lacks, and signals that Windows lacks.
ELSEWHERE = """
import json, os, shutil, signal, sys
from pathlib import Path

MISSING = {"triton", "fcntl", "resource", "termios", "pwd", "grp", "pty", "tty"}

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import subprocess, tempfile, multiprocessing.util, multiprocessing.shared_memory, zipfile, tarfile
import asyncio, pathlib, getpass, webbrowser, torch, torch.distributed, numpy, tqdm, gguf, jinja2
import tokenizers, sentencepiece, safetensors.torch  # these have Windows builds of their own
for name in [name for name in sys.modules if name.partition(".")[0] in MISSING]:
    del sys.modules[name]
sys.meta_path.insert(0, Missing())

class Msvcrt:
    LK_NBLCK, LK_UNLCK = 2, 0
    locking = staticmethod(lambda descriptor, mode, count: None)

sys.modules["msvcrt"] = Msvcrt
for name in ("SIGHUP", "SIGQUIT", "SIGKILL", "pthread_sigmask"):
    if hasattr(signal, name):
        delattr(signal, name)
for name in ("fork", "register_at_fork", "sched_getaffinity", "O_NOFOLLOW", "getuid",
             "O_DIRECTORY", "O_NONBLOCK", "killpg", "getpgid"):
    if hasattr(os, name):
        delattr(os, name)
sys.platform = "win32"

from minitune.commands.generate import main as generate
from minitune.commands.train import main as train

model, data, output = sys.argv[1:]
arguments = ["--model", model, "--data", data, "--output-dir", output, "--max-steps", "1", "--r",
             "2", "--max-seq-length", "64", "--merge", "--gguf", "q8_0", "--device", "cpu"]
assert train(arguments) == 0
assert train([*arguments, "--resume", "--max-steps", "2"]) == 0
assert generate(["--model", output, "--prompt", "Hi", "--max-new-tokens", "2"]) == 0
assert not MISSING & {name.partition(".")[0] for name in sys.modules}
"""


def test_training_needs_no_module_or_signal_that_windows_lacks(tmp_path):
    inputs = write_inputs(tmp_path)
    model, data = inputs / "model", inputs / "data.jsonl"
    command = [sys.executable, "-c", ELSEWHERE, str(model), str(data), str(tmp_path / "run")]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoint-2").is_dir() and list(tmp_path.glob("run/*.gguf"))


@pytest.fixture
def no_home(monkeypatch):
    """Leave no home: neither a variable nor an entry for the user."""
    for name in ("HOME", "USERPROFILE", "HOMEPATH", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_entry(uid):
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", no_entry)


def test_a_home_that_the_environment_does_not_name_is_not_written(monkeypatch, tmp_path):
    for name in ("HOME", "USERPROFILE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: SimpleNamespace(pw_dir=str(tmp_path)))
    assert expanded("~/model") == tmp_path / "model" and cache_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"


@pytest.mark.usefixtures("no_home")
def test_without_a_home_paths_stay_as_they_are_and_nothing_is_cached(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert expanded("~/model") == Path("~/model")
    assert cache_folder() is None
    for name in ("org/name", "~/model"):
        with pytest.raises(ValueError, match=rf"model (folder )?{name} "):
            resolve_model(name)
    rates = dict.fromkeys(device_rates.MEASURED, 1.0)
    monkeypatch.setattr(device_rates, "measure", lambda device: rates)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(backend, "has_tensor_core_kernels", lambda device: True)
    measured = device_rates.machine_rates.__wrapped__(torch.device("cuda"))
    assert measured.copy == 1.0 and not list(tmp_path.iterdir())


def test_a_system_without_a_temporary_folder_names_tmpdir(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/no/such/folder"])
    with pytest.raises(ValueError, match=r"no folder for temporary files .*TMPDIR"):
        temporary_folder()


def fail():
    raise ValueError("a wrong value")


def test_without_stderr_an_error_does_not_reach_the_results_on_stdout(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    assert run_command("minitune train", fail) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("is_flushed", [False, True])
def test_a_command_ends_without_a_word_when_the_reader_of_stdout_has_gone(
    monkeypatch, capsys, is_flushed
):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run_command("minitune plan", lambda: print("a plan", flush=is_flushed)) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_stdout_that_cannot_be_written_is_named(monkeypatch, capsys):
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run_command("minitune plan", print, "a plan") == 2
    assert "stdout: could not be written (No space left on device)" in capsys.readouterr().err


def test_closed_descriptors_are_not_taken_by_the_files_of_a_command(tmp_path):
    code = """
import json, os, sys
from minitune.config.cli.running import run_command
files = []
def command():
    with open(sys.argv[1], "w") as file:
        os.write(2, b"a library's message")
        json.dump([file.fileno(), sys.stdin is None, sys.stdout is None], file)
sys.exit(run_command("minitune train", command))
"""
    path = tmp_path / "file"
    shell = '"$0" -c "$1" "$2" <&- >&- 2>&-'
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = ["sh", "-c", shell, sys.executable, code, str(path)]
    assert subprocess.run(command, env=env).returncode == 0
    number, *closed = json.loads(path.read_text())
    assert number > 2 and closed == [True, True]
