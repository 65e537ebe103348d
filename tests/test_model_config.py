"""The lists of linears and tensors in ModelConfig equal the modules of the model."""

import itertools
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minitune.config.architectures import ARCHITECTURES, LORA_TARGETS
from minitune.config.family_defaults import DEFAULTS
from minitune.config.layer_kinds import FULL, SLIDING
from minitune.config.model_config import ModelConfig
from minitune.config.text_config import text_config
from minitune.model.causal_lm import CausalLM
from minitune.model.linear import Linear
from minitune.model.rope import RopeTables

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,  # not hidden_size / heads
}


@pytest.mark.parametrize(
    ("tied", "attention_bias", "mlp_bias"), list(itertools.product([False, True], repeat=3))
)
def test_linears_and_tensor_shapes_equal_the_modules_of_the_model(tied, attention_bias, mlp_bias):
    choices = {
        "tie_word_embeddings": tied,
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
    }
    config = ModelConfig.from_dict(CONFIG | choices)
    model = CausalLM(
        config,
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_seq_length=32,
        planner=None,
    )
    prefix = "model.layers.1."
    linears = [
        (name.removeprefix(prefix), linear.in_features, linear.out_features, linear.has_bias)
        for name, linear in model.linears()
        if name.startswith(prefix)
    ]
    assert [
        (linear.name, linear.in_features, linear.out_features, linear.bias)
        for linear in config.linears()
    ] == linears
    names = []
    for name, module in model.named_modules():
        if module is model.lm_head and tied:
            continue
        if hasattr(module, "weight"):
            names.append(f"{name}.weight")
        if isinstance(module, Linear) and module.has_bias:
            names.append(f"{name}.bias")
    assert list(config.tensor_shapes()) == names


def test_lora_targets_are_the_last_parts_of_the_linears_names():
    names = [linear.name.split(".")[-1] for linear in ModelConfig.from_dict(CONFIG).linears()]
    assert tuple(names) == LORA_TARGETS
    groups = [linear.group for linear in ModelConfig.from_dict(CONFIG).linears()]
    assert groups == ["qkv", "qkv", "qkv", "o", "gate_up", "gate_up", "down"]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_family_fixes_its_biases_or_takes_them_from_the_config(model_type):
    raw = CONFIG | {"model_type": model_type, "attention_bias": True, "mlp_bias": True}
    config, family = ModelConfig.from_dict(raw), ARCHITECTURES[model_type]
    fixed = [family.qkv_bias, family.o_bias, family.mlp_bias]
    found = [config.qkv_bias, config.o_bias, config.mlp_bias]
    assert found == [True if value is None else value for value in fixed]
    with pytest.raises(ValueError, match=f"{family.activation_key} 'gelu' is not supported"):
        ModelConfig.from_dict(raw | {family.activation_key: "gelu"})


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("llama", {"sliding_window": 64}),
        ("mistral", {}),
        ("mistral", {"sliding_window": 64}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"sliding_window": 64, "max_window_layers": 3}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 6}),
        ("smollm3", {}),
        ("smollm3", {"no_rope_layer_interval": 3}),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1, 0, 1]}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 64}),
        ("phi3", {"sliding_window": 2047}),
        ("ministral3", {"head_dim": 32}),
    ],
    ids=str,
)
def test_windows_and_layers_without_rope_are_those_of_transformers(model_type, values):
    raw = CONFIG | {"model_type": model_type, "num_hidden_layers": 6} | values
    config, theirs = ModelConfig.from_dict(raw), AutoConfig.for_model(**raw)
    window = None if model_type == "llama" else theirs.sliding_window
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 6
    assert [kind.window for kind in config.layer_kinds] == [
        window if kind == "sliding_attention" else None for kind in types
    ]
    assert [kind.rope is not None for kind in config.layer_kinds] == [
        bool(rotates) for rotates in getattr(theirs, "no_rope_layers", [1] * 6)
    ]


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_values_that_a_config_leaves_out_are_those_of_transformers(model_type):
    raw = {"model_type": model_type}
    if hasattr(AutoConfig.for_model(model_type), "use_sliding_window"):
        raw["use_sliding_window"] = True
    theirs = AutoConfig.for_model(**raw).to_dict()
    ropes = theirs["rope_parameters"]
    ropes = [ropes[kind] for kind in (FULL, SLIDING)] if FULL in ropes else [ropes]
    theirs["rope_theta"] = ropes[0]["rope_theta"]
    read_from_lists = {"sliding_window_pattern", "rope_local_base_freq"}
    for key in DEFAULTS[model_type].keys() - read_from_lists:
        expected = theirs[key]
        if key == "rope_parameters":
            expected = {k: v for k, v in expected.items() if k in DEFAULTS[model_type][key]}
        assert DEFAULTS[model_type][key] == expected, key
    text = text_config({"model_type": "wrapper", "text_config": raw})
    config = ModelConfig.from_dict(text)
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text["model_type"]] == text["architectures"][0]
    if model_type in ARCHITECTURES:
        assert replace(ModelConfig.from_dict(raw), raw=text) == config
    heads = theirs["num_attention_heads"]
    assert config.num_key_value_heads == (theirs["num_key_value_heads"] or heads)
    assert config.rms_norm_eps == theirs["rms_norm_eps"]
    assert config.max_position_embeddings == theirs["max_position_embeddings"]
    assert config.head_dim == (theirs.get("head_dim") or theirs["hidden_size"] // heads)
    assert config.tie_word_embeddings == bool(theirs.get("tie_word_embeddings"))
    assert config.score_softcap == (theirs.get("attn_logit_softcapping") or 0.0)
    assert config.logit_softcap == (theirs.get("final_logit_softcapping") or 0.0)
    assert [rope.theta for rope in config.ropes] == [rope["rope_theta"] for rope in ropes]
    assert [rope.kind or "default" for rope in config.ropes] == [r["rope_type"] for r in ropes]
    kinds = theirs.get("layer_types") or [SLIDING] * config.num_hidden_layers
    window = theirs.get("sliding_window")
    assert [kind.window for kind in config.layer_kinds] == [
        window if kind == SLIDING else None for kind in kinds
    ]


def test_a_window_that_no_sample_reaches_beyond_is_left_out():
    config = ModelConfig.from_dict(CONFIG | {"model_type": "mistral", "sliding_window": 64})
    assert {kind.window for kind in config.kinds_up_to(64)} == {None}
    assert {kind.window for kind in config.kinds_up_to(65)} == {64}


def test_a_note_says_that_dropout_is_not_applied():
    assert not ModelConfig.from_dict(CONFIG | {"attention_dropout": 0.0}).notes
    config = ModelConfig.from_dict(CONFIG | {"model_type": "granite", "attention_dropout": 0.1})
    assert config.notes == ("attention_dropout 0.1 of config.json is not applied in training",)


def test_names_of_llamas_linears_mean_the_linears_that_hold_them():
    phi = ModelConfig.from_dict(CONFIG | {"model_type": "phi3"})
    own = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    assert phi.adapted_linears(LORA_TARGETS) == phi.adapted_linears(own) == own
    assert phi.adapted_linears(["v_proj", "q_proj", "k_proj"]) == ("qkv_proj",)
    with pytest.raises(ValueError, match="'q_proj' does not exist in models of type phi3; choose"):
        phi.adapted_linears(["q_proj", "o_proj"])
    with pytest.raises(ValueError, match="'qkv_proj' does not exist in models of type llama"):
        ModelConfig.from_dict(CONFIG).adapted_linears(["qkv_proj"])


@pytest.mark.parametrize("model_type", ["gpt2", None, ["llama"]])
def test_an_unknown_family_is_refused(model_type):
    with pytest.raises(ValueError, match="is not supported; supported are llama, mistral"):
        ModelConfig.from_dict(CONFIG | {"model_type": model_type})


def test_the_nearest_supported_family_is_named():
    with pytest.raises(ValueError, match=r"'qwen3_moe' is not supported.*the nearest is qwen3$"):
        ModelConfig.from_dict(CONFIG | {"model_type": "qwen3_moe"})


@pytest.mark.parametrize("rope_type", ["dynamic", ["linear"]])
def test_an_unknown_rope_scaling_is_refused(rope_type):
    message = "is not supported; supported are default, linear, llama3, yarn"
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(CONFIG | {"rope_scaling": {"rope_type": rope_type, "factor": 2.0}})


THETA = {"rope_type": "default", "rope_theta": 5e3}


@pytest.mark.parametrize(
    "values",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 2e3},
        {"rope_scaling": None, "rope_theta": 3e5},
        {"rope_parameters": {FULL: THETA, SLIDING: {"rope_type": "default"}}},
        {"rope_parameters": {FULL: None, SLIDING: THETA}},
        {"rope_parameters": {SLIDING: THETA}},
        {"rope_parameters": {FULL: THETA}},
        {"rope_parameters": {FULL: THETA, SLIDING: THETA}, "rope_scaling": THETA},
    ],
    ids=str,
)
def test_both_rotations_of_every_layout_are_those_of_transformers(values):
    raw = CONFIG | {"model_type": "gemma3_text"} | values
    config, theirs = ModelConfig.from_dict(raw), AutoConfig.for_model(**deepcopy(raw))
    expected = [theirs.rope_parameters[kind] for kind in (FULL, SLIDING)]
    assert [rope.theta for rope in config.ropes] == [rope["rope_theta"] for rope in expected]
    assert [rope.kind or "default" for rope in config.ropes] == [r["rope_type"] for r in expected]


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text"])
def test_two_layouts_of_the_rotation_that_differ_are_refused(model_type):
    new = {FULL: THETA} if model_type == "gemma3_text" else THETA
    both = {"rope_parameters": new, "rope_scaling": YARN}
    with pytest.raises(ValueError, match="rope_parameters and rope_scaling differ in rope_type"):
        ModelConfig.from_dict(CONFIG | {"model_type": model_type} | both)


@pytest.mark.parametrize("model_type", ["mistral", "ministral3", "phi3"])
def test_layer_types_that_contradict_the_window_of_all_layers_are_refused(model_type):
    raw = CONFIG | {"model_type": model_type, "layer_types": [FULL, SLIDING]}
    with pytest.raises(ValueError, match=f"all layers of a {model_type} model have its sliding_w"):
        ModelConfig.from_dict(raw | {"sliding_window": 64})
    plain = ModelConfig.from_dict(raw | {"sliding_window": None})
    assert {kind.window for kind in plain.layer_kinds} == {None}


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_attention_that_looks_ahead_is_refused(model_type):
    raw = CONFIG | {"model_type": model_type, "use_bidirectional_attention": True}
    with pytest.raises(ValueError, match="use_bidirectional_attention True is not supported"):
        ModelConfig.from_dict(raw)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"beta_fast": 16.0, "beta_slow": 3.0},
        {"attention_factor": 0.8},
        {"mscale": 0.7, "mscale_all_dim": 1.2},
        {"factor": 0.5},
    ],
    ids=str,
)
def test_the_tables_of_yarn_are_those_of_transformers(change):
    raw = CONFIG | {"rope_scaling": YARN | change, "rope_theta": 50000.0}
    config = ModelConfig.from_dict(raw)
    theirs = LlamaRotaryEmbedding(AutoConfig.for_model(**raw))
    positions = torch.arange(200)[None]
    cos, sin = theirs(torch.zeros(1), positions)
    tables = RopeTables.build(config.ropes[0], 200, torch.device("cpu"))
    half = config.head_dim // 2
    assert torch.allclose(tables.cos, cos[0, :, :half], atol=1e-5)
    assert torch.allclose(tables.sin, sin[0, :, :half], atol=1e-5)


@pytest.mark.parametrize("change", [{"truncate": False}, {"partial_rotary_factor": 0.5}], ids=str)
def test_values_of_yarn_that_would_be_ignored_are_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} .*is not supported"):
        ModelConfig.from_dict(CONFIG | {"rope_scaling": YARN | change})
