"""The values of SFTConfig's settings in their one form, and the settings that fit together."""

import datetime
import os
import re
from typing import Any

from minitune.config.foreign_settings import plain_word
from minitune.config.numbers import shown
from minitune.config.training_config import REPORTS, SCORES, parse_bytes

LOSS_METRICS = ("loss", "eval_loss")  # two names of the evaluation loss
# Settings that name a folder -> the files without them
DEFAULT_FOLDERS = {
    "output_dir": "a run that is saved makes a new folder under runs/",
    "logging_dir": "TensorBoard's files lie in the run folder",
}
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


def check_together(args: Any) -> None:
    """Check the settings of an SFTConfig that depend on each other, and set the best metric.

    Raises: ValueError if settings exclude each other or need another one.
    """
    _check_best(args)
    _check_score(args)
    if (args.instruction_part is None) != (args.response_part is None):
        raise ValueError("instruction_part and response_part need each other; give both")
    if args.response_part is not None and args.assistant_only_loss is False:
        raise ValueError(
            "response_part trains on answers only, but assistant_only_loss=False trains on "
            "everything; leave one of them out"
        )
    if args.bf16 and args.fp16:
        raise ValueError("bf16=True and fp16=True exclude each other; leave one out")
    if args.max_steps == 0 or args.max_steps < -1:
        raise ValueError(
            f"max_steps is {args.max_steps}; expected at least 1, or -1 for num_train_epochs"
        )
    if args.template_date is not None:
        check_date(args.template_date)
    for size in (args.memory_budget, args.host_memory):
        if size is not None:
            parse_bytes(size)
    if args.overwrite and args.resume:
        raise ValueError(
            "overwrite and resume exclude each other: "
            "one deletes the old run, the other continues it"
        )
    if args.warmup_steps >= 1 and args.warmup_steps != int(args.warmup_steps):
        raise ValueError(
            f"warmup_steps is {args.warmup_steps}; expected whole steps, or a share below 1"
        )
    if args.lr_scheduler_type == "constant" and (args.warmup_steps or args.warmup_ratio):
        raise ValueError(
            "lr_scheduler_type 'constant' has no warm-up; choose 'constant_with_warmup'"
        )


def normal_value(name: str, value: Any) -> Any:
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
    if name == "score_answer" and callable(value):
        raise ValueError(
            "score_answer is a function; pass it to SFTTrainer(score_answer=...), or name it here "
            "as FILE.py:FUNCTION"
        )
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


def _check_score(args: Any) -> None:
    """Raise ValueError if score_answer names no function."""
    name = args.score_answer
    if name is not None and name not in SCORES and not re.fullmatch(r".+\.py:[^\W\d]\w*", name):
        raise ValueError(
            f"score_answer is {shown(name)}; name a function of a Python file as FILE.py:FUNCTION, "
            f"or choose {' or '.join(SCORES)}"
        )


def _check_best(args: Any) -> None:
    """Name the metric of the best checkpoint if one is asked for.

    Raises: ValueError if evaluations and checkpoints do not meet.
    """
    if args.greater_is_better and args.metric_for_best_model is None:
        raise ValueError("greater_is_better is True without metric_for_best_model; leave it out")
    if args.greater_is_better and args.metric_for_best_model in LOSS_METRICS:
        raise ValueError(
            f"greater_is_better is True, but a lower {args.metric_for_best_model} is better; "
            "leave it out"
        )
    needs_best = args.load_best_model_at_end or args.save_strategy == "best"
    if needs_best and args.metric_for_best_model is None:
        object.__setattr__(args, "metric_for_best_model", "loss")
    metric = args.metric_for_best_model
    if metric is not None and args.greater_is_better is None:
        object.__setattr__(args, "greater_is_better", not metric.endswith("loss"))
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
