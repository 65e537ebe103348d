"""Print the memory and time of a training step, without a GPU and without weights.

    minitune plan --model llama-3-8b                  on cards of the usual sizes
    minitune plan --model DIR|FILE.gguf --memory-budget 24GiB [--max-seq-length 4096 ...]
    minitune plan --list-shapes                       the models that need no folder

The model is a GGUF file, or a folder, which needs config.json only; weights that it holds are
checked against config.json. The shapes of many published models are built in
(config/model_shapes.py). A folder of the same name wins. `minitune train --plan` takes all flags of
a training run, `minitune plan` those that a plan depends on.
"""

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from minitune.checkpoints.find_model import find_model
from minitune.checkpoints.load_weights import open_model_folder
from minitune.checkpoints.resolve_model import is_gguf, resolve_model
from minitune.config.cli import Settings, parse, print_notes, run_command
from minitune.config.model_config import EMBEDDING, ModelConfig
from minitune.config.model_shapes import SHAPES, config_of_shape, nearest_shapes, shape_name
from minitune.config.training_config import GRADIENT_CHECKPOINTING, parse_bytes
from minitune.device import BFLOAT16_CAPABILITY, gib_text
from minitune.gguf.base.load import file_bytes, open_base
from minitune.memory.memory_model import Storage
from minitune.memory.plan import Plan, Workload, plan_table
from minitune.memory.planner import parse_gradient_checkpointing, plan_memory
from minitune.memory.search import MemoryBudget
from minitune.memory.stored_weights import StoredWeights
from minitune.system_folders import expanded
from minitune.training.out_of_memory import (
    DEFAULT_MICRO_STEP_TOKENS,
    default_host_budget,
    halve_until_fits,
)

DESCRIPTION = "Print the memory and time of a training step. Needs --model."
# The settings of a run that a plan depends on.
PLAN_SETTINGS = (
    "model",
    "memory_budget",
    "host_memory",
    "max_seq_length",
    "max_length",
    "micro_step_tokens",
    "load_in_4bit",
    "dtype",
    "offload_embedding",
    "use_gradient_checkpointing",
    "optim",
    "r",
    "target_modules",
)
STORED_DTYPE = torch.bfloat16  # of most folders; also the compute dtype without a GPU
CARDS = (8, 12, 16, 24, 32, 40, 48, 80)  # GB of the usual cards
# Share of a card that a run can use: the driver, the CUDA context and the screen take the rest.
USABLE = 0.95


def main(argv: Sequence[str] | None = None, program: str = "minitune plan") -> int:
    """Run the command and return its exit code."""
    return run_command(program, _run, argv, program)


def _run(argv: Sequence[str] | None, program: str) -> None:
    settings = parse(argv, program, DESCRIPTION, ("list_shapes",), names=PLAN_SETTINGS)
    print(shape_list() if settings.list_shapes else plan(settings, program))


def shape_list() -> str:
    """Return the built-in shapes as lines of a name and a number of parameters."""
    counts = {name: _parameters(config_of_shape(name)) for name in SHAPES}
    return "\n".join(f"{name:<20}{count / 1e9:6.2f} B" for name, count in counts.items())


def _parameters(config: ModelConfig) -> int:
    return sum(map(prod, config.tensor_shapes().values()))


def plan(settings: Settings, program: str) -> str:
    """Return the plan of a step as a table.

    Without a memory budget, the plan is that of the GPU; without a GPU, one of each usual card.

    program: the command as the user types it, for error messages.

    Raises: ValueError if the model is missing or wrong.
    """
    model, sft = settings.run.model, settings.sft
    if model is None:
        raise ValueError(
            f"--model is missing: {program} --model llama-3-8b, or a folder with config.json, or a "
            "GGUF file"
        )
    planned_model = find_planned_model(model, settings.run.load_in_4bit, _dtype(settings))
    config = planned_model.config
    print_notes(config.notes)
    step = PlannedStep(settings, planned_model)
    head = f"{planned_model.label}: {_parameters(config) / 1e9:.2f} B parameters"
    if sft.memory_budget is None and not torch.cuda.is_available():
        return f"{head}\n{step.table_of_cards()}"
    budget = parse_bytes(sft.memory_budget) if sft.memory_budget else torch.cuda.mem_get_info()[0]
    tokens, planned = step.plan_within(budget)
    return (
        f"{head}; {tokens:,} tokens a forward/backward, in samples of up to "
        f"{step.max_seqlen:,}, on {gib_text(budget)}\n{plan_table(planned, tokens, budget)}"
    )


def _dtype(settings: Settings) -> torch.dtype:
    """Return the compute dtype: the given one, or the default of this machine's GPU."""
    if settings.run.dtype is not None:
        return getattr(torch, settings.run.dtype)
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < BFLOAT16_CAPABILITY:
        return torch.float16
    return STORED_DTYPE


class PlannedModel(NamedTuple):
    """A model to plan for.

    config: its shape.
    dtype: the compute dtype.
    weights: its frozen weights as a run stores them.
    label: its name for the reader.
    """

    config: ModelConfig
    dtype: torch.dtype
    weights: StoredWeights
    label: str


def find_planned_model(
    model: str, load_in_4bit: bool, dtype: torch.dtype = STORED_DTYPE
) -> PlannedModel:
    """Return the model in a GGUF file or a folder, or that of a built-in shape.

    dtype: the compute dtype.

    Raises: ValueError that names the nearest shapes if there is none.
    """
    if not expanded(model).exists():
        config, stored_dtype, label = _config_of_name(model)
    elif is_gguf(base := find_model(model).base):
        config, stored = open_base(base)
        return PlannedModel(config, dtype, file_bytes(stored, dtype), model)
    else:
        (config, stored_dtype), label = _config_of_folder(base), model
    weights = StoredWeights.of_folder(
        config, stored_dtype.itemsize, load_in_4bit, converts_head=stored_dtype != dtype
    )
    return PlannedModel(config, dtype, weights, label)


def _config_of_name(model: str) -> tuple[ModelConfig, torch.dtype, str]:
    """Return the config, weights' dtype and label of an id in the local cache or a built-in shape.

    Raises: ValueError that names the nearest shapes if there is none.
    """
    shape = shape_name(model)
    try:
        folder = resolve_model(model)
    except ValueError:
        if is_gguf(Path(model)):
            raise  # no shape is called so
        if shape is not None:
            own = "" if shape == model else f", that of {shape}"
            return config_of_shape(shape), STORED_DTYPE, f"{model} (built-in shape{own})"
        near = nearest_shapes(model)
        hint = f"did you mean {' or '.join(near)}?" if near else f"shapes are {', '.join(SHAPES)}"
        raise ValueError(
            f"{model} is no folder, is not in the local cache, and is no built-in shape; {hint}"
        ) from None
    return *_config_of_folder(folder), model


def _config_of_folder(folder: Path) -> tuple[ModelConfig, torch.dtype]:
    """Return the config of a folder, and the dtype of its weights.

    Weights that the folder holds have to fit the config.
    """
    if not any(folder.glob("*.safetensors")):
        return ModelConfig.from_folder(folder), STORED_DTYPE
    config, stored = open_model_folder(folder)
    return config, stored.dtype(EMBEDDING)


class PlannedStep:
    """A step of a run, planned for several memory budgets.

    max_seqlen: tokens of the longest sample.
    """

    def __init__(self, settings: Settings, model: PlannedModel):
        """Take the settings that the plan depends on.

        Raises: ValueError if the model cannot take samples of that length.
        """
        run, sft = settings.run, settings.sft
        self._settings, self._model, config = settings, model, model.config
        self.max_seqlen = sft.max_length or run.max_seq_length or config.default_seq_length
        config.check_seq_length(self.max_seqlen)
        self._level = parse_gradient_checkpointing(
            GRADIENT_CHECKPOINTING[run.use_gradient_checkpointing]
        )
        self._storage = Storage(run.offload_embedding, sft.optim == "adamw_8bit")
        self._host = parse_bytes(sft.host_memory) if sft.host_memory else default_host_budget()

    def _plan(self, tokens: int, budget: int) -> Plan:
        return plan_memory(
            self._model.config,
            self._settings.lora,
            Workload.of_samples(tokens, self.max_seqlen),
            MemoryBudget(budget, self._host),
            itemsize=self._model.dtype.itemsize,
            weights=self._model.weights,
            storage=self._storage,
            level=self._level,
        )

    def plan_within(self, budget: int) -> tuple[int, Plan]:
        """Return the tokens of a micro-step and its plan.

        budget: bytes of GPU memory.
        """
        tokens = self._settings.sft.micro_step_tokens
        if tokens is None:
            most = max(DEFAULT_MICRO_STEP_TOKENS["cuda"], self.max_seqlen)
            tokens = halve_until_fits(
                most, self.max_seqlen, lambda n: self._plan(n, budget).peak > budget
            )
        return tokens, self._plan(tokens, budget)

    def table_of_cards(self) -> str:
        """Return the plans on cards of the usual sizes, one a line."""
        rank, seqlen = self._settings.lora.r, self.max_seqlen
        lines = [
            f"linears in {self._model.weights}, r {rank}, samples of up to {seqlen:,} tokens"
            + (f", {gib_text(self._host)} of host memory" if self._host else ""),
            "",
            "card          peak   tokens a pass   tokens/s   host memory",
        ]
        for card in CARDS:
            tokens, planned = self.plan_within(int(card * USABLE * 2**30))
            peak, host = gib_text(planned.peak), gib_text(planned.host_bytes)
            if planned.peak > card * USABLE * 2**30:
                lines.append(f"{card:>3} GB    does not fit: at least {peak}")
                continue
            speed = tokens / planned.seconds
            lines.append(f"{card:>3} GB {peak:>11}  {tokens:>14,} {speed:>10,.0f} {host:>13}")
        lines += [
            "",
            "tokens/s is at the speed of one H200: compare the lines, not cards.",
            "--memory-budget 24GiB shows the plan of one card in full; --host-memory 32GiB",
            "offloads activations to the host, which lets larger models fit.",
        ]
        return "\n".join(lines)
