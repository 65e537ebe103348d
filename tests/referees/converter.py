"""Compare our F16 files with those of llama.cpp's converter: keys, types, values, tensors, order.

    python tests/referees/converter.py LLAMA_CPP [--packages FOLDER] [--only CASE]

LLAMA_CPP is llama.cpp's source folder, with convert_hf_to_gguf.py. FOLDER holds the Python packages
that the converter needs and that are not installed here, such as protobuf.

A case is a tiny random model of a family (tests/tiny_families.py) with a published vocabulary. A
line of the output is a case: its number of keys and tensors, the deliberate differences, and every
other difference. A config.json that is read from the converter's file must describe the model of
the folder. The exit code is 1 if there is any other difference.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from family_configs import FAMILIES, YARN  # noqa: E402
from gguf_files import LLAMA3_ROPE  # noqa: E402
from same_models import check_same_model  # noqa: E402
from tiny import make_tiny_model  # noqa: E402
from tiny_families import make_tiny_family  # noqa: E402

from minitune.config.model_config import ModelConfig  # noqa: E402
from minitune.gguf.base.open_gguf import open_gguf, read_config  # noqa: E402
from minitune.gguf.export import convert_folder  # noqa: E402
from referees.gguf_reading import GGUFContent, read_gguf  # noqa: E402
from referees.package_vocabularies import read_vocabulary, write_tokenizer_files  # noqa: E402

# (cases, keys that differ there on purpose, the reason)
DELIBERATE = (
    ("", r"general\.name", "the file's name, which the converter spells as a title"),
    (
        "",
        r"general\.(basename|finetune|version|size_label|license.*|tags|languages|quantized_by)",
        "the converter guesses them from the folder's name or copies them from the model card",
    ),
    ("", r"tokenizer\.ggml\.(eot|eom)_token_id", "every token that ends a text has its key"),
    (
        " as json",
        r"tokenizer\.ggml\.scores",
        "the merges give the scores; the converter's -1000 for all cuts 274 of 405 lines wrong",
    ),
    (
        "deepseek-coder",
        r"tokenizer\.ggml\.tokens",
        "the converter writes U+FFFD for added tokens whose letters stand for single bytes",
    ),
    (
        "",
        "order of the tensors",
        "the order of the layers; the converter has the order of the safetensors files",
    ),
)
LLAMAS = {
    "llama": {},
    "llama with llama3's RoPE": {"rope_scaling": LLAMA3_ROPE, "head_dim": 64},
    "llama with YaRN": {"rope_scaling": YARN},
}
ROUNDING = 1e-4  # of cos and sin: the converter computes llama3's divisors in another precision
FILES = ("tokenizer.json", "tokenizer.model", "generation_config.json")
AS_JSON = " as json"
# Vocabulary of each family -> form, for the families of tiny_families.py.
FAMILY_VOCABULARIES = {
    "llama": ("llama-bpe", "llama-spm", "llama-spm as json", "deepseek-coder", "refact", "gpt-2"),
    "mistral": ("llama-spm", "llama-spm as json"),
    "ministral3": ("llama-spm",),
    "qwen2": ("qwen2",),
    "qwen3": ("qwen2",),
    "smollm3": ("llama-bpe",),
    "granite": ("refact",),
    "phi3": ("phi-3",),
    "olmo2": ("qwen2",),
    "olmo3": ("qwen2",),
    "gemma2": ("llama-spm",),
    "gemma3_text": ("llama-spm",),
}


def cases() -> dict[str, tuple[str, str]]:
    """Return name of a case -> (case of tiny_families.py or "llama", vocabulary)."""
    found = {f"llama, {name}": ("llama", name) for name in FAMILY_VOCABULARIES["llama"]}
    found |= {f"{case}, llama-bpe": (case, "llama-bpe") for case in LLAMAS}
    for case, (model_type, _) in FAMILIES.items():
        for name in FAMILY_VOCABULARIES[model_type]:
            found[f"{case}, {name}"] = (case, name)
    return found


def write_case(models: Path, case: str, vocabulary: str, folder: Path) -> None:
    """Write the model folder of a case."""
    name = vocabulary.removesuffix(AS_JSON)
    keys = read_vocabulary(models, name)
    rows = len(keys["tokens"])
    if case in LLAMAS:
        make_tiny_model(folder, vocab=rows, **LLAMAS[case])
    else:
        make_tiny_family(folder, case, vocab_size=rows)
    for file in FILES:
        (folder / file).unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    for special, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{special}_token_id"] = keys.get(f"{key}_token_id")
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer_files(models, name, folder, vocabulary.endswith(AS_JSON))
    if case.startswith("gemma"):  # its vocabularies put no space before a text
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"add_prefix_space": False}))


def convert(llama_cpp: Path, packages: Path | None, folder: Path, path: Path) -> str:
    """Convert a folder with llama.cpp's converter, and return its error or ""."""
    command = [sys.executable, llama_cpp / "convert_hf_to_gguf.py", folder]
    command += ["--outfile", path, "--outtype", "f16"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(packages or "")
    reply = subprocess.run(command, capture_output=True, text=True, env=environment)
    return "" if path.is_file() else reply.stderr.strip().splitlines()[-1]


def differing_keys(ours: GGUFContent, theirs: GGUFContent) -> dict[str, str]:
    """Return key -> difference."""
    found = {}
    for key in sorted({*ours.keys, *theirs.keys}):
        here, there = ours.keys.get(key), theirs.keys.get(key)
        if there is None:
            found[key] = f"only here: {short(here.content)}"
        elif here is None:
            found[key] = f"missing: {short(there.content)}"
        elif here.types != there.types:
            found[key] = f"{here.types} instead of {there.types}"
        elif here.content != there.content:
            found[key] = difference(here.content, there.content)
    return found


def difference(here: object, there: object) -> str:
    """Return two values that differ, of lists the first place."""
    if isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        places = [i for i, pair in enumerate(zip(here, there, strict=True)) if pair[0] != pair[1]]
        first = places[0]
        return f"{len(places)} places, at {first}: {short(here[first])}, not {short(there[first])}"
    return f"{short(here)} instead of {short(there)}"


def short(value: object) -> str:
    """Return the beginning of a value."""
    return repr(value)[:60]


def differing_tensors(ours: GGUFContent, theirs: GGUFContent) -> dict[str, str]:
    """Return tensor, or their order -> difference."""
    here, there = ({x.name: x for x in content.tensors} for content in (ours, theirs))
    found = dict.fromkeys(here.keys() ^ there.keys(), "in one file only")
    for name in here.keys() & there.keys():
        if here[name] != there[name]:
            found[name] = "another type, other sizes or other bytes"
    if not found and list(here) != list(there):
        found["order of the tensors"] = "differs"
    return found


def differing_config(path: Path, folder: Path) -> dict[str, str]:
    """Return "config.json" -> difference, if a file's config is not the one of the folder."""
    try:
        config = ModelConfig.from_dict(read_config(open_gguf(path)))
        check_same_model(config, ModelConfig.from_folder(folder), ROUNDING)
    except (ValueError, AssertionError) as error:
        return {"config.json": str(error)}
    return {}


def report(name: str, here: GGUFContent, found: dict[str, str], deliberate: list[str]) -> bool:
    """Print the line of a case, and return True if nothing differs but by intention.

    here: the keys and tensors of our file.
    found: key -> its difference.
    deliberate: the keys that differ by intention.
    """
    print(
        f"{name}: {len(here.keys)} keys, {len(here.tensors)} tensors; deliberate: "
        f"{', '.join(deliberate) or 'none'}; other: {len(found) - len(deliberate)}",
        flush=True,
    )
    for key, text in found.items():
        if key not in deliberate:
            print(f"    {key}: {text}", flush=True)
    return len(found) == len(deliberate)


def compare(options: argparse.Namespace, name: str, case: str, vocabulary: str) -> bool:
    """Print the line of a case, and return True if nothing differs but by intention."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "Tiny-Model"
        ours, theirs = (Path(temporary) / part / "Tiny-Model.gguf" for part in ("a", "b"))
        theirs.parent.mkdir()
        write_case(options.llama_cpp / "models", case, vocabulary, folder)
        if error := convert(options.llama_cpp, options.packages, folder, theirs):
            print(f"{name}: the converter fails: {error}", flush=True)
            return True
        try:
            convert_folder(folder, ours, "f16", verify=False)
        except ValueError as error:
            print(f"{name}: refused: {error}", flush=True)
            return True
        here, there = read_gguf(ours), read_gguf(theirs)
        found = differing_keys(here, there) | differing_tensors(here, there)
        found |= differing_config(theirs, folder)
    deliberate = [
        key
        for key in found
        if any(part in name and re.fullmatch(form, key) for part, form, _ in DELIBERATE)
    ]
    return report(name, here, found, deliberate)


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("llama_cpp", type=Path, help="llama.cpp's source folder")
    parser.add_argument("--packages", type=Path, help="folder with packages for the converter")
    parser.add_argument("--only", help="part of the names of the cases to run")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found = [
        compare(options, name, *case)
        for name, case in cases().items()
        if options.only is None or options.only in name
    ]
    for part, form, reason in DELIBERATE:
        print(f"deliberate{f' for {part.strip()}' if part else ''}: {form}: {reason}")
    sys.exit(0 if all(found) else 1)


if __name__ == "__main__":
    main()
