"""The search for the fastest plan within a memory budget, and the object that a model and a run plan with."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import product

import torch

from minitune.config.model_config import ModelConfig
from minitune.config.training_config import LoraConfig
from minitune.device import free_memory
from minitune.kernels.attention_cudnn import CUDNN_MIN_LENGTH
from minitune.memory.device_rates import DeviceRates, machine_rates
from minitune.memory.memory_model import MemoryModel, _host_bytes, _memory, static_parts
from minitune.memory.plan import Candidate, Plan, Workload
from minitune.memory.time_model import _dequantise, _seconds
from minitune.model.activations import LayerPlan, SaveLevel
from minitune.model.causal_lm import CausalLM
from minitune.model.packed_sequences import PackedSequences


def parse_gradient_checkpointing(use_gradient_checkpointing: bool | str) -> int | None:
    """The level that a `use_gradient_checkpointing` argument means; None, for "unsloth" and "auto": what fits.

    True recomputes, False keeps everything. Raises ValueError for anything else.
    """
    if use_gradient_checkpointing in ("unsloth", "auto"):
        return None
    if use_gradient_checkpointing is True:
        return SaveLevel.INPUT
    if use_gradient_checkpointing is False:
        return SaveLevel.ALL
    raise ValueError(
        f"use_gradient_checkpointing is {use_gradient_checkpointing!r}; choose True, False, 'unsloth' or 'auto'"
    )


SEGMENTS = (2, 4, 8)  # layers of which only the first keeps its input


LEVELS = (
    SaveLevel.INPUT,
    SaveLevel.ATTENTION,
    SaveLevel.QKV,
    SaveLevel.ALL,
)  # keeping o without q, k, v is never the best


TILES = (None, 4096, 2048, 1024, 512, 256)  # rows


MARGIN = 0.05  # of a budget: memory is handed out in blocks that do not always fit together


def evaluate(
    sizes: MemoryModel,
    load: Workload,
    choice: Candidate,
    static: Sequence[tuple[str, int]],
    rates: DeviceRates,
    dense: int = 0,
) -> Plan:
    """The plan of a choice. static: what is there whatever the plan, in bytes; dense: as in Plan."""
    kept, work = _memory(sizes, load, choice)
    parts = (*static, ("saved activations", kept), ("workspace", work))
    parts += (("dequantised weights", dense * sizes.buffers),) if dense else ()
    host = _host_bytes(sizes, load, choice)
    seconds = _seconds(sizes, load, choice, rates) - 2 * dense * _dequantise(sizes, rates)
    layers = choice.layer_plans(sizes.layers)
    return Plan(layers, choice.tile_rows, host, choice.cudnn, dense, kept, parts, seconds)


def choices(load: Workload, host: bool) -> Iterator[Candidate]:
    """All that are looked at, with a count of 0."""
    places = (False, True) if host else (False,)
    fars = [LayerPlan(level, offloaded) for level in LEVELS for offloaded in places]
    tiles = [tile for tile in TILES if tile is None or tile < load.tokens]
    ways = (
        (True, False) if load.cudnn else (False,)
    )  # cuDNN's attention is faster and needs more memory
    for cudnn, tile, near, far in product(ways, tiles, LEVELS, fars):
        if near >= far.level:
            yield Candidate(near, far, 0, tile, cudnn)
        if near == far.level == SaveLevel.INPUT:
            yield from (Candidate(near, far, 0, tile, cudnn, segment) for segment in SEGMENTS)


def uniform_plan(
    sizes: MemoryModel,
    load: Workload,
    level: int,
    static: Sequence[tuple[str, int]],
    rates: DeviceRates | None = None,
) -> Plan:
    """The plan in which all layers keep the same, on the GPU."""
    return evaluate(
        sizes,
        load,
        Candidate(level, LayerPlan(level), sizes.layers, None, load.cudnn),
        static,
        rates or DeviceRates(),
    )


@lru_cache(
    maxsize=256
)  # a loop of equal steps asks the same again and again, and a search takes 10 ms or more
def fastest_plan(
    sizes: MemoryModel,
    load: Workload,
    static: tuple[tuple[str, int], ...],
    budget: int,
    host_budget: int = 0,
    rates: DeviceRates | None = None,
    dense: bool = False,
) -> Plan:
    """The fastest plan that needs at most `budget` bytes of GPU memory and `host_budget` of the host's.

    Where none fits, the one that needs least. budget counts everything, `static` too. dense: whether weights may stay
    dequantised; for their bytes that saves less than anything else, so they get what is left.
    """
    rates, limit, L = (
        rates or DeviceRates(),
        budget * (1 - MARGIN) - sum(size for _, size in static),
        sizes.layers,
    )

    def need(choice: Candidate) -> int:
        return sum(_memory(sizes, load, choice))

    best = least = None
    for none_near in choices(load, host_budget > 0):
        found, of_count = [none_near], partial(replace, none_near)
        if (
            none_near.recompute_span == 1
        ):  # as a rule more layers that keep `near` take more memory and less time
            fitting = bisect_right(
                range(1, L), limit, key=lambda count: need(of_count(late_layers=count))
            )
            found += [of_count(late_layers=fitting), of_count(late_layers=L)]
        for choice in found:
            if _host_bytes(sizes, load, choice) > host_budget:
                continue
            memory, seconds = need(choice), _seconds(sizes, load, choice, rates)
            if least is None or memory < least[0]:
                least = memory, choice
            if memory <= limit and (best is None or seconds < best[0]):
                best = seconds, choice, memory
    if best is None:
        return evaluate(sizes, load, least[1], static, rates)
    _, choice, memory = best
    count = min(int(limit - memory) // sizes.buffers, L) if dense else 0
    return evaluate(sizes, load, choice, static, rates, count)


def plan_memory(
    config: ModelConfig,
    lora: LoraConfig,
    budget: int,
    *,
    tokens: int = 4096,
    longest: int | None = None,
    host_memory: int = 0,
    eight_bit: bool = False,
    load_in_4bit: bool = True,
    offload_embedding: bool = False,
    level: int | None = None,
    rates: DeviceRates | None = None,
) -> Plan:
    """The plan of a micro-step of `tokens` in bf16, samples of `longest`, before a model is loaded or a GPU is there.

    budget, host_memory: bytes. Where nothing fits, the plan that needs least; its peak says how much that is.
    level: what all layers keep, where that is not to be planned (recompute.py).
    Raises ValueError for a number of tokens that makes no step.
    """
    longest = tokens if longest is None else longest
    if not 0 < longest <= tokens:
        raise ValueError(
            f"samples of {longest} tokens in micro-steps of {tokens}: expected 1 to {tokens}"
        )
    sizes = MemoryModel.of(config, lora, itemsize=2)
    static = static_parts(
        sizes, config, 2.03 if eight_bit else 8, load_in_4bit, longest, offload_embedding
    )
    load = Workload(tokens, tokens * longest, tokens, cudnn=tokens == longest >= CUDNN_MIN_LENGTH)
    if level is not None:
        return uniform_plan(sizes, load, level, static, rates)
    return fastest_plan(sizes, load, static, budget, host_memory, rates, dense=True)


def plan_table(plan: Plan, tokens: int, budget: int) -> str:
    """A plan as lines of (label, text)."""
    rows = [(name, f"{size / 2**30:8.2f} GiB") for name, size in plan.parts]
    fits = "" if plan.peak <= budget else f", more than the {budget / 2**30:.2f} GiB there are"
    rows += [
        ("peak", f"{plan.peak / 2**30:8.2f} GiB{fits}"),
        ("host memory", f"{plan.host_bytes / 2**30:8.2f} GiB"),
        (
            "time",
            f"{1e3 * plan.seconds:8.0f} ms, {tokens / plan.seconds:,.0f} tokens/s at the speed of one H200",
        ),
        ("layers", str(plan)),
    ]
    return "\n".join(f"{label:<26}{text}" for label, text in rows)


class Planner:
    """The plans of one model's forward and backward passes.

    level: the SaveLevel of every layer, or None to choose the fastest plan within the budgets.
    memory_budget: bytes of GPU memory for everything, or None for all that is free.
    host_budget: bytes of host memory for offloaded activations.
    largest: the plan with the highest peak so far, or None before the first plan.
    """

    def __init__(
        self,
        level: SaveLevel | None = SaveLevel.INPUT,
        memory_budget: int | None = None,
        host_budget: int = 0,
    ):
        self.level, self.memory_budget, self.host_budget = level, memory_budget, host_budget
        self.largest: Plan | None = None

    def memory_limit(self, device: torch.device) -> int:
        """Return the bytes that plans may use: the usable device memory, capped by memory_budget."""
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
        allow_resident_weights: True if the plan may keep dequantised weights resident.
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

        cudnn: True if attention may be cuDNN's; the other arguments are those of `plan_for`.
        """
        device = model.device
        sizes = MemoryModel.of(model.config, model.lora, model.dtype.itemsize, device.type)
        static = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        static -= already_allocated if device.type == "cuda" else 0
        if not model.layer_context.weight_buffers:  # the dequantisation buffers are not allocated yet
            static += sizes.buffers
        squares = tokens * min(max_seqlen or tokens, tokens)
        load, parts = Workload(tokens, squares, tokens, cudnn), (("allocated", static),)
        if self.level is not None:
            return uniform_plan(sizes, load, self.level, parts)
        rates = machine_rates(device) if device.type == "cuda" else None
        limit = self.memory_limit(device)
        return fastest_plan(
            sizes, load, parts, limit, self.host_budget, rates, allow_resident_weights
        )

    def plan_with_less(self, device: torch.device) -> tuple[int, int]:
        """Lower memory_budget by a sixth, forget the largest plan; return the limit before and after."""
        limit = self.memory_limit(device)
        self.memory_budget, self.largest = limit * 5 // 6, None
        return limit, self.memory_budget

    def plan_without_host(self) -> None:
        """Offload nothing from now on, and forget the largest plan."""
        self.host_budget, self.largest = 0, None
