"""Settings of a run and of an adapter: values out of range are refused."""

import math

import pytest

from minitune import SFTConfig
from minitune.config.training_config import LoraConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": "3"}, "max_steps is '3'; expected a whole number"),
        ({"max_steps": 0}, "max_steps is 0; expected at least 1, or -1"),
        ({"max_steps": True}, "max_steps is True; expected a whole number"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; expected at least 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan; expected a finite number"),
        ({"adam_beta1": 1.0}, "adam_beta1 is 1.0; expected less than 1"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0; expected more than 0"),
        ({"optim": "sgd"}, "expected one of adamw_torch, adamw_torch_fused, adamw_8bit"),
        ({"lr_scheduler_type": "polynomial"}, "expected one of linear, cosine"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "constant_with_warmup"),
        ({"packing": 1}, "packing is 1; expected true or false"),
        ({"warmup_steps": 2.5}, "expected whole steps, or a share below 1"),
        (
            {"report_to": "wandb"},
            "report_to is 'wandb'; choose 'none' or 'tensorboard', and pass a callback",
        ),
        ({"overwrite": True, "resume": True}, "exclude each other"),
        ({"max_length": 1}, "max_length is 1; expected at least 2"),
    ],
)
def test_settings_out_of_range_are_refused_with_value_and_expectation(settings, message):
    with pytest.raises(ValueError) as error:
        SFTConfig(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": -5}, "lora_alpha is -5; expected more than 0"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan; expected a finite number"),
        ({"lora_alpha": "32"}, "lora_alpha is '32'; expected a number"),
        ({"use_rslora": "no"}, "use_rslora is 'no'; expected true or false"),
        ({"r": True}, "r is True; expected a whole number"),
        ({"r": 0}, "r is 0; expected at least 1"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": "q_proj"}, "target_modules is 'q_proj'; expected a list of names"),
        ({"target_modules": ("w_proj",)}, "target module 'w_proj' does not exist"),
    ],
)
def test_adapter_settings_out_of_range_are_refused_with_value_and_expectation(settings, message):
    with pytest.raises(ValueError) as error:
        LoraConfig(**settings)
    assert message in str(error.value)


def test_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError, match="no argument 'learning_rte'; did you mean learning_rate"):
        SFTConfig(learning_rte=1e-4)


@pytest.mark.parametrize("size", ["8", "8 GB of it", "8KiB", "-1GiB", ""])
def test_a_memory_budget_that_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match="is not a size; write it as 24GiB"):
        SFTConfig(memory_budget=size)
