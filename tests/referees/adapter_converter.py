"""Compare our adapters with those of llama.cpp's converter: keys, types, values, tensors, order.

    python tests/referees/adapter_converter.py LLAMA_CPP [--only CASE]

LLAMA_CPP is llama.cpp's source folder, with convert_lora_to_gguf.py. A case is an adapter with
random values on a tiny model of a family (tests/tiny_families.py). Every second one has rsLoRA.

A line of the output is a case: its number of keys and tensors, the deliberate differences, and
every other difference. The exit code is 1 if there is any other difference.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from family_configs import FAMILIES  # noqa: E402
from tiny import draw_adapter, make_tiny_model  # noqa: E402
from tiny_families import make_tiny_family  # noqa: E402

from minitune import FastLanguageModel  # noqa: E402
from minitune.gguf.lora_adapter import save_gguf_adapter  # noqa: E402
from minitune.language_model import LanguageModel  # noqa: E402
from referees.converter import differing_keys, differing_tensors, report  # noqa: E402
from referees.gguf_reading import read_gguf  # noqa: E402

# (key, reason); the key of rsLoRA's alpha is one of DELIBERATE_RSLORA
DELIBERATE = (
    (
        r"general\.name",
        "the base's name, with the program's behind it; not the folder's as a title",
    ),
    (r"general\.base_model\..*", "the base that the adapter belongs to"),
    (r"general\.file_type", "as in every other file; the converter leaves it out for adapters"),
    (r"general\.quantization_version", "nothing in an adapter is quantised"),
)
DELIBERATE_RSLORA = (
    (
        r"adapter\.lora\.alpha",
        "alpha * sqrt(r), because llama.cpp divides by r; the converter ignores use_rslora",
    ),
)


def trained_model(folder: Path, use_rslora: bool) -> LanguageModel:
    """Return the model of a folder with an adapter that has random values."""
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=64, dtype=torch.float32, device="cpu", load_in_4bit=False
    )
    FastLanguageModel.get_peft_model(model, r=6, lora_alpha=12, use_rslora=use_rslora)
    draw_adapter(model, b=0.1)
    return model


def convert(llama_cpp: Path, base: Path, adapter: Path, path: Path) -> str:
    """Convert an adapter with llama.cpp's converter, and return its error or ""."""
    command = [sys.executable, llama_cpp / "convert_lora_to_gguf.py", adapter]
    command += ["--base", base, "--outfile", path]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    reply = subprocess.run(command, capture_output=True, text=True, env=environment)
    if not path.is_file():
        return reply.stderr.strip().splitlines()[-1]
    kind = read_gguf(path).keys["general.type"].content
    return "" if kind == "adapter" else f"it writes a file of general.type {kind!r}"


def compare(llama_cpp: Path, case: str, use_rslora: bool) -> bool:
    """Print the line of a case, and return True if nothing differs but by intention."""
    name = f"{case}, rsLoRA" if use_rslora else case
    with tempfile.TemporaryDirectory() as temporary:
        base, adapter = Path(temporary) / "Tiny-Model", Path(temporary) / "adapter"
        ours, theirs = (Path(temporary) / part for part in ("ours.gguf", "theirs.gguf"))
        if case == "llama":
            make_tiny_model(base, attention_bias=True)
        else:
            make_tiny_family(base, case)
        model = trained_model(base, use_rslora)
        model.save_pretrained(adapter)
        try:
            save_gguf_adapter(model, ours)
        except ValueError as error:
            print(f"{name}: refused: {error}", flush=True)
            return True
        if error := convert(llama_cpp, base, adapter, theirs):
            print(f"{name}: the converter fails: {error}", flush=True)
            return True
        here, there = read_gguf(ours), read_gguf(theirs)
        found = differing_keys(here, there) | differing_tensors(here, there)
    expected = DELIBERATE + (DELIBERATE_RSLORA if use_rslora else ())
    deliberate = [key for key in found if any(re.fullmatch(form, key) for form, _ in expected)]
    return report(name, here, found, deliberate)


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("llama_cpp", type=Path, help="llama.cpp's source folder")
    parser.add_argument("--only", help="part of the names of the cases to run")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found = [
        compare(options.llama_cpp, case, index % 2 == 0)
        for index, case in enumerate(["llama", *FAMILIES])
        if options.only is None or options.only in case
    ]
    for form, reason in DELIBERATE + DELIBERATE_RSLORA:
        print(f"deliberate: {form}: {reason}")
    sys.exit(0 if all(found) else 1)


if __name__ == "__main__":
    main()
