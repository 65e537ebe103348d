"""Time `minitune export` beside llama.cpp's converter and llama-quantize on random weights.

    python tests/referees/gguf_speed.py FOLDER --tokenizer DIR --llama-cpp DIR --llama-quantize FILE
    python tests/referees/gguf_speed.py FOLDER --shape 8b --types q4_k_m       ours alone

FOLDER gets a model of the shape of Llama 3.2 1B or 3.1 8B, if it holds none, and the GGUF files
while they are timed. --tokenizer is a folder with Llama 3's tokenizer.json, because the converter
refuses unknown vocabularies. --llama-cpp is a folder with convert_hf_to_gguf.py.

Each row is a type: seconds, seconds of all CPU cores together, and peak memory (ru_maxrss of the
largest process). The two take turns, and dirty pages are flushed before each. A row has the fastest
of the runs. Ours includes the flush to disk, which llama.cpp leaves to the system.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from minitune.device import gib_text
from referees.reporting import markdown_table
from scripts.benchmark.model_shapes import SHAPES
from scripts.benchmark.random_checkpoints import write_random_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def timed(
    commands: Sequence[Sequence[str | Path]], environment: dict[str, str]
) -> tuple[float, float, int]:
    """Run commands one after the other.

    Returns: seconds, seconds of CPU cores, and bytes of the largest peak memory.

    Raises: ValueError if a command fails.
    """
    os.sync()
    start, busy, peak = time.perf_counter(), 0.0, 0
    for command in commands:
        process = subprocess.Popen(
            list(map(str, command)),
            env=os.environ | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise ValueError(f"failed: {' '.join(process.args)}")
        busy += usage.ru_utime + usage.ru_stime
        peak = max(peak, usage.ru_maxrss * 1024)
    return time.perf_counter() - start, busy, peak


def make_model(folder: Path, shape: str, tokenizer: Path | None) -> Path:
    """Return a folder with a random model of a shape, which is written if it is not there.

    tokenizer: folder of the tokenizer's files; None makes a tokenizer of bytes.
    """
    model = folder / shape
    if not (model / "config.json").exists():
        write_random_checkpoint(model, SHAPES[shape])
        for name in TOKENIZER_FILES if tokenizer else ():
            shutil.copy(tokenizer / name, model / name)
    return model


def commands_of(
    arguments: argparse.Namespace, model: Path, kind: str
) -> list[tuple[list[list], str]]:
    """Return the commands that write a type, and their PYTHONPATH: ours, and llama.cpp's if given.

    model: the model folder.
    """
    export = [sys.executable, "-m", "minitune.commands", "export", "--model", model]
    export += ["--output", arguments.folder / "ours.gguf", "--quantization-method", kind]
    export += [f"--{option}" for option in arguments.options]
    sides = [([export], str(ROOT))]
    if arguments.llama_cpp is None:
        return sides
    half, theirs = arguments.folder / "half.gguf", arguments.folder / "theirs.gguf"
    converter = [sys.executable, arguments.llama_cpp / "convert_hf_to_gguf.py", model]
    if kind in ("f32", "f16", "bf16", "q8_0"):
        peers = [[*converter, "--outfile", theirs, "--outtype", kind]]
    else:
        peers = [[*converter, "--outfile", half, "--outtype", "f16"]]
        peers += [[arguments.llama_quantize, half, theirs, kind.upper()]]
    return [*sides, (peers, arguments.converter_path)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--llama-quantize", type=Path)
    parser.add_argument("--shape", default="1b", choices=SHAPES)
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0", "q4_k_m"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--options", nargs="*", default=[], help="flags of `minitune export`")
    parser.add_argument("--converter-path", default="", help="PYTHONPATH of the converter")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    model = make_model(arguments.folder, arguments.shape, arguments.tokenizer)
    rows = []
    for kind in arguments.types:
        sides = commands_of(arguments, model, kind)
        runs = [[] for _ in sides]
        for _ in range(arguments.repeats):
            for found, (commands, path) in zip(runs, sides, strict=True):
                found.append(timed(commands, {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}))
                for file in arguments.folder.glob("*.gguf"):
                    file.unlink()
        best = [min(found) for found in runs]
        cells = [
            text
            for seconds, busy, peak in best
            for text in (f"{seconds:.1f} s", f"{busy:.1f} s", gib_text(peak))
        ]
        speed_up = f"{best[-1][0] / best[0][0]:.2f}" if len(best) > 1 else "-"
        rows.append([kind, *cells, speed_up])
    sides = ["ours", "CPU", "peak", "llama.cpp", "CPU", "peak"]
    header = ["type", *sides[: len(rows[0]) - 2], "speed-up"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
