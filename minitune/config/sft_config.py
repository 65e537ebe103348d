"""The settings of a training run, under TRL's names."""

import datetime
import os
from dataclasses import dataclass

from minitune.config.fields import check_settings, setting
from minitune.config.training_config import (
    DROPPED_TEXT,
    INTERVALS,
    OPTIMIZERS,
    SCHEDULES,
    parse_bytes,
)


def check_date(date: str) -> None:
    """Raise ValueError if a text is no date such as 2026-11-25."""
    try:
        datetime.date.fromisoformat(date)
    except (TypeError, ValueError):
        raise ValueError(f"template_date is {date!r}; write it as 2026-11-25") from None


@dataclass(frozen=True)
class SFTConfig:
    """The settings of a training run, under TRL's names; an unknown name is a TypeError.

    An optimizer step trains on per_device_train_batch_size * gradient_accumulation_steps samples
    (with packing: rows of max_length tokens). The samples are moved without padding, in as few
    forward/backward passes as `micro_step_tokens` allows. The loss is divided once, by the number
    of trained-on tokens of the whole step, so the split changes the speed and not the result.
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
    max_grad_norm: float = setting(
        1.0, "largest global norm of the gradient; 0 turns clipping off", minimum=0
    )
    max_length: int | None = setting(
        None, "longer samples are cut to this many tokens; default max_seq_length", minimum=2
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
    )
    logging_steps: int = setting(10, "optimizer steps a metrics line", minimum=1)
    logging_first_step: bool = setting(False, "write a metrics line for the first step too")
    save_strategy: str = setting("steps", "when to write checkpoint-N", choices=INTERVALS)
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
    seed: int = setting(
        42, "the order of the samples follows from this and the epoch", minimum=0, maximum=2**64 - 1
    )
    report_to: str = setting(
        "none", "nothing is reported anywhere; metrics.jsonl holds everything", choices=("none",)
    )
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
        if isinstance(self.output_dir, os.PathLike):
            object.__setattr__(self, "output_dir", os.fspath(self.output_dir))
        if isinstance(self.ignore_fields, list):
            object.__setattr__(self, "ignore_fields", tuple(self.ignore_fields))
        if isinstance(self.data_weights, list):
            object.__setattr__(self, "data_weights", tuple(self.data_weights))
        check_settings(self)
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
