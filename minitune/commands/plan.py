"""Print the memory and time of a training step, without a GPU and without weights.

    minitune plan --model DIR --memory-budget 24GiB [--max-seq-length 4096 ...]

The model folder needs config.json only. The flags are those of `minitune train`.
"""

from collections.abc import Sequence

import torch

from minitune.checkpoints.safetensors_folder import resolve_model
from minitune.config.cli import Settings, parse, print_notes, run_command
from minitune.config.model_config import ModelConfig
from minitune.config.training_config import GRADIENT_CHECKPOINTING, parse_bytes
from minitune.device import gib_text
from minitune.memory.memory_model import Storage
from minitune.memory.plan import Plan, Workload, plan_table
from minitune.memory.planner import parse_gradient_checkpointing, plan_memory
from minitune.memory.search import MemoryBudget
from minitune.training.out_of_memory import (
    DEFAULT_MICRO_STEP_TOKENS,
    default_host_budget,
    halve_until_fits,
)

DESCRIPTION = "Print the memory and time of a training step. Needs --model and --memory-budget."


def main(argv: Sequence[str] | None = None, program: str = "minitune plan") -> int:
    """Run the command and return its exit code."""
    return run_command(program, _run, argv, program)


def _run(argv: Sequence[str] | None, program: str) -> None:
    settings = parse(argv, program, description=DESCRIPTION, switches=())
    print(plan(settings, program))


def plan(settings: Settings, program: str) -> str:
    """Return the plan of a step as a table.

    program: the command as the user types it, for error messages.

    Raises: ValueError if the model or the memory budget is missing or wrong.
    """
    run, sft = settings.run, settings.sft
    if run.model is None:
        raise ValueError(f"--model is missing: {program} --model DIR --memory-budget 24GiB")
    if sft.memory_budget is None and not torch.cuda.is_available():
        raise ValueError("--memory-budget is missing and there is no GPU; give it, such as 24GiB")
    budget = parse_bytes(sft.memory_budget) if sft.memory_budget else torch.cuda.mem_get_info()[0]
    host_memory = parse_bytes(sft.host_memory) if sft.host_memory else default_host_budget()
    config = ModelConfig.from_folder(resolve_model(run.model))
    print_notes(config.notes)
    max_seqlen = sft.max_length or run.max_seq_length or config.default_seq_length
    config.check_seq_length(max_seqlen)
    checkpointing = GRADIENT_CHECKPOINTING[run.use_gradient_checkpointing]
    storage = Storage(run.load_in_4bit, run.offload_embedding, sft.optim == "adamw_8bit")

    def planned(tokens: int) -> Plan:
        return plan_memory(
            config,
            settings.lora,
            Workload.of_samples(tokens, max_seqlen),
            MemoryBudget(budget, host_memory),
            storage=storage,
            level=parse_gradient_checkpointing(checkpointing),
        )

    tokens = sft.micro_step_tokens
    if tokens is None:
        max_tokens = max(DEFAULT_MICRO_STEP_TOKENS["cuda"], max_seqlen)
        tokens = halve_until_fits(max_tokens, max_seqlen, lambda n: planned(n).peak > budget)
    table = plan_table(planned(tokens), tokens, budget)
    return (
        f"{run.model}: {tokens:,} tokens a forward/backward, in samples of up to {max_seqlen:,}, "
        f"on {gib_text(budget)}\n{table}"
    )
