"""What kernel_timing.py times, the part bound by arithmetic: attention, loss, and linears with their LoRA branch."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark.elementwise_cases import BF16, Maker, MemoryModel, Row, direct, normal, widened
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


def attention_rows(s: MemoryModel, device: str) -> Iterator[Row]:
    """The project's own kernels; for long samples of one length also what attention="auto" chooses there."""
    scale = s.K**-0.5

    def forward_inputs(lengths: tuple[int, ...]) -> tuple:
        counts = torch.tensor(lengths)
        end = counts.cumsum(0)
        bounds = [t.repeat_interleave(counts).to(device, torch.int32) for t in (end - counts, end)]
        qkv = [normal(device, sum(lengths), heads, s.K) for heads in (s.H, s.G, s.G)]
        return *qkv, *bounds, scale, lengths

    def backward_inputs(lengths: tuple[int, ...]) -> tuple:
        q, k, v, start, end, scale, lengths = forward_inputs(lengths)
        saved = attention(q, k, v, start, end, scale)
        return torch.randn_like(q), q, k, v, *saved, start, end, scale, lengths

    def exact_backward(dout, q, k, v, out, lse, start, end, scale, lengths):
        saved = attention_reference(q, k, v, start, end, scale)
        return attention_backward_reference(dout, q, k, v, *saved, start, end, scale)

    for shape, lengths in s.samples:
        flops = 2 * s.H * s.K * sum(n * n for n in lengths)
        choices = {shape: {"max_seqlen": seqlen_bound(max(lengths))}}  # as the model says it
        if len(set(lengths)) == 1 and lengths[0] >= CUDNN_MIN_LENGTH:
            choices[f"{shape} auto"] = {
                "max_seqlen": lengths[0],
                "uniform_seqlen": lengths[0],
            }  # cuDNN's, where that is possible
        for name, hints in choices.items():
            forward = direct(lambda *inputs, hints=hints: attention(*inputs[:-1], **hints))
            backward = direct(
                lambda *inputs, hints=hints: attention_backward(*inputs[:-1], **hints)
            )
            yield Row(
                "attention",
                name,
                partial(forward_inputs, lengths),
                widened(lambda *inputs: attention_reference(*inputs[:-1])),
                flops,
                "matmul",
                {"ours": forward, "eager": sdpa_maker},
            )
            yield Row(
                "attention_backward",
                name,
                partial(backward_inputs, lengths),
                widened(exact_backward),
                2.5 * flops,
                "matmul",
                {"ours": backward, "eager": sdpa_backward_maker},
            )


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, lengths: tuple[int, ...], mask: Tensor | None
) -> Tensor:
    """scaled_dot_product_attention of packed (N, heads, K): samples of one length as a batch, others under a mask."""
    B = 1 if mask is not None else len(lengths)
    q, k, v = (x.unflatten(0, (B, -1)).transpose(1, 2) for x in (q, k, v))
    causal = mask is None
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(0, 1)


def sample_mask(lengths: tuple[int, ...], device: torch.device) -> Tensor | None:
    """(N, N), true where a row sees a key; None where the samples are equally long."""
    if len(set(lengths)) == 1:
        return None
    sample = torch.arange(len(lengths), device=device).repeat_interleave(
        torch.tensor(lengths, device=device)
    )
    return (sample[:, None] == sample).tril()


def sdpa_maker(q, k, v, start, end, scale, lengths) -> Callable:
    return partial(sdpa, q, k, v, scale, lengths, sample_mask(lengths, q.device))


def sdpa_backward_maker(dout, q, k, v, out, lse, start, end, scale, lengths) -> Callable:
    return backward_of(sdpa, dout, q, k, v, scale, lengths, sample_mask(lengths, q.device))


def backward_of(f: Callable, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Callable:
    """The call that repeats autograd's backward of f(q, k, v, *rest)."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = f(*leaves, *rest)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def loss_rows(s: MemoryModel, device: str) -> Iterator[Row]:
    weight = normal(device, s.V, s.D, std=s.D**-0.5)

    def mean_loss(hidden, weight, targets):
        return F.cross_entropy((hidden @ weight.t()).float(), targets)

    def with_gradient(loss: Callable) -> Callable:
        def run(hidden, weight, targets):
            hidden = hidden.detach().requires_grad_()
            value = loss(hidden, weight, targets)
            return value.detach(), torch.autograd.grad(value, hidden)[0]

        return run

    yield Row(
        "linear_cross_entropy",
        f"{s.N} x {s.D}, V {s.V}",
        lambda: (normal(device, s.N, s.D), weight, torch.randint(0, s.V, (s.N,), device=device)),
        widened(with_gradient(mean_loss)),
        4 * s.N * s.D * s.V,
        "matmul",
        {
            "ours": direct(
                lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets, s.N)
            ),
            "eager": direct(with_gradient(mean_loss)),
            "compile": direct(with_gradient(torch.compile(mean_loss, dynamic=False))),
        },
        capture=False,  # milliseconds, and peers ask the device how many labels count
    )


def matmul_rows(s: MemoryModel, device: str) -> Iterator[Row]:
    """The frozen matmuls alone, as cuBLAS runs them: the floor of the LoRA rows."""
    for name, (outs, width) in s.linears().items():
        out = sum(outs)
        yield Row(
            "torch.mm",
            f"{name} {s.N} x {width} x {out}",
            partial(
                lambda out, width: (normal(device, s.N, width), normal(device, out, width)),
                out,
                width,
            ),
            widened(lambda x, w: x @ w.t()),
            2 * s.N * width * out,
            "matmul",
            {"ours": direct(lambda x, w: torch.mm(x, w.t()))},
        )


def lora_rows(s: MemoryModel, device: str) -> Iterator[Row]:
    """lora_linear_, its dx and its adapter gradients; in plain PyTorch a matmul, then `addmm_` for each adapter."""
    for name, (outs, width) in s.linears().items():
        out = sum(outs)
        forward, backward, gradients = _plain_lora(outs, width, s.R)
        splits = [(rows, s.R) for rows in outs]
        shape, flops = f"{name} {s.N} x {width} x {out}", 2 * s.N * width * out
        for kernel, ours, plain, work, unit in (
            (
                "lora_linear_",
                lambda x, dy, w, out=out: lora_linear_(x, w, out, SCALING),
                forward,
                flops,
                "matmul",
            ),
            (
                "lora_linear_backward_",
                lambda x, dy, w, width=width: lora_linear_backward_(dy, w, width, SCALING),
                backward,
                flops,
                "matmul",
            ),
            (
                "lora_gradients",
                lambda x, dy, w, splits=splits: [
                    g for pair in lora_gradients(dy, x, splits) for g in pair
                ],
                gradients,
                s.N * (width + out) * BF16.itemsize,
                "copy",
            ),
        ):
            inputs, exact = (
                partial(_lora_inputs, s, outs, width, device),
                widened(lambda *t, f=plain: f(*t)()),
            )
            yield Row(
                kernel, shape, inputs, exact, work, unit, {"ours": direct(ours), "eager": plain}
            )


def _parts(outs: list[int], R: int) -> list[tuple[slice, slice]]:
    """Of each linear, its rows of the common weight and its part of the common rank."""
    ends = list(accumulate(outs))
    return [(slice(ends[i] - outs[i], ends[i]), slice(i * R, i * R + R)) for i in range(len(outs))]


def _lora_inputs(
    s: MemoryModel, outs: list[int], width: int, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """x and dy with columns to spare, and the extended weight of kernels/lora_linear.py."""
    out, spare = sum(outs), padded_rank(s.R * len(outs))
    weight = normal(device, out + spare, width + spare, std=width**-0.5)
    weight[:, width:] = 0
    for rows, rank in _parts(outs, s.R):
        weight[rows, width:][:, rank] = normal(device, rows.stop - rows.start, s.R, std=0.02)
    return normal(device, s.N, width + spare), normal(device, s.N, out + spare), weight


def _plain_lora(outs: list[int], width: int, R: int) -> tuple[Maker, Maker, Maker]:
    """Makers of forward, dx and adapter gradients, linear by linear, from the same inputs."""
    out, parts = sum(outs), _parts(outs, R)

    def split(weight: Tensor) -> tuple[Tensor, list[tuple[slice, Tensor, Tensor]]]:
        adapters = [
            (r, weight[out:, :width][k].contiguous(), weight[r, width:][:, k].contiguous())
            for r, k in parts
        ]
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

    def gradients(x: Tensor, dy: Tensor, weight: Tensor) -> Callable[[], list[Tensor]]:
        thin = [(dy[:, out:][:, rank], dy[:, rows], x[:, width:][:, rank]) for rows, rank in parts]
        return lambda: [g for dyb, dy, xa in thin for g in (dyb.t() @ x[:, :width], dy.t() @ xa)]

    return forward, backward, gradients
