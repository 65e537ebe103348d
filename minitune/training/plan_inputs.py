"""The numbers that decide the plans of a run. They stay the same for the whole run.

Plans depend on the free memory and on measured speeds, and their row tiles and micro-steps decide
the order of sums. A run therefore fixes these inputs when it starts, and records them in each
checkpoint.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from minitune.config.numbers import number, shown, whole
from minitune.config.sft_config import SFTConfig
from minitune.device import free_memory, gib_text
from minitune.memory.device_rates import DeviceRates
from minitune.memory.planner import Planner
from minitune.model.causal_lm import CausalLM
from minitune.training.checkpoint import REMEDY
from minitune.training.out_of_memory import DEFAULT_MICRO_STEP_TOKENS, fit_micro_step_tokens

# Share of the free memory that a run keeps in reserve for drivers and other processes. On a CPU,
# other programs use the same memory.
MEMORY_RESERVE = {"cuda": 0.01, "cpu": 0.25}
# A resumed run keeps its recorded host budget if that is at most this share of the free host
# memory. A new run takes half of the free host memory.
MAX_HOST_SHARE = 0.75
BUDGETS = whole(0, 1 << 62)  # bytes or tokens
RATES = number(1e-30, 1e30)


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
            raise ValueError(f"{source}: plan_inputs is {shown(values)}; {REMEDY}")
        for name in ("memory_budget", "host_budget", "micro_step_tokens"):
            value = values.get(name)
            if not BUDGETS.hold(value):
                raise ValueError(f"{source}: plan_inputs.{name} is {shown(value)}; {REMEDY}")
        rates = values.get("rates")
        if rates is not None:
            names = {item.name for item in fields(DeviceRates)}
            if not isinstance(rates, dict) or rates.keys() != names:
                raise ValueError(f"{source}: plan_inputs.rates is {shown(rates)}; {REMEDY}")
            for name, value in rates.items():
                if not RATES.hold(value):
                    raise ValueError(
                        f"{source}: plan_inputs.rates.{name} is {shown(value)}; {REMEDY}"
                    )
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
