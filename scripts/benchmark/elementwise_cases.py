"""What kernel_timing.py times, the part bound by memory: dequantisation, norms, RoPE, SwiGLU, optimizer.

Every public kernel at the shapes of an 8B Llama, with the same work in plain PyTorch (matmul_cases.py has the others).

A `Row` makes fresh random inputs and holds one maker a column: given the inputs, a maker prepares whatever is not to
be timed and returns the call that is. `exact` computes the same in float32, for the check that comes before the timing.
`work` is what cannot be avoided: the bytes that are read and written once, or the multiplications and additions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minitune.kernels.adamw import MOMENT_BLOCKSIZE, adamw_, adamw_8bit_, global_norm
from minitune.kernels.dequantize import dequantize_nf4
from minitune.kernels.lora_linear import padded_rank
from minitune.kernels.rms_norm import (
    add_rms_norm_,
    add_rms_norm_reference_,
    rms_norm,
    rms_norm_backward,
    rms_norm_backward_reference,
    rms_norm_reference,
)
from minitune.kernels.rope import rope_, rope_reference_
from minitune.kernels.swiglu import (
    swiglu,
    swiglu_backward,
    swiglu_backward_reference,
    swiglu_reference,
)
from minitune.model.nf4 import BLOCKSIZE as NF4_BLOCKSIZE
from minitune.model.nf4 import NESTED_BLOCKSIZE, NF4, dynamic_map, nf4_code
from minitune.training.optimizer import moment_tables

BF16, EPS = torch.bfloat16, 1e-5
Maker = Callable[..., Callable[[], Any]]


@dataclass(frozen=True)
class MemoryModel:
    """Rows, widths and heads; by default those of an 8B Llama and a step of 4096 tokens."""

    N: int = 4096
    D: int = 4096
    H: int = 32
    G: int = 8
    K: int = 128
    F: int = 14336
    V: int = 128256
    R: int = 16
    layers: int = 32
    samples: tuple[tuple[str, tuple[int, ...]], ...] = (
        ("2 x 2048", (2048,) * 2),
        ("1 x 8192", (8192,)),
        ("8 x 119", (119,) * 8),
        ("12 of 64-900", (512, 100, 900, 300, 64, 172) * 2),
    )

    def linears(self) -> dict[str, tuple[list[int], int]]:
        """Linears that share an input, as they are multiplied: name -> (rows of each weight, columns)."""
        q, kv = self.H * self.K, self.G * self.K
        return {
            "q,k,v": ([q, kv, kv], self.D),
            "o": ([self.D], q),
            "gate,up": ([self.F, self.F], self.D),
            "down": ([self.D], self.F),
        }


@dataclass(frozen=True)
class Row:
    kernel: str
    shape: str
    inputs: Callable[[], tuple]
    exact: Callable[..., Any]
    work: float
    unit: str  # "copy": work in bytes; "matmul": in FLOPs
    makers: dict[str, Maker] = field(default_factory=dict)  # column -> maker
    capture: bool = True  # into a CUDA graph, so that launching from Python is not what is timed


def direct(f: Callable) -> Maker:
    return lambda *inputs: partial(f, *inputs)


def beside(ours: Callable, plain: Callable) -> dict[str, Maker]:
    """The columns of a kernel whose work in plain PyTorch is one function of the same inputs."""
    compiled = torch.compile(plain, dynamic=False)
    return {"ours": direct(ours), "eager": direct(plain), "compile": direct(compiled)}


def widened(f: Callable) -> Callable:
    """f with every 16-bit tensor among its inputs in float32."""
    return lambda *inputs: f(
        *(x.float() if isinstance(x, Tensor) and x.dtype == BF16 else x for x in inputs)
    )


def normal(device: str, *shape: int, std: float = 1.0) -> Tensor:
    return torch.randn(shape, device=device, dtype=BF16) * std


# ---- elementwise


def dequantize_rows(s: MemoryModel, device: str) -> Iterator[Row]:
    """A layer's seven linears as a step wants them: those that share an input in one, with columns to spare."""
    groups = [([(out, width) for out in outs], width) for outs, width in s.linears().values()]
    count = sum(out * width for shapes, _ in groups for out, width in shapes)

    def ours(weights: list[list[NF4]]) -> list[Tensor]:
        found = []
        for group, (shapes, width) in zip(weights, groups, strict=True):
            rows = [out for out, _ in shapes]
            wide = torch.empty(
                sum(rows), width + padded_rank(s.R * len(rows)), device=device, dtype=BF16
            )
            found += dequantize_nf4(group, BF16, out=wide[:, :width]).split(rows)
        return found

    def plain(w: NF4, unpack: Callable, dtype: torch.dtype) -> Tensor:
        return unpack(
            w.packed, w.absmax, w.code, w.nested_absmax, w.nested_code, w.nested_offset, dtype
        ).view(w.shape)

    def each(unpack: Callable, dtype: torch.dtype = BF16) -> Callable:
        return lambda weights: [plain(w, unpack, dtype) for group in weights for w in group]

    yield Row(
        "dequantize_nf4",
        f"7 linears, {count / 1e6:.0f} M",
        lambda: ([[_random_nf4(shape, device) for shape in shapes] for shapes, _ in groups],),
        each(_unpack, torch.float32),
        count * (0.5 + 1 / NF4_BLOCKSIZE + BF16.itemsize),
        "copy",
        {
            "ours": direct(ours),
            "eager": direct(each(_unpack)),
            "compile": direct(each(torch.compile(_unpack, dynamic=False))),
        },
    )


def _unpack(packed, absmax, code, nested_absmax, nested_code, nested_offset, dtype):
    coarse = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()]
    scale = nested_code[absmax.int()] * coarse + nested_offset
    nibbles = torch.stack([packed >> 4, packed & 15], dim=1).view(-1, NF4_BLOCKSIZE)
    return (code[nibbles.int()] * scale[:, None]).to(dtype)


def _random_nf4(shape: tuple[int, int], device: str) -> NF4:
    count = shape[0] * shape[1]
    blocks = count // NF4_BLOCKSIZE
    return NF4(
        packed=torch.randint(0, 256, (count // 2,), dtype=torch.uint8, device=device),
        absmax=torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device),
        code=nf4_code(torch.device(device)),
        shape=shape,
        nested_absmax=torch.rand(-(-blocks // NESTED_BLOCKSIZE), device=device),
        nested_code=dynamic_map(torch.device(device)),
        nested_offset=torch.tensor(0.1, device=device),
    )


def norm_rows(s: MemoryModel, device: str) -> Iterator[Row]:
    shape, bytes_each = f"{s.N} x {s.D}", s.N * s.D * BF16.itemsize

    def x() -> Tensor:
        return normal(device, s.N, s.D)

    weight = 1 + normal(device, s.D, std=0.1)
    for name, tensors, inputs, ours, plain in (
        ("rms_norm", 2, lambda: (x(), weight, EPS), rms_norm, rms_norm_reference),
        (
            "add_rms_norm_",
            7,  # of them 4 for the residual stream, which is float32 and is read and written
            lambda: (x(), x(), weight, EPS, x().float()),
            add_rms_norm_,
            add_rms_norm_reference_,
        ),
        (
            "rms_norm_backward",
            4,
            lambda: (x(), (h := x()), weight, rms_norm_reference(h, weight, EPS)[1], x()),
            rms_norm_backward,
            rms_norm_backward_reference,
        ),
    ):
        yield Row(
            name, shape, inputs, widened(plain), tensors * bytes_each, "copy", beside(ours, plain)
        )


def rope_rows(s: MemoryModel, device: str) -> Iterator[Row]:
    angles = torch.rand(s.N, s.K // 2, device=device) * 6.3
    cos, sin = angles.cos(), angles.sin()
    positions = torch.arange(s.N, device=device, dtype=torch.int32) % (s.N // 2)

    def rotated(rotate: Callable) -> Callable:
        def run(q, k, *tables):
            rotate(q, k, *tables)
            return q, k

        return run

    yield Row(
        "rope_",
        f"{s.N} x ({s.H}+{s.G}) x {s.K}",
        lambda: (normal(device, s.N, s.H, s.K), normal(device, s.N, s.G, s.K), cos, sin, positions),
        widened(rotated(rope_reference_)),
        2 * s.N * (s.H + s.G) * s.K * BF16.itemsize,
        "copy",
        beside(rotated(rope_), rotated(rope_reference_)),
    )


def swiglu_rows(s: MemoryModel, device: str) -> Iterator[Row]:
    shape, bytes_each = f"{s.N} x {s.F}", s.N * s.F * BF16.itemsize

    def tensors(count: int) -> Callable[[], tuple]:
        return lambda: tuple(normal(device, s.N, s.F) for _ in range(count))

    plain = swiglu_reference
    yield Row(
        "swiglu", shape, tensors(2), widened(plain), 3 * bytes_each, "copy", beside(swiglu, plain)
    )

    def backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        """With the output once more, which the gradient of down_proj's adapter needs."""
        out = torch.empty_like(dout)
        return *swiglu_backward(dout, gate, up, out=out), out

    plain = swiglu_backward_reference
    makers = beside(backward, plain)
    yield Row("swiglu_backward", shape, tensors(3), widened(plain), 6 * bytes_each, "copy", makers)


def optimizer_rows(s: MemoryModel, device: str) -> Iterator[Row]:
    """One update of a whole adapter, with moments in float32 and in 8 bits, and the norm for clipping."""
    P = s.layers * s.R * sum(out + width for outs, width in s.linears().values() for out in outs)
    blocks, shape = -(-P // MOMENT_BLOCKSIZE), f"{P / 1e6:.1f} M"
    settings = {
        "lr": 2e-4,
        "step": 1,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
    }

    def vectors() -> tuple:
        """Values, their gradients, and the norm of these."""
        values, grads = 0.02 * torch.randn(2, P, device=device)
        return values, grads, torch.linalg.vector_norm(grads)

    def float_inputs() -> tuple:
        values, grads, norm = vectors()
        return values, grads, *torch.zeros(2, P, device=device), norm

    def byte_inputs() -> tuple:
        values, grads, norm = vectors()
        codes, scales = (
            torch.zeros(2, P, device=device, dtype=torch.uint8),
            torch.zeros(2, blocks, device=device),
        )
        return values, grads, *codes, *scales, moment_tables(torch.device(device)), norm

    def update(f: Callable, *moments: int) -> Callable:
        """f as a call that returns the new values and, of its inputs, these moments or scales of moments."""

        def run(*inputs):
            f(*inputs, **settings)
            return inputs[0], *(inputs[i] for i in moments)

        return run

    def on_the_cpu(f: Callable) -> Callable:
        return lambda *inputs: [x.to(device) for x in f(*(x.cpu() for x in inputs))]

    def torch_adamw(values, grads, *rest) -> Callable:
        p = torch.nn.Parameter(values)
        p.grad = grads
        fused = {"fused": True, "capturable": True} if values.is_cuda else {}
        optimizer = torch.optim.AdamW([p], lr=settings["lr"], weight_decay=0.0, **fused)

        def run() -> Tensor:
            optimizer.step()
            return p.detach()

        return run

    def norm_inputs() -> tuple:
        return (torch.randn(P, device=device),)

    plain_norm = torch.linalg.vector_norm
    norms = {"ours": direct(global_norm), "eager": direct(plain_norm)}
    yield Row(
        "global_norm", shape, norm_inputs, lambda x: plain_norm(x.double()), 4 * P, "copy", norms
    )
    ours = update(adamw_, 2, 3)
    makers = {"ours": direct(ours), "eager": torch_adamw}
    yield Row("adamw_", shape, float_inputs, on_the_cpu(ours), 28 * P, "copy", makers)
    ours = update(adamw_8bit_, 4, 5)
    yield Row(
        "adamw_8bit_", shape, byte_inputs, on_the_cpu(ours), 16 * P, "copy", {"ours": direct(ours)}
    )
