"""Attention, the LoRA linear, and the head with its loss, in the widths of the model."""

import torch
from torch import Tensor
from torch.nn import functional

from minitune.doctor.kernel_checks.elementwise import packed_samples
from minitune.doctor.kernel_checks.results import compare, three_ways
from minitune.doctor.report import Finding, skipped
from minitune.doctor.subject import Subject
from minitune.kernels.attention import attention, attention_reference
from minitune.kernels.attention_backward import attention_backward, attention_backward_reference
from minitune.kernels.attention_cudnn import (
    CUDNN_MIN_LENGTH,
    cudnn_attention,
    cudnn_attention_backward,
    cudnn_supports,
)
from minitune.kernels.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from minitune.kernels.lora_linear import (
    lora_gradients,
    lora_linear_,
    lora_linear_backward_,
    padded_rank,
    write_adapters_,
)

LOSS_ROWS, LOSS_VOCABULARY = 64, 32768  # the float64 logits of more would take gigabytes
WINDOW = 64  # tokens; shorter than the samples, so that the window counts


def check_attention(s: Subject) -> Finding:
    """Compare attention's output and its logsumexp."""
    run = _attention_run(s, backward=False)
    return three_ways(run, (attention,), (attention_reference,), s.model.dtype)


def check_attention_backward(s: Subject) -> Finding:
    """Compare the gradients of queries, keys and values."""
    run = _attention_run(s, backward=True)
    kernels = attention, attention_backward
    references = attention_reference, attention_backward_reference
    return three_ways(run, kernels, references, s.model.dtype)


def _attention_run(s: Subject, backward: bool):
    """Return a function that runs attention in a dtype with given functions."""
    c, packed = s.model.config, packed_samples(s)
    if any(kind.window for kind in c.layer_kinds):
        packed = packed.windowed(WINDOW)
    N, H, G, K = len(packed.start), c.num_attention_heads, c.num_key_value_heads, c.head_dim
    tensors = [s.normal(N, heads, K, seed=i) for i, heads in enumerate((H, G, G, H))]
    bounds, options = (packed.start, packed.end, c.attention_scale), {"softcap": c.score_softcap}

    def run(dtype, forward, gradients=None):
        q, k, v, dout = (t.to(dtype) for t in tensors)
        out, lse = forward(q, k, v, *bounds, **options)
        if not backward:
            return out, lse
        return gradients(dout, q, k, v, out, lse, *bounds, **options)

    return run


def check_cudnn_attention(s: Subject) -> Finding:
    """Compare cuDNN's attention, which takes samples of one length from 4,096 tokens on."""
    c, L, K = s.model.config, CUDNN_MIN_LENGTH, s.model.config.head_dim
    H = max(1, c.num_attention_heads // c.num_key_value_heads)  # those of one key head
    tensors = [s.normal(L, heads, K, seed=i) for i, heads in enumerate((H, 1, 1, H))]
    if not cudnn_supports(*tensors[:3], L) or c.score_softcap:
        return skipped("cuDNN's attention is for 16 bit on GPUs of capability 9.0 and higher")
    start, scale = torch.zeros(L, dtype=torch.int32, device=s.model.device), c.attention_scale
    end = torch.full_like(start, L)

    def kernels(dtype):
        q, k, v, dout = tensors
        out, lse = cudnn_attention(q, k, v, L, scale)
        return out, *cudnn_attention_backward(dout, q, k, v, out, lse, L, scale)

    def references(dtype):
        q, k, v, dout = (t.to(dtype) for t in tensors)
        out, lse = attention_reference(q, k, v, start, end, scale)
        gradients = attention_backward_reference(dout, q, k, v, out, lse, start, end, scale)
        return out, *gradients

    found, plain = kernels(s.model.dtype), references(s.model.dtype)
    return compare(found, plain, references(torch.float64))


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
