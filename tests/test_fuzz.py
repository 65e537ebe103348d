"""Damaged and hostile files of every kind are read, or refused with a ValueError."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fuzz_readers.py")


@pytest.mark.slow  # a minute or two
def test_no_mutant_of_a_file_ends_in_anything_but_success_or_a_value_error():
    # In a process of its own, which forks before it computes.
    command = [sys.executable, SCRIPT, "--count", "2000"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    row = next(line for line in found.stdout.splitlines() if line.startswith("all "))
    success, refused = map(int, row.split()[2:4])
    assert success > 500 and refused > 500  # otherwise most mutants are alike
