"""Each tensor of a GGUF file has the type that llama-quantize chooses."""

import json

import pytest
from referees.gguf_types import CASES, GOLDEN, case_config, golden_key, our_types, summary

from minitune.config.training_config import GGUF_METHODS
from minitune.gguf.mixtures import gguf_methods


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_has_the_type_that_llama_quantize_chooses(case):
    config, expected = case_config(case), json.loads(GOLDEN.read_text())[case]
    assert len(expected) == 2 * len(GGUF_METHODS)
    for method in GGUF_METHODS:
        for has_importance in (False, True):
            types = our_types(config, method, has_importance)
            assert summary(types) == expected[golden_key(method, has_importance)], types


def test_q4_k_m_gives_six_bits_to_the_first_and_last_layers_and_every_third_between():
    types = our_types(case_config("llama, 4 query heads a group"), "q4_k_m", False)
    for part in ("attn_v", "ffn_down"):
        kinds = [types[f"blk.{layer}.{part}.weight"] for layer in range(19)]
        assert [i for i, kind in enumerate(kinds) if kind == "Q6_K"] == [
            0,
            1,
            4,
            7,
            10,
            13,
            16,
            17,
            18,
        ]
        assert set(kinds) == {"Q4_K", "Q6_K"}
    assert types["output.weight"] == "Q6_K" and types["token_embd.weight"] == "Q4_K"


@pytest.mark.parametrize(
    ("names", "methods"),
    [
        ("Q4_K_M", ("q4_k_m",)),
        (["q4_k_m", "Q8_0"], ("q4_k_m", "q8_0")),
        (("q4_k", "q5_k", "q3_k", "q2_k"), ("q4_k_m", "q5_k_m", "q3_k_m", "q2_k")),
        (["quantized", "fast_quantized", "not_quantized"], ("q4_k_m", "q8_0", "bf16")),
        (["q4_k", "quantized", "q4_k_m"], ("q4_k_m",)),
    ],
    ids=str,
)
def test_names_of_types_are_resolved_in_any_case_and_each_type_is_written_once(names, methods):
    assert gguf_methods(names, is_float16=False) == methods


def test_a_model_in_float16_is_not_quantized_as_f16():
    assert gguf_methods("not_quantized", is_float16=True) == ("f16",)
