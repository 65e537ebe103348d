"""GPU time of a training step by group of kernels, and the idle time.

cuBLAS names its kernels after tiles, not after the operands. So the steps are profiled eagerly, and
the operation that launched a kernel and the shapes of its inputs decide the group:

    a kernel of kernels/                          PROFILE_GROUP of its file
    a matmul with a dimension of the vocabulary   loss
    a matmul with a dimension up to the LoRA      LoRA: A and B, alone or of three linears at once
      columns of three linears
    any other matmul                              base matmuls, with s B (A x) in the LoRA columns
    an operation or kernel of attention           attention
    everything else                               elementwise: norms, RoPE, SwiGLU, sums, copies

The optimizer is profiled apart. Idle is the wall clock time of a step as it really runs, with CUDA
graphs, minus the time of all its kernels.
"""

import importlib
import pkgutil
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch.autograd import DeviceType

import minitune.kernels
from minitune.kernels.lora_linear import padded_rank

GROUPS = (
    "attention",
    "base matmuls",
    "LoRA",
    "dequantisation",
    "elementwise",
    "loss",
    "optimizer",
    "idle",
)
MATMULS = {
    "aten::mm",
    "aten::addmm",
    "aten::addmm_",
    "aten::bmm",
    "aten::baddbmm",
    "aten::baddbmm_",
}
REPEATS = 3


def own_kernels() -> dict[str, str]:
    """Return the name of each kernel in kernels/ -> the PROFILE_GROUP of its file."""
    groups = {}
    for info in pkgutil.iter_modules(minitune.kernels.__path__):
        module = importlib.import_module(f"minitune.kernels.{info.name}")
        group = getattr(module, "PROFILE_GROUP", None)
        if group is None:  # a file of helpers, which launches no kernel
            continue
        assert group in GROUPS, f"{module.__name__}.PROFILE_GROUP is {group!r}, not one of {GROUPS}"
        for name, value in vars(module).items():
            function = getattr(value, "fn", None)  # the Python function of a Triton kernel
            if function is not None and function.__module__ == module.__name__:
                groups[name] = group
    return groups


def group_of(
    kernel: str,
    operation: str,
    shapes: Iterable[Sequence[int]],
    own: dict[str, str],
    vocab: int,
    max_rank: int,
) -> str:
    """Return the group of a kernel.

    operation: the operation that launched it; "" if unknown.
    shapes: the shapes of the operation's inputs; () if unknown.
    own: the result of `own_kernels`.
    vocab: size of the vocabulary.
    max_rank: the largest dimension that marks a matmul as LoRA's.
    """
    if kernel in own:
        return own[kernel]
    if "attention" in operation or re.search("sdpa|fmha|flash", kernel):
        return "attention"
    sizes: set[int] = set()
    if operation in MATMULS:
        sizes = {size for shape in shapes if len(shape) >= 2 for size in shape[-2:]}
    if vocab in sizes:
        return "loss"
    if sizes and min(sizes) <= max_rank:
        return "LoRA"
    if sizes or re.search("gemm|nvjet|cutlass", kernel):
        return "base matmuls"
    return "elementwise"


def group_times(events: Iterable, own: dict[str, str], vocab: int, max_rank: int) -> Counter[str]:
    """Return microseconds by group, from the profiler's events.

    The profiler lists a kernel below the operation that launched it, unless Triton or a CUDA graph
    did. The time of kernels that no operation lists is grouped by their names alone.
    """
    groups: Counter[str] = Counter()
    unlisted: Counter[str] = Counter()
    for event in events:
        if event.device_type == DeviceType.CUDA:
            if not event.is_user_annotation:
                unlisted[event.name] += event.time_range.elapsed_us()
            continue
        for kernel in event.kernels:
            group = group_of(kernel.name, event.name, event.input_shapes, own, vocab, max_rank)
            groups[group] += kernel.duration
            unlisted[kernel.name] -= kernel.duration
    for name, microseconds in unlisted.items():
        groups[group_of(name, "", (), own, vocab, max_rank)] += microseconds
    return groups


def profile_step(
    micro: Callable[[], object], optimizer: Callable[[], object], wall_ms: float, vocab: int, r: int
) -> dict[str, float]:
    """Return the milliseconds of a step in each of GROUPS.

    micro: runs forward and backward eagerly.
    optimizer: runs the update.
    wall_ms: milliseconds of a whole step as it really runs.
    vocab, r: size of the vocabulary, LoRA rank.

    Raises: ValueError if there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("--profile needs a GPU, and torch finds none")
    groups = group_times(_events(micro), own_kernels(), vocab, max_rank=padded_rank(3 * r))
    groups["optimizer"] += sum(group_times(_events(optimizer), {}, vocab, 0).values())
    milliseconds = {name: groups[name] / REPEATS / 1e3 for name in GROUPS[:-1]}
    return milliseconds | {"idle": wall_ms - sum(milliseconds.values())}


def _events(work: Callable[[], object]) -> Iterable:
    """Return the profiler's events of REPEATS calls, after a call that is not profiled."""
    work()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(REPEATS):
            work()
        torch.cuda.synchronize()
    return profiler.events()
