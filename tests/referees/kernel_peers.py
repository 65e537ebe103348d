"""Other libraries' kernels for scripts/benchmark/kernel_timing.py --peers: Liger, bitsandbytes, and torch's own attention.

`makers(kernel)` gives, by column of the table, functions that take the inputs of that kernel's row (elementwise_cases.py,
matmul_cases.py) and prepare a call that does the same work. What is not installed is not in it. Some of these kernels
write into what they are given or have saved; those get copies of their own.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

LIBRARIES = {"liger_kernel": "liger-kernel", "bitsandbytes": "bitsandbytes"}


def versions() -> dict[str, str]:
    found = {}
    for package in LIBRARIES.values():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def makers(kernel: str) -> dict[str, Callable]:
    return {
        column: make
        for (name, column, library), make in MAKERS.items()
        if name == kernel and (library is None or find_spec(library) is not None)
    }


# ---- bitsandbytes


def bitsandbytes_dequantize(weights: list) -> Callable:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    def state(w) -> QuantState:
        coarse = QuantState(
            w.nested_absmax, code=w.nested_code, blocksize=w.nested_blocksize, dtype=torch.float32
        )
        return QuantState(
            w.absmax,
            shape=torch.Size(w.shape),
            code=w.code,
            blocksize=w.blocksize,
            quant_type="nf4",
            dtype=torch.bfloat16,
            offset=w.nested_offset,
            state2=coarse,
        )

    states = [(w.packed.view(-1, 1), state(w)) for group in weights for w in group]
    return lambda: [dequantize_4bit(packed, state) for packed, state in states]


def bitsandbytes_adamw_8bit(values, grads, *rest) -> Callable:
    from bitsandbytes.optim import AdamW8bit

    p = torch.nn.Parameter(values.clone())
    p.grad = grads
    optimizer = AdamW8bit([p], lr=2e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def run():
        optimizer.step()
        return p.detach()

    return run


# ---- Liger


def liger_rms_norm(x, weight, eps) -> Callable:
    from liger_kernel.ops import LigerRMSNormFunction

    return lambda: (LigerRMSNormFunction.apply(x, weight, eps),)


def liger_add_rms_norm(x, residual, weight, eps, *_) -> Callable:
    """Its stream is bf16: x + residual is rounded and written, 8 bytes an element where ours moves 14."""
    from liger_kernel.ops import LigerFusedAddRMSNormFunction

    return lambda: LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps)[:1]  # (y, s)


def liger_rms_norm_backward(dy, x, weight, rstd, dresidual) -> Callable:
    """Of their fused addition and norm, with x as the sum: the gradient of s comes in beside that of y, as here."""
    from liger_kernel.ops import LigerFusedAddRMSNormFunction

    x = x.clone().requires_grad_()
    y, s = LigerFusedAddRMSNormFunction.apply(x, torch.zeros_like(x), weight, 1e-5)
    return lambda: torch.autograd.grad((y, s), x, (dy, dresidual), retain_graph=True)


def liger_rope(q, k, cos, sin, positions) -> Callable:
    from liger_kernel.ops import LigerRopeFunction

    q, k = (
        x[None].transpose(1, 2) for x in (q, k)
    )  # they rotate (1, heads, rows, K), stored as (1, rows, heads, K)
    cos, sin = (table[positions.long()].repeat(1, 2)[None] for table in (cos, sin))

    def run():
        return [x.transpose(1, 2)[0] for x in LigerRopeFunction.apply(q, k, cos, sin)]

    return run


def liger_swiglu(gate, up) -> Callable:
    from liger_kernel.ops import LigerSiLUMulFunction

    return lambda: (LigerSiLUMulFunction.apply(gate, up),)


def liger_swiglu_backward(dout, gate, up) -> Callable:
    """It writes the gradients over gate and up: right once, and as fast every time."""
    from liger_kernel.ops import LigerSiLUMulFunction

    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    out = LigerSiLUMulFunction.apply(gate, up)
    return lambda: torch.autograd.grad(out, (gate, up), dout, retain_graph=True)


def liger_linear_cross_entropy(hidden, weight, targets) -> Callable:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss_of, hidden = LigerFusedLinearCrossEntropyLoss(), hidden.detach().requires_grad_()

    def run():
        loss = loss_of(weight, hidden, targets)
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]

    return run


# ---- torch's attention


def flash(q, k, v, start, end, scale, lengths) -> Callable:
    """torch's variable-length flash attention. It takes grouped k and v as they are."""
    bounds, max_seqlen = _bounds(lengths, q.device), max(lengths)
    forward = torch.ops.aten._flash_attention_forward
    return lambda: forward(
        q, k, v, bounds, bounds, max_seqlen, max_seqlen, 0.0, True, False, scale=scale
    )[:1]


def flash_backward(dout, q, k, v, out, lse, start, end, scale, lengths) -> Callable:
    bounds, max_seqlen = _bounds(lengths, q.device), max(lengths)
    args = (bounds, bounds, max_seqlen, max_seqlen, 0.0, True)
    out, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, *args, False, scale=scale
    )
    backward = torch.ops.aten._flash_attention_backward
    return lambda: backward(dout, q, k, v, out, lse, *args, rng, unused, scale=scale)


def cudnn(q, k, v, start, end, scale, lengths) -> Callable | None:
    if len(set(lengths)) > 1:
        return None
    return partial(_cudnn, *_batched(lengths, q, k, v), scale)


def cudnn_backward(dout, q, k, v, out, lse, start, end, scale, lengths) -> Callable | None:
    if len(set(lengths)) > 1:
        return None
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = _cudnn(*_batched(lengths, *leaves), scale)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def _cudnn(q, k, v, scale):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        attend = torch.nn.functional.scaled_dot_product_attention
        return (
            attend(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            .transpose(1, 2)
            .flatten(0, 1)
        )


def _batched(lengths, *packed):
    return [x.unflatten(0, (len(lengths), -1)).transpose(1, 2) for x in packed]


def _bounds(lengths, device) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def flex(q, k, v, start, end, scale, lengths) -> Callable:
    """torch.compile's attention under a mask of samples; with gradients, so that forward and backward compile once."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return partial(_flex, *leaves, scale, _sample_mask(lengths, q.device))


def flex_backward(dout, q, k, v, out, lse, start, end, scale, lengths) -> Callable:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = _flex(*leaves, scale, _sample_mask(lengths, q.device))
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


@cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(q, k, v, scale, mask):
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return _compiled_flex()(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)[0].transpose(
        0, 1
    )


@cache
def _sample_mask(lengths, device):
    from torch.nn.attention.flex_attention import create_block_mask

    counts = torch.tensor(lengths, device=device)
    sample = torch.arange(len(lengths), device=device).repeat_interleave(counts)

    def sees(b, h, i, j):
        return (j <= i) & (sample[i] == sample[j])

    return create_block_mask(sees, None, None, len(sample), len(sample), device=device)


MAKERS = {
    ("dequantize_nf4", "bitsandbytes", "bitsandbytes"): bitsandbytes_dequantize,
    ("adamw_8bit_", "bitsandbytes", "bitsandbytes"): bitsandbytes_adamw_8bit,
    ("rms_norm", "Liger", "liger_kernel"): liger_rms_norm,
    ("add_rms_norm_", "Liger", "liger_kernel"): liger_add_rms_norm,
    ("rms_norm_backward", "Liger", "liger_kernel"): liger_rms_norm_backward,
    ("rope_", "Liger", "liger_kernel"): liger_rope,
    ("swiglu", "Liger", "liger_kernel"): liger_swiglu,
    ("swiglu_backward", "Liger", "liger_kernel"): liger_swiglu_backward,
    ("linear_cross_entropy", "Liger", "liger_kernel"): liger_linear_cross_entropy,
    ("attention", "flash", None): flash,
    ("attention_backward", "flash", None): flash_backward,
    ("attention", "cuDNN", None): cudnn,
    ("attention_backward", "cuDNN", None): cudnn_backward,
    ("attention", "compile", None): flex,
    ("attention_backward", "compile", None): flex_backward,
}
