"""Faults of a run, made on purpose: the outcome, the exit code, and the files that are left.

    python tests/faults.py     prints the table

Each fault happens to the train or the export command in a process that is forked after the imports.
The run has 4 steps and a checkpoint each 2 steps.
"""

import contextlib
import ctypes
import json
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from command_process import Place
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model
from training_runs import edit_json

from minitune.atomic_files import atomic_file
from minitune.commands import export
from minitune.gguf.export import convert_folder
from minitune.training import write_models

FILES = ("config.toml", "metrics.jsonl", "outputs.json", "run.json")
FINISHED = ("adapter", "checkpoint-2", "checkpoint-4", *FILES)
SAVED = ("checkpoint-2", "checkpoint-3", *FILES)
SIGNALS = (
    ("SIGTERM", signal.SIGTERM, 143),
    ("SIGHUP", signal.SIGHUP, 129),
    ("Ctrl-C", signal.SIGINT, 130),
)
CAPABILITY_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3 of linux/capability.h


@dataclass(frozen=True)
class Fault:
    """A fault and its expected outcome.

    happen: makes it, and returns the exit code and the last line of stderr.
    code: exit code; a negative one is a signal.
    words: regular expression that the line matches.
    left: names in the run folder afterwards.
    """

    name: str
    happen: Callable[[Place], tuple[int, str]]
    code: int
    words: str = ""
    left: tuple[str, ...] = FINISHED


def _signalled(number: int, times: int = 1) -> Callable[[Place], tuple[int, str]]:
    def act() -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)

    return lambda place: place.train(before=place.at_step(2, act))


def _full_disk(place: Place) -> tuple[int, str]:
    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))

    return place.train(before=place.at_step(3, fill))


def _read_only(place: Place) -> tuple[int, str]:
    place.output.mkdir()
    place.output.chmod(0o555)

    return place.train(before=_give_up_rights)


def _give_up_rights() -> None:
    """Let the process, also of root, write only where the modes of files allow it."""
    no_capabilities = struct.pack("6I", *[0] * 6)
    if ctypes.CDLL(None).capset(struct.pack("Ii", CAPABILITY_VERSION, 0), no_capabilities):
        raise OSError("the capabilities of the process could not be given up")


def _removed(place: Place) -> tuple[int, str]:
    return place.train(before=place.at_step(2, lambda: shutil.rmtree(place.output)))


def _second_run(place: Place) -> tuple[int, str]:
    found = []

    def start_second() -> None:
        found.append(place.train("--overwrite"))
        (place.folder / "second").write_text(json.dumps(found[-1]))

    place.train(before=place.at_step(2, start_second))
    return tuple(json.loads((place.folder / "second").read_text()))


def _second_export(place: Place) -> tuple[int, str]:
    target = place.folder / "model.gguf"
    arguments = ["--model", str(place.inputs / "model"), "--output", str(target)]
    with atomic_file(target) as partial:
        partial.write_text("first")
        return place.command(lambda: export.main(arguments), lambda: None)


def _stopped_export(place: Place) -> tuple[int, str]:
    place.output.mkdir()
    target = place.output / "model.gguf"
    base = convert_folder(
        make_tiny_model(place.folder / "plain", hidden=256, ffn=256),
        place.folder / "base.gguf",
        verify=False,
    )
    temporary = place.folder / "temporary"
    temporary.mkdir()

    def stop_in_export() -> None:
        tempfile.tempdir = str(temporary)
        write = export.GGUFExport.write

        def stopped(planned, **options):
            with atomic_file(target) as partial:
                partial.write_text("half")
                os.kill(os.getpid(), signal.SIGTERM)
            return write(planned, **options)

        export.GGUFExport.write = stopped

    arguments = ["--model", str(base), "--output", str(target)]
    result = place.command(lambda: export.main(arguments), stop_in_export)
    assert list(temporary.iterdir()) == []
    return result


def _changed(change: Callable[[Place], None], *more: str) -> Callable[[Place], tuple[int, str]]:
    """Return a fault: a finished run, a change, and the command again with more flags."""

    def happen(place: Place) -> tuple[int, str]:
        code, line = place.train()
        assert code == 0, line
        change(place)
        return place.train(*more)

    return happen


def _other_weights(place: Place) -> None:
    path = place.inputs / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def _truncate(name: str) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        path = place.output / "checkpoint-4" / name
        path.write_bytes(path.read_bytes()[:100])

    return change


def _link_checkpoint(place: Place) -> None:
    shutil.move(place.output / "checkpoint-4", place.folder / "elsewhere")
    (place.output / "checkpoint-4").symlink_to(place.folder / "elsewhere")


def _foreign(*files: str) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        for file in files:
            path = place.output / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"names": ["src"]}' if path.name == "outputs.json" else "mine")

    return change


def _on_new(change: Callable[[Place], None]) -> Callable[[Place], tuple[int, str]]:
    def happen(place: Place) -> tuple[int, str]:
        change(place)
        return place.train("--overwrite")

    return happen


def _killed_export(place: Place) -> tuple[int, str]:
    def kill_in_merge() -> None:
        def killed(model, folder, *arguments, **options):
            (folder / "model.safetensors").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

        write_models.merge_to_folder = killed

    result = place.train("--merge", before=kill_in_merge)
    assert ".merged.partial" in _names(place.output)
    assert place.train("--merge", "--resume")[0] == 0
    return result


def _closed(*names: str) -> Callable[[Place], tuple[int, str]]:
    def close() -> None:
        read, write = os.pipe()
        os.close(read)
        for name in names:
            setattr(sys, name, os.fdopen(os.dup(write), "w", buffering=1))

    return lambda place: place.train(before=close)


FAULTS = [
    Fault(
        "`kill -9` in step 3",
        _signalled(signal.SIGKILL),
        -9,
        "",
        (".run.lock", "checkpoint-2", *FILES),
    ),
    Fault(
        "`kill -9` while `merged/` is written, then `--resume`",
        _killed_export,
        -9,
        left=(*FINISHED, "merged"),
    ),
    *(
        Fault(f"{name} in step 3", _signalled(number), code, "after step 3 of 4, last", SAVED)
        for name, number, code in SIGNALS
    ),
    Fault(
        "Ctrl-C twice in step 3",
        _signalled(signal.SIGINT, 2),
        130,
        "step 2 of 4, last check",
        ("checkpoint-2", *FILES),
    ),
    Fault("SIGTERM while a GGUF file is written", _stopped_export, 143, "stopped by SIGTERM", ()),
    Fault(
        "disk full at checkpoint 4",
        _full_disk,
        2,
        "checkpoint-4: could not be written",
        ("checkpoint-2", *FILES),
    ),
    Fault("run folder read-only", _read_only, 2, "writ(ten|able)", ()),
    Fault("run folder removed in step 3", _removed, 2, "the folder of this run is no longer", ()),
    Fault("second run, with `--overwrite`", _second_run, 2, "another run trains in this folder"),
    Fault("second export to the same file", _second_export, 2, "another process is writing it", ()),
    Fault(
        "weights changed, `--resume`",
        _changed(_other_weights, "--resume"),
        2,
        "the weights of .* are not those",
    ),
    Fault(
        "`rope_theta` changed, `--resume`",
        _changed(
            lambda place: edit_json(place.inputs / "model" / "config.json", rope_theta=5e5),
            "--resume",
        ),
        2,
        "config.json of .* changed: ropes.0.theta",
    ),
    Fault(
        "checkpoint damaged, `--resume`",
        _changed(_truncate("optimizer.safetensors"), "--resume"),
        2,
        "optimizer.safetensors",
    ),
    Fault(
        "`state.json` damaged, `--resume`",
        _changed(_truncate("state.json"), "--resume"),
        2,
        "state.json",
    ),
    Fault("checkpoint is a link, `--overwrite`", _changed(_link_checkpoint, "--overwrite"), 0),
    Fault(
        "`checkpoint-2/` of another program",
        _on_new(_foreign("checkpoint-2/state.json")),
        2,
        "checkpoint-2 has the name of a checkpoint, but no run",
        ("checkpoint-2",),
    ),
    Fault(
        "own `adapter/`, `--overwrite`",
        _on_new(_foreign("adapter/adapter_config.json")),
        2,
        "adapter exists, but no run wrote it",
        ("adapter",),
    ),
    Fault(
        "`outputs.json` of a stranger, `--overwrite`",
        _on_new(_foreign("outputs.json")),
        2,
        "lists 'src', which no run writes",
        ("outputs.json",),
    ),
    Fault("reader of stdout and stderr gone", _closed("stdout", "stderr"), 0, "", FINISHED),
]


@contextlib.contextmanager
def place() -> Iterator[Place]:
    """Yield a folder for a fault."""
    with tempfile.TemporaryDirectory() as name:
        yield Place(Path(name))


def _names(folder: Path) -> tuple[str, ...]:
    """Return the names in a folder; none if it is missing."""
    return tuple(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else ()


def observe(fault: Fault) -> tuple[int, str, tuple[str, ...]]:
    """Make a fault, and return the exit code, the line, and the names in the run folder."""
    with place() as where:
        code, line = fault.happen(where)
        text = line.replace(str(where.folder) + "/", "").replace(str(where.folder), "DIR")
        if code <= 0:
            text = ""
        return code, re.sub(r"process \d+", "process N", text), _names(where.output)


def main() -> int:
    """Print the table, and return 1 if an outcome is not the expected one."""
    wrong = 0
    print("| fault | exit code | last line on stderr | in the run folder |\n|---|---|---|---|")
    for fault in FAULTS:
        code, line, names = observe(fault)
        wrong += (code, names) != (fault.code, tuple(sorted(fault.left)))
        shown = 128 - code if code < 0 else code
        print(f"| {fault.name} | {shown} | {line} | {', '.join(names) or 'nothing'} |", flush=True)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
