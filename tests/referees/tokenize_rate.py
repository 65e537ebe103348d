"""Measure the rate and the memory of tokenization, beside `datasets.map` with the same tokenizer.

    python tests/referees/tokenize_rate.py prepare FOLDER    a tokenizer and three data files
    python tests/referees/tokenize_rate.py table FOLDER      every system on every file

The tokenizer is a byte-level BPE of 49,152 tokens with single digits, as SmolLM2's, trained on the
source files of Python's standard library. The files hold

    rows.jsonl         1,000,000 texts of 20 to 200 characters
    documents.jsonl    300 texts of 100,000 characters
    line.jsonl         one text of 20,000,000 characters

The systems are

    minitune    tokenize_dataset into a cache on disk
    again       the same once more: the tokens come from the cache
    datasets    load_dataset("json") and a batched map with transformers' tokenizer

Each runs in a process of its own. Samples are cut to 2,048 tokens. Memory is the peak of the
process above its memory after the imports.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import datasets  # noqa: E402
import tokenizers  # noqa: E402
import transformers  # noqa: E402
from tokenizers import decoders, models, pre_tokenizers, trainers  # noqa: E402

from minitune.data.tokenization.tokenizer import Tokenizer  # noqa: E402
from minitune.data.tokenize_dataset import tokenize_dataset  # noqa: E402
from referees.reporting import markdown_table  # noqa: E402

VOCABULARY = 49_152
MAX_LENGTH = 2048
SYSTEMS = ("minitune", "again", "datasets")
FILES = ("rows.jsonl", "documents.jsonl", "line.jsonl")
EOS = "<|endoftext|>"


def corpus() -> str:
    """Return the source files of the standard library as one text."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py"))
    paths = [path for path in paths if "site-packages" not in path.parts]
    return "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in paths)


def prepare(folder: Path) -> None:
    """Write the tokenizer and the data files."""
    text = corpus()
    write_tokenizer(folder / "tokenizer", text)
    rng, last = random.Random(0), len(text) - 200
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(1_000_000):
            begin = rng.randrange(last)
            file.write(json.dumps({"text": text[begin : begin + rng.randrange(20, 200)]}) + "\n")
    with (folder / "documents.jsonl").open("w") as file:
        for _ in range(300):
            begin = rng.randrange(len(text) - 100_000)
            file.write(json.dumps({"text": text[begin : begin + 100_000]}) + "\n")
    line = (text * (1 + 20_000_000 // len(text)))[:20_000_000]
    (folder / "line.jsonl").write_text(json.dumps({"text": line}) + "\n")


def write_tokenizer(folder: Path, text: str) -> None:
    """Train the tokenizer and write a folder for both systems."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def measure(system: str, folder: Path, name: str) -> dict[str, Any]:
    """Return samples, tokens, seconds and peak memory of one system.

    The CPU seconds are those of all threads, so they hardly depend on other work of the machine.
    """
    path, cache = folder / name, folder / "cache"
    if system == "datasets":
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
        datasets.disable_progress_bars()
    else:
        tokenizer = Tokenizer.from_folder(folder / "tokenizer")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu_start = time.perf_counter(), time.process_time()
    if system == "datasets":
        samples, tokens, read_seconds = with_datasets(path, tokenizer)
    else:
        dataset = tokenize_dataset(path, tokenizer, MAX_LENGTH, cache=cache)
        assert dataset.is_cached == (system == "again")
        samples, tokens = len(dataset.samples), int(dataset.samples.lengths.sum())
        read_seconds = 0.0
    seconds = time.perf_counter() - start
    cpu_seconds = time.process_time() - cpu_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "system": system,
        "file": name,
        "MB": round(path.stat().st_size / 1e6),
        "samples": samples,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "of which reading": round(read_seconds, 1),
        "CPU seconds": round(cpu_seconds, 1),
        "rows/s": round(samples / seconds),
        "peak MB": (peak - before) // 1024,
    }


def with_datasets(path: Path, tokenizer: Any) -> tuple[int, int, float]:
    """Return samples, tokens and the seconds of load_dataset."""

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        texts = [text + EOS for text in batch["text"]]
        return tokenizer(texts, truncation=True, max_length=MAX_LENGTH)

    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        seconds = time.perf_counter() - start
        mapped = loaded.map(encode, batched=True, remove_columns=["text"])
        lengths = mapped.data.column("input_ids")
        tokens = sum(len(chunk.flatten()) for chunk in lengths.chunks)
        return len(mapped), tokens, seconds


def table(folder: Path) -> None:
    """Run every system on every file and print the table."""
    rows = []
    for name in FILES:
        for system in SYSTEMS:
            command = [sys.executable, __file__, "measure", str(folder), system, name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], file=sys.stderr)
    print(markdown_table(list(rows[0]), [list(map(str, row.values())) for row in rows]))
    threads = os.environ.get("RAYON_NUM_THREADS", os.cpu_count())
    print(
        f"{threads} threads of tokenizers {tokenizers.__version__}; "
        f"datasets {datasets.__version__}, transformers {transformers.__version__}"
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("prepare", "measure", "table"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("system", nargs="?", choices=SYSTEMS)
    parser.add_argument("file", nargs="?", choices=FILES)
    arguments = parser.parse_args(argv)
    if arguments.command == "prepare":
        prepare(arguments.folder)
    elif arguments.command == "table":
        table(arguments.folder)
    else:
        print(json.dumps(measure(arguments.system, arguments.folder, arguments.file)))


if __name__ == "__main__":
    main(sys.argv[1:])
