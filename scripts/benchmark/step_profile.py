"""Where a training step's GPU time goes: every kernel of a few steps in one of seven groups, and what was idle.

cuBLAS names its kernels after tiles, not after what they multiply. So the steps are profiled without CUDA graphs, and a
kernel is judged by the operation that launched it and that operation's input shapes:

    one of our own kernels                              by the file of kernels/ that defines it
    a matmul with a dimension of the vocabulary's size  loss
    a matmul with a dimension of at most 4 R            LoRA: A and B, alone or those of three linears side by side
    any other matmul                                    base matmuls, with s B (A x) where it rides in spare columns
    an operation or kernel of attention                 attention
    everything else                                     elementwise: norms, rope, swiglu, additions, copies

The optimizer is profiled apart. Idle is the wall time of a step as it really runs, with graphs, less what the kernels
of a step take in sum.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.autograd import DeviceType

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
FILES = {  # how a file of kernels/ begins -> group; the others are elementwise
    "attention": "attention",
    "lora": "LoRA",
    "dequant": "dequantisation",
    "cross_entropy": "loss",
    "adam": "optimizer",
}
MATMULS = {
    "aten::mm",
    "aten::addmm",
    "aten::addmm_",
    "aten::bmm",
    "aten::baddbmm",
    "aten::baddbmm_",
}
REPEATS = 3


def own_kernels(folder: Path = Path(__file__).parents[2] / "kernels") -> dict[str, str]:
    """Our kernels' names -> their group."""
    groups = {}
    for path in sorted(folder.glob("*.py")):
        group = next(
            (group for start, group in FILES.items() if path.name.startswith(start)), "elementwise"
        )
        for name in re.findall(
            r"^@\w*\.?jit\b[^\n]*\n(?:@[^\n]*\n)*def (\w+)", path.read_text(), re.MULTILINE
        ):
            groups[name] = group
    return groups


def group_of(
    kernel: str, operation: str, shapes: Iterable, own: dict[str, str], vocab: int, thin: int
) -> str:
    """The group of a kernel that `operation` launched on inputs of `shapes`; "" and () where that is not known."""
    if kernel in own:
        return own[kernel]
    if "attention" in operation or re.search("sdpa|fmha|flash", kernel):
        return "attention"
    sizes = (
        {size for shape in shapes if len(shape) >= 2 for size in shape[-2:]}
        if operation in MATMULS
        else set()
    )
    if vocab in sizes:
        return "loss"
    if sizes and min(sizes) <= thin:
        return "LoRA"
    if sizes or re.search("gemm|nvjet|cutlass", kernel):
        return "base matmuls"
    return "elementwise"


def group_times(events: Iterable, own: dict[str, str], vocab: int, thin: int) -> Counter[str]:
    """Microseconds a group, from the profiler's events.

    The profiler hangs a kernel below the operation that launched it, but not one that was launched by Triton or in a
    CUDA graph: what the operations do not account for is grouped by name alone.
    """
    groups: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for event in events:
        if event.device_type == DeviceType.CUDA:
            if not event.is_user_annotation:
                left[event.name] += event.time_range.elapsed_us()
            continue
        for kernel in event.kernels:
            groups[group_of(kernel.name, event.name, event.input_shapes, own, vocab, thin)] += (
                kernel.duration
            )
            left[kernel.name] -= kernel.duration
    for name, microseconds in left.items():
        groups[group_of(name, "", (), own, vocab, thin)] += microseconds
    return groups


def profile_step(
    micro: Callable[[], object], optimizer: Callable[[], object], wall_ms: float, vocab: int, r: int
) -> dict[str, float]:
    """Milliseconds of a step in each of GROUPS.

    micro: forward and backward, without graphs; wall_ms: a whole step as it really runs. ValueError without a GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("--profile needs a GPU: it sorts the time of GPU kernels")
    groups = group_times(_events(micro), own_kernels(), vocab, thin=padded_rank(3 * r))
    groups["optimizer"] += sum(group_times(_events(optimizer), {}, vocab, 0).values())
    milliseconds = {name: groups[name] / REPEATS / 1e3 for name in GROUPS[:-1]}
    return milliseconds | {"idle": wall_ms - sum(milliseconds.values())}


def _events(work: Callable[[], object]) -> Iterable:
    """The profiler's events of REPEATS calls, after one that is not looked at."""
    work()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(REPEATS):
            work()
        torch.cuda.synchronize()
    return profiler.events()
