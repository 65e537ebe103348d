"""`minitune COMMAND ...`: the choice of the command, and the command plan."""

import json
import subprocess
import sys

import pytest
from command_inputs import train, write_inputs

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


def test_a_warning_of_a_command_is_one_line_without_source_code():
    program = (
        "import warnings; from minitune.config.cli import run_command; "
        "run_command('minitune', warnings.warn, 'short of\\nmemory')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == "warning: short of memory\n"
