"""The config.json of a GGUF file describes the model of the folder that was exported."""

import json
import math
import warnings

import pytest
import torch
import transformers
from family_configs import FAMILIES
from gguf import GGMLQuantizationType as GGMLType
from gguf_files import LLAMA3_ROPE, SMALL_KEYS, SMALL_TENSORS
from same_models import check_same_model
from tiny import make_tiny_model
from tiny_families import make_tiny_family

from minitune.config.layer_kinds import FULL, SLIDING
from minitune.config.model_config import ModelConfig
from minitune.gguf.base.config_from_metadata import MODEL_TYPES, config_from_metadata
from minitune.gguf.base.open_gguf import open_gguf, read_config
from minitune.gguf.export import convert_folder
from minitune.gguf.reader import StoredTensor
from minitune.model.rope import RopeTables

# Cases that llama.cpp cannot express (tests/test_gguf_refused.py).
INEXPRESSIBLE = {
    "qwen3 with biases",
    "olmo2 tied",
    "olmo3 with two thetas",
    "gemma3 untied",
    "gemma3 with a scale",
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.5 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 8,
}
LLAMAS = {
    "plain": {},
    "a head of its own, biases, wide heads": {
        "tie": False,
        "attention_bias": True,
        "head_dim": 32,
    },
    "llama3": {"rope_scaling": LLAMA3_ROPE, "head_dim": 64},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "longrope": {"rope_scaling": LONGROPE},
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def exported(folder, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of windows that llama.cpp ignores
        return convert_folder(folder, path, "f16", verify=False)


def check_comes_back(folder, path):
    """Check the config of an exported folder, here and in transformers."""
    raw = read_config(open_gguf(exported(folder, path)))
    check_same_model(ModelConfig.from_dict(raw), ModelConfig.from_folder(folder))
    twin = transformers.AutoConfig.for_model(**raw)
    check_same_model(ModelConfig.from_dict(twin.to_dict()), ModelConfig.from_dict(raw))


@pytest.mark.parametrize("case", sorted(FAMILIES.keys() - INEXPRESSIBLE))
def test_a_family_comes_back_from_its_file(tmp_path, case):
    check_comes_back(make_tiny_family(tmp_path / "base", case), tmp_path / "x.gguf")


@pytest.mark.parametrize("case", LLAMAS)
def test_a_llama_comes_back_from_its_file(tmp_path, case):
    folder = make_tiny_model(tmp_path / "base", **LLAMAS[case])
    check_comes_back(folder, tmp_path / "x.gguf")


def test_float32_numbers_come_back_as_the_decimal_numbers_of_config_json(tmp_path):
    folder = make_tiny_model(tmp_path / "base", rope_scaling=LLAMA3_ROPE, head_dim=64)
    config = json.loads((folder / "config.json").read_text())
    config |= {"rms_norm_eps": 3e-7, "rope_theta": 1000000.7}
    (folder / "config.json").write_text(json.dumps(config))
    found = read_config(open_gguf(exported(folder, tmp_path / "x.gguf")))
    assert (found["rms_norm_eps"], found["rope_theta"]) == (3e-7, 1000000.7)
    assert found["rope_scaling"] == LLAMA3_ROPE


# ---- keys that no exporter of this project writes

TENSORS = {name: StoredTensor(name, *info, 0) for name, info in SMALL_TENSORS.items()}


def config_of(keys, divisors=None, name="llama", tensors=None):
    """Return the config of SMALL_KEYS with other keys below the architecture."""
    metadata = {key.replace("llama.", f"{name}."): value for key, value in SMALL_KEYS.items()}
    metadata |= {"general.architecture": name}
    metadata |= {f"{name}.{key}": value for key, value in keys.items()}
    raw = config_from_metadata(metadata, TENSORS | (tensors or {}), divisors or {})
    return ModelConfig.from_dict(raw)


def angles(config, position=7):
    """Return cos and sin of a position, float64 (2, R/2)."""
    tables = RopeTables.build(config.ropes[0], position + 1, torch.device("cpu"))
    return torch.stack((tables.cos[-1], tables.sin[-1])).double()


def expected_angles(config, divisors, position=7, scale=1.0):
    """Return cos and sin by the formula of llama.cpp."""
    width = config.ropes[0].rotary_dim
    pairs = torch.arange(width // 2, dtype=torch.float64)
    turned = position * config.ropes[0].theta ** (-2 * pairs / width) / divisors
    return scale * torch.stack((turned.cos(), turned.sin()))


DIVISORS = torch.linspace(1, 9, 64)


@pytest.mark.parametrize(
    ("keys", "divisors", "scale"),
    [
        ({"rope.scaling.factor": 2.0}, 2.0, 1.0),
        ({"rope.scale_linear": 2.0}, 2.0, 1.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, 1.0, 1.0),
        ({"rope.scaling.attn_factor": 1.5}, 1.0, 1.5),
        ({"rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 1.5}, 2.0, 1.5),
        ({}, DIVISORS, 1.0),
        ({"rope.scaling.factor": 2.0}, 2.0 * DIVISORS, 1.0),
    ],
)
def test_each_scaling_of_llama_cpp_gives_its_angles(keys, divisors, scale):
    stored = {"rope_freqs.weight": DIVISORS} if isinstance(divisors, torch.Tensor) else {}
    config = config_of(keys, stored)
    expected = expected_angles(config, divisors, scale=scale)
    assert (angles(config) - expected).abs().max() < 1e-5


def converter_divisors(factor, original, theta, width=128):
    """Return llama3's divisors as llama.cpp's converter computes them."""
    found = []
    for pair in range(width // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / width)
        smooth = min(max((original / wavelength - 1) / 3, 0.0), 1.0)
        found.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(found)


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (8.0, 4096)])
def test_the_divisors_of_llama_3_become_its_parameters(factor, original):
    divisors = {"rope_freqs.weight": converter_divisors(factor, original, 5e5)}
    scaling = config_of({"rope.freq_base": 5e5}, divisors).ropes[0].scaling
    expected = LLAMA3_ROPE | {"factor": factor, "original_max_position_embeddings": original}
    assert scaling == expected


def test_divisors_of_one_are_no_scaling():
    assert config_of({}, {"rope_freqs.weight": torch.ones(64)}).ropes[0].scaling is None


def test_missing_keys_have_llama_cpps_values():
    config = config_of({"attention.head_count_kv": 2})
    assert (config.ropes[0].theta, config.head_dim, config.num_key_value_heads) == (1e4, 128, 2)
    gemma2 = config_of({}, name="gemma2")
    assert (gemma2.score_softcap, gemma2.logit_softcap) == (50.0, 30.0)
    assert [kind.window for kind in gemma2.layer_kinds] == [4096]
    gemma3 = config_of({"attention.sliding_window": 8, "rope.freq_base": 1e6}, name="gemma3")
    assert [rope.theta for rope in gemma3.ropes] == [1e6, 1e4]
    granite = config_of({"logit_scale": 8.0}, name="granite")
    assert granite.attention_scale == 128**-0.5
    assert (granite.embedding_multiplier, granite.residual_multiplier) == (1.0, 1.0)
    assert granite.logit_multiplier == 1 / 8


@pytest.mark.parametrize(
    ("pattern", "types"),
    [(1, [FULL]), (0, [SLIDING]), (2, [SLIDING]), ([False], [FULL]), ([1], [SLIDING])],
)
def test_a_pattern_of_windows_is_a_period_or_a_list(pattern, types):
    keys = {"attention.sliding_window": 8, "attention.sliding_window_pattern": pattern}
    config = config_of(keys, name="gemma3")
    assert config.raw["layer_types"] == types


def test_gemma_of_27b_divides_scores_by_the_width_over_the_heads():
    layers = {
        f"blk.{i}.attn_output.weight": StoredTensor("", (256, 256), GGMLType.F16, 0)
        for i in range(46)
    }
    found = config_of({"block_count": 46, "attention.head_count": 4}, name="gemma2", tensors=layers)
    assert found.attention_scale == 64**-0.5
    assert found.head_dim == 64
    keys = {"block_count": 46, "attention.key_length": 64, "attention.value_length": 64}
    keys |= {"attention.head_count": 4, "embedding_length": 512}
    assert config_of(keys, name="gemma2", tensors=layers).attention_scale == 128**-0.5


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gemma2", {"attention.sliding_window": 0}, "expected a number of tokens above 0"),
        ("gemma2", {"final_logit_softcapping": 0.0}, "soft caps are 0"),
        ("gemma2", {"rope.freq_base_swa": 5.0}, "freq_base_swa is 5.0; expected 10000.0"),
        ("olmo2", {"attention.sliding_window": 8, "rope.freq_base_swa": 5.0}, "freq_base_swa"),
        (
            "gemma3",
            {
                "attention.sliding_window": 8,
                "attention.sliding_window_pattern": 0,
                "rope.scaling.type": "yarn",
            },
            "scaling.type is 'yarn'; expected linear, or no sliding layers",
        ),
        ("granite", {}, "granite.logit_scale is missing"),
        ("granite", {"logit_scale": 1.0, "rope.scaling.finetuned": False}, "finetuned is False"),
        ("qwen2", {"rope.scaling.yarn_log_multiplier": 1.0}, "yarn_log_multiplier is 1.0"),
        ("mistral3", {"attention.temperature_length": 8}, "temperature_length is 8"),
    ],
)
def test_a_value_that_a_family_does_not_compute_with_is_refused(name, keys, message):
    with pytest.raises(ValueError, match=message):
        config_of(keys, name=name)


def test_queries_of_ministral_grow_without_a_scaling_too():
    config = config_of(
        {"attention.temperature_scale": 0.1, "rope.scaling.original_context_length": 4},
        name="mistral3",
    )
    tables = RopeTables.build(config.ropes[0], 9, torch.device("cpu"))
    growth = [1 + 0.1 * math.log(1 + position // 4) for position in range(9)]
    assert torch.allclose(tables.query_scale, torch.tensor(growth))
    assert (angles(config) - expected_angles(config, 1.0)).abs().max() < 1e-5


@pytest.mark.parametrize("name", MODEL_TYPES)
@pytest.mark.parametrize("tensor", ["rope_freqs.weight", "rope_factors_long.weight"])
def test_divisors_that_llama_cpp_does_not_read_are_refused(name, tensor):
    keys = {"logit_scale": 1.0} if name == "granite" else {}
    reads = {"llama", "mistral3", "granite"} if tensor == "rope_freqs.weight" else {"phi3"}
    if name in reads and tensor == "rope_freqs.weight":
        assert config_of(keys, {tensor: DIVISORS}, name).ropes[0].kind == "longrope"
        return
    message = "rope_factors_short.weight is missing" if name in reads else "does not belong"
    with pytest.raises(ValueError, match=message):
        config_of(keys, {tensor: DIVISORS}, name)
