"""Tests of the comparisons with other systems: they time and compare the same work, in small."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import make_tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import bench
from benchmark import kernel_timing
from benchmark.kernel_cases import KernelSizes, direct
from benchmark.model_shapes import llama_config
from referees import exactness

from minitune.config.architectures import LORA_TARGETS
from minitune.config.model_config import ModelConfig

TINY = KernelSizes.of(
    ModelConfig.from_dict(
        llama_config(
            hidden=128,
            ffn=256,
            layers=1,
            heads=4,
            kv_heads=2,
            vocab=512,
            theta=10000.0,
            positions=64,
            tie=True,
        )
    ),
    rows=64,
    samples=(("2 x 24", (24, 24)), ("3", (5, 17, 3))),
)


def seconds(calls, capture):
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


def kernel_cases():
    for group in bench.KERNEL_GROUPS:
        for case in group(TINY, "cpu"):
            case.makers.pop("compile", None)
            yield case


# ---- the kernels' benchmark


def test_the_kernels_are_timed_at_the_sizes_of_an_8b_llama():
    sizes = KernelSizes.of(ModelConfig.from_dict(bench.SHAPES["8b"]))
    assert (sizes.N, sizes.D, sizes.H, sizes.G, sizes.K) == (4096, 4096, 32, 8, 128)
    assert (sizes.F, sizes.V, sizes.R, sizes.layers) == (14336, 128256, 16, 32)
    assert sizes.linears == {
        "q,k,v": ([4096, 1024, 1024], 4096),
        "o": ([4096], 4096),
        "gate,up": ([14336, 14336], 4096),
        "down": ([4096], 14336),
    }


def test_each_case_of_the_kernel_benchmark_computes_the_same_as_plain_pytorch():
    torch.manual_seed(0)
    for case in kernel_cases():
        record = kernel_timing.run_case(case, {}, 1000, seconds)
        assert record["right"], record
        assert record["error"].get("eager", 0) < 1e-2, record
        assert record["ms"].keys() == case.makers.keys()


def test_a_kernel_that_is_wrong_is_marked_in_the_benchmark():
    for case in kernel_cases():
        if case.kernel in ("rms_norm", "adamw_", "lora_linear_"):
            ours = case.makers["ours"]

            def wrong(*inputs, ours=ours):
                result = ours(*inputs)()
                return [x * 1.01 for x in kernel_timing.tensors_of(result)]

            broken = replace(case, makers={**case.makers, "ours": direct(wrong)})
            assert not kernel_timing.run_case(broken, {}, 1000, seconds)["right"], case.kernel


def test_a_peer_that_fails_is_left_out_with_a_note_and_one_without_an_equivalent_silently(capsys):
    case = next(kernel_cases())

    def fails(*inputs):
        raise RuntimeError("not on this GPU")

    peers = {"Liger": fails, "cuDNN": lambda *inputs: None}
    record = kernel_timing.run_case(case, peers, 1000, seconds)
    assert record["ms"].keys() == {"ours", "eager"}
    note = f"{case.kernel} {case.shape}: Liger failed: not on this GPU\n"
    assert capsys.readouterr().err == note


def test_the_kernel_table_marks_wrong_kernels_and_missing_columns():
    record = {
        "kernel": "rms_norm",
        "shape": "4096 x 4096",
        "ms": {"ours": 0.019, "eager": 0.09},
        "error": {"ours": 2e-2, "eager": 1e-3},
        "right": False,
        "unit": "copy",
        "rate": 3.53e12,
        "of_peak": 0.84,
        "faster": 4.7,
    }
    line = kernel_timing.kernel_table([record]).splitlines()[-1].split()
    assert line[4:] == [
        *("0.0190", "3.53", "TB/s", "0.84", "copy", "0.0900", "-", "-", "-", "-", "-"),
        *("4.70", "2.0e-02", "WRONG", "1.0e-03"),
    ]


# ---- exactness


@pytest.mark.slow
def test_gradients_of_minitune_and_of_the_plain_model_are_those_of_transformers_and_peft(
    tmp_path, capsys
):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    model, out = make_tiny_model(tmp_path / "model", tie=False), tmp_path / "out"
    systems = ["reference", "plain-float64", "minitune"]
    command = ["gradients", "--model", str(model), "--out", str(out), "--tokens", "48"]
    assert exactness.main([*command, "--systems", *systems]) == 0
    found = result(capsys)
    assert list(found) == systems
    for system in systems:
        assert found[system]["all"] < 1e-5 and found[system]["worst"] < 2e-5, system
        assert found[system]["nf4"] == found["reference"]["nf4"]


def test_gradient_errors_are_relative_to_the_norm():
    exact = {
        f"layers.0.{module}.lora_A.weight": torch.tensor([0.0, 4.0]) for module in LORA_TARGETS
    }
    found = {**exact, "layers.0.q_proj.lora_A.weight": torch.tensor([0.4, 4.0])}
    errors = exactness.gradient_errors(found, exact)
    assert errors["all"] == pytest.approx(0.1 / 7**0.5) and errors["worst"] == pytest.approx(0.1)
    assert errors["median"] == 0 and errors["by_module"]["k_proj"] == 0
    assert errors["by_module"]["q_proj"] == pytest.approx(0.1)


def test_curves_of_one_system_repeat_and_seeds_differ(tmp_path, capsys):
    model, data = make_tiny_model(tmp_path / "model"), tmp_path / "data.safetensors"
    ids = torch.randint(3, 400, (38, 256), generator=torch.Generator().manual_seed(0))
    ids = ids.to(torch.uint16)
    save_file({"held_out": ids[:32].clone(), "train": ids[32:].clone()}, data)
    command = ["curve", "--model", str(model), "--data", str(data), "--system", "minitune-cpu"]
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in files:
        run = ["--seeds", "2", "--steps", "3", "--out", str(path)]
        assert exactness.main([*command, *run]) == 0
    one, two = ([json.loads(line) for line in path.read_text().splitlines()] for path in files)
    for a, b in zip(one, two, strict=True):
        assert a["losses"] == b["losses"] and a["held_out"] == b["held_out"]
    assert one[0]["losses"] != one[1]["losses"]
    assert one[0]["losses"][0] == one[1]["losses"][0]  # B begins at zero
    files[1].write_text("\n".join(json.dumps({**r, "system": "other"}) for r in two))
    capsys.readouterr()
    assert exactness.main(["curves", *map(str, files)]) == 0
    out = capsys.readouterr().out
    assert "NF4 weights: the same bits" in out
    assert "| largest difference between systems, seed 0 | 0.0000 |" in out


@pytest.mark.slow
def test_repeated_runs_are_compared_bit_for_bit(tmp_path, capsys):
    model = make_tiny_model(tmp_path / "model")
    command = ["repeat", "--model", str(model), "--out", str(tmp_path / "out"), "--steps", "2"]
    assert exactness.main(command) == 0
    assert [row[2:4] for row in result(capsys)["rows"]] == [["same bits", "same bits"]] * 3


def result(capsys):
    line = capsys.readouterr().out.strip().splitlines()[-1]
    return json.loads(line.removeprefix("RESULT "))
