"""The commands that compare with others, in miniature: what they time and hold against each other is the same work."""

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

from benchmark import kernel_timing
from benchmark.elementwise_cases import MemoryModel, direct
from referees import exactness

from minitune.config.architectures import LORA_TARGETS

TINY = MemoryModel(
    N=64,
    D=128,
    H=4,
    G=2,
    K=32,
    F=256,
    V=512,
    R=16,
    layers=1,
    samples=(("2 x 24", (24, 24)), ("3", (5, 17, 3))),
)


def seconds(calls, capture):
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


def rows():
    for group in kernel_timing.GROUPS:
        for row in group(TINY, "cpu"):
            row.makers.pop("compile", None)
            yield row


def test_each_row_of_the_kernel_benchmark_computes_what_plain_pytorch_does():
    torch.manual_seed(0)
    for row in rows():
        record = kernel_timing.run_row(row, {}, 1000, seconds)
        assert record["right"], record
        assert record["error"].get("eager", 0) < 1e-2, record
        assert record["ms"].keys() == row.makers.keys()


def test_a_kernel_that_is_wrong_is_marked_in_the_benchmark():
    for row in rows():
        if row.kernel in ("rms_norm", "adamw_", "lora_linear_"):
            ours = row.makers["ours"]

            def wrong(*inputs, ours=ours):
                result = ours(*inputs)()
                return [x * 1.01 for x in kernel_timing.tensors_of(result)]

            broken = replace(row, makers={**row.makers, "ours": direct(wrong)})
            assert not kernel_timing.run_row(broken, {}, 1000, seconds)["right"], row.kernel


def test_a_peer_that_fails_is_left_out_with_a_note_and_one_without_an_equivalent_silently(capsys):
    row = next(rows())

    def fails(*inputs):
        raise RuntimeError("not on this GPU")

    record = kernel_timing.run_row(
        row, {"Liger": fails, "cuDNN": lambda *inputs: None}, 1000, seconds
    )
    assert record["ms"].keys() == {"ours", "eager"}
    assert capsys.readouterr().err == f"{row.kernel} {row.shape}: Liger failed: not on this GPU\n"


def test_gradients_of_minitune_and_of_the_plain_model_are_those_of_transformers_and_peft(
    tmp_path, capsys
):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    model = make_tiny_model(tmp_path / "model", tie=False)
    systems = ["reference", "plain-float64", "minitune"]
    command = [
        "gradients",
        "--model",
        str(model),
        "--out",
        str(tmp_path / "out"),
        "--tokens",
        "48",
        "--systems",
    ]
    assert exactness.main([*command, *systems]) == 0
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
    model = make_tiny_model(tmp_path / "model")
    ids = torch.randint(3, 400, (38, 256), generator=torch.Generator().manual_seed(0)).to(
        torch.uint16
    )
    save_file(
        {"held_out": ids[:32].clone(), "train": ids[32:].clone()}, tmp_path / "data.safetensors"
    )
    command = ["curve", "--model", str(model), "--data", str(tmp_path / "data.safetensors")]
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in files:
        assert (
            exactness.main(
                [
                    *command,
                    *["--system", "minitune-cpu", "--seeds", "2", "--steps", "3", "--out"],
                    str(path),
                ]
            )
            == 0
        )
    one, two = ([json.loads(line) for line in path.read_text().splitlines()] for path in files)
    for a, b in zip(one, two, strict=True):
        assert a["losses"] == b["losses"] and a["held_out"] == b["held_out"]
    assert (
        one[0]["losses"] != one[1]["losses"] and one[0]["losses"][0] == one[1]["losses"][0]
    )  # B begins at zero
    files[1].write_text("\n".join(json.dumps({**r, "system": "other"}) for r in two))
    capsys.readouterr()
    assert exactness.main(["curves", *map(str, files)]) == 0
    out = capsys.readouterr().out
    assert (
        "NF4 weights: the same bits" in out
        and "| largest difference between systems, seed 0 | 0.0000 |" in out
    )


def test_repeated_runs_are_compared_bit_for_bit(tmp_path, capsys):
    model = make_tiny_model(tmp_path / "model")
    command = ["repeat", "--model", str(model), "--out", str(tmp_path / "out"), "--steps", "2"]
    assert exactness.main(command) == 0
    assert [row[2:4] for row in result(capsys)["rows"]] == [["same bits", "same bits"]] * 3


def result(capsys):
    line = capsys.readouterr().out.strip().splitlines()[-1]
    return json.loads(line.removeprefix("RESULT "))
