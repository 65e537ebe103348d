"""Tests of the benchmark of generation, and of its referee against float64."""

import json
import sys
from pathlib import Path

import pytest
from tiny import make_tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import bench
from benchmark import decode_timing
from benchmark.decode_records import random_prompts
from referees import decode_exactness


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("bench") / "model", vocab=512)


def test_generation_gives_a_record_for_each_number_of_sequences(folder, capsys):
    sizes = ("--prompt-tokens", "8", "--new-tokens", "5", "--calls", "1", "--r", "4")
    assert bench.run(["--model", str(folder), "--decode", "1", "3", *sizes]) == 0
    output = capsys.readouterr().out
    record = json.loads(output.splitlines()[0].removeprefix("RESULT "))
    assert (record["prompt"], record["new"], list(record["decode"])) == (8, 5, ["1", "3"])
    for sequences, figures in record["decode"].items():
        tokens = int(sequences) * 5
        assert figures["tok_s"] == pytest.approx(tokens / figures["call_s"], rel=0.02)
        assert figures["captures"] == 0
    table = [line.split() for line in output.splitlines()[2:]]
    assert [row[:2] for row in table] == [["system", "sequences"]] + [
        ["minitune", sequences] for sequences in ("1", "3")
    ]


def test_the_profile_of_a_step_is_the_difference_of_two_calls():
    steps = decode_timing.PROFILED_STEPS
    own = {"_dequantize": "dequantisation", "_few_row": "base matmuls", "_attend": "attention"}
    one = [("_dequantize", 50.0), ("gemm", 9.0), ("_attend", 7.0), ("_dequantize", 50.0)]
    step = [("_few_row", 20.0), ("_few_row", 30.0), ("_attend", 10.0), ("gemm", 40.0)]
    found = decode_timing.step_profile(one, one + steps * step, 0.15, own)
    assert found["profile"] == {
        "base matmuls": 0.05,
        "cuBLAS": 0.04,
        "attention": 0.01,
        "dequantisation": 0,
        "idle": 0.05,
    }
    assert found["early_dequantizations"] == 1 and found["step_dequantizations"] == 0
    assert found["kernels"][0] == ["_few_row", 2, 0.05]


def test_a_longer_list_of_prompts_begins_with_the_shorter_one():
    prompts = random_prompts(64, 128, 300)
    assert prompts[:1] == random_prompts(1, 128, 300)
    assert len(prompts) == 64 and {len(prompt) for prompt in prompts} == {128}


def test_flags_of_steps_and_of_generation_do_not_mix(folder):
    for wrong, message in (
        (["--decode", "1", "--batch", "4"], "--batch does not go with --decode"),
        (["--new-tokens", "9"], "--new-tokens goes with --decode"),
        (["--decode", "0"], "--decode 0; expected numbers of sequences"),
    ):
        with pytest.raises(ValueError, match=message):
            bench.parse(["--model", str(folder), *wrong])


def test_log_probabilities_of_generation_are_as_near_to_float64_as_those_of_training(
    folder, capsys
):
    sizes = ("--sequences", "8", "--answers", "3", "--new-tokens", "6")
    decode_exactness.run(["--model", str(folder), *sizes])
    found = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert len(found["invariance"]) == 6
    assert all(result.startswith("same") for _, _, result in found["invariance"])
    errors = {(name, other): float(largest) for name, other, _, largest in found["errors"]}
    assert len(errors) == 8 and 0 < max(errors.values()) < 2e-5
