"""Names of other libraries' notebooks: imported with the same meaning, or refused with a remedy."""

import pytest
import torch
from tiny import make_tiny_model

import minitune
from minitune import FastLanguageModel, FastModel, LoraConfig, prepare_model_for_kbit_training
from minitune.config.foreign_names import ABSENT_NAMES

IDS = torch.tensor([[5, 17, 300, 42, 7]])


@pytest.mark.parametrize("name", ABSENT_NAMES)
def test_an_import_of_an_absent_name_says_what_to_use_instead(name):
    with pytest.raises(ImportError) as caught:
        exec(f"from minitune import {name}", {})
    assert str(caught.value) == f"minitune has no {name}: {ABSENT_NAMES[name]}"


def test_an_absent_name_is_no_name_of_the_package():
    assert not set(ABSENT_NAMES) & {*vars(minitune), *minitune.__all__}


def test_an_unknown_name_is_an_attribute_error_with_the_nearest_name():
    with pytest.raises(AttributeError, match=r"no 'SFTTrainr'; did you mean SFTTrainer"):
        _ = minitune.SFTTrainr
    assert not hasattr(minitune, "something_else")


def test_fast_model_is_fast_language_model():
    assert FastModel is FastLanguageModel


def test_preparing_calls_of_peft_scripts_change_nothing(tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    plain, prepared = (FastLanguageModel.from_pretrained(folder)[0] for _ in range(2))
    assert prepare_model_for_kbit_training(prepared, use_gradient_checkpointing=True) is prepared
    prepared.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    prepared.enable_input_require_grads()
    for model in (plain, prepared):
        model.add_lora(LoraConfig(r=4))
        model(input_ids=IDS, labels=IDS).loss.backward()
    for (name, p), (_, q) in zip(
        plain.trainable_parameters(), prepared.trainable_parameters(), strict=True
    ):
        assert torch.equal(p.grad, q.grad), name


def test_a_model_of_another_library_is_not_prepared():
    with pytest.raises(ValueError, match=r"Linear; load it with minitune\.FastLanguageModel"):
        prepare_model_for_kbit_training(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_frozen_modules_are_no_targets(name):
    with pytest.raises(ValueError, match=f"'{name}' is not supported: .*leave it out, .*larger r"):
        LoraConfig(target_modules=["q_proj", name])
