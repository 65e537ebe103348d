"""GPUs of compute capability 7.5, such as a T4: no bfloat16, 64 KiB of shared memory."""

import functools
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_checks import judge, plain_attention
from test_kernels_attention import run_attention
from tiny import make_tiny_model

from minitune.kernels import attention, attention_backward, attention_dkdv, backend
from minitune.kernels.attention_common import choose_block_sizes

TESTS = Path(__file__).parent
SHARED_MEMORY = 64 << 10  # bytes
KERNELS = ((attention, 1), (attention_backward, 2), (attention_dkdv, 2))  # and their outer tensors
WIDE_HEADS = {"hidden": 256, "heads": 2, "kv_heads": 1, "head_dim": 128, "ffn": 512}
LOWERED = {"TRITON_OVERRIDE_ARCH": "sm75"}  # environment in which Triton lowers for sm_75
MINUTES = 60  # seconds


@pytest.fixture
def turing(monkeypatch):
    """Let the kernels see the shared memory and the products of such a GPU."""
    monkeypatch.setattr(backend, "shared_memory_limit", lambda device: SHARED_MEMORY)
    monkeypatch.setattr(backend, "has_tensor_core_kernels", lambda device: False)


@pytest.mark.usefixtures("turing")
def test_blocks_of_attention_fit_into_64_kib_at_every_head_width():
    for dtype, K in itertools.product((torch.float16, torch.float32), (8, 64, 96, 128, 256)):
        q = torch.empty(1, 1, K, dtype=dtype)
        width = max(backend.power_of_two(K), 16)
        for module, outer_tensors in KERNELS:
            for max_seqlen in (1, 10**6):
                sizes = choose_block_sizes(module.BLOCK_SIZES, outer_tensors, q, max_seqlen)
                # What Triton 3.6 and 3.9 allocate: kept rows in float32, and two walked tensors.
                kept = sizes.outer * outer_tensors * width * 4
                walked = 2 * sizes.inner * width * q.element_size()
                assert kept + walked + sizes.outer * sizes.inner * 4 <= SHARED_MEMORY
                # Each product of larger blocks would be thousands of instructions.
                assert sizes.outer * sizes.inner <= 32 * 32


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True)])
def test_triton_multiplies_on_tensor_cores_from_capability_8_0_on(
    capability, expected, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    device = torch.device("cuda", 0)
    assert backend.has_tensor_core_kernels.__wrapped__(device) is expected
    assert backend.has_tensor_core_kernels(torch.device("cpu"))


@pytest.mark.usefixtures("turing")
def test_four_warps_walk_over_few_numbers_a_row_in_16_bit_only():
    def warps(K, dtype):
        q = torch.empty(1, 1, K, dtype=dtype)
        sizes = (choose_block_sizes(module.BLOCK_SIZES, n, q, 1) for module, n in KERNELS)
        return [size.options["num_warps"] for size in sizes]

    assert warps(64, torch.float16) == [4, 4, 4]
    assert warps(128, torch.float16) == [4, 8, 8]
    assert warps(64, torch.float32) == warps(256, torch.float16) == [8, 8, 8]


def test_blocks_of_newer_gpus_do_not_depend_on_older_ones(monkeypatch):
    monkeypatch.setattr(backend, "has_tensor_core_kernels", lambda device: True)
    monkeypatch.setattr(backend, "shared_memory_limit", lambda device: 227 << 10)
    q = torch.empty(1, 1, 128, dtype=torch.bfloat16)
    found = [tuple(choose_block_sizes(m.BLOCK_SIZES, n, q, 10**6))[:2] for m, n in KERNELS]
    assert found == [(128, 128), (128, 32), (64, 64)]
    found = [tuple(choose_block_sizes(m.BLOCK_SIZES, n, q.float(), 10**6))[:2] for m, n in KERNELS]
    assert found == [(32, 32), (32, 32), (32, 32)]


@pytest.mark.usefixtures("turing", "triton_everywhere", "poisoned")
@pytest.mark.parametrize(
    ("K", "dtype"), [(64, torch.float16), (256, torch.float16), (256, torch.float32)], ids=str
)
def test_attention_is_right_with_the_blocks_of_older_gpus(K, dtype, device):
    inputs, dout, seen, results = run_attention([3, 1, 40], 2, 1, K, dtype, device)
    formula = functools.partial(plain_attention, seen=seen, scale=K**-0.5)
    judge(results, formula, inputs, [dout, torch.zeros_like(results[1])])


# ---- GPU only


def run_program(*arguments, **variables):
    """Run Python on these arguments, with further environment variables; return its output."""
    folders = [str(TESTS.parent), str(TESTS.parent / "scripts"), str(TESTS)]
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)} | variables,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=10 * MINUTES,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@pytest.mark.gpu
def test_kernels_lowered_for_sm_75_hold_the_bounds():
    chosen = "(err_at_most_twice or any_length or real_sizes or cap) and not bfloat16 and not cudnn"
    files = [TESTS / f"test_kernels_attention{part}.py" for part in ("", "_softcap", "_windows")]
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "-o", "addopts=", "-p", "pretend_turing"]
    run_program("-m", "pytest", *options, "-k", chosen, *files, **LOWERED)


@pytest.mark.gpu
def test_a_gpu_without_bfloat16_trains_resumes_generates_and_exports(tmp_path):
    folder = make_tiny_model(tmp_path / "model", **WIDE_HEADS)
    program = TESTS / "pretend_turing.py"
    older = json.loads(run_program(program, folder, tmp_path / "older", **LOWERED))
    newer = json.loads(run_program(program, folder, tmp_path / "newer", "--as-it-is"))
    assert older["dtype"] == newer["dtype"] == "torch.float16"
    assert older["same bits"] and newer["same bits"]
    assert older["files"] == newer["files"]
    assert older["merged"] == newer["merged"] != []
    assert older["new tokens"] > 0
    for loss, expected in zip(older["losses"], newer["losses"], strict=True):
        assert math.isclose(loss, expected, rel_tol=2e-2)
