"""The start of a run: imports, weights read ahead, kernels compiled before their first launch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark.model_shapes import SHAPES

from minitune import device
from minitune.checkpoints import safetensors_folder

ROOT = Path(__file__).parents[1]
CASES = {
    "8b in 16 bit": (SHAPES["8b"], False),
    **{name: (config, True) for name, config in SHAPES.items()},
}
HEAVY = {"sympy", "torch._dynamo", "torch.distributed.tensor", "pyarrow", "transformers"}

# Programs that compile one kernel ahead and launch it.
SETUP = """
import rehearsal_program as program, torch
from minitune.kernels import backend, compile_ahead
from minitune.kernels.global_norm import global_norm
program.pretend_gpu()
def rehearse():
    for length in (64, 65, 1):  # of which Triton makes different kernels
        global_norm(torch.empty(length, device="meta"))
"""
FAILING_REHEARSAL = """
compile_ahead.compile_ahead(lambda: [][0], program.GPU)
compile_ahead.finish_compiling()
"""
FAILING_COMPILER = """
def fail(*args, **kwargs):
    raise ValueError("no such instruction")
program.triton.compiler.compile = fail
compile_ahead.compile_ahead(rehearse, program.GPU)
compile_ahead.finish_compiling()
backend.use_triton = lambda x: True
rehearse()
"""
SLOW_COMPILER = """
import sys, threading
begun = threading.Event()
def compile_slowly(source, *args, **kwargs):
    sys.stdout.write(source.name + "\\n")  # in one piece, because several threads write
    sys.stdout.flush()
    begun.set()
    threading.main_thread().join(0.5)
    return program.compile_nothing(source)
program.triton.compiler.compile = compile_slowly
"""
EARLY_EXIT = """
compile_ahead.MAX_THREADS = 1
compile_ahead.compile_ahead(rehearse, program.GPU)
assert begun.wait(60)
"""
EARLY_LAUNCH = """
compile_ahead.compile_ahead(rehearse, program.GPU)
assert begun.wait(60)
backend.use_triton = lambda x: True
rehearse()
print("launched")
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    """Run Python in a process that compiles kernels for a GPU."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(str(ROOT / name) for name in (".", "scripts", "tests"))
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def rehearsed() -> dict:
    """Return what the rehearsals of all cases compiled, in one process."""
    done = run(str(ROOT / "tests" / "rehearsal_program.py"), json.dumps(CASES))
    assert done.returncode == 0 and not done.stderr, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_a_step_launches_only_kernels_that_a_rehearsal_compiled(rehearsed, case):
    assert rehearsed[case]["late"] == []


def test_a_rehearsal_compiles_the_kernels_of_layer_loss_and_update(rehearsed):
    first = rehearsed["8b in 16 bit"]["ahead"]
    assert {"_rope", "_attention_dkdv", "_cross_entropy", "_adamw"} <= set(first)
    assert set(rehearsed["8b"]["ahead"]) == {"_dequantize"}  # NF4 needs no others
    assert "_qk_norm_rope" in rehearsed["qwen3-8b"]["ahead"]


def test_a_rehearsal_does_not_import_the_compiler_of_pytorch(rehearsed):
    assert rehearsed["imported"] == []


def test_a_rehearsal_that_fails_is_a_warning():
    done = run("-c", SETUP + FAILING_REHEARSAL)
    assert done.returncode == 0, done.stderr
    assert "not compiled ahead of its launch: IndexError" in done.stderr


def test_a_kernel_that_fails_to_compile_raises_at_its_launch():
    done = run("-c", SETUP + FAILING_COMPILER)
    assert done.returncode == 1
    assert "not compiled ahead of its launch: ValueError: no such instruction" in done.stderr
    assert done.stderr.rstrip().endswith("ValueError: no such instruction")


def test_a_compiler_that_is_missing_is_an_error_that_says_what_is_needed():
    missing = FAILING_COMPILER.replace("ValueError(", "FileNotFoundError(")
    done = run("-c", SETUP + missing)
    assert done.returncode == 1
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("ValueError: Triton could not compile the kernel _square_sums (no such")
    assert "C compiler with a linker ($CC, gcc or clang)" in last and "$TRITON_CACHE_DIR" in last


def test_the_interpreter_exits_without_compiling_the_rest():
    done = run("-c", SETUP + SLOW_COMPILER + EARLY_EXIT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["_square_sums"]


def test_a_launch_waits_for_a_kernel_that_is_being_compiled():
    done = run("-c", SETUP + SLOW_COMPILER + EARLY_LAUNCH)
    assert done.returncode == 0, done.stderr
    compiled = done.stdout.split()
    assert compiled.pop() == "launched"
    assert compiled.count("_square_sums") == 3


def test_importing_the_package_imports_nothing_heavy_beside_torch():
    done = run("-c", "import sys, minitune; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    alone = run("-c", "import sys, torch; print(*sys.modules)")
    assert HEAVY & (set(done.stdout.split()) - set(alone.stdout.split())) == set()


@pytest.mark.parametrize(("first", "frozen"), [("minitune", True), ("torch", False)])
def test_only_objects_that_the_package_imports_are_left_out_of_collections(first, frozen):
    done = run("-c", f"import {first}, minitune, gc; print(gc.get_freeze_count() > 100_000)")
    assert done.stdout.strip() == str(frozen), done.stderr


@pytest.mark.parametrize(("free", "reads"), [(1 << 40, 1), (1000, 0)])
def test_weights_are_read_ahead_unless_they_fill_half_of_the_memory(
    smallest, monkeypatch, free, reads
):
    advice = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: advice.append(arguments))
    monkeypatch.setattr(device, "free_memory", lambda device: free)
    safetensors_folder.SafetensorsFolder(smallest).read_ahead()
    assert len(advice) == reads
