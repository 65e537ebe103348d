"""The search for the fastest plan within a memory budget.

Every combination of levels, tiles and offloading is a candidate. The early layers come first and
may be offloaded. The late layers save at least as much, on the GPU. For each candidate the search
tries no late layers, as many as fit, and all. The fastest plan that fits wins. Left-over memory
may hold dequantised weights. A search takes 5 to 30 ms on a CPU core, so its results are cached.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from minitune.memory.device_rates import DeviceRates
from minitune.memory.memory_model import MemoryModel
from minitune.memory.plan import Candidate, Plan
from minitune.memory.time_model import TimeModel
from minitune.model.activations import LayerPlan, SaveLevel

LEVELS = (SaveLevel.INPUT, SaveLevel.ATTENTION, SaveLevel.QKV, SaveLevel.ALL)
RECOMPUTE_SPANS = (2, 4, 8)  # numbers of consecutive layers that share one saved input
TILE_ROWS = (None, 4096, 2048, 1024, 512, 256)
# Fraction of a budget that plans leave: the allocator's blocks do not always fit together.
MARGIN = 0.05


@dataclass(frozen=True)
class MemoryBudget:
    """The memory that a plan may use.

    gpu: bytes of GPU memory for everything, weights included.
    host: bytes of host memory for offloaded activations.
    """

    gpu: int
    host: int = 0


def evaluate(
    memory: MemoryModel,
    candidate: Candidate,
    static: Sequence[tuple[str, int]],
    rates: DeviceRates,
    resident_layers: int = 0,
) -> Plan:
    """Return the plan of a candidate.

    static: (name, bytes) of everything in GPU memory that no plan changes.
    resident_layers: layers whose weights are kept dequantised.
    """
    time_model = TimeModel(memory, rates)
    saved, workspace = memory.step_bytes(candidate)
    parts = (*static, ("saved activations", saved), ("workspace", workspace))
    if resident_layers:
        resident_bytes = resident_layers * memory.shape.weight_buffer_bytes
        parts += (("dequantised weights", resident_bytes),)
    # Forward and backward dequantise each layer once.
    gain = 2 * resident_layers * time_model.dequantise_seconds
    return Plan(
        layers=candidate.layer_plans(memory.shape.layers),
        tile_rows=candidate.tile_rows,
        host_bytes=memory.host_bytes(candidate),
        cudnn=candidate.cudnn,
        resident_layers=resident_layers,
        saved_bytes=saved,
        parts=parts,
        seconds=time_model.seconds(candidate) - gain,
    )


def uniform_plan(
    memory: MemoryModel,
    level: SaveLevel,
    static: Sequence[tuple[str, int]],
    rates: DeviceRates | None = None,
) -> Plan:
    """Return the plan in which every layer uses the same save level, on the GPU, without tiles."""
    candidate = Candidate(level, LayerPlan(level), memory.shape.layers, None, memory.cudnn)
    return evaluate(memory, candidate, static, rates or DeviceRates())


@lru_cache(maxsize=256)
def fastest_plan(
    memory: MemoryModel,
    static: tuple[tuple[str, int], ...],
    budget: MemoryBudget,
    rates: DeviceRates | None = None,
    allow_resident_weights: bool = False,
) -> Plan:
    """Return the fastest plan within the budget.

    If no plan fits, return the plan that needs the least memory.

    static: (name, bytes) of everything in GPU memory that no plan changes; it counts too.
    allow_resident_weights: True if weights may be kept dequantised. Dequantised weights save the
        least time per byte, so they get only the memory that is left.
    """
    rates = rates or DeviceRates()
    time_model = TimeModel(memory, rates)
    limit = budget.gpu * (1 - MARGIN) - sum(size for _, size in static)
    sizes = {
        candidate: sum(memory.step_bytes(candidate))
        for candidate in _candidates_that_fill(memory, limit, budget.host > 0)
        if memory.host_bytes(candidate) <= budget.host
    }
    fitting = [candidate for candidate, size in sizes.items() if size <= limit]
    if not fitting:
        return evaluate(memory, min(sizes, key=sizes.get), static, rates)
    best = min(fitting, key=time_model.seconds)
    resident_layers = 0
    if allow_resident_weights:
        room = int(limit - sizes[best]) // memory.shape.weight_buffer_bytes
        resident_layers = min(room, memory.shape.layers)
    return evaluate(memory, best, static, rates, resident_layers)


def candidates(memory: MemoryModel, offload: bool) -> Iterator[Candidate]:
    """Yield every combination of levels, tiles and offloading, without late layers.

    offload: True if the early layers may offload.
    """
    workload = memory.workload
    tiles = [rows for rows in TILE_ROWS if rows is None or rows < workload.tokens]
    # cuDNN's attention is faster and needs more memory.
    attention = (True, False) if memory.cudnn else (False,)
    places = (False, True) if offload else (False,)
    for cudnn, tile_rows, late_level in product(attention, tiles, LEVELS):
        for level, offloaded in product(LEVELS, places):
            early = LayerPlan(level, offloaded)
            candidate = Candidate(late_level, early, 0, tile_rows, cudnn)
            if late_level >= level:
                yield candidate
            if late_level == level == SaveLevel.INPUT:
                for span in RECOMPUTE_SPANS:
                    yield replace(candidate, recompute_span=span)


def _candidates_that_fill(memory: MemoryModel, limit: float, offload: bool) -> Iterator[Candidate]:
    """Yield each candidate three times: with no late layers, with as many as fit, with all.

    Candidates with a `recompute_span` above 1 come once, without late layers.

    limit: bytes into which the late layers must fit.
    offload: True if the early layers may offload.
    """
    layers = memory.shape.layers
    for candidate in candidates(memory, offload):
        yield candidate
        if candidate.recompute_span > 1:
            continue

        def size(late_layers: int, candidate: Candidate = candidate) -> int:
            return sum(memory.step_bytes(replace(candidate, late_layers=late_layers)))

        # As a rule more late layers take more memory and less time.
        fitting = bisect_right(range(1, layers), limit, key=size)
        yield replace(candidate, late_layers=fitting)
        yield replace(candidate, late_layers=layers)
