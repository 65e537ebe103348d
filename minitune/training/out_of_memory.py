"""What a training run does about memory: plan with it, compare the plan with what was measured, and plan with less.

Plans are made by the model, for every new size of micro-step (plan.py). Here are the settings that they are made by,
and what happens where a plan was wrong.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from minitune.config.training_config import parse_bytes
from minitune.device import free_memory

if TYPE_CHECKING:
    from minitune.training.trainer import SFTTrainer

SMALLER_PLANS = 4  # that are tried where memory runs out, each with a sixth less
LEAST_TOKENS = 1024  # of a micro-step, where memory and not the user decides

T = TypeVar("T")


def size_setting(trainer: "SFTTrainer", name: str) -> int | None:
    """A setting in bytes. ValueError where there is nothing that could be chosen by it."""
    size, model = getattr(trainer.args, name), trainer.model
    if size is None:
        return None
    if model.device.type != "cuda" or model.level is not None:
        raise ValueError(
            f"{name} {size} decides what a GPU keeps where use_gradient_checkpointing is 'unsloth'; the model is on "
            f"{model.device}, with {trainer.settings['use_gradient_checkpointing']!r}"
        )
    return parse_bytes(size)


def host_memory_for(trainer: "SFTTrainer") -> int:
    """Bytes of the host's memory that activations may wait in: as set, or half of what is available."""
    size = size_setting(trainer, "host_memory")
    if size is not None:
        return size
    return (
        default_host_budget()
        if trainer.model.device.type == "cuda" and trainer.model.level is None
        else 0
    )


def default_host_budget() -> int:
    """Half of the host's free bytes; none where torch sees no GPU."""
    return free_memory(torch.device("cpu")) // 2 if torch.cuda.is_available() else 0


def fit_micro_step_tokens(trainer: "SFTTrainer") -> int:
    """The default of micro_step_tokens, or as much less as it takes to fit into a GPU's memory."""
    tokens, model = trainer.micro_step_tokens, trainer.model
    if trainer.args.micro_step_tokens is not None or model.device.type == "cpu":
        return tokens
    longest = max(len(sample.input_ids) for sample in trainer.train_data.samples)
    return halve_until_fits(
        tokens, longest, lambda n: model.plan(n, longest).peak > model.memory_limit()
    )


def halve_until_fits(tokens: int, longest: int, too_many: Callable[[int], bool]) -> int:
    """`tokens` halved as long as they are too many and the longest sample still fits in."""
    while tokens // 2 >= max(LEAST_TOKENS, longest) and too_many(tokens):
        tokens //= 2
    return tokens


def retry_on_oom(trainer: "SFTTrainer", accumulate: Callable[[], T]) -> T:
    """`accumulate` with all gradients at zero; again, with smaller plans, where memory runs out and plans decide."""
    if trainer.micro_step.planned is None and trainer.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(
            trainer.model.device
        )  # what loading took is not what a step takes
    for _ in range(SMALLER_PLANS):
        trainer.optimizer.zero_grad()
        try:
            return accumulate()
        except torch.OutOfMemoryError:
            if trainer.model.level is not None:
                raise
            plan_anew = _plan_with_less
        except MemoryError as error:
            if trainer.model.host_memory == 0:
                raise
            plan_anew = partial(_plan_without_host, why=str(error))
        plan_anew(trainer)  # out here nothing holds the tensors of the step that failed
    trainer.optimizer.zero_grad()
    return accumulate()


def run_in_graph_pool(trainer: "SFTTrainer", work: Callable[[], T]) -> T:
    """`work` in the graphs' memory; where that is too little, again without graphs and dequantised weights."""
    with contextlib.suppress(torch.OutOfMemoryError), trainer.micro_step.own_memory():
        return work()
    trainer.micro_step.close()
    return work()


def _plan_with_less(trainer: "SFTTrainer") -> None:
    model, planned, limit = trainer.model, trainer.micro_step.planned, trainer.model.memory_limit()
    trainer.micro_step.close()
    trainer.micro_step.planned = None
    model.memory_budget = limit * 5 // 6
    expected = "" if planned is None else f"{_gib(planned.peak)} were planned and "
    warnings.warn(
        f"{model.device} is out of memory in step {trainer.progress.step + 1}, though {expected}{_gib(limit)} "
        f"expected; trying the step again with a plan for {_gib(model.memory_budget)}",
        stacklevel=2,
    )


def _plan_without_host(trainer: "SFTTrainer", why: str) -> None:
    trainer.micro_step.close()
    trainer.micro_step.planned = None
    trainer.model.host_memory = 0
    warnings.warn(
        f"{why}: activations stay on the GPU or are computed again, which takes longer",
        stacklevel=2,
    )


def planned_vs_measured(trainer: "SFTTrainer") -> str | None:
    """A line of what was planned beside what was measured; none on a CPU, whose peak nobody counts."""
    planned, device = trainer.micro_step.planned, trainer.model.device
    if planned is None or device.type == "cpu":
        return None
    measured = torch.cuda.max_memory_allocated(device)
    return f"{'memory':<11}{_gib(planned.peak)} planned, {_gib(measured)} measured; {planned}"


@contextlib.contextmanager
def oom_as_value_error(trainer: "SFTTrainer") -> Iterator[None]:
    """A GPU that runs out of memory within becomes a ValueError that says what needs less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        settings, planned = trainer.settings, trainer.micro_step.planned
        expected = "" if planned is None else f" ({_gib(planned.peak)} were planned)"
        raise ValueError(
            f"{trainer.model.device} is out of memory in step {trainer.progress.step + 1}{expected}; lower "
            f"micro_step_tokens ({trainer.micro_step_tokens}) or max_length ({trainer.max_length}), or set "
            f"use_gradient_checkpointing to true (it is {settings['use_gradient_checkpointing']}) or load_in_4bit to "
            f"true (it is {settings['load_in_4bit']}); last checkpoint: {trainer.last_checkpoint()}"
        ) from error


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
