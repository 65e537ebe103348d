"""Make each deliberate bug in a copy of the tree, and report if the tests beside it catch it.

    python tests/mutations/run.py [--gpu] [--jobs N] [--only WORD ...]

The tests first have to pass without a bug. Exit code 1: a bug survived, or its tests did not run.

The libraries are imported once. Each bug has a forked process of its own, which imports the code
and runs the tests, so most bugs take a few seconds.
"""

import argparse
import compileall
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutations.mutation import ROOT, Mutation
from mutations.table import MUTATIONS

FOLDERS = ("kernels", "minitune", "scripts", "tests")
FILES = ("pyproject.toml", "README.md")
LIBRARIES = ("torch", "hypothesis", "gguf", "sentencepiece", "tokenizers", "peft")
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=")
SECONDS = 240  # a bug that makes its tests hang is caught
PASSED, FAILED = 0, 1  # exit codes of pytest; the others say that the tests did not run


class Outcome(NamedTuple):
    """The end of a bug: a word, the seconds that it took, and the output of tests that fail."""

    word: str
    seconds: float
    output: str = ""


def import_libraries(gpu: bool) -> None:
    """Import the slow libraries of the tests, which no bug changes."""
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads this when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in (*LIBRARIES, "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)


def copy_tree(target: Path) -> None:
    """Copy code and tests into a new folder, and compile them."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.pyc"))
        compileall.compile_dir(target / name, quiet=2)
    for name in FILES:
        shutil.copy2(ROOT / name, target / name)


def run_tests(tree: Path, tests: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Return pytest's exit code, None after the time limit, and the end of the output."""
    log = tree / "output.txt"
    pid = os.fork()
    if not pid:
        _run_in_this_process(tree, tests, log)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            text = log.read_text(encoding="utf-8", errors="replace")
            return os.waitstatus_to_exitcode(status), text[-3000:]
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None, f"no end after {seconds:.0f} s"


def _run_in_this_process(tree: Path, tests: Sequence[str], log: Path) -> None:
    """Run the tests of a tree and end the process with pytest's exit code."""
    code = 70  # of an error outside of pytest
    try:
        os.setsid()  # a group of its own, so that its children end with it
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(tree)
        sys.dont_write_bytecode = True  # so that no compiled bug outlives its source
        os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        others = [path for path in sys.path if path not in (str(ROOT), str(ROOT / "tests"))]
        sys.path[:] = [str(tree), *others]
        code = int(pytest.main([*OPTIONS, *(f"tests/{test}" for test in tests)]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def judge(mutation: Mutation, unchanged: Path) -> Outcome:
    """Make a bug in a copy of the unchanged tree, and run its tests."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=unchanged.parent) as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(unchanged, tree)
        path = tree / mutation.file
        source = path.read_text(encoding="utf-8")
        path.write_text(mutation.changed_source(source), encoding="utf-8")
        code, output = run_tests(tree, mutation.tests, SECONDS)
    seconds = time.monotonic() - start
    if code is None:
        return Outcome("caught by time", seconds)
    if code == FAILED:
        return Outcome("caught", seconds)
    if code == PASSED:
        return Outcome("SURVIVED", seconds)
    return Outcome(f"ERROR {code}", seconds, output)


def check_without_bugs(mutations: Sequence[Mutation], tree: Path) -> None:
    """Run all named tests on the tree as it is.

    Raises: SystemExit if a test fails.
    """
    tests = sorted({test for mutation in mutations for test in mutation.tests})
    code, output = run_tests(tree, tests, SECONDS * len(tests))
    if code != PASSED:
        sys.exit(f"the tests fail without a bug (exit code {code}):\n{output}")
    print(f"{len(tests)} tests pass without a bug", flush=True)


def chosen(gpu: bool, words: Sequence[str]) -> list[Mutation]:
    """Return the bugs that need a GPU or none, with one of the words in name or file."""
    of_kind = [mutation for mutation in MUTATIONS if mutation.gpu == gpu]
    texts = {mutation: f"{mutation.file} {mutation.name}" for mutation in of_kind}
    return [m for m in of_kind if not words or any(word in texts[m] for word in words)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bugs that the command line chooses, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="run the bugs that need a GPU")
    parser.add_argument("--jobs", type=int, default=1, help="bugs at work at once")
    parser.add_argument("--only", nargs="+", default=(), help="words in a bug's name or file")
    args = parser.parse_args(arguments)
    mutations = chosen(args.gpu, args.only)
    if not mutations:
        sys.exit("no bug has one of these words in its name or file")
    import_libraries(args.gpu)
    caught = 0
    with tempfile.TemporaryDirectory(prefix="minitune-mutations-") as folder:
        tree = Path(folder) / "unchanged"
        copy_tree(tree)
        check_without_bugs(mutations, tree)
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("fork")) as pool:
            outcomes = pool.map(partial(judge, unchanged=tree), mutations)
            for mutation, outcome in zip(mutations, outcomes, strict=True):
                caught += outcome.word.startswith("caught")
                line = f"{outcome.word:14} {outcome.seconds:5.1f} s  {mutation.file}"
                print(f"{line}: {mutation.name}\n{outcome.output}".rstrip(), flush=True)
    print(f"{caught} of {len(mutations)} bugs caught")
    return int(caught < len(mutations))


if __name__ == "__main__":
    sys.exit(main())
