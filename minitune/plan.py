"""Memory and time of a training step, known before it runs; and the plan that takes the least time within a budget.

What there is to decide, for a micro-step of N tokens: what each layer keeps for backward and whether that waits on the
GPU or on the host (recompute.py, offload.py), and how many rows the wide parts of a layer take at a time (decoder.py).
Layers are alike, so a plan is a few numbers: the last ones keep level `near` on the GPU, where backward needs it first;
those before them keep level `far`, on the host where that helps. Each combination is priced with as many `near` layers
as fit, and the fastest is taken; in memory that is left then, the weights of the first layers stay dequantised.

Memory is counted in sizes.py. Time adds up what is multiplied and what is moved, at the rates of the machine (`Rates`);
copies to and from the host run beside the layers, which wait where a copy falls behind by more than there is room for.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product

from minitune.config import LoraConfig, ModelConfig
from minitune.kernels.attention_cudnn import WORTHWHILE
from minitune.layers import Packed
from minitune.offload import ALIGN
from minitune.recompute import KEEP_ALL, KEEP_ATTENTION, KEEP_INPUT, KEEP_NOTHING, KEEP_QKV, Keep
from minitune.sizes import NF4_BYTES, Sizes, static_parts

KEPT = (  # by level, from nothing on
    "nothing", "their input", "input and attention", "all before the MLP but q k v", "all before the MLP", "everything",
)  # fmt: skip
SHARES = (16, 12, 8, 6, 4, 3, 2)  # of the rows, one in so many keeps gate and up
SEGMENTS = (2, 4, 8)  # layers of which only the first keeps its input
LEVELS = (KEEP_INPUT, KEEP_ATTENTION, KEEP_QKV, KEEP_ALL)  # keeping o without q, k, v is never the best
TILES = (None, 4096, 2048, 1024, 512, 256)  # rows
MARGIN = 0.05  # of a budget: memory is handed out in blocks that do not always fit together


@dataclass(frozen=True)
class Rates:
    """What the machine does in a second: floating-point operations of a large matmul, bytes of a copy on the GPU, bytes
    to and from the host. The defaults are one H200's (700 W, PCIe 5), November 2026."""

    matmul: float = 740e12
    copy: float = 3.5e12  # as kernels of one layer's size reach it
    to_host: float = 50e9
    from_host: float = 50e9
    attention: float = 0.62  # of the rate of a matmul, our own
    cudnn: float = 0.72  # cuDNN's
    launch: float = 3e-6  # seconds of a small kernel in a graph, with the gap before it
    start: float = 0.35e-3  # seconds of a micro-step in which no layer runs


@dataclass(frozen=True)
class Plan:
    """What a micro-step does, and what that is expected to take."""

    layers: tuple[Keep, ...]
    tile: int | None = None
    host_bytes: int = 0
    cudnn: bool = False  # whether attention may be cuDNN's
    dense: int = 0  # layers, the first ones, whose weights stay dequantised
    parts: tuple[tuple[str, int], ...] = ()  # what the GPU's memory is for, in bytes
    seconds: float = math.nan  # of forward and backward

    @property
    def peak(self) -> int:
        """Bytes of GPU memory allocated at most."""
        return sum(size for _, size in self.parts)

    def leaving(self, i: int) -> int:
        """Bytes that may still be on their way to the host while layer i runs.

        As much as the layers after i will keep on the GPU, where nothing is yet, less one layer's, which the plan
        counts in what a layer works with. Or one layer's, up to the first of those that keep theirs on the GPU.
        """
        on_host = sum(keep.on_host for keep in self.layers)
        near = sum(not keep.on_host and keep.level != KEEP_NOTHING for keep in self.layers)
        after = len(self.layers) - 1 - i
        one = self.host_bytes // on_host if 0 < i <= len(self.layers) - near and on_host else 0
        return max(one, self.kept * min(after, near - 1) // near if near else 0)

    @property
    def kept(self) -> int:
        """Bytes of what layers keep on the GPU."""
        return dict(self.parts).get("activations", 0)

    def samples(self, packed: Packed) -> Packed:
        """As attention is to see them: without the length that cuDNN's wants, where that is not planned with."""
        return packed if self.cudnn else replace(packed, length=None)

    def __str__(self) -> str:
        """What is kept where, in words."""
        kept = Counter(self.layers)
        words = [
            f"{count} {'layer keeps' if count == 1 else 'layers keep'} {KEPT[keep.level + 1]}"
            f"{f' and {keep.wide:,} rows of gate and up' if keep.wide else ''}{' on the host' if keep.on_host else ''}"
            for keep, count in kept.items()
        ]
        words += [f"tiles of {self.tile:,} rows"] if self.tile else []
        words += [f"weights of {self.dense} layer{'s' * (self.dense > 1)} stay dequantised"] if self.dense else []
        return "; ".join(words)


@dataclass(frozen=True)
class Load:
    """What a micro-step computes: its tokens, the squares of its samples' lengths added up, how many rows have a label,
    and whether attention may be cuDNN's."""

    tokens: int
    squares: int
    labelled: int
    cudnn: bool = False


@dataclass(frozen=True)
class _Choice:
    """The last `count` layers keep level `near` on the GPU; of those before them every `segment`-th keeps `far`, and
    the others nothing."""

    near: int
    far: Keep
    count: int
    tile: int | None
    cudnn: bool = False
    segment: int = 1

    def layers(self, L: int) -> tuple[Keep, ...]:
        far = tuple(Keep(KEEP_NOTHING) if i % self.segment else self.far for i in range(L - self.count))
        return far + (Keep(self.near),) * self.count

    def keepers(self, L: int) -> int:
        """How many layers keep `far`."""
        return -(-(L - self.count) // self.segment)


def _host_bytes(sizes: Sizes, load: Load, choice: _Choice) -> int:
    layer = _kept(sizes, load, choice.far) + 10 * ALIGN  # ten tensors, each on a line of the arena
    return choice.keepers(sizes.layers) * layer if choice.far.on_host else 0


def _kept(sizes: Sizes, load: Load, keep: Keep) -> int:
    """Bytes that a layer keeps."""
    return load.tokens * sizes.kept(keep.level) + sizes.wide(keep.wide)


def _memory(sizes: Sizes, load: Load, choice: _Choice) -> tuple[int, int]:
    """Bytes of what layers keep on the GPU, and of what else is in use when most is."""
    N, before, far = load.tokens, sizes.layers - choice.count, choice.far
    T = min(choice.tile or N, N)
    near_bytes, far_bytes = N * sizes.kept(choice.near), _kept(sizes, load, far)
    held = 0 if far.on_host else far_bytes
    copied = far_bytes if far.on_host else 0  # the layer before, on its way out, or the one to come, on its way in
    others = (choice.count - 1) * near_bytes if choice.count else 0
    keepers = choice.keepers(sizes.layers)
    kept = keepers * held + choice.count * near_bytes
    peak = kept + sizes.loss(N)
    if before:
        beside = (keepers - 1) * held + (choice.segment - 1) * far_bytes + sizes.wide(far.wide)
        forward = sizes.forward(far.level, N, T, choice.cudnn)
        forward += max(copied, others if far.on_host else 0)  # Plan.leaving
        backward = copied + sizes.backward(far.level, N, T, choice.cudnn)
        peak = max(peak, beside + max(forward, backward))
    if choice.count:
        beside = keepers * held + max(copied, others)
        work = max(way(choice.near, N, T, choice.cudnn) for way in (sizes.forward, sizes.backward))
        peak = max(peak, beside + work)
    top = N * (sizes.D + max(sizes.spare[1], sizes.spare[3])) * sizes.itemsize
    return kept, peak - kept + top


def _seconds(sizes: Sizes, load: Load, choice: _Choice, r: Rates) -> float:
    """Of forward, loss and backward."""
    N, D, F, QKV, HK, b = load.tokens, sizes.D, sizes.F, sizes.HK + 2 * sizes.GK, sizes.HK, sizes.itemsize
    T = min(choice.tile or N, N)
    tiles = -(-N // T)
    rate = r.matmul * T / (T + 32)  # shorter matmuls reach less of it
    qkv, o, gate_up, down = 2 * N * D * QKV / rate, 2 * N * HK * D / rate, 4 * N * D * F / rate, 2 * N * F * D / rate
    matmuls = qkv + o + gate_up + down
    attention = 2 * load.squares * HK / (r.matmul * (r.cudnn if choice.cudnn else r.attention))
    widths = (D + QKV, HK + D, D + 2 * F, F + D)  # of x and y of each projection
    adapted = sum(width for width, spare in zip(widths, sizes.spare, strict=True) if spare)
    thin = 0.7 * N * adapted * b / r.copy  # a look at x or at dy
    dequantise = _dequantise(sizes, r)
    forward = matmuls + attention + dequantise + thin
    forward += N * (15 * D + 3 * F + 2 * QKV) * b / r.copy + (11 + 12 * tiles) * r.launch
    backward = matmuls + 3 * attention + dequantise + 3 * thin
    backward += N * (14 * D + 6 * F + 2 * QKV) * b / r.copy + (21 + 30 * tiles) * r.launch
    again = (qkv + attention + o + gate_up, qkv + o + gate_up, qkv + gate_up, gate_up, 0.0)
    before = sizes.layers - choice.count
    loss = 4 * load.labelled * (D + 256) * sizes.V / r.matmul  # a narrow head reaches less of it
    loss += 5 * load.labelled * sizes.V * b / r.copy
    wide = 2 * sizes.wide(choice.far.wide) / r.copy  # a copy of gate and up of some rows
    far_backward = backward + again[choice.far.level] + wide - gate_up * choice.far.wide / N
    nothing = before - choice.keepers(sizes.layers)
    back = choice.count * (backward + again[choice.near]) + nothing * forward
    if choice.far.on_host:
        fetch = _kept(sizes, load, choice.far) / r.from_host
        far_backward = max(far_backward, fetch / choice.segment)
        back += fetch if choice.count == 0 else 0.0  # the first one, which runs beside nothing
    ahead = sizes.layers * forward + before * wide + _waits(sizes, load, choice, forward, r)
    return r.start + ahead + loss + back + before * far_backward


def _waits(sizes: Sizes, load: Load, choice: _Choice, forward: float, r: Rates) -> float:
    """Seconds that forward waits for copies to the host, with as many on their way as `Plan.leaving` lets.

    While layers run, what they keep falls behind, by whole layers as long as there is room; then each one waits; and
    what is left in the end is waited for, which may be as soon as the last layer.
    """
    keepers = choice.keepers(sizes.layers)
    if not choice.far.on_host or not keepers:
        return 0.0
    far, near = _kept(sizes, load, choice.far), load.tokens * sizes.kept(choice.near)
    run = forward * r.to_host  # bytes that leave while a layer runs
    between = choice.segment * run
    behind = keepers * max(far - between, 0.0) + min(far, between)  # when the last that goes to the host has run
    room = max((choice.count - 1) * near, far) // far * far
    left = min(behind, room) - max(choice.count - 1, min(choice.count, 1)) * run
    return (max(behind - room, 0.0) + max(left, 0.0)) / r.to_host


def _dequantise(sizes: Sizes, r: Rates) -> float:
    """Seconds for the weights of a layer."""
    return sizes.of_layer * (NF4_BYTES + sizes.itemsize) / r.copy


def price(
    sizes: Sizes, load: Load, choice: _Choice, static: Sequence[tuple[str, int]], rates: Rates, dense: int = 0
) -> Plan:
    """The plan of a choice. static: what is there whatever the plan, in bytes; dense: as in Plan."""
    kept, work = _memory(sizes, load, choice)
    parts = (*static, ("activations", kept), ("workspace", work))
    parts += (("dequantised weights", dense * sizes.buffers),) if dense else ()
    host = _host_bytes(sizes, load, choice)
    seconds = _seconds(sizes, load, choice, rates) - 2 * dense * _dequantise(sizes, rates)
    return Plan(choice.layers(sizes.layers), choice.tile, host, choice.cudnn, dense, parts, seconds)


def choices(load: Load, host: bool) -> Iterator[_Choice]:
    """All that are looked at, with a count of 0."""
    kinds = [(level, 0) for level in LEVELS]
    kinds += [(KEEP_QKV, wide) for share in SHARES if (wide := load.tokens // share // 128 * 128)]
    fars = [Keep(level, on_host, wide) for level, wide in kinds for on_host in ((False, True) if host else (False,))]
    tiles = [tile for tile in TILES if tile is None or tile < load.tokens]
    ways = (True, False) if load.cudnn else (False,)  # cuDNN's attention is faster and needs more memory
    for cudnn, tile, near, far in product(ways, tiles, LEVELS, fars):
        if near >= far.level:
            yield _Choice(near, far, 0, tile, cudnn)
        if near == far.level == KEEP_INPUT:
            yield from (_Choice(near, far, 0, tile, cudnn, segment) for segment in SEGMENTS)


def uniform(
    sizes: Sizes, load: Load, level: int, static: Sequence[tuple[str, int]], rates: Rates | None = None
) -> Plan:
    """The plan in which all layers keep the same, on the GPU."""
    return price(sizes, load, _Choice(level, Keep(level), sizes.layers, None, load.cudnn), static, rates or Rates())


@lru_cache(maxsize=256)  # a loop of equal steps asks the same again and again, and a search takes 10 ms or more
def fastest(
    sizes: Sizes,
    load: Load,
    static: tuple[tuple[str, int], ...],
    budget: int,
    host_budget: int = 0,
    rates: Rates | None = None,
    dense: bool = False,
) -> Plan:
    """The fastest plan that needs at most `budget` bytes of GPU memory and `host_budget` of the host's.

    Where none fits, the one that needs least. budget counts everything, `static` too. dense: whether weights may stay
    dequantised; for their bytes that saves less than anything else, so they get what is left.
    """
    rates, limit, L = rates or Rates(), budget * (1 - MARGIN) - sum(size for _, size in static), sizes.layers

    def need(choice: _Choice) -> int:
        return sum(_memory(sizes, load, choice))

    best = least = None
    for none_near in choices(load, host_budget > 0):
        found, of_count = [none_near], partial(replace, none_near)
        if none_near.segment == 1:  # as a rule more layers that keep `near` take more memory and less time
            fitting = bisect_right(range(1, L), limit, key=lambda count: need(of_count(count=count)))
            found += [of_count(count=fitting), of_count(count=L)]
        for choice in found:
            if _host_bytes(sizes, load, choice) > host_budget:
                continue
            memory, seconds = need(choice), _seconds(sizes, load, choice, rates)
            if least is None or memory < least[0]:
                least = memory, choice
            if memory <= limit and (best is None or seconds < best[0]):
                best = seconds, choice, memory
    if best is None:
        return price(sizes, load, least[1], static, rates)
    _, choice, memory = best
    count = min(int(limit - memory) // sizes.buffers, L) if dense else 0
    return price(sizes, load, choice, static, rates, count)


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
    rates: Rates | None = None,
) -> Plan:
    """The plan of a micro-step of `tokens` in bf16, samples of `longest`, before a model is loaded or a GPU is there.

    budget, host_memory: bytes. Where nothing fits, the plan that needs least; its peak says how much that is.
    level: what all layers keep, where that is not to be planned (recompute.py).
    Raises ValueError for a number of tokens that makes no step.
    """
    longest = tokens if longest is None else longest
    if not 0 < longest <= tokens:
        raise ValueError(f"samples of {longest} tokens in micro-steps of {tokens}: expected 1 to {tokens}")
    sizes = Sizes.of(config, lora, itemsize=2)
    static = static_parts(sizes, config, 2.03 if eight_bit else 8, load_in_4bit, longest, offload_embedding)
    load = Load(tokens, tokens * longest, tokens, cudnn=tokens == longest >= WORTHWHILE)
    if level is not None:
        return uniform(sizes, load, level, static, rates)
    return fastest(sizes, load, static, budget, host_memory, rates, dense=True)


def plan_table(plan: Plan, tokens: int, budget: int) -> str:
    """A plan as lines of (label, text)."""
    rows = [(name, f"{size / 2**30:8.2f} GiB") for name, size in plan.parts]
    fits = "" if plan.peak <= budget else f", more than the {budget / 2**30:.2f} GiB there are"
    rows += [
        ("peak", f"{plan.peak / 2**30:8.2f} GiB{fits}"),
        ("on the host", f"{plan.host_bytes / 2**30:8.2f} GiB"),
        ("time", f"{1e3 * plan.seconds:8.0f} ms, {tokens / plan.seconds:,.0f} tokens/s at the speed of one H200"),
        ("layers", str(plan)),
    ]
    return "\n".join(f"{label:<26}{text}" for label, text in rows)
