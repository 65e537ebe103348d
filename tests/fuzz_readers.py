"""Read mutants of every file that minitune reads: each is read, or refused with a ValueError.

    python tests/fuzz_readers.py                              2,000 mutants over all readers
    python tests/fuzz_readers.py --count 20000
    python tests/fuzz_readers.py --count 0                    the seeds of found faults alone
    python tests/fuzz_readers.py --reader config --seed 17    one mutant, with its files kept

The seeds of found faults (fuzz/found.py) run first, unless a reader is chosen.

Prints a table of reader x outcome with the worst time and memory, and for each fault the command
that repeats it. Exit code 1 if there is a fault.

A change of a mutator changes the meaning of the seeds.
"""

import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "1000"}

import torch
from fuzz.found import FOUND
from fuzz.maker import Maker, foreign_values
from fuzz.observer import CANARY, Observer
from fuzz.originals import build_in_a_process
from fuzz.readers import READERS
from fuzz.sandbox import Result, run_mutants

from minitune.data import token_cache

token_cache.MIN_BYTES = 0  # small data is cached too


class Fuzzer:
    """Makes and runs mutants. `root` holds the originals and the folders of the mutants."""

    def __init__(self, root: Path):
        self.root = root
        torch.set_num_threads(1)
        build_in_a_process(root / "originals")
        self.pool = foreign_values(root / "originals")
        gc.collect()
        gc.freeze()  # a collection in a forked process then copies fewer pages

    def run(self, reader: str, seeds: Iterable[int]) -> Iterator[Result]:
        """Yield the results of the mutants of one reader."""

        def one(seed: int, folder: Path, observer: Observer) -> tuple[str, str, bool]:
            return self._run_one(reader, seed, folder, observer)

        yield from run_mutants(reader, seeds, one, self.root / "mutants")

    def make(self, reader: str, seed: int, folder: Path):
        """Write a mutant into `folder` and return it."""
        (folder / CANARY).write_bytes(b"not for reading")
        maker = Maker(self.root / "originals", folder, Random(f"{reader} {seed}"), self.pool)
        os.chdir(folder)
        os.environ["HOME"] = str(folder)
        # A process keeps the small files of a GGUF base, so their place outlives the mutant.
        tempfile.tempdir = str(folder.parent / "tmp")
        return READERS[reader](maker)

    def _run_one(
        self, reader: str, seed: int, folder: Path, observer: Observer
    ) -> tuple[str, str, bool]:
        """Return outcome, text, and True unless a ValueError fails to name the file."""
        mutant = self.make(reader, seed, folder)
        outcome, text, names = "success", "", True
        with observer.watch(folder, mutant.prints):
            try:
                mutant.use()
            except ValueError as error:
                outcome, text = "refused", f"{type(error).__name__}: {error}"
                if mutant.path is not None:
                    names = mutant.path.name in text or str(mutant.path.parent) in text
            except BaseException as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                outcome = type(error).__name__
                text = f"{outcome}: {error} ({place.filename}:{place.lineno})"
        if observer.complaints and outcome in ("success", "refused"):
            outcome, text = (
                observer.complaints[0].split(":")[0][:60],
                " | ".join(observer.complaints),
            )
        return outcome, text, names


def shares(count: int) -> dict[str, int]:
    """Return the number of mutants of each reader, `count` together. Trainings are slow: fewer."""
    weights = {name: 1 if name in ("checkpoint", "run_folder") else 3 for name in READERS}
    total, given, numbers = sum(weights.values()), 0, {}
    for name, weight in weights.items():
        given += weight
        numbers[name] = count * given // total - sum(numbers.values())
    return numbers


def chosen(arguments: argparse.Namespace) -> list[tuple[str, Iterable[int]]]:
    """Return (reader, seeds) for all mutants that the command line asks for."""
    if arguments.seed is not None:
        return [(reader, [arguments.seed]) for reader in arguments.reader]
    counts = shares(arguments.count)
    found = [] if arguments.reader else [(reader, [seed]) for reader, seed in FOUND.values()]
    first = arguments.first
    new = [(reader, range(first, first + counts[reader])) for reader in arguments.reader or counts]
    return found + new


def report(results: list[Result], seconds: float) -> str:
    """Return the table and the faults."""
    lines = [
        f"{'reader':<20}{'mutants':>8}{'success':>8}{'refused':>8}{'faults':>8}"
        f"{'unnamed':>8}{'CPU ms':>8}{'worst s':>9}{'MB':>7}"
    ]
    for reader in dict.fromkeys(result.reader for result in results):
        own = [result for result in results if result.reader == reader]
        lines.append(_row(reader, own))
    lines.append(_row("all", results))
    lines.append(f"{seconds:.0f} s with the making of the originals")
    faults = [result for result in results if result.is_fault]
    for kind in dict.fromkeys((fault.reader, _kind(fault)) for fault in faults):
        same = [fault for fault in faults if (fault.reader, _kind(fault)) == kind]
        command = f"--reader {kind[0]} --seed {same[0].seed}"
        lines.append(f"FAULT x{len(same)} {kind[0]}: {_one_line(same[0].text)}")
        lines.append(f"      python tests/fuzz_readers.py {command}")
    return "\n".join(lines)


def _row(name: str, results: list[Result]) -> str:
    counts = [
        len(results),
        sum(result.outcome == "success" for result in results),
        sum(result.outcome == "refused" for result in results),
        sum(result.is_fault for result in results),
        sum(not result.names for result in results),
    ]
    slowest, largest = max(r.cpu_seconds for r in results), max(r.grown for r in results)
    counts.append(round(1000 * sum(r.cpu_seconds for r in results) / len(results)))
    figures = "".join(f"{count:>8}" for count in counts)
    return f"{name:<20}{figures}{slowest:>9.1f}{largest / 1e6:>7.0f}"


def _kind(fault: Result) -> str:
    """Return the text that faults of one kind share: the error and its place in the code."""
    text = fault.text
    return f"{fault.outcome} {text[text.rfind('(') :]}" if text.endswith(")") else fault.outcome


def _one_line(text: str) -> str:
    return " ".join(text.split())[:400]


def main(argv: list[str] | None = None) -> int:
    """Run the mutants that the command line asks for; return 1 if there is a fault."""
    parser = argparse.ArgumentParser(description="Read mutants of every file that minitune reads.")
    parser.add_argument("--count", type=int, default=2000, help="mutants over all readers")
    parser.add_argument("--first", type=int, default=0, help="seed of the first mutants")
    parser.add_argument("--reader", action="append", choices=READERS, help="one of the readers")
    parser.add_argument("--seed", type=int, help="a single mutant of --reader")
    parser.add_argument("--unnamed", action="store_true", help="list errors that name no file")
    parser.add_argument("--list", action="store_true", help="list every mutant")
    arguments = parser.parse_args(argv)
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    start, results = time.monotonic(), []
    try:
        fuzzer = Fuzzer(root)
        for reader, seeds in chosen(arguments):
            for result in fuzzer.run(reader, seeds):
                results.append(result)
                if result.is_fault:  # also if the run is stopped
                    print(f"{reader} {result.seed}: {result.text[:300]}", file=sys.stderr)
    finally:
        os.chdir("/")
        shutil.rmtree(root, ignore_errors=True)
    print(report(results, time.monotonic() - start))
    for result in results:
        wanted = arguments.list or (arguments.unnamed and not result.names)
        if wanted or arguments.seed is not None:
            print(f"{result.reader} {result.seed}: {result.outcome}: {result.text}")
    return int(any(result.is_fault for result in results))


if __name__ == "__main__":
    sys.exit(main())
