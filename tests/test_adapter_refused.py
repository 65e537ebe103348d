"""Adapters and optimizer states that no training wrote are refused by tensor or field."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model
from weight_folders import edit_json, load

from minitune import FastLanguageModel
from minitune.checkpoints.adapter import WEIGHTS, save_adapter
from minitune.training.checkpoint import OPTIMIZER, STATE, load_checkpoint, save_checkpoint
from minitune.training.optimizer import FlatAdamW
from minitune.training.trained_parameters import TrainedParameters


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), layers=1, tie=False)


def edit_adapter(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors, next(iter(tensors)))
    save_file(tensors, folder / WEIGHTS)


@pytest.fixture
def adapted(tiny, tmp_path):
    model = FastLanguageModel.get_peft_model(load(tiny), r=2)
    save_adapter(model, tmp_path / "adapter")
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_a_matrix_of_an_adapter_is_named(adapted, tmp_path, value):
    folder, wrong = tmp_path / "adapter", {}

    def damage(tensors, name):
        tensors[name] = tensors[name].double()
        tensors[name][0, 0] = value
        wrong["name"] = name

    edit_adapter(folder, damage)
    before = [p.clone() for _, p in adapted.trainable_parameters()]
    with pytest.raises(ValueError, match=f"{wrong['name']} holds a value that is NaN or infinite"):
        adapted.load_adapter(folder)
    after = [p for _, p in adapted.trainable_parameters()]
    assert all(map(torch.equal, before, after))


def test_a_matrix_of_whole_numbers_is_refused(adapted, tmp_path):
    for dtype in (torch.int8, torch.int64, torch.bool, torch.uint8):
        save_adapter(adapted, tmp_path / "adapter")
        edit_adapter(tmp_path / "adapter", lambda t, name, d=dtype: t.update({name: t[name].to(d)}))
        with pytest.raises(ValueError, match=f"is {dtype}; LoRA matrices are floating-point"):
            adapted.load_adapter(tmp_path / "adapter")


def test_one_parameter_under_two_names_is_refused_with_both(adapted, tmp_path):
    for old, new in (("lora_A.", "lora_A.default."), ("base_model.model.", "")):
        save_adapter(adapted, tmp_path / "adapter")
        names = []

        def double(tensors, name, old=old, new=new, names=names):
            names[:] = name, name.replace(old, new, 1)
            tensors[names[1]] = tensors[name].clone()

        edit_adapter(tmp_path / "adapter", double)
        with pytest.raises(ValueError, match="the same matrix under two names, ") as error:
            adapted.load_adapter(tmp_path / "adapter")
        assert all(name in str(error.value) for name in names)


def test_two_matrices_that_share_a_parameter_are_neither_trained_nor_saved(adapted, tmp_path):
    first, second = (linear for _, linear in list(adapted.linears())[:2])
    kept = second.lora_A.weight
    second.lora_A.weight = first.lora_A.weight
    for refuse in (TrainedParameters, lambda model: save_adapter(model, tmp_path / "shared")):
        with pytest.raises(ValueError, match=r"k_proj\.lora_A\.weight is no parameter of its own"):
            refuse(adapted)
    assert not (tmp_path / "shared").exists()
    second.lora_A.weight = kept
    assert len(TrainedParameters(adapted).parameters) == 14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 10**30}, "r is a whole number of more than 30 digits; expected at most 65536"),
        ({"r": 2.0}, "r is 2.0; expected a whole number"),
        ({"r": True}, "r is True; expected a whole number"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'; expected a number"),
        ({"lora_alpha": 1e200}, "lora_alpha is 1e\\+200; expected at most"),
        ({"lora_alpha": 0}, "lora_alpha is 0; expected more than 0"),
        ({"use_rslora": 1}, "use_rslora is 1; expected true or false"),
        ({"lora_dropout": -1}, "lora_dropout is -1; expected a number from 0 to 1"),
        ({"lora_dropout": "0"}, "lora_dropout is '0'; expected a number from 0 to 1"),
        ({"target_modules": [1]}, r"target_modules is \[1\]; expected names of linears"),
        ({"target_modules": {"a": 1}}, "target_modules is {'a': 1}; expected names of linears"),
        ({"rank_pattern": {"q_proj": 10**40}}, "rank_pattern is .* is not supported"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern is .* is not supported"),
    ],
)
def test_a_value_of_adapter_config_is_refused_by_its_field(adapted, tmp_path, change, message):
    edit_json(tmp_path / "adapter" / "adapter_config.json", **change)
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {message}"):
        adapted.load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("eight_bit", [False, True])
def test_moments_that_no_run_can_have_are_refused(adapted, tmp_path, eight_bit):
    parameters = [p for _, p in adapted.trainable_parameters()]
    optimizer, folder = FlatAdamW(parameters, eight_bit=eight_bit), tmp_path / "checkpoint-1"
    scales = "_absmax" if eight_bit else ""
    for name, value, message in (
        ("exp_avg" + scales, math.nan, "holds a value that is NaN or infinite"),
        ("exp_avg_sq" + scales, math.inf, "holds a value that is NaN or infinite"),
        ("exp_avg_sq" + scales, -1.0, "holds a negative value"),
    ):
        save_checkpoint(adapted, optimizer, {}, folder)
        moments = load_file(folder / OPTIMIZER)
        moments[name][0] = value
        save_file(moments, folder / OPTIMIZER)
        with pytest.raises(ValueError, match=rf"optimizer\.safetensors: {name} {message}"):
            load_checkpoint(adapted, optimizer, folder)
    save_checkpoint(adapted, optimizer, {}, folder)
    moments = {name: x.to(torch.int32) for name, x in load_file(folder / OPTIMIZER).items()}
    save_file(moments, folder / OPTIMIZER)
    with pytest.raises(ValueError, match=r"is torch\.int32; expected float32 or uint8"):
        load_checkpoint(adapted, optimizer, folder)
    save_checkpoint(adapted, optimizer, {}, folder)
    for steps in (True, -1, 10**30, 1.0, None):
        edit_json(folder / STATE, optimizer_steps=steps)
        with pytest.raises(ValueError, match=r"state\.json: optimizer_steps is "):
            load_checkpoint(adapted, optimizer, folder)
