"""Out-of-memory handling: size the micro-step, compare planned and measured peak, retry with less.

A `Planner` (memory/planner.py) plans every new size of micro-step. This file makes the planner of a
run from the run's settings. If a step runs out of memory although its plan fits, the planner gets a
smaller budget and the step runs again.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch

from minitune.config.sft_config import SFTConfig
from minitune.config.training_config import parse_bytes
from minitune.device import free_memory, gib_text
from minitune.memory.planner import Planner
from minitune.model.causal_lm import CausalLM
from minitune.progress import warn
from minitune.training.cuda_graphs import MAX_SMALLER_PLANS
from minitune.training.micro_step import MicroStep

# Tokens of one forward/backward unless micro_step_tokens is given. More tokens mean fewer, larger
# launches and less dequantisation a token. Memory grows with them: an 8B model that recomputes
# needs about 0.5 GB of layer inputs per 2,000 tokens.
DEFAULT_MICRO_STEP_TOKENS = {"cuda": 8192, "cpu": 4096}
MIN_MICRO_STEP_TOKENS = 1024  # lower bound if memory, and not the user, decides

Result = TypeVar("Result")


def run_planner(model: CausalLM, args: SFTConfig, checkpointing: str) -> Planner:
    """Return the planner of a run on `model` with the budgets in `args`.

    checkpointing: the run's use_gradient_checkpointing, for the error text.

    Raises: ValueError if a budget is set and no plan depends on it.
    """
    plans = model.device.type == "cuda" and model.planner.level is None
    for name in ("memory_budget", "host_memory"):
        if (size := getattr(args, name)) is not None and not plans:
            raise ValueError(
                f"{name} {size} decides what a GPU saves if use_gradient_checkpointing is "
                f"'unsloth'; the model is on {model.device}, with {checkpointing!r}"
            )
    memory_budget = None if args.memory_budget is None else parse_bytes(args.memory_budget)
    if args.host_memory is not None:
        host_budget = parse_bytes(args.host_memory)
    else:
        host_budget = default_host_budget() if plans else 0
    return Planner(model.planner.level, memory_budget, host_budget)


def default_host_budget() -> int:
    """Return half of the host's free bytes, or 0 if torch sees no GPU."""
    return free_memory(torch.device("cpu")) // 2 if torch.cuda.is_available() else 0


def fit_micro_step_tokens(planner: Planner, model: CausalLM, tokens: int, max_seqlen: int) -> int:
    """Return `tokens`, halved until the plan of a micro-step fits into the GPU's memory.

    max_seqlen: tokens of the longest sample; a micro-step is never smaller.
    """
    if model.device.type == "cpu":
        return tokens

    def too_many(count: int) -> bool:
        plan = planner.plan_for_tokens(model, count, max_seqlen)
        return plan.peak > planner.memory_limit(model.device)

    return halve_until_fits(tokens, max_seqlen, too_many)


def halve_until_fits(tokens: int, max_seqlen: int, too_many: Callable[[int], bool]) -> int:
    """Return `tokens`, halved while `too_many(tokens)` and the half holds the longest sample."""
    while tokens // 2 >= max(MIN_MICRO_STEP_TOKENS, max_seqlen) and too_many(tokens):
        tokens //= 2
    return tokens


def retry_on_oom(
    micro_step: MicroStep,
    zero_grad: Callable[[], None],
    step: int,
    accumulate: Callable[[], Result],
) -> Result:
    """Return `accumulate()` after `zero_grad()`; retry with smaller plans if memory runs out.

    micro_step: runs the passes of `accumulate`; its planner gets the smaller budgets.
    step: number of the optimizer step, from 1, for the warning.

    Raises: torch.OutOfMemoryError if the plans cannot or may not become smaller. MemoryError if the
        host refuses memory although nothing is offloaded.
    """
    planner, device = micro_step.planner, micro_step.model.device
    if planner.largest is None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # loading does not count as a step's peak
    for _ in range(MAX_SMALLER_PLANS):
        zero_grad()
        try:
            return accumulate()
        except torch.OutOfMemoryError:
            if planner.level is not None:
                raise
            plan_anew = partial(_plan_with_less, planner, device, step)
        except MemoryError as error:
            if planner.host_budget == 0:
                raise
            plan_anew = partial(_plan_without_host, planner, str(error))
        # Outside of the except block nothing refers to the failed step's tensors.
        micro_step.close()
        plan_anew()
    zero_grad()
    return accumulate()


def run_in_graph_pool(micro_step: MicroStep, work: Callable[[], Result]) -> Result:
    """Run `work` in the CUDA graphs' pool.

    If memory runs out, drop graphs and resident weights and run `work` again.
    """
    with contextlib.suppress(torch.OutOfMemoryError), micro_step.memory_pool():
        return work()
    micro_step.close()
    return work()


def _plan_with_less(planner: Planner, device: torch.device, step: int) -> None:
    """Plan within a sixth less memory from now on, and warn."""
    planned = "" if planner.largest is None else f"{gib_text(planner.largest.peak)} of "
    before, after = planner.plan_with_less(device)
    warn(
        f"{device} is out of memory in step {step}, although {planned}{gib_text(before)} were "
        f"planned; trying the step again within {gib_text(after)}",
        stacklevel=3,
    )


def _plan_without_host(planner: Planner, reason: str) -> None:
    """Offload nothing from now on, and warn."""
    planner.plan_without_host()
    warn(
        f"{reason}: activations stay on the GPU or are recomputed, which takes longer", stacklevel=3
    )


def planned_vs_measured(planner: Planner, device: torch.device) -> str | None:
    """Return a text that compares planned and measured peak, or None on a CPU."""
    if planner.largest is None or device.type == "cpu":
        return None
    measured = torch.cuda.max_memory_allocated(device)
    plan = planner.largest
    return f"{gib_text(plan.peak)} planned, {gib_text(measured)} measured; {plan}"


@contextlib.contextmanager
def oom_as_value_error(
    planner: Planner, device: torch.device, advice: Callable[[], str]
) -> Iterator[None]:
    """Turn an out-of-memory error of the GPU into a ValueError with advice.

    advice: returns the step, the settings to lower and the last checkpoint.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        largest = planner.largest
        planned = "" if largest is None else f" ({gib_text(largest.peak)} were planned)"
        raise ValueError(f"{device} is out of memory{planned} in {advice()}") from error
