"""The settings that repeat a run, and the values that a resumed run has to share with it.

config.toml holds the settings, resolved, for `--config`.

state.json of a checkpoint holds an identity, the values that decide a run's numbers. `--resume`
compares it with the current settings. Another base model (base_identity.py) is refused. Of the
settings:

    SAME_ORDER        a change alters which samples follow: refused
    SAME_MATHEMATICS  a change alters what is minimised: a warning
    SAME_ROUNDING     a change splits the same sums differently, so losses may differ in rounding:
                      a warning

It also holds plan inputs (plan_inputs.py). A resumed run plans with the same ones. It then gives
the same bits as an uninterrupted run, in its losses and in its adapter.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minitune.config.cli import as_dict, with_absolute_paths
from minitune.config.sft_config import SFTConfig
from minitune.config.training_config import RunConfig
from minitune.memory.planner import checkpointing_word
from minitune.model.causal_lm import CausalLM
from minitune.training.base_identity import base_identity, check_same_base
from minitune.training.checkpoint import (
    STATE,
    Progress,
    RunSize,
    load_checkpoint,
    read_state,
)
from minitune.training.loss_scale import LossScale
from minitune.training.optimizer import FlatAdamW
from minitune.training.plan_inputs import PlanInputs
from minitune.training.run_data import RunData

SAME_ORDER = ("seed", "samples_per_step", "packing", "max_length", "data")
SAME_MATHEMATICS = (
    "model",
    "load_in_4bit",
    "dtype",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_cycles",
    "warmup_steps",
    "warmup_ratio",
    "total_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
)
SAME_ROUNDING = (
    "micro_step_tokens",
    "memory_budget",
    "host_memory",
    "use_gradient_checkpointing",
    "cuda_graphs",
    "attention",
    "device",
    "threads",
)


# ---- the settings in config.toml


def resolve_run_config(
    model: CausalLM,
    data: tuple[str, ...],
    eval_data: tuple[str, ...],
    given: RunConfig | None = None,
) -> RunConfig:
    """Return the settings that repeat a run: those of the model, replaced by those given.

    data, eval_data: paths of the datasets; none for data in memory.
    given: the settings of a command; None, or no path, means not set.
    """
    of_model = RunConfig(
        model=model.name,
        data=data,
        eval_data=eval_data,
        max_seq_length=model.max_seq_length,
        load_in_4bit=bool(model.weight_formats),
        dtype=str(model.dtype).removeprefix("torch."),
        offload_embedding=model.model.embed_tokens.table.device.type != model.device.type,
        use_gradient_checkpointing=checkpointing_word(model.planner.level),
        random_state=model.lora_seed,
    )
    if given is None:
        return of_model
    settings = {name: value for name, value in as_dict(given).items() if value not in (None, ())}
    return replace(of_model, **settings)


# ---- identity


def run_identity(model: CausalLM, args: SFTConfig, size: RunSize, data: RunData) -> dict[str, Any]:
    """Return the values that decide the numbers of a run, by the names in SAME_*.

    The base model's config and the fingerprint of its weights stand beside them.

    Raises: ValueError if the base model cannot be read any more.
    """
    settings = as_dict(args)
    names = SAME_ORDER + SAME_MATHEMATICS + SAME_ROUNDING
    is_gpu = model.device.type == "cuda"
    return {
        **{name: settings[name] for name in names if name in settings},
        "samples_per_step": size.units_per_step,
        "max_length": data.max_length,
        "total_steps": size.total_steps,
        "data": data.train.samples.fingerprint(),
        "model": with_absolute_paths({"model": model.name})["model"],
        **base_identity(model),
        "load_in_4bit": bool(model.weight_formats),
        "dtype": str(model.dtype).removeprefix("torch."),
        "use_gradient_checkpointing": checkpointing_word(model.planner.level),
        "attention": model.layer_context.attention,
        "device": torch.cuda.get_device_name(model.device) if is_gpu else "cpu",
        "threads": None if is_gpu else torch.get_num_threads(),
    }


def recorded_threads(source: Path | None) -> int | None:
    """Return the threads of the run that saved checkpoint `source`; None if nothing is recorded."""
    if source is None:
        return None
    threads = read_state(source, identity=dict)["identity"].get("threads")
    return threads if type(threads) is int and threads > 0 else None


def _changes(names: Sequence[str], before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return `name old -> new` for each of the names whose value changed.

    The value of `data` is a fingerprint, which tells a person nothing.
    """
    return [
        "the data changed" if name == "data" else f"{name} {before.get(name)} -> {now[name]}"
        for name in names
        if before.get(name) != now[name]
    ]


def _is_same_model(before: Any, now: str) -> bool:
    """Return True if two names mean the same model.

    before: of a checkpoint. Older versions wrote a relative path as it was given.
    now: an absolute path, or an id.
    """
    if not isinstance(before, str) or not before:
        return False
    parts = Path(os.path.normpath(before)).parts
    return bool(parts) and Path(now).parts[-len(parts) :] == parts


def _check_order(source: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError if a changed setting alters which samples follow."""
    if not (wrong := _changes(SAME_ORDER, before, now)):
        return
    raise ValueError(
        f"{source} cannot be continued, because other samples would follow: {', '.join(wrong)}; "
        "restore what the run began with, or start again with overwrite=True"
    )


# ---- resuming


class ResumedRun(NamedTuple):
    """The state of a run that continues from a checkpoint.

    plan_inputs: None if the checkpoint has none, or if a setting in SAME_ROUNDING changed.
    warnings: texts for the user on changed settings.
    notes: texts for the user on what is not checked.
    """

    progress: Progress
    plan_inputs: PlanInputs | None
    warnings: list[str]
    notes: list[str]


def resume_run(
    source: Path,
    model: CausalLM,
    optimizer: FlatAdamW,
    identity: dict[str, Any],
    args: SFTConfig,
) -> ResumedRun:
    """Load adapter and optimizer in place from checkpoint `source`, and return the run's state.

    identity: values of the current run (`run_identity`).

    Raises: ValueError if the run cannot continue from `source`, or ends before its step.
    """
    state = read_state(source, progress=dict, identity=dict)
    before, path = state["identity"], source / STATE
    _check_order(source, before, identity)
    note = check_same_base(source, before, identity)
    if note is None or _is_same_model(before.get("model"), identity["model"]):
        before = {**before, "model": identity["model"]}  # moved, and the same
    progress = Progress.from_state(state["progress"], path)
    progress.loss_scale = LossScale.of_dtype(model.dtype, progress.loss_scale)
    if progress.step > identity["total_steps"]:
        raise ValueError(
            f"{source} is already past {_limit(args, identity)}; raise it, or resume from an "
            "earlier checkpoint"
        )
    plan_inputs = None
    if "plan_inputs" in state:  # checkpoints of older versions have none
        plan_inputs = PlanInputs.from_state(state["plan_inputs"], path)
    load_checkpoint(model, optimizer, source)

    warnings = []
    recorded_names = [name for name in SAME_MATHEMATICS if name in before]
    if changes := _changes(recorded_names, before, identity):
        warnings.append(f"{source} is continued with other settings: {', '.join(changes)}")
    recorded_names = [name for name in SAME_ROUNDING if name in before]
    if changes := _changes(recorded_names, before, identity):
        warnings.append(
            f"{source} is continued with {', '.join(changes)}: losses may differ in rounding"
        )
        plan_inputs = None
    return ResumedRun(progress, plan_inputs, warnings, [] if note is None else [note])


def _limit(args: SFTConfig, identity: dict[str, Any]) -> str:
    """Return the setting that limits the steps of the run, with its value."""
    if args.max_steps > 0:
        return f"max_steps {args.max_steps}"
    epochs = f"num_train_epochs {args.num_train_epochs:g}"
    return f"the {identity['total_steps']} steps of {epochs}"


def checkpoint_state(
    progress: Progress, size: RunSize, identity: dict[str, Any], plan_inputs: PlanInputs
) -> dict[str, Any]:
    """Return the content of state.json; `resume_run` reads all of it except the epoch."""
    epoch, steps_into_epoch = divmod(progress.step, size.steps_per_epoch)
    return {
        "progress": asdict(progress),
        "epoch": epoch,
        "steps_into_epoch": steps_into_epoch,
        "identity": identity,
        "plan_inputs": asdict(plan_inputs),
    }
