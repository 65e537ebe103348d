"""The planner of a model's passes, and plans without a model.

A `Planner` is passed to the model and to the micro-step. It owns the settings that plans depend on,
and remembers the largest plan.
"""

import torch

from minitune.config.model_config import ModelConfig
from minitune.config.training_config import PLANNED_CHECKPOINTING, LoraConfig
from minitune.device import free_memory
from minitune.memory.device_rates import DeviceRates, machine_rates
from minitune.memory.memory_model import MemoryModel, Storage, static_parts
from minitune.memory.model_shape import ModelShape
from minitune.memory.plan import Plan, Workload
from minitune.memory.search import MemoryBudget, fastest_plan, uniform_plan
from minitune.memory.stored_weights import StoredWeights
from minitune.model.activations import SaveLevel
from minitune.model.causal_lm import CausalLM
from minitune.model.packed_sequences import PackedSequences


def parse_gradient_checkpointing(use_gradient_checkpointing: bool | str) -> SaveLevel | None:
    """Return the SaveLevel of a `use_gradient_checkpointing` argument, or None for the planner's.

    Raises: ValueError for any other value than True, False, "unsloth" and "auto".
    """
    if use_gradient_checkpointing is True:
        return SaveLevel.INPUT
    if use_gradient_checkpointing is False:
        return SaveLevel.ALL
    if use_gradient_checkpointing in PLANNED_CHECKPOINTING:
        return None
    words = " or ".join(repr(word) for word in PLANNED_CHECKPOINTING)
    raise ValueError(
        f"use_gradient_checkpointing is {use_gradient_checkpointing!r}; choose True, False, {words}"
    )


def checkpointing_word(level: SaveLevel | None) -> str:
    """Return use_gradient_checkpointing as on the command line; None means that it is planned."""
    return {SaveLevel.ALL: "false", SaveLevel.INPUT: "true"}.get(level, "unsloth")


def plan_memory(
    config: ModelConfig,
    lora: LoraConfig,
    workload: Workload,
    budget: MemoryBudget,
    *,
    itemsize: int = 2,
    weights: StoredWeights | None = None,
    storage: Storage | None = None,
    level: SaveLevel | None = None,
    rates: DeviceRates | None = None,
) -> Plan:
    """Return the plan of a micro-step, without a model and without a GPU.

    itemsize: bytes of an element in the compute dtype.
    weights: the frozen weights as they are stored; by default linears in NF4.
    storage: by default the moments are in float32.
    level: SaveLevel of every layer, or None for the fastest plan. If none fits into the budget, the
        result is the plan that needs least memory.
    rates: of the machine; by default those of one H200.
    """
    shape = ModelShape.of(
        config, lora, itemsize, max_seq_length=workload.max_seqlen, weights=weights
    )
    memory = MemoryModel(shape, workload)
    static = static_parts(config, shape, workload.max_seqlen, storage)
    if level is not None:
        return uniform_plan(memory, level, static, rates)
    return fastest_plan(memory, static, budget, rates, allow_resident_weights=True)


class Planner:
    """The plans of one model's forward and backward passes.

    level: the SaveLevel of every layer, or None to choose the fastest plan within the budgets.
    memory_budget: bytes of GPU memory for everything, or None for all that is free.
    host_budget: bytes of host memory for offloaded activations.
    rates: the rates of the device, or None until `measure_rates` or a plan needs them.
    largest: the plan with the highest peak so far, or None before the first plan.

    The budgets may be set at any time; the next plan keeps to them.
    """

    def __init__(
        self,
        level: SaveLevel | None = SaveLevel.INPUT,
        memory_budget: int | None = None,
        host_budget: int = 0,
    ):
        self.level = level
        self.memory_budget = memory_budget
        self.host_budget = host_budget
        self.rates: DeviceRates | None = None
        self.largest: Plan | None = None
        self._weights: StoredWeights | None = None  # of the model, which never change

    def measure_rates(self, device: torch.device) -> None:
        """Set `rates` to those of a GPU, if plans depend on them and they are not set yet.

        A run calls this before it times a step or counts its memory.
        """
        if self.level is None and self.rates is None and device.type == "cuda":
            self.rates = machine_rates(device)

    def memory_limit(self, device: torch.device) -> int:
        """Return the bytes that plans may use: the usable memory, capped by memory_budget."""
        allocated = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        limit = free_memory(device) + allocated
        return limit if self.memory_budget is None else min(limit, self.memory_budget)

    def plan_for(
        self,
        model: CausalLM,
        packed: PackedSequences,
        already_allocated: int = 0,
        allow_resident_weights: bool = False,
    ) -> Plan:
        """Return the plan of a forward and backward pass over `packed`, and remember the largest.

        already_allocated: bytes that are allocated and that the plan counts as well.
        allow_resident_weights: True if the plan may keep weights dequantised.
        """
        plan = self.plan_for_tokens(
            model,
            len(packed.positions),
            packed.max_seqlen,
            model.layer_context.attention_kwargs(packed)["uniform_seqlen"] is not None,
            already_allocated,
            allow_resident_weights,
        )
        if self.largest is None or plan.peak > self.largest.peak:
            self.largest = plan
        return plan

    def plan_for_tokens(
        self,
        model: CausalLM,
        tokens: int,
        max_seqlen: int | None = None,
        cudnn: bool = False,
        already_allocated: int = 0,
        allow_resident_weights: bool = False,
    ) -> Plan:
        """Return the plan of a pass over `tokens` tokens in samples of at most `max_seqlen`.

        cudnn: True if attention may use cuDNN; the other arguments are those of `plan_for`.
        """
        device = model.device
        if self._weights is None:
            self._weights = StoredWeights.of_model(model)
        shape = ModelShape.of(
            model.config,
            model.lora,
            model.dtype.itemsize,
            model.max_seq_length,
            device.type,
            self._weights,
        )
        memory = MemoryModel(shape, Workload(tokens, max_seqlen or tokens, cudnn))
        allocated = 0
        if device.type == "cuda":
            allocated = torch.cuda.memory_allocated(device) - already_allocated
        if not model.layer_context.weight_buffers:  # not allocated yet
            allocated += shape.weight_buffer_bytes
        static = (("allocated", allocated),)
        if self.level is not None:
            return uniform_plan(memory, self.level, static)
        self.measure_rates(device)
        budget = MemoryBudget(self.memory_limit(device), self.host_budget)
        return fastest_plan(memory, static, budget, self.rates, allow_resident_weights)

    def plan_with_less(self, device: torch.device, nbytes: int | None = None) -> tuple[int, int]:
        """Lower memory_budget by `nbytes`, or by a sixth, and forget the largest plan.

        Return the memory limit before and after.
        """
        limit = self.memory_limit(device)
        self.memory_budget = limit - (limit // 6 if nbytes is None else min(nbytes, limit))
        self.largest = None
        return limit, self.memory_budget

    def plan_without_host(self) -> None:
        """Offload nothing from now on, and forget the largest plan."""
        self.host_budget = 0
        self.largest = None
