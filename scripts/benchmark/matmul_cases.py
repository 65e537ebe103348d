"""Timed kernels that arithmetic bounds: attention, the loss, and linears with their LoRA branch."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark.kernel_cases import BF16, KernelCase, KernelSizes, Maker, direct, normal, widened
from minitune.kernels.attention import attention, attention_backward, attention_reference
from minitune.kernels.attention_backward import attention_backward_reference
from minitune.kernels.attention_common import seqlen_bound
from minitune.kernels.attention_cudnn import CUDNN_MIN_LENGTH
from minitune.kernels.cross_entropy import linear_cross_entropy
from minitune.kernels.lora_linear import (
    lora_gradients,
    lora_linear_,
    lora_linear_backward_,
    padded_rank,
)

SCALING = 2.0


# ---- attention


def attention_cases(s: KernelSizes, device: str) -> Iterator[KernelCase]:
    """Yield attention on packed samples, forward and backward.

    Samples of one length from CUDNN_MIN_LENGTH on have a second case, "auto": the backend that
    attention="auto" chooses.
    """
    for shape, lengths in s.samples:
        yield from _attention_pair(s, device, shape, lengths, seqlen_bound(max(lengths)), None)
        if len(set(lengths)) == 1 and lengths[0] >= CUDNN_MIN_LENGTH:
            name = f"{shape} auto"
            yield from _attention_pair(s, device, name, lengths, lengths[0], lengths[0])


def _attention_pair(
    s: KernelSizes,
    device: str,
    shape: str,
    lengths: tuple[int, ...],
    max_seqlen: int | None,
    uniform_seqlen: int | None,
) -> Iterator[KernelCase]:
    scale = s.K**-0.5
    hints = {"max_seqlen": max_seqlen, "uniform_seqlen": uniform_seqlen}
    flops = 2 * s.H * s.K * sum(n * n for n in lengths)  # two causal matmuls

    def forward_inputs() -> tuple:
        counts = torch.tensor(lengths)
        end = counts.cumsum(0)
        bounds = [t.repeat_interleave(counts).to(device, torch.int32) for t in (end - counts, end)]
        qkv = [normal(device, sum(lengths), heads, s.K) for heads in (s.H, s.G, s.G)]
        return *qkv, *bounds, scale, lengths

    def backward_inputs() -> tuple:
        q, k, v, start, end, scale, lengths = forward_inputs()
        saved = attention(q, k, v, start, end, scale)
        return torch.randn_like(q), q, k, v, *saved, start, end, scale, lengths

    def exact_backward(dout, q, k, v, out, lse, start, end, scale, lengths):
        saved = attention_reference(q, k, v, start, end, scale)
        return attention_backward_reference(dout, q, k, v, *saved, start, end, scale)

    # The last input, `lengths`, is for the peers.
    forward = direct(lambda *inputs: attention(*inputs[:-1], **hints))
    backward = direct(lambda *inputs: attention_backward(*inputs[:-1], **hints))
    yield KernelCase(
        kernel="attention",
        shape=shape,
        inputs=forward_inputs,
        exact=widened(lambda *inputs: attention_reference(*inputs[:-1])),
        work=flops,
        unit="matmul",
        makers={"ours": forward, "eager": sdpa_maker},
    )
    yield KernelCase(
        kernel="attention_backward",
        shape=shape,
        inputs=backward_inputs,
        exact=widened(exact_backward),
        work=2.5 * flops,  # five matmuls
        unit="matmul",
        makers={"ours": backward, "eager": sdpa_backward_maker},
    )


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, lengths: tuple[int, ...], mask: Tensor | None
) -> Tensor:
    """Return scaled_dot_product_attention of packed samples (N, heads, K).

    Samples of one length run as a batch, others as one sequence under a mask.
    """
    B = 1 if mask is not None else len(lengths)
    q, k, v = (x.unflatten(0, (B, -1)).transpose(1, 2) for x in (q, k, v))
    causal = mask is None
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(0, 1)


def sample_mask(lengths: tuple[int, ...], device: torch.device) -> Tensor | None:
    """Return (N, N), true if a row sees a key; None if the samples have one length."""
    if len(set(lengths)) == 1:
        return None
    counts = torch.tensor(lengths, device=device)
    sample = torch.arange(len(lengths), device=device).repeat_interleave(counts)
    return (sample[:, None] == sample).tril()


def sdpa_maker(q, k, v, start, end, scale, lengths) -> Callable:
    """Return the call of PyTorch's attention on these inputs."""
    return partial(sdpa, q, k, v, scale, lengths, sample_mask(lengths, q.device))


def sdpa_backward_maker(dout, q, k, v, out, lse, start, end, scale, lengths) -> Callable:
    """Return the call of the backward of PyTorch's attention, after its forward."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    result = sdpa(*leaves, scale, lengths, sample_mask(lengths, q.device))
    return lambda: torch.autograd.grad(result, leaves, dout, retain_graph=True)


# ---- loss


def loss_cases(s: KernelSizes, device: str) -> Iterator[KernelCase]:
    """Yield the loss of all rows and its gradient, head included."""
    weight = normal(device, s.V, s.D, std=s.D**-0.5)

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        return normal(device, s.N, s.D), weight, torch.randint(0, s.V, (s.N,), device=device)

    def ours(hidden, weight, targets):
        return linear_cross_entropy(hidden, weight, targets, s.N)

    def mean_loss(hidden, weight, targets):
        return F.cross_entropy((hidden @ weight.t()).float(), targets)

    def with_gradient(loss: Callable) -> Callable:
        def run(hidden, weight, targets):
            hidden = hidden.detach().requires_grad_()
            value = loss(hidden, weight, targets)
            return value.detach(), torch.autograd.grad(value, hidden)[0]

        return run

    yield KernelCase(
        kernel="linear_cross_entropy",
        shape=f"{s.N} x {s.D}, V {s.V}",
        inputs=inputs,
        exact=widened(with_gradient(mean_loss)),
        work=4 * s.N * s.D * s.V,
        unit="matmul",
        makers={
            "ours": direct(ours),
            "eager": direct(with_gradient(mean_loss)),
            "compile": direct(with_gradient(torch.compile(mean_loss, dynamic=False))),
        },
        capture=False,  # it takes milliseconds, and peers ask the device for the number of labels
    )


# ---- linears


def matmul_cases(s: KernelSizes, device: str) -> Iterator[KernelCase]:
    """Yield the frozen matmuls alone, as cuBLAS runs them: the floor of the LoRA cases."""
    for name, (outs, width) in s.linears.items():
        out = sum(outs)
        yield KernelCase(
            kernel="torch.mm",
            shape=f"{name} {s.N} x {width} x {out}",
            inputs=partial(_matmul_inputs, s.N, width, out, device),
            exact=widened(lambda x, w: x @ w.t()),
            work=2 * s.N * width * out,
            unit="matmul",
            makers={"ours": direct(lambda x, w: torch.mm(x, w.t()))},
        )


def _matmul_inputs(rows: int, width: int, out: int, device: str) -> tuple[Tensor, Tensor]:
    return normal(device, rows, width), normal(device, out, width)


def lora_cases(s: KernelSizes, device: str) -> Iterator[KernelCase]:
    """Yield lora_linear_, its backward and its adapter gradients, for each group of linears.

    Plain PyTorch runs a matmul, then addmm_ for each adapter.
    """
    for name, (outs, width) in s.linears.items():
        out = sum(outs)
        splits = [(rows, s.R) for rows in outs]
        plain_forward, plain_backward, plain_gradients = _plain_lora(outs, width, s.R)

        def forward(x, dy, weight, out=out):
            return lora_linear_(x, weight, out, SCALING)

        def backward(x, dy, weight, width=width):
            return lora_linear_backward_(dy, weight, width, SCALING)

        def gradients(x, dy, weight, splits=splits):
            return lora_gradients(dy, x, splits)

        flops = 2 * s.N * width * out
        moved = s.N * (width + out) * BF16.itemsize
        for kernel, ours, plain, work, unit in (
            ("lora_linear_", forward, plain_forward, flops, "matmul"),
            ("lora_linear_backward_", backward, plain_backward, flops, "matmul"),
            ("lora_gradients", gradients, plain_gradients, moved, "copy"),
        ):
            yield KernelCase(
                kernel=kernel,
                shape=f"{name} {s.N} x {width} x {out}",
                inputs=partial(_lora_inputs, s, outs, width, device),
                exact=widened(lambda *inputs, plain=plain: plain(*inputs)()),
                work=work,
                unit=unit,
                makers={"ours": direct(ours), "eager": plain},
            )


def _parts(outs: Sequence[int], R: int) -> list[tuple[slice, slice]]:
    """Return each linear's rows of the common weight, and its part of the common rank."""
    ends = list(accumulate(outs))
    return [(slice(ends[i] - outs[i], ends[i]), slice(i * R, i * R + R)) for i in range(len(outs))]


def _lora_inputs(
    s: KernelSizes, outs: Sequence[int], width: int, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x and dy with LoRA columns, and the extended weight of kernels/lora_linear.py."""
    out, rank = sum(outs), padded_rank(s.R * len(outs))
    weight = normal(device, out + rank, width + rank, std=width**-0.5)
    weight[:, width:] = 0
    for rows, part in _parts(outs, s.R):
        weight[rows, width:][:, part] = normal(device, rows.stop - rows.start, s.R, std=0.02)
    return normal(device, s.N, width + rank), normal(device, s.N, out + rank), weight


def _plain_lora(outs: Sequence[int], width: int, R: int) -> tuple[Maker, Maker, Maker]:
    """Return makers of forward, dx and adapter gradients, linear by linear, on the same inputs."""
    out, parts = sum(outs), _parts(outs, R)

    def split(weight: Tensor) -> tuple[Tensor, list[tuple[slice, Tensor, Tensor]]]:
        """Return the base weight, and rows, A and B of each adapter."""
        adapters = []
        for rows, rank in parts:
            a = weight[out:, :width][rank].contiguous()
            b = weight[rows, width:][:, rank].contiguous()
            adapters.append((rows, a, b))
        return weight[:out, :width].contiguous(), adapters

    def forward(x: Tensor, dy: Tensor, weight: Tensor) -> Callable[[], Tensor]:
        x, (w, adapters) = x[:, :width].contiguous(), split(weight)

        def run() -> Tensor:
            y = x @ w.t()
            for rows, a, b in adapters:
                y[:, rows].addmm_(x @ a.t(), b.t(), alpha=SCALING)
            return y

        return run

    def backward(x: Tensor, dy: Tensor, weight: Tensor) -> Callable[[], Tensor]:
        dy, (w, adapters) = dy[:, :out].contiguous(), split(weight)

        def run() -> Tensor:
            dx = dy @ w
            for rows, a, b in adapters:
                dx.addmm_(dy[:, rows] @ b, a, alpha=SCALING)
            return dx

        return run

    def gradients(x: Tensor, dy: Tensor, weight: Tensor) -> Callable[[], list[Any]]:
        # Of each adapter: dy B, dy and x A^T.
        thin = [(dy[:, out:][:, rank], dy[:, rows], x[:, width:][:, rank]) for rows, rank in parts]
        return lambda: [(dyb.t() @ x[:, :width], dy.t() @ xa) for dyb, dy, xa in thin]

    return forward, backward, gradients


GROUPS = (attention_cases, loss_cases, matmul_cases, lora_cases)
