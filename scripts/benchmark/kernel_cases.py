"""The cases of `bench.py --kernels`: a kernel at one shape, and makers of the calls to time.

dequantize_cases.py, elementwise_cases.py and matmul_cases.py list the cases, kernel_timing.py
checks and times them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minitune.config.model_config import ModelConfig

BF16 = torch.bfloat16
SAMPLES = (
    ("2 x 2048", (2048,) * 2),
    ("1 x 8192", (8192,)),
    ("8 x 119", (119,) * 8),
    ("12 of 64-900", (512, 100, 900, 300, 64, 172) * 2),
)

Maker = Callable[..., Callable[[], Any]]


@dataclass(frozen=True)
class KernelSizes:
    """The sizes that kernels are timed at, in the letters of the model."""

    N: int  # rows: packed tokens
    D: int  # model width
    H: int  # query heads
    G: int  # key/value heads
    K: int  # head width
    F: int  # ffn width
    V: int  # vocabulary
    R: int  # LoRA rank
    layers: int
    # The linears that run as one matmul: name -> (output widths, input width).
    linears: dict[str, tuple[list[int], int]]
    samples: tuple[tuple[str, tuple[int, ...]], ...]  # of attention: (name, lengths)

    @classmethod
    def of(
        cls, config: ModelConfig, rows: int = 4096, rank: int = 16, samples=SAMPLES
    ) -> "KernelSizes":
        """Return the sizes of a model's kernels in a step of `rows` tokens."""
        linears = {}
        for group in config.linear_groups().values():
            name = ",".join(linear.target.removesuffix("_proj") for linear in group)
            linears[name] = ([linear.out_features for linear in group], group[0].in_features)
        return cls(
            N=rows,
            D=config.hidden_size,
            H=config.num_attention_heads,
            G=config.num_key_value_heads,
            K=config.head_dim,
            F=config.intermediate_size,
            V=config.vocab_size,
            R=rank,
            layers=config.num_hidden_layers,
            linears=linears,
            samples=samples,
        )


@dataclass(frozen=True)
class KernelCase:
    """A kernel at one shape, with a maker a column of the table.

    Given the inputs, a maker does all that is not timed and returns the call that is.
    """

    kernel: str
    shape: str
    inputs: Callable[[], tuple]  # returns new random inputs
    exact: Callable[..., Any]  # the result in float32, from the same inputs
    work: float  # bytes read and written once, or FLOPs
    unit: str  # "copy" for bytes, "matmul" for FLOPs
    makers: dict[str, Maker] = field(default_factory=dict)
    capture: bool = True  # as a CUDA graph


CaseGroup = Callable[[KernelSizes, str], Iterator[KernelCase]]  # (sizes, device) -> cases


def direct(f: Callable) -> Maker:
    """Return the maker of a function that needs no preparation."""
    return lambda *inputs: partial(f, *inputs)


def beside(ours: Callable, reference: Callable) -> dict[str, Maker]:
    """Return the makers of a kernel whose reference is one function of the same inputs."""
    compiled = torch.compile(reference, dynamic=False)
    return {"ours": direct(ours), "eager": direct(reference), "compile": direct(compiled)}


def widened(f: Callable) -> Callable:
    """Return f with every 16-bit input tensor converted to float32."""

    def widen(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.dtype == BF16 else x

    return lambda *inputs: f(*map(widen, inputs))


def normal(device: str, *shape: int, std: float = 1.0) -> Tensor:
    """Return a bf16 tensor of normal random numbers."""
    return torch.randn(shape, device=device, dtype=BF16) * std
