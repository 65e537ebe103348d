"""The lists of linears and tensors in ModelConfig equal the modules of the model."""

import itertools

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minitune.config.architectures import ARCHITECTURES, LORA_TARGETS
from minitune.config.model_config import ModelConfig
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
    with pytest.raises(ValueError, match="hidden_act 'gelu' is not supported"):
        ModelConfig.from_dict(raw | {"hidden_act": "gelu"})


def test_a_window_limits_the_samples_if_the_config_switches_it_on():
    mistral = ModelConfig.from_dict(CONFIG | {"model_type": "mistral", "sliding_window": 64})
    assert (mistral.sliding_window, mistral.default_seq_length) == (64, 64)
    mistral.check_seq_length(64)
    with pytest.raises(ValueError, match="max_seq_length 65 is more than the model's sliding_win"):
        mistral.check_seq_length(65)
    qwen = CONFIG | {"model_type": "qwen2", "sliding_window": 64}
    assert ModelConfig.from_dict(qwen).sliding_window is None
    assert ModelConfig.from_dict(qwen | {"use_sliding_window": True}).sliding_window == 64


@pytest.mark.parametrize("model_type", ["gpt2", None, ["llama"]])
def test_an_unknown_family_is_refused(model_type):
    with pytest.raises(ValueError, match="is not supported; supported are llama, mistral"):
        ModelConfig.from_dict(CONFIG | {"model_type": model_type})


@pytest.mark.parametrize("rope_type", ["dynamic", ["linear"]])
def test_an_unknown_rope_scaling_is_refused(rope_type):
    message = "is not supported; supported are default, linear, llama3, yarn"
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(CONFIG | {"rope_scaling": {"rope_type": rope_type, "factor": 2.0}})


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
    tables = RopeTables.build(config, 200, torch.device("cpu"))
    half = config.head_dim // 2
    assert torch.allclose(tables.cos, cos[0, :, :half], atol=1e-5)
    assert torch.allclose(tables.sin, sin[0, :, :half], atol=1e-5)


@pytest.mark.parametrize("change", [{"truncate": False}, {"partial_rotary_factor": 0.5}], ids=str)
def test_values_of_yarn_that_would_be_ignored_are_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} .*is not supported"):
        ModelConfig.from_dict(CONFIG | {"rope_scaling": YARN | change})
