"""Attention, the LoRA linear, and the head with its loss, in the widths of the model."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from minitune.doctor.kernel_checks.elementwise import packed_samples
from minitune.doctor.kernel_checks.results import compare
from minitune.doctor.report import Finding, skipped
from minitune.doctor.subject import Subject
from minitune.kernels.attention import attention
from minitune.kernels.attention_backward import attention_backward
from minitune.kernels.attention_cudnn import (
    CUDNN_MIN_LENGTH,
    cudnn_attention,
    cudnn_attention_backward,
    cudnn_supports,
)
from minitune.kernels.backend import accumulator
from minitune.kernels.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from minitune.kernels.lora_linear import (
    lora_gradients,
    lora_linear_,
    lora_linear_backward_,
    padded_rank,
    write_adapters_,
)
from minitune.model.packed_sequences import PackedSequences

LOSS_ROWS, LOSS_VOCABULARY = 64, 32768  # the float64 logits of more would take gigabytes
CUDNN_HEADS = 2  # of queries; the float64 scores of one take 128 MiB
WINDOW = 64  # tokens; shorter than the samples, so that the window counts


def check_attention(s: Subject) -> Finding:
    """Compare attention's output and its logsumexp with the textbook formula."""
    inputs, dout, packed, options = _attention_inputs(s)
    found = attention(*inputs, packed.start, packed.end, **options)
    return _compare_attention(found, inputs, dout, packed.start, options, slice(2))


def check_attention_backward(s: Subject) -> Finding:
    """Compare the gradients of queries, keys and values with the textbook formula's."""
    inputs, dout, packed, options = _attention_inputs(s)
    bounds = packed.start, packed.end
    out, lse = attention(*inputs, *bounds, **options)
    found = attention_backward(dout, *inputs, out, lse, *bounds, **options)
    return _compare_attention(found, inputs, dout, packed.start, options, slice(2, None))


def check_cudnn_attention(s: Subject) -> Finding:
    """Compare cuDNN's attention, which takes samples of one length from 4,096 tokens on."""
    c, L = s.model.config, CUDNN_MIN_LENGTH
    H = min(CUDNN_HEADS, c.num_attention_heads // c.num_key_value_heads)
    *inputs, dout = (s.normal(L, n, c.head_dim, seed=i) for i, n in enumerate((H, 1, 1, H)))
    if not cudnn_supports(*inputs, L) or c.score_softcap:
        return skipped("cuDNN's attention is for 16 bit on GPUs of capability 9.0 and higher")
    options = {"scale": c.attention_scale}
    out, lse = cudnn_attention(*inputs, L, **options)
    found = out, lse, *cudnn_attention_backward(dout, *inputs, out, lse, L, **options)
    start = torch.zeros(L, dtype=torch.int32, device=s.model.device)
    return _compare_attention(found, inputs, dout, start, options, slice(None))


def _attention_inputs(s: Subject) -> tuple[list[Tensor], Tensor, PackedSequences, dict[str, float]]:
    """Return q, k and v, the gradient of the output, the samples, and the model's options."""
    c, packed = s.model.config, packed_samples(s)
    if any(kind.window for kind in c.layer_kinds):
        packed = packed.windowed(WINDOW)
    H, G, N = c.num_attention_heads, c.num_key_value_heads, len(packed.start)
    *inputs, dout = (s.normal(N, n, c.head_dim, seed=i) for i, n in enumerate((H, G, G, H)))
    return inputs, dout, packed, {"scale": c.attention_scale, "softcap": c.score_softcap}


def _compare_attention(
    found: Sequence[Tensor],
    inputs: Sequence[Tensor],
    dout: Tensor,
    start: Tensor,
    options: dict[str, float],
    part: slice,
) -> Finding:
    """Judge a part of (out, lse, dq, dk, dv) by the textbook formula."""
    index = torch.arange(len(start), device=start.device)
    seen = (index >= start[:, None]) & (index <= index[:, None])

    def plain(dtype: torch.dtype) -> Sequence[Tensor]:
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs)
        out, lse = _textbook_attention(q, k, v, seen, **options)
        gradients = torch.autograd.grad(out, (q, k, v), dout.to(dtype))
        return (out.detach(), lse.detach(), *gradients)[part]

    return compare(found, plain(dout.dtype), plain(torch.float64))


def _textbook_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) by the textbook formula, with the softmax in at least float32."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1).transpose(0, 1) for x in (k, v))
    scores = ((q.transpose(0, 1) * scale) @ k.mT).to(accumulator(q.dtype))
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores.masked_fill(~seen, -math.inf)
    return (scores.softmax(-1).to(q.dtype) @ v).transpose(0, 1), scores.logsumexp(-1)


def check_lora_linear(s: Subject) -> Finding:
    """Compare a linear of the model with an adapter, and all its gradients, with autograd."""
    linear = next(linear for _, linear in s.model.linears() if linear.rank)
    dtype, scaling, N = s.model.dtype, linear.scaling, len(s.batch.input_ids)
    weight, (a, b) = linear.weight_as(dtype), linear.adapter()
    inputs = [s.normal(N, linear.in_features), a.to(dtype), b.to(dtype)]
    dy = s.normal(N, linear.out_features, seed=1)

    def plain(kind):
        x, a, b = (t.detach().to(kind).requires_grad_() for t in inputs)
        y = functional.linear(x, weight.to(kind))
        y = y + scaling * functional.linear(functional.linear(x, a), b)
        return y.detach(), *torch.autograd.grad(y, (x, a, b), dy.to(kind))

    found = _lora_linear(*inputs, weight, dy, scaling)
    return compare(found, plain(dtype), plain(torch.float64))


def _lora_linear(
    x: Tensor, a: Tensor, b: Tensor, weight: Tensor, dy: Tensor, scaling: float
) -> list[Tensor]:
    """Return y, dx, dA and dB by the kernels of an extended weight."""
    (out, width), R = weight.shape, padded_rank(len(a), x.device.type)
    extended = weight.new_zeros(out + R, width + R)
    extended[:out, :width] = weight
    write_adapters_([(extended, [(a.contiguous(), b.contiguous(), out)], out, width)])
    wide_x, wide_dy = (functional.pad(t, (0, R)) for t in (x, dy))
    y = lora_linear_(wide_x, extended, out, scaling)
    dx = lora_linear_backward_(wide_dy, extended, width, scaling)
    ((da, db),) = lora_gradients(wide_dy, wide_x, [(out, len(a))])
    return [y, dx, da, db]


def check_cross_entropy(s: Subject) -> Finding:
    """Compare the loss of the head's logits and the gradient of the hidden rows with autograd."""
    head, dtype = s.model.head(), s.model.dtype
    weight = head.weight[:LOSS_VOCABULARY].to(dtype)
    hidden = s.normal(LOSS_ROWS, weight.shape[1])
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(len(weight), (LOSS_ROWS,), generator=generator).to(s.model.device)
    targets[::5] = IGNORE_INDEX
    denominator, softcap = int((targets != IGNORE_INDEX).sum()), head.softcap

    def plain(kind):
        x = hidden.to(kind).requires_grad_()
        logits = head.multiplier * functional.linear(x, weight.to(kind))
        logits = logits.to(torch.promote_types(kind, torch.float32))
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        loss = functional.cross_entropy(logits, targets, reduction="sum") / denominator
        return loss.detach()[None], torch.autograd.grad(loss, x)[0] * denominator

    loss, gradient = linear_cross_entropy(
        hidden, weight, targets, denominator, multiplier=head.multiplier, softcap=softcap
    )
    found = loss.view(1), gradient * denominator  # as large as the loss
    return compare(found, plain(dtype), plain(torch.float64))
