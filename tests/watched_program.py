"""The commands in one process whose audit events are watched; tests/test_watched_program.py.

    python tests/watched_program.py INPUTS OUTPUT REPORT

INPUTS holds the model and the data of command_inputs.py. REPORT receives two lists in JSON: the
events of the commands, and those of one misdeed of each kind.
"""

import contextlib
import io
import json
import marshal
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork")
ADDRESSES = ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo")
IMPORTER = "<frozen importlib._bootstrap_external>"  # reads the code of modules with marshal

_events: list[str] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Note an event that opens a socket, loads Python objects of a file, or starts a program."""
    if event == "socket.__new__":
        _events.append(f"socket {arguments[1]}")
    elif event in ADDRESSES or event == "pickle.find_class":
        _events.append(event)
    elif event in PROGRAMS:
        _events.append(f"program {' '.join(map(str, arguments[1] if arguments[1:] else ()))}")
    elif event.startswith("marshal.load") and sys._getframe(1).f_code.co_filename != IMPORTER:
        _events.append(event)


@contextlib.contextmanager
def watched_loads() -> Iterator[None]:
    """Note each call of pickle and torch.load, which may hold no class and raise no event."""
    import torch

    originals = [(pickle, "load"), (pickle, "loads"), (torch, "load")]
    originals = [(module, name, getattr(module, name)) for module, name in originals]

    def noted(name: str, load: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            _events.append(name)
            return load(*arguments, **options)

        return call

    for module, name, load in originals:
        setattr(module, name, noted(f"{module.__name__}.{name}", load))
    try:
        yield
    finally:
        for module, name, load in originals:
            setattr(module, name, load)


def run_commands(inputs: Path, output: Path) -> None:
    """Train, merge, export, resume, generate, and show data and plan."""
    from minitune.commands.__main__ import main

    model, data = str(inputs / "model"), str(inputs / "data.jsonl")
    run, device = str(output / "run"), ("--device", "cpu")
    train = ["train", "--model", model, "--data", data, "--output-dir", run, "--r", "2", *device]
    export = ["export", "--model", run, "--output", str(output / "gguf")]
    for arguments in (
        [*train, "--max-steps", "1", "--max-seq-length", "128", "--merge", "--gguf", "q8_0"],
        [*train, "--max-steps", "2", "--max-seq-length", "128", "--resume"],
        ["generate", "--model", run, "--prompt", "Hi", "--max-new-tokens", "2", *device],
        [*export, "--quantization-method", "q4_0", "--ollama"],
        ["data", "--model", model, "--data", data],
        ["plan", "--model", model],
    ):
        code = main(arguments)
        assert code == 0, f"{' '.join(arguments)} ends with exit code {code}"


def misbehave() -> None:
    """Do one thing of each kind that the commands must not do."""
    import torch

    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as opened:
        opened.connect(("127.0.0.1", 9))
    pickle.loads(pickle.dumps(Path("x")))
    marshal.loads(marshal.dumps(1))
    stored = io.BytesIO()
    torch.save({}, stored)
    stored.seek(0)
    torch.load(stored)
    subprocess.run(["true"], check=True)


def main() -> None:
    inputs, output, report = map(Path, sys.argv[1:])
    sys.addaudithook(watch)
    with watched_loads():
        run_commands(inputs, output)
        of_commands = list(_events)
        _events.clear()
        misbehave()
    report.write_text(json.dumps([of_commands, _events]), encoding="utf-8")


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main()
