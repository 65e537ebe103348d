"""The settings of a training run, under TRL's names."""

import datetime
import os
from dataclasses import dataclass, fields
from typing import Any

from minitune.config.fields import check_settings, setting
from minitune.config.foreign_arguments import foreign_arguments
from minitune.config.foreign_settings import FOREIGN_SETTINGS, plain_word
from minitune.config.numbers import shown
from minitune.config.training_config import (
    DROPPED_TEXT,
    INTERVALS,
    MAX_SEQ_LENGTH,
    OPTIMIZERS,
    REPORTS,
    SAVE_STRATEGIES,
    SCHEDULES,
    parse_bytes,
)

# Settings that name a folder -> the files without them
DEFAULT_FOLDERS = {
    "output_dir": "a run that is saved makes a new folder under runs/",
    "logging_dir": "TensorBoard's files lie in the run folder",
}
MAX_DATA_WEIGHT = 1000  # copies of a source's samples
# transformers' name of an optimizer -> the same optimizer here
OPTIMIZER_ALIASES = {"adamw_bnb_8bit": "adamw_8bit"}
# Paged optimizers move their moments to host memory if the GPU is full. Those of an adapter in 8
# bits take 2 bytes a parameter, which is 84 MB for r=16 on an 8B model.
OPTIMIZER_REMEDIES = {
    "paged_adamw": "adamw_torch",
    "paged_adamw_32bit": "adamw_torch",
    "paged_adamw_8bit": "adamw_8bit",
}


def check_date(date: str) -> None:
    """Raise ValueError if a text is no date such as 2026-11-25."""
    try:
        datetime.date.fromisoformat(date)
    except (TypeError, ValueError):
        raise ValueError(f"template_date is {date!r}; write it as 2026-11-25") from None


@foreign_arguments(**FOREIGN_SETTINGS)
@dataclass(frozen=True)
class SFTConfig:
    """The settings of a training run, under TRL's names; an unknown name is a TypeError.

    Settings that TRL and transformers have beside these are accepted if they change nothing
    (foreign_settings.py).

    An optimizer step trains on per_device_train_batch_size * gradient_accumulation_steps samples
    (with packing: rows of max_length tokens). The samples are moved without padding, in as few
    forward/backward passes as `micro_step_tokens` allows. The loss is divided once, by the number
    of trained-on tokens of the whole step, so the split changes the speed and not the result.

    Without output_dir a run makes a new numbered folder under runs/. With save_strategy "no" it has
    no folder then, and writes nothing; a command makes the folder in any case.
    """

    output_dir: str | None = setting(None, "run folder; default: a new numbered folder under runs/")
    per_device_train_batch_size: int = setting(
        8, "samples (with packing: rows) of an optimizer step ...", minimum=1
    )
    gradient_accumulation_steps: int = setting(1, "... times this", minimum=1)
    num_train_epochs: float = setting(3.0, "passes through the data", greater_than=0)
    max_steps: int = setting(-1, "optimizer steps; a positive number replaces num_train_epochs")
    learning_rate: float = setting(
        2e-5, "peak learning rate; adapters usually need about 2e-4", minimum=0
    )
    lr_scheduler_type: str = setting(
        "linear", "shape of the learning rate after warm-up", choices=SCHEDULES
    )
    lr_scheduler_cycles: int = setting(
        1, "waves of the learning rate, with cosine_with_restarts", minimum=1
    )
    warmup_steps: float = setting(
        0, "steps of linear warm-up; below 1: a share of all steps", minimum=0
    )
    warmup_ratio: float = setting(
        0.0, "warm-up as a share of all steps, used if warmup_steps is 0", minimum=0, maximum=1
    )
    weight_decay: float = setting(0.0, "AdamW's decoupled decay", minimum=0)
    adam_beta1: float = setting(0.9, "decay of the first moment", minimum=0, less_than=1)
    adam_beta2: float = setting(0.999, "decay of the second moment", minimum=0, less_than=1)
    adam_epsilon: float = setting(1e-8, "added to the root of the second moment", minimum=0)
    optim: str = setting(
        "adamw_torch_fused",
        "AdamW on one flat buffer; moments in float32, with adamw_8bit in 8 bits",
        choices=OPTIMIZERS,
    )
    bf16: bool | None = setting(
        None, "True expects a model in bfloat16, and notes any other dtype", python_only=True
    )
    fp16: bool | None = setting(
        None, "True expects a model in float16, and notes any other dtype", python_only=True
    )
    max_grad_norm: float = setting(
        1.0, "largest global norm of the gradient; 0 turns clipping off", minimum=0
    )
    max_length: int | None = setting(
        None,
        "longer samples are cut to this many tokens; default max_seq_length",
        minimum=2,
        maximum=MAX_SEQ_LENGTH,
    )
    packing: bool = setting(
        False, "fill rows of max_length with whole samples, and count rows instead of samples"
    )
    assistant_only_loss: bool | None = setting(
        None, "train on assistant turns only; default: yes for conversations"
    )
    completion_only_loss: bool | None = setting(
        None, "train on completions only; default: yes for prompt/completion"
    )
    dataset_text_field: str | None = setting(
        None,
        "key of plain-text records; default text; a name that is given here wins over the other "
        "shapes in a record",
    )
    split_turns: bool | None = setting(
        None,
        "make one sample of each answer, as at inference; default: if the chat template leaves "
        "earlier reasoning out",
    )
    dropped_text: str = setting(
        "error",
        "if the chat template leaves a text of a record out, refuse the record or warn",
        choices=DROPPED_TEXT,
    )
    template_date: str | None = setting(
        None, "the day that a chat template writes, such as 2026-11-25; default: the run's first"
    )
    ignore_fields: tuple[str, ...] = setting(
        (), "keys of records to leave out on purpose, such as title or messages.mood"
    )
    skip_bad: bool = setting(False, "leave out records that cannot be read or used, and count them")
    data_weights: tuple[float, ...] = setting(
        (),
        "a number for each file of the training data: 2 takes its samples twice, 0.5 takes half",
        greater_than=0,
        maximum=MAX_DATA_WEIGHT,
    )
    instruction_part: str | None = setting(
        None, "text before each instruction of plain texts; needs response_part"
    )
    response_part: str | None = setting(
        None, "text before each answer of plain texts, which are then trained on their answers only"
    )
    logging_strategy: str = setting("steps", "when to write a metrics line", choices=INTERVALS)
    logging_steps: int = setting(10, "optimizer steps a metrics line", minimum=1)
    logging_first_step: bool = setting(False, "write a metrics line for the first step too")
    save_strategy: str = setting(
        "steps",
        "when to write checkpoint-N; best: after each evaluation with a lower loss than all before",
        choices=SAVE_STRATEGIES,
    )
    save_steps: int = setting(
        500, "optimizer steps a checkpoint, with save_strategy steps", minimum=1
    )
    save_total_limit: int | None = setting(
        None, "number of newest checkpoints that stay; default: all", minimum=1
    )
    eval_strategy: str = setting(
        "no", "when to compute the loss of the evaluation data", choices=INTERVALS
    )
    eval_steps: int | None = setting(
        None, "steps between evaluations; default logging_steps", minimum=1
    )
    eval_on_start: bool = setting(False, "evaluate before the first step too")
    load_best_model_at_end: bool = setting(
        False, "end with the adapter of the checkpoint that has the lowest evaluation loss"
    )
    metric_for_best_model: str | None = setting(
        None,
        "the metric of the best checkpoint, which save_total_limit keeps",
        choices=("loss", "eval_loss"),
    )
    greater_is_better: bool | None = setting(
        None, "False: a lower loss is better", python_only=True
    )
    sample_prompts: tuple[str, ...] = setting(
        (),
        "texts of a user that the model answers before the first step, at each evaluation and "
        "after the last step",
    )
    seed: int = setting(
        42, "the order of the samples follows from this and the epoch", minimum=0, maximum=2**64 - 1
    )
    report_to: str = setting(
        "none",
        "further destination of the metrics, which metrics.jsonl holds in any case",
        choices=REPORTS,
    )
    logging_dir: str | None = setting(
        None, "folder of TensorBoard's files; default: tensorboard in the run folder"
    )
    run_name: str | None = setting(None, "a name of the run, for callbacks")
    disable_tqdm: bool | None = setting(None, "show no progress bar")
    micro_step_tokens: int | None = setting(
        None, "tokens of one forward/backward; default by device", minimum=1
    )
    memory_budget: str | None = setting(
        None,
        "GPU memory to plan with, such as 24GiB, with use_gradient_checkpointing 'unsloth'; "
        "default: all free memory",
    )
    host_memory: str | None = setting(
        None, "host memory for offloaded activations; default: half of the available memory"
    )
    cuda_graphs: bool = setting(True, "on a GPU, capture a micro-step of each size and replay it")
    overwrite: bool = setting(False, "replace the run in output_dir")
    resume: bool = setting(
        False, "continue from output_dir's newest checkpoint, or start if there is none"
    )

    def __post_init__(self):
        for item in fields(self):
            value = _normal_value(item.name, getattr(self, item.name))
            object.__setattr__(self, item.name, value)
        check_settings(self)
        _check_best(self)
        if (self.instruction_part is None) != (self.response_part is None):
            raise ValueError("instruction_part and response_part need each other; give both")
        if self.response_part is not None and self.assistant_only_loss is False:
            raise ValueError(
                "response_part trains on answers only, but assistant_only_loss=False trains on "
                "everything; leave one of them out"
            )
        if self.bf16 and self.fp16:
            raise ValueError("bf16=True and fp16=True exclude each other; leave one out")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(
                f"max_steps is {self.max_steps}; expected at least 1, or -1 for num_train_epochs"
            )
        if self.template_date is not None:
            check_date(self.template_date)
        for size in (self.memory_budget, self.host_memory):
            if size is not None:
                parse_bytes(size)
        if self.overwrite and self.resume:
            raise ValueError(
                "overwrite and resume exclude each other: "
                "one deletes the old run, the other continues it"
            )
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}; expected whole steps, or a share below 1"
            )
        if self.lr_scheduler_type == "constant" and (self.warmup_steps or self.warmup_ratio):
            raise ValueError(
                "lr_scheduler_type 'constant' has no warm-up; choose 'constant_with_warmup'"
            )


@foreign_arguments(**FOREIGN_SETTINGS)
@dataclass(frozen=True)
class TrainingArguments(SFTConfig):
    """SFTConfig with the defaults of transformers' TrainingArguments."""

    learning_rate: float = setting(5e-5, "peak learning rate", minimum=0)
    logging_steps: int = setting(500, "optimizer steps a metrics line", minimum=1)


def _normal_value(name: str, value: Any) -> Any:
    """Return the value of a setting in its one form: words, tuples and texts of paths.

    Raises: ValueError if the value is another library's and has no form here.
    """
    value = plain_word(value)
    if name in DEFAULT_FOLDERS and isinstance(value, os.PathLike):
        return os.fspath(value)
    if name in DEFAULT_FOLDERS and value == "":
        raise ValueError(
            f"{name} is ''; name a folder, such as '.' for the current one, or leave {name} out: "
            f"{DEFAULT_FOLDERS[name]}"
        )
    if name in ("ignore_fields", "data_weights", "sample_prompts") and isinstance(value, list):
        return tuple(value)
    if name == "max_steps" and value is None:
        return -1
    if name == "report_to":
        return _report(value)
    if name == "optim" and isinstance(value, str):
        if value in OPTIMIZER_REMEDIES:
            raise ValueError(
                f"optim {value!r} is not supported, because the moments of an adapter are small; "
                f"use {OPTIMIZER_REMEDIES[value]!r}"
            )
        return OPTIMIZER_ALIASES.get(value, value)
    return value


def _report(value: Any) -> str:
    """Return the one destination that report_to names.

    Raises: ValueError if it names another service or several destinations.
    """
    names = [value] if isinstance(value, str) else value
    if names in ([], ()):
        return "none"
    if not isinstance(names, list | tuple) or len(names) != 1 or names[0] not in REPORTS:
        raise ValueError(
            f"report_to is {shown(value)}; choose 'none' or 'tensorboard', and pass a callback for "
            "any other service: SFTTrainer(callbacks=[...])"
        )
    return names[0]


def _check_best(args: SFTConfig) -> None:
    """Name the metric of the best checkpoint if one is asked for.

    Raises: ValueError if evaluations and checkpoints do not meet.
    """
    if args.greater_is_better and args.metric_for_best_model is None:
        raise ValueError("greater_is_better is True without metric_for_best_model; leave it out")
    if args.greater_is_better:
        raise ValueError(
            f"greater_is_better is True, but a lower {args.metric_for_best_model} is better; "
            "leave it out"
        )
    needs_best = args.load_best_model_at_end or args.save_strategy == "best"
    if needs_best and args.metric_for_best_model is None:
        object.__setattr__(args, "metric_for_best_model", "loss")
    if args.metric_for_best_model is not None:
        object.__setattr__(args, "greater_is_better", False)
    if args.save_strategy == "best" and args.eval_strategy == "no":
        raise ValueError("save_strategy 'best' needs evaluations; choose an eval_strategy")
    if not args.load_best_model_at_end or args.save_strategy == "best":
        return
    if args.eval_strategy != args.save_strategy or args.eval_strategy == "no":
        raise ValueError(
            f"load_best_model_at_end needs checkpoints of evaluated steps, but eval_strategy is "
            f"{args.eval_strategy!r} and save_strategy is {args.save_strategy!r}; choose 'steps' "
            "or 'epoch' for both, or save_strategy 'best'"
        )
    interval = args.eval_steps or args.logging_steps
    if args.eval_strategy == "steps" and args.save_steps % interval:
        raise ValueError(
            f"load_best_model_at_end needs checkpoints of evaluated steps, but save_steps "
            f"{args.save_steps} is no multiple of eval_steps {interval}; use the same number"
        )
