"""Damaged and hostile files of every kind are read, or refused with a ValueError."""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
# The rest of the readers has known faults.
READERS = ("config", "weights", "index", "generation_config", "tokenizer_json", "tokenizer_files")
READERS += ("adapter", "token_cache", "records", "text_files", "gguf", "imatrix")


def fuzz(*arguments):
    """Run the fuzzer in a process of its own, which forks before it computes."""
    command = [sys.executable, TESTS / "fuzz_readers.py", *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    return found.stdout


def test_no_mutant_of_a_file_ends_in_anything_but_success_or_a_value_error():
    readers = [word for reader in READERS for word in ("--reader", reader)]
    table = fuzz("--count", 500, *readers)
    row = next(line for line in table.splitlines() if line.startswith("all "))
    success, refused = map(int, row.split()[2:4])
    assert success > 50 and refused > 50  # otherwise most mutants are alike
