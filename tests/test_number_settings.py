"""Numbers of settings, commands and checkpoints: hostile ones are refused by name, in one line."""

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tiny_model
from weight_folders import load

from minitune import FastLanguageModel, LoraConfig, SFTConfig
from minitune.commands import data, generate, plan
from minitune.config.cli.settings import flag_of, known_settings
from minitune.config.numbers import LARGEST_WHOLE
from minitune.config.training_config import RunConfig, parse_bytes
from minitune.model.sampling import BOUNDS, SamplingConfig
from minitune.training.checkpoint import Progress
from minitune.training.plan_inputs import PlanInputs

SETTINGS = (SFTConfig, LoraConfig, RunConfig)
KINDS = (int, float, int | None)
FIELDS = [(cls, item.name, item.type) for cls in SETTINGS for item in dataclasses.fields(cls)]
NUMBERS = [(cls, name) for cls, name, kind in FIELDS if kind in KINDS]
FLOATS = {name for _, name, kind in FIELDS if kind is float}
SEEDS = ("seed", "random_state")
HOSTILE = [True, "8", math.nan, math.inf, -math.inf, 1e308, 10**30, 10**400, 10**5000, [], {}]
STATE = {"step": 3, "tokens": 9, "seconds": 1.0, "loss_sum": 2.0, "grad_norm": 1, "unlogged": [0.5]}
LOSSES = ("loss_sum", "grad_norm")  # they may be large
INPUTS = {"memory_budget": 1 << 30, "host_budget": 0, "micro_step_tokens": 512}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), layers=1)


def error_of(function, *args, **kwargs):
    """Return the text of the ValueError that a call raises."""
    with pytest.raises(ValueError) as error:
        function(*args, **kwargs)
    text = str(error.value)
    assert len(text) < 400 and "\n" not in text
    return text


def test_the_numbers_of_all_settings_are_covered():
    names = {name for _, name in NUMBERS}
    assert {"r", "lora_alpha", "max_steps", "learning_rate", "max_seq_length", "seed"} <= names
    assert len(names) >= 25


@pytest.mark.parametrize(("cls", "name"), NUMBERS, ids=[name for _, name in NUMBERS])
def test_a_hostile_value_of_a_setting_is_refused_by_its_name(cls, name):
    for value in HOSTILE:
        assert name in error_of(cls, **{name: value})
    if name not in SEEDS:
        for value in (2**64, -(10**30)):
            assert name in error_of(cls, **{name: value})
    else:
        assert name in error_of(cls, **{name: 2**64})
        assert getattr(cls(**{name: 2**64 - 1}), name) == 2**64 - 1


@settings(max_examples=12, deadline=None)
@given(st.one_of(st.integers(), st.floats()))
def test_a_setting_that_is_taken_is_finite_and_below_its_limit(value):
    for cls, name in NUMBERS:
        if name in SEEDS:
            continue
        try:
            taken = getattr(cls(**{name: value}), name)
        except ValueError as error:
            assert name in str(error)
            continue
        assert abs(taken) <= 1e15
        assert name in FLOATS or abs(taken) <= LARGEST_WHOLE


@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "1e999", "9" * 31, "9" * 5000, "0x8"])
def test_a_hostile_number_on_the_command_line_is_refused_by_its_flag(word, capsys, tiny):
    known = known_settings()
    flags = [name for name in plan.PLAN_SETTINGS if known[name].types[0] in (int, float)]
    assert len(flags) > 3
    for name in flags:
        assert plan.main(["--model", str(tiny), f"{flag_of(name)}={word}"]) == 2
        assert f"{flag_of(name).removeprefix('--')} is " in one_line(capsys)
    for flag in ("max-seq-length", "max-new-tokens", "temperature", "top-p", "top-k", "seed"):
        assert generate.main(["--model", str(tiny), f"--{flag}={word}"]) == 2
        assert f"--{flag} is " in one_line(capsys)
    assert data.main(["show", "--model", str(tiny), f"--n={word}"]) == 2
    assert "--n is " in one_line(capsys)


def one_line(capsys):
    """Return the single line on stderr."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and len(lines[0]) < 700, lines
    return lines[0]


def test_a_hostile_number_in_a_toml_file_is_refused_with_its_key(tmp_path, capsys, tiny):
    path = tmp_path / "run.toml"
    for key, value in {"r": 10**30, "max_steps": 10**19, "lora_alpha": "nan"}.items():
        path.write_text(f"{key} = {value}\n")
        assert plan.main(["--model", str(tiny), "--config", str(path)]) == 2
        assert f"{key} is " in one_line(capsys)


def test_a_size_of_memory_that_no_machine_has_is_refused():
    assert parse_bytes("24GiB") == 24 << 30
    for digits in (400, 5000):
        assert "more than any machine has" in error_of(parse_bytes, "9" * digits + "GiB")
    assert "memory_budget" not in error_of(parse_bytes, "nanGiB")


def test_arguments_of_attaching_and_loading_are_bounded(tiny):
    model = load(tiny)
    for value in (2**64, -(2**63) - 1, 10**30, 1.0, True, "3", None, math.nan):
        assert "random_state is " in error_of(
            FastLanguageModel.get_peft_model, model, random_state=value
        )
    assert model.lora is None
    for value in ("64", 64.0, True, 10**30, math.inf):
        text = error_of(FastLanguageModel.from_pretrained, tiny, max_seq_length=value, device="cpu")
        assert text.startswith("max_seq_length ")


def test_settings_of_sampling_are_bounded():
    for name in BOUNDS:
        for value in (*HOSTILE, -1, 1e-300):
            if value == 1e-300 and name == "min_p":
                continue
            assert f"{name} is " in error_of(SamplingConfig, **{name: value})


# ---- checkpoints


def test_progress_of_a_checkpoint_is_bounded():
    assert Progress.from_state(STATE, Path("state.json")).step == 3
    for name in STATE:
        for value in (*HOSTILE, None, "unlogged"):
            if (name == "unlogged" and value == []) or (name in LOSSES and value == 10**30):
                continue
            text = error_of(Progress.from_state, STATE | {name: value}, Path("state.json"))
            assert text.startswith(f"state.json: {name} is ")
            if name == "unlogged" and value != 10**30:
                error_of(Progress.from_state, STATE | {name: [0.5, value]}, Path("state.json"))


def test_plan_inputs_of_a_checkpoint_are_bounded():
    assert PlanInputs.from_state(INPUTS, Path("state.json")).host_budget == 0
    for name in INPUTS:
        for value in (*HOSTILE, None, -1, 1.0):
            text = error_of(PlanInputs.from_state, INPUTS | {name: value}, Path("state.json"))
            assert text.startswith(f"state.json: plan_inputs.{name} is ")
    assert "plan_inputs.rates is" in error_of(
        PlanInputs.from_state, INPUTS | {"rates": {"a": math.inf}}, Path("state.json")
    )
