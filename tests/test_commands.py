"""`minitune COMMAND ...`: the choice of the command, and the command plan."""

import json
import re
import subprocess
import sys

import pytest
import torch
from command_inputs import train, write_inputs

from minitune.commands import generate
from minitune.commands.__main__ import COMMANDS, main


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return a folder with a tiny model and datasets."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def config_of_8b(tmp_path):
    """Return a folder that holds nothing but the config.json of an 8B model."""
    config = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
    }
    (tmp_path / "8b").mkdir()
    (tmp_path / "8b" / "config.json").write_text(json.dumps(config))
    return tmp_path / "8b"


def test_the_usage_lists_every_command_and_a_misspelt_one_is_suggested(capsys):
    assert main([]) == 0
    usage = capsys.readouterr().out
    assert all(f"\n  {name} " in usage for name in COMMANDS)
    assert main(["trian"]) == 2
    assert capsys.readouterr().err.startswith(
        "minitune: error: unknown command 'trian'; did you mean train"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_names_its_error(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0 and f"usage: minitune {name}" in capsys.readouterr().out
    assert main([name, "--no-such-flag", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"minitune {name}: error: ") and len(error.splitlines()) == 1


def test_the_installed_train_command_has_no_demonstration(capsys):
    assert main(["train", "--demo"]) == 2
    assert "unknown argument --demo" in capsys.readouterr().err


def test_a_plan_needs_neither_weights_nor_a_gpu(config_of_8b, capsys):
    model = ("--model", str(config_of_8b))
    budget = ("--memory-budget", "24GiB", "--max-seq-length", "4096")
    assert train(["--plan", *model, *budget]) == 0
    plan = capsys.readouterr().out
    assert "8,192 tokens a forward/backward, in samples of up to 4,096, on 24.00 GiB" in plan
    for label in (
        "weights",
        "adapter and its gradient",
        "optimizer",
        "saved activations",
        "workspace",
        "peak",
        "time",
    ):
        assert f"\n{label} " in plan
    assert main(["plan", *model, *budget]) == 0
    assert capsys.readouterr().out == plan
    assert train(["--plan", *model, "--memory-budget", "6GiB"]) == 0
    plan = capsys.readouterr().out
    assert "1,024 tokens" not in plan and "more than the budget of 6.00 GiB" in plan


def test_a_plan_is_of_the_dtype_that_is_given_or_that_the_gpu_has(capsys, monkeypatch):
    model = ["--model", "llama-3-8b", "--memory-budget", "200GiB", "--max-seq-length", "2048"]

    def planned_bytes(*dtype):
        assert main(["plan", *model, *dtype]) == 0
        return float(re.search(r"^peak +([0-9.]+) GiB", capsys.readouterr().out, re.M)[1])

    narrow, half, wide = (
        planned_bytes("--dtype", name) for name in ("bfloat16", "float16", "float32")
    )
    assert narrow < half < wide  # the head is converted for the loss; everything is twice as wide
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for capability, expected in (((6, 1), half), ((7, 5), half), ((8, 0), narrow)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda found=capability: found)
        assert planned_bytes() == expected


def test_a_plan_names_a_missing_or_wrong_setting(inputs, capsys):
    model = str(inputs / "model")
    for arguments, message in (
        (["--plan"], "--model is missing: train.py --plan"),
        (["--plan", "--model", model, "--memory-budget", "24"], "'24' is not a size"),
        (["--plan", "--model", "nowhere", "--memory-budget", "24GiB"], "nowhere"),
    ):
        assert train(arguments) == 2
        assert message in capsys.readouterr().err
    assert main(["plan"]) == 2
    assert "--model is missing: minitune plan" in capsys.readouterr().err


def test_a_plan_without_a_budget_and_a_gpu_shows_the_usual_cards(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["plan", "--model", "llama-3-8b"]) == 0
    out, error = capsys.readouterr()
    assert error == "" and out.startswith("llama-3-8b (built-in shape): 8.03 B parameters\n")
    assert max(map(len, out.splitlines())) <= 80
    peaks = dict(re.findall(r"^ *(\d+) GB +([\d.]+) GiB", out, re.MULTILINE))
    assert list(peaks) == ["8", "12", "16", "24", "32", "40", "48", "80"]
    assert all(float(peak) <= 0.95 * int(card) for card, peak in peaks.items())
    assert main(["plan", "--model", "llama-3-70b"]) == 0
    assert " 24 GB    does not fit: at least " in capsys.readouterr().out


def test_a_plan_of_a_built_in_shape_is_that_of_the_same_config(config_of_8b, capsys, monkeypatch):
    budget = ["--memory-budget", "24GiB"]
    plans = []
    for model in (str(config_of_8b), "llama-3-8b", "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit"):
        assert main(["plan", "--model", model, *budget]) == 0
        plans.append(capsys.readouterr().out.partition("\n")[2])
    assert plans[0] == plans[1] == plans[2]
    # A folder of the same name wins.
    monkeypatch.chdir(config_of_8b.parent)
    config_of_8b.rename("qwen3-4b")
    assert train(["--plan", "--model", "qwen3-4b", *budget]) == 0
    out = capsys.readouterr().out
    assert out.startswith("qwen3-4b: 8.03 B") and out.partition("\n")[2] == plans[0]


def test_an_unknown_shape_names_the_nearest_and_the_list_names_all(capsys):
    assert main(["plan", "--model", "qwen3-9b"]) == 2
    assert "did you mean qwen3-8b" in capsys.readouterr().err
    assert main(["plan", "--model", "zebra"]) == 2
    assert "shapes are llama-2-7b, " in capsys.readouterr().err
    assert main(["plan", "--list-shapes"]) == 0
    assert "qwen3-32b            32.76 B\n" in capsys.readouterr().out


def test_the_help_of_a_plan_lists_its_own_flags_and_no_others(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = capsys.readouterr().out
    assert "--memory-budget" in text and "--learning-rate" not in text
    assert main(["plan", "--learning-rate", "1"]) == 2
    assert "--learning-rate is a flag of `minitune train`" in capsys.readouterr().err


def test_a_warning_of_a_command_is_one_line_without_source_code():
    program = (
        "import warnings; from minitune.config.cli import run_command; "
        "run_command('minitune', warnings.warn, 'short of\\nmemory')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == "warning: short of memory\n"


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_generate_computes_in_the_dtype_that_the_flag_names(inputs, monkeypatch, capsys, dtype):
    def answer(answerer, *arguments):
        dtypes.append(answerer.model.dtype)
        answer_whole(answerer, *arguments)

    dtypes, answer_whole = [], generate.answer
    monkeypatch.setattr(generate, "answer", answer)
    prompt = ["--prompt", "number 1", "--max-new-tokens", "2"]
    flags = [] if dtype is None else ["--dtype", dtype]
    model = ["--model", str(inputs / "model"), "--device", "cpu"]
    assert main(["generate", *model, *prompt, *flags]) == 0
    assert dtypes == [getattr(torch, dtype or "float32")] and capsys.readouterr().out
