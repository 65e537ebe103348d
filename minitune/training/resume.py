"""The settings that repeat a run, and the values that a resumed run has to share with it.

config.toml holds the settings, resolved, for `--config`.

state.json of a checkpoint holds an identity, the values that decide a run's numbers. `--resume`
compares it with the current settings:

    SAME_ORDER        a change alters which samples follow: refused
    SAME_MATHEMATICS  a change alters what is minimised: a warning
    SAME_ROUNDING     a change splits the same sums differently, so losses may differ in rounding:
                      a warning

It also holds plan inputs. Plans depend on the free memory and on measured speeds, and their row
tiles and micro-steps decide the order of sums. A run therefore fixes these inputs when it starts,
and a resumed run plans with the same ones. A resumed run then gives the same bits as an
uninterrupted run, in its losses and in its adapter.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minitune.config.cli import as_dict, with_absolute_paths
from minitune.config.sft_config import SFTConfig
from minitune.config.training_config import RunConfig
from minitune.device import free_memory, gib_text
from minitune.memory.device_rates import DeviceRates
from minitune.memory.planner import Planner, checkpointing_word
from minitune.model.causal_lm import CausalLM
from minitune.training.checkpoint import (
    REMEDY,
    STATE,
    Progress,
    RunSize,
    load_checkpoint,
    read_state,
)
from minitune.training.optimizer import FlatAdamW
from minitune.training.out_of_memory import DEFAULT_MICRO_STEP_TOKENS, fit_micro_step_tokens
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
# Share of the free memory that a run keeps in reserve for drivers and other processes. On a CPU,
# other programs use the same memory.
MEMORY_RESERVE = {"cuda": 0.01, "cpu": 0.25}
# A resumed run keeps its recorded host budget if that is at most this share of the free host
# memory. A new run takes half of the free host memory.
MAX_HOST_SHARE = 0.75


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
        load_in_4bit=any(linear.is_quantized for _, linear in model.linears()),
        dtype=str(model.dtype).removeprefix("torch."),
        offload_embedding=model.model.embed_tokens.weight.device.type != model.device.type,
        use_gradient_checkpointing=checkpointing_word(model.planner.level),
        random_state=model.lora_seed,
    )
    if given is None:
        return of_model
    settings = {name: value for name, value in as_dict(given).items() if value not in (None, ())}
    return replace(of_model, **settings)


# ---- identity


def run_identity(model: CausalLM, args: SFTConfig, size: RunSize, data: RunData) -> dict[str, Any]:
    """Return the values that decide the numbers of a run, by the names in SAME_*."""
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
        "load_in_4bit": any(linear.is_quantized for _, linear in model.linears()),
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
    """Return `name old -> new` for each of the names whose value changed."""
    return [
        f"{name} {before.get(name)} -> {now[name]}"
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
    changes = ", ".join(wrong + _changes(SAME_MATHEMATICS, before, now))
    raise ValueError(
        f"{source} cannot be continued: {changes}; another value of {wrong[0].split()[0]} changes "
        "which samples follow; use the same value, or start again with overwrite=True"
    )


# ---- plan inputs


@dataclass(frozen=True)
class PlanInputs:
    """The numbers that decide the plans and the micro-steps of a run.

    memory_budget: bytes of the device's memory for everything.
    host_budget: bytes of host memory for offloaded activations.
    micro_step_tokens: tokens of one forward/backward at most.
    rates: the speeds of a GPU by their names in DeviceRates; None on a CPU.
    """

    memory_budget: int
    host_budget: int
    micro_step_tokens: int
    rates: dict[str, float] | None = None

    @classmethod
    def from_state(cls, values: Any, source: Path) -> "PlanInputs":
        """Return the plan inputs that a checkpoint's state holds.

        source: the file that errors name.

        Raises: ValueError if a value is missing or of another type.
        """
        if not isinstance(values, dict):
            raise ValueError(f"{source}: plan_inputs is {values!r}; {REMEDY}")
        for name in ("memory_budget", "host_budget", "micro_step_tokens"):
            value = values.get(name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{source}: plan_inputs.{name} is {value!r}; {REMEDY}")
        rates = values.get("rates")
        if rates is not None:
            names = {item.name for item in fields(DeviceRates)}
            if not isinstance(rates, dict) or rates.keys() != names:
                raise ValueError(f"{source}: plan_inputs.rates is {rates!r}; {REMEDY}")
            for name, value in rates.items():
                if type(value) is not float or not value > 0:
                    raise ValueError(f"{source}: plan_inputs.rates.{name} is {value!r}; {REMEDY}")
        return cls(
            values["memory_budget"], values["host_budget"], values["micro_step_tokens"], rates
        )


def fix_plan_inputs_(
    planner: Planner,
    model: CausalLM,
    args: SFTConfig,
    max_seqlen: int,
    recorded: PlanInputs | None = None,
) -> tuple[PlanInputs, list[str]]:
    """Fix the inputs of `planner` in place for a whole run.

    max_seqlen: tokens of the longest sample.
    recorded: the inputs of the run that is continued, or None. Its budgets are taken if as much
        memory is free now.

    Returns the inputs, and for each budget that is smaller than recorded a text that says so.
    """
    device = model.device
    free = Planner(planner.level).memory_limit(device)
    memory_budget = int(free * (1 - MEMORY_RESERVE[device.type]))
    if planner.memory_budget is not None:
        memory_budget = min(memory_budget, planner.memory_budget)
    shortages = []
    if recorded is not None:
        if recorded.memory_budget <= free:
            memory_budget = recorded.memory_budget
        elif planner.level is None or device.type == "cuda":
            shortages.append(_shortage(recorded.memory_budget, free, f"memory on {device}"))
        host_limit = _host_limit(planner.host_budget, args)
        if recorded.host_budget <= host_limit:
            planner.host_budget = recorded.host_budget
        else:
            shortages.append(_shortage(recorded.host_budget, host_limit, "host memory"))
        if recorded.rates is not None:
            planner.rates = DeviceRates(**recorded.rates)
    planner.memory_budget = memory_budget
    planner.measure_rates(device)

    if args.micro_step_tokens is not None:
        tokens = args.micro_step_tokens
    elif recorded is not None and recorded.memory_budget == memory_budget:
        tokens = recorded.micro_step_tokens
    else:
        default = DEFAULT_MICRO_STEP_TOKENS[device.type]
        tokens = fit_micro_step_tokens(planner, model, default, max_seqlen)
    return current_plan_inputs(planner, tokens), shortages


def current_plan_inputs(planner: Planner, micro_step_tokens: int) -> PlanInputs:
    """Return the inputs that a planner plans with now. Out-of-memory errors lower its budgets."""
    rates = None if planner.rates is None else asdict(planner.rates)
    return PlanInputs(planner.memory_budget, planner.host_budget, micro_step_tokens, rates)


def _host_limit(host_budget: int, args: SFTConfig) -> int:
    """Return the largest host budget that a resumed run may take from its checkpoint."""
    if args.host_memory is not None or host_budget == 0:
        return host_budget
    return max(host_budget, int(MAX_HOST_SHARE * free_memory(torch.device("cpu"))))


def _shortage(recorded: int, free: int, memory: str) -> str:
    """Return the text for a recorded budget of which only `free` bytes are available."""
    return (
        f"planned with {gib_text(recorded)} of {memory}, of which {gib_text(free)} "
        "are free: losses may differ in rounding"
    )


# ---- resuming


class ResumedRun(NamedTuple):
    """The state of a run that continues from a checkpoint.

    plan_inputs: None if the checkpoint has none, or if a setting in SAME_ROUNDING changed.
    warnings: texts for the user on changed settings.
    """

    progress: Progress
    plan_inputs: PlanInputs | None
    warnings: list[str]


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
    if _is_same_model(before.get("model"), identity["model"]):
        before = {**before, "model": identity["model"]}
    _check_order(source, before, identity)
    progress = Progress.from_state(state["progress"], path)
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
    return ResumedRun(progress, plan_inputs, warnings)


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
