"""Every setting of transformers and TRL works, is accepted if neutral, or is refused by name."""

from dataclasses import MISSING, fields

import pytest
import torch

from minitune import SFTConfig, TrainingArguments
from minitune.config.foreign_settings import FOREIGN_SETTINGS
from minitune.training import precision_notes as module
from minitune.training.precision_notes import precision_notes

transformers, trl = map(pytest.importorskip, ("transformers", "trl"))

# Settings whose default differs from that of the library with the same name of the class.
OTHER_DEFAULTS = {
    "assistant_only_loss",  # None: yes for conversations
    "bf16",  # None: the model's dtype counts
    "fp16",
    "dataset_text_field",  # None: "text", but other shapes come first
    "max_length",  # None: the model's max_seq_length
}
LIBRARIES = {"SFTConfig": trl.SFTConfig, "TrainingArguments": transformers.TrainingArguments}


def defaults_of(cls):
    """Return (name, default) of each setting of a dataclass."""
    return [
        (item.name, item.default_factory() if item.default is MISSING else item.default)
        for item in fields(cls)
    ]


@pytest.mark.parametrize(
    ("own", "name", "default"),
    [
        (own, name, default)
        for own, library in LIBRARIES.items()
        for name, default in defaults_of(library)
    ],
)
def test_the_default_of_every_setting_of_the_libraries_is_accepted(own, name, default):
    cls = {"SFTConfig": SFTConfig, "TrainingArguments": TrainingArguments}[own]
    args = cls(**{name: default})
    if name not in FOREIGN_SETTINGS and name not in OTHER_DEFAULTS:
        assert getattr(cls(), name) == default == getattr(args, name)


def test_no_foreign_setting_hides_one_of_ours():
    assert not FOREIGN_SETTINGS.keys() & {item.name for item in fields(SFTConfig)}


def test_the_settings_of_the_usual_notebook_work():
    args = SFTConfig(
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=4,
        warmup_steps=5,
        max_steps=60,
        learning_rate=2e-4,
        fp16=True,
        bf16=False,
        logging_steps=1,
        optim="adamw_bnb_8bit",
        weight_decay=0.01,
        lr_scheduler_type="cosine_with_restarts",
        lr_scheduler_kwargs={"num_cycles": 3},
        seed=3407,
        output_dir="outputs",
        overwrite_output_dir=True,
        report_to=[],
        max_seq_length=1024,
        dataset_num_proc=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        dataloader_num_workers=4,
        remove_unused_columns=False,
        evaluation_strategy="steps",
        ddp_find_unused_parameters=False,
        run_name="first",
        hub_token="secret",
        disable_tqdm=True,
    )
    assert (args.optim, args.lr_scheduler_cycles, args.report_to) == ("adamw_8bit", 3, "none")
    assert (args.max_length, args.overwrite, args.eval_strategy) == (1024, True, "steps")
    assert SFTConfig(max_steps=None).max_steps == -1


def test_words_of_the_libraries_enums_are_words_here():
    args = SFTConfig(
        eval_strategy=transformers.trainer_utils.IntervalStrategy.STEPS,
        lr_scheduler_type=transformers.SchedulerType.COSINE,
        optim=transformers.training_args.OptimizerNames.ADAMW_TORCH,
    )
    assert args == SFTConfig(eval_strategy="steps", lr_scheduler_type="cosine", optim="adamw_torch")
    assert type(args.optim) is str


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "paged_adamw_8bit"}, "use 'adamw_8bit'"),
        ({"optim": "paged_adamw_32bit"}, "use 'adamw_torch'"),
        ({"neftune_noise_alpha": 5}, "use weight_decay, fewer epochs"),
        ({"report_to": "wandb"}, r"pass a callback .*SFTTrainer\(callbacks="),
        ({"report_to": "all"}, "choose 'none' or 'tensorboard'"),
        ({"report_to": ["tensorboard", "wandb"]}, "callbacks"),
        ({"push_to_hub": True}, "upload the saved folder yourself"),
        ({"deepspeed": "zero2.json"}, "one GPU or the CPU trains"),
        ({"group_by_length": True}, "nothing is padded"),
        ({"label_smoothing_factor": 0.1}, "plain cross entropy"),
        ({"use_cpu": True}, 'device="cpu"'),
        ({"save_only_model": True}, "so that it can be continued"),
        ({"lr_scheduler_kwargs": {"power": 2}}, "'power'; known is num_cycles"),
        ({"greater_is_better": True, "metric_for_best_model": "eval_loss"}, "a lower eval_loss"),
        ({"score_answer": "accuracy"}, "FILE.py:FUNCTION, or choose exact_match or contains"),
        ({"predict_with_generate": True}, "score_answer generates and scores answers"),
        ({"bf16": True, "fp16": True}, "exclude each other"),
        ({"save_strategy": "best"}, "needs evaluations"),
    ],
)
def test_other_values_are_refused_with_the_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        SFTConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_strategy": "no"}, "choose 'steps' or 'epoch' for both"),
        ({"eval_strategy": "epoch"}, "save_strategy is 'steps'"),
        ({"eval_strategy": "steps", "eval_steps": 3, "save_steps": 10}, "no multiple of eval_st"),
    ],
)
def test_the_best_checkpoint_needs_evaluations_and_checkpoints_that_meet(settings, message):
    with pytest.raises(ValueError, match=message):
        SFTConfig(load_best_model_at_end=True, **settings)
    with pytest.raises(ValueError, match="load_best_model_at_end"):
        transformers.TrainingArguments(load_best_model_at_end=True, **settings)


def test_the_metric_of_the_best_checkpoint_is_that_of_transformers():
    settings = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    ours, theirs = SFTConfig(**settings), transformers.TrainingArguments(**settings)
    for name in ("metric_for_best_model", "greater_is_better"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_a_dtype_that_is_not_the_models_is_noted_and_the_models_own_is_not():
    cpu, float32 = torch.device("cpu"), torch.float32
    (note,) = precision_notes(SFTConfig(bf16=True), float32, cpu)
    assert "bf16=True asks for bfloat16, but the model was loaded in float32" in note
    assert precision_notes(SFTConfig(bf16=True), torch.bfloat16, cpu) == []
    assert precision_notes(SFTConfig(fp16=False, bf16=False), float32, cpu) == []


def test_the_note_on_bf16_promises_no_bfloat16_to_a_gpu_without_it(monkeypatch):
    monkeypatch.setattr(module, "is_bfloat16_supported", lambda device: False)
    (note,) = precision_notes(SFTConfig(bf16=True), torch.float16, torch.device("cuda", 0))
    assert note.endswith("loaded in float16 and trains in it; this GPU has no bfloat16")
