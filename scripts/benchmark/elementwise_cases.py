"""Timed kernels that memory bandwidth bounds: norms, RoPE, SwiGLU, optimizer.

Each public kernel has the same work in plain PyTorch beside it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmark.kernel_cases import BF16, KernelCase, KernelSizes, beside, direct, normal, widened
from minitune.kernels.adamw import MOMENT_BLOCKSIZE, adamw_, adamw_8bit_
from minitune.kernels.gated_activation import (
    gated_activation,
    gated_activation_backward,
    gated_activation_backward_reference,
    gated_activation_reference,
)
from minitune.kernels.global_norm import global_norm
from minitune.kernels.rms_norm import (
    add_rms_norm_,
    add_rms_norm_reference_,
    rms_norm,
    rms_norm_backward,
    rms_norm_backward_reference,
    rms_norm_reference,
)
from minitune.kernels.rope import rope_, rope_reference_
from minitune.training.optimizer import moment_tables

EPS = 1e-5
ADAMW = {
    "lr": 2e-4,
    "step": 1,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
}


# ---- norms, RoPE, SwiGLU


def norm_cases(s: KernelSizes, device: str) -> Iterator[KernelCase]:
    """Yield RMSNorm, its fusion with the residual addition, and its backward."""
    weight = 1 + normal(device, s.D, std=0.1)

    def x() -> Tensor:
        return normal(device, s.N, s.D)

    def backward_inputs() -> tuple:
        h = x()
        rstd = rms_norm_reference(h, weight, EPS)[1]
        return x(), h, weight, rstd, x()

    # `tensors` counts the bf16 tensors (N, D) that are read or written.
    def case(kernel: str, tensors: int, inputs: Callable, ours: Callable, reference: Callable):
        return KernelCase(
            kernel=kernel,
            shape=f"{s.N} x {s.D}",
            inputs=inputs,
            exact=widened(reference),
            work=tensors * s.N * s.D * BF16.itemsize,
            unit="copy",
            makers=beside(ours, reference),
        )

    yield case("rms_norm", 2, lambda: (x(), weight, EPS), rms_norm, rms_norm_reference)
    # 4 of the 7: the residual stream is float32, and is read and written.
    yield case(
        "add_rms_norm_",
        7,
        lambda: (x(), x(), weight, EPS, x().float()),
        add_rms_norm_,
        add_rms_norm_reference_,
    )
    yield case(
        "rms_norm_backward", 4, backward_inputs, rms_norm_backward, rms_norm_backward_reference
    )


def rope_cases(s: KernelSizes, device: str) -> Iterator[KernelCase]:
    """Yield the rotation of q and k in place."""
    angles = torch.rand(s.N, s.K // 2, device=device) * 6.3
    cos, sin = angles.cos(), angles.sin()
    positions = torch.arange(s.N, device=device, dtype=torch.int32) % (s.N // 2)

    def inputs() -> tuple:
        return normal(device, s.N, s.H, s.K), normal(device, s.N, s.G, s.K), cos, sin, positions

    def rotated(rotate_: Callable) -> Callable:
        def run(q, k, *tables):
            rotate_(q, k, *tables)
            return q, k

        return run

    yield KernelCase(
        kernel="rope_",
        shape=f"{s.N} x ({s.H}+{s.G}) x {s.K}",
        inputs=inputs,
        exact=widened(rotated(rope_reference_)),
        work=2 * s.N * (s.H + s.G) * s.K * BF16.itemsize,
        unit="copy",
        makers=beside(rotated(rope_), rotated(rope_reference_)),
    )


def swiglu_cases(s: KernelSizes, device: str) -> Iterator[KernelCase]:
    """Yield SwiGLU and its backward. The backward also writes the output, for down_proj's dA."""

    def backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        out = torch.empty_like(dout)
        return *gated_activation_backward(dout, gate, up, out=out), out

    # Read: gate and up, in backward also dout. Written: out, in backward also dgate and dup.
    for kernel, inputs, tensors, ours, reference in (
        ("swiglu", 2, 3, gated_activation, gated_activation_reference),
        ("swiglu_backward", 3, 6, backward, gated_activation_backward_reference),
    ):
        yield KernelCase(
            kernel=kernel,
            shape=f"{s.N} x {s.F}",
            inputs=lambda n=inputs: tuple(normal(device, s.N, s.F) for _ in range(n)),
            exact=widened(reference),
            work=tensors * s.N * s.F * BF16.itemsize,
            unit="copy",
            makers=beside(ours, reference),
        )


# ---- optimizer


def optimizer_cases(s: KernelSizes, device: str) -> Iterator[KernelCase]:
    """Yield the update of a whole adapter, with moments in float32 and in 8 bits, and its norm."""
    widths = [out + width for outs, width in s.linears.values() for out in outs]
    P = s.layers * s.R * sum(widths)
    blocks, shape = -(-P // MOMENT_BLOCKSIZE), f"{P / 1e6:.1f} M"
    norm = torch.linalg.vector_norm

    def vectors() -> tuple[Tensor, Tensor, Tensor]:
        values, grads = 0.02 * torch.randn(2, P, device=device)
        return values, grads, norm(grads)

    def float_inputs() -> tuple:
        values, grads, grad_norm = vectors()
        return values, grads, *torch.zeros(2, P, device=device), grad_norm

    def eight_bit_inputs() -> tuple:
        values, grads, grad_norm = vectors()
        codes = torch.zeros(2, P, device=device, dtype=torch.uint8)
        scales = torch.zeros(2, blocks, device=device)
        tables = moment_tables(torch.device(device))
        return values, grads, *codes, *scales, tables, grad_norm

    def on_the_cpu(f: Callable) -> Callable:
        return lambda *inputs: [x.to(device) for x in f(*(x.cpu() for x in inputs))]

    yield KernelCase(
        kernel="global_norm",
        shape=shape,
        inputs=lambda: (torch.randn(P, device=device),),
        exact=lambda x: norm(x.double()),
        work=4 * P,
        unit="copy",
        makers={"ours": direct(global_norm), "eager": direct(norm)},
    )
    adamw = _updated(adamw_, 2, 3)
    yield KernelCase(
        kernel="adamw_",
        shape=shape,
        inputs=float_inputs,
        exact=on_the_cpu(adamw),
        work=28 * P,  # read: 4 float32 vectors; written: 3
        unit="copy",
        makers={"ours": direct(adamw), "eager": _torch_adamw},
    )
    adamw_8bit = _updated(adamw_8bit_, 4, 5)
    yield KernelCase(
        kernel="adamw_8bit_",
        shape=shape,
        inputs=eight_bit_inputs,
        exact=on_the_cpu(adamw_8bit),
        work=16 * P,  # 12 for values, gradients and values again; 4 for two codes, each twice
        unit="copy",
        makers={"ours": direct(adamw_8bit)},
    )


def _updated(update_: Callable, *moments: int) -> Callable:
    """Return a call of `update_` that returns the new values and the inputs at `moments`."""

    def run(*inputs: Any) -> tuple[Tensor, ...]:
        update_(*inputs, **ADAMW)
        return inputs[0], *(inputs[i] for i in moments)

    return run


def _torch_adamw(values: Tensor, grads: Tensor, *rest: Tensor) -> Callable[[], Tensor]:
    p = torch.nn.Parameter(values)
    p.grad = grads
    fused = {"fused": True, "capturable": True} if values.is_cuda else {}
    optimizer = torch.optim.AdamW([p], lr=ADAMW["lr"], weight_decay=0.0, **fused)

    def run() -> Tensor:
        optimizer.step()
        return p.detach()

    return run


GROUPS = (norm_cases, rope_cases, swiglu_cases, optimizer_cases)
