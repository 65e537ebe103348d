"""Numbers of a config.json have types and bounds, within which every derived value is finite.

A hostile value is refused by the name of its field, and costs neither time nor memory.
"""

import math
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune.config.architectures import ARCHITECTURES
from minitune.config.config_values import NUMBERS
from minitune.config.model_config import ModelConfig
from minitune.config.numbers import LARGEST_FACTOR, SMALLEST_FACTOR, number, shown, whole
from minitune.model.rope import RopeTables, rope_divisors

PLAIN = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "sliding_window": 8,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "sliding_window_pattern": 2,
    "no_rope_layer_interval": 2,
}
LISTS = ("short_factor", "long_factor")
ROPE = {
    "linear": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
    "longrope": {
        "original_max_position_embeddings": 32,
        "attention_factor": 1.2,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
    },
}
HOSTILE = st.one_of(
    st.sampled_from([True, False, "8", [], {}, math.nan, math.inf, -math.inf, 1e308, 5e-324, 0]),
    st.sampled_from([10**400, -(10**400), 10**18, 2**31, 2**63, 0.0, -1, 1e-30, 64.9]),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
)


def config_of(model_type: str, kind: str) -> dict:
    """Return a config.json with a scaling of RoPE."""
    family = ARCHITECTURES[model_type]
    config = PLAIN | {"model_type": model_type, "rope_scaling": {"rope_type": kind, **ROPE[kind]}}
    activation = "silu" if family.activation == "silu" else "gelu_pytorch_tanh"
    return deepcopy(config) | {family.activation_key: activation}


def check_is_finite(config: ModelConfig) -> None:
    """Fail if a value that the model computes with is not finite."""
    factors = (
        *(config.attention_scale, config.score_softcap, config.logit_softcap),
        *(config.embedding_multiplier, config.residual_multiplier, config.logit_multiplier),
    )
    assert all(map(math.isfinite, factors)), factors
    for rope in config.ropes:
        tables = RopeTables.build(rope, 64, torch.device("cpu"))
        assert rope_divisors(rope, 64).isfinite().all()
        assert tables.cos.isfinite().all() and tables.sin.isfinite().all()
        assert tables.query_scale is None or tables.query_scale.isfinite().all()


def refusal(raw: dict) -> str:
    """Return the error of a config.json, or "" if it is taken and all its values are finite."""
    try:
        config = ModelConfig.from_dict(raw)
    except ValueError as error:
        return str(error)
    check_is_finite(config)
    return ""


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_hostile_number_is_refused_or_every_derived_value_is_finite(data):
    model_type, kind = (data.draw(st.sampled_from(sorted(keys))) for keys in (ARCHITECTURES, ROPE))
    raw = config_of(model_type, kind)
    name = data.draw(st.sampled_from(sorted(NUMBERS)))
    value = data.draw(HOSTILE)
    place = raw["rope_scaling"] if name in raw["rope_scaling"] else raw
    place[name] = [1.0] * 7 + [value] if name in LISTS else value
    refusal(raw)


@pytest.mark.parametrize("value", ["16", True, math.nan, math.inf, -8, 10**400, 2**64], ids=shown)
def test_a_value_that_no_field_takes_is_refused_by_the_name_of_the_field(value):
    fields = {name: config_of("llama", "llama3") for name in PLAIN if type(PLAIN[name]) is not bool}
    of_qwen = ("sliding_window", "max_window_layers")
    fields |= {name: config_of("qwen2", "linear") for name in of_qwen}
    fields |= {"sliding_window_pattern": config_of("gemma2", "linear")}
    fields |= {"no_rope_layer_interval": config_of("smollm3", "linear")}
    for name, raw in fields.items():
        assert f"{name} is " in refusal(raw | {name: value}), name
    for kind, names in ROPE.items():
        for name in names.keys() - {"llama_4_scaling_beta"}:
            raw = config_of("llama", kind)
            raw["rope_scaling"][name] = [1.0] * 7 + [value] if name in LISTS else value
            assert f"{name} is " in refusal(raw), name


def test_a_value_of_lists_of_layers_is_refused_unless_it_is_0_or_1():
    for value in (True, 1.0, "1", 2, -1, None, 10**400):
        raw = config_of("smollm3", "linear") | {"no_rope_layers": [1, value]}
        assert "no_rope_layers is " in refusal(raw)
    assert "layer_types has " in refusal(config_of("olmo3", "linear") | {"layer_types": [{}, 1]})


def test_a_model_without_a_width_of_heads_is_refused():
    raw = config_of("llama", "linear") | {"head_dim": None, "num_attention_heads": 128}
    assert "head_dim 0 is not supported" in refusal(raw)


def test_frequencies_of_llama3_that_divide_by_zero_are_refused():
    raw = config_of("llama", "llama3")
    raw["rope_scaling"]["high_freq_factor"] = 1.0
    assert "high_freq_factor is 1; expected more than the low_freq_factor 1" in refusal(raw)


@settings(max_examples=100, deadline=None)
@given(HOSTILE)
def test_a_number_within_its_bounds_is_finite_and_of_its_type(value):
    if whole(1, 9).hold(value):
        assert type(value) is int and 1 <= value <= 9
    if number().hold(value):
        assert SMALLEST_FACTOR <= value <= LARGEST_FACTOR and math.isfinite(1 / value)
    assert len(shown(value)) <= 80
