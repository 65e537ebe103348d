"""Kernels of other libraries for bench.py --kernels: Liger, bitsandbytes, and torch's attention.

`makers(kernel)` returns makers by column of the table (scripts/benchmark/kernel_cases.py). A maker
takes the inputs of the kernel's case and returns a call of the same work. A library that is not
installed has no maker. Kernels that write into their inputs or saved tensors get copies.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from minitune.kernels.dequantize_nf4 import NF4Storage
from referees.versions import installed_versions

try:
    import bitsandbytes
    import bitsandbytes.functional
    import bitsandbytes.optim
except ImportError:
    bitsandbytes = None
try:
    import liger_kernel.ops as liger
    import liger_kernel.transformers as liger_transformers
except ImportError:
    liger = None

PACKAGES = ("liger-kernel", "bitsandbytes")


def versions() -> dict[str, str]:
    """Return the versions of the installed libraries."""
    return installed_versions(PACKAGES)


def makers(kernel: str) -> dict[str, Callable]:
    """Return column -> maker, of the installed libraries that have this kernel."""
    installed = {"bitsandbytes": bitsandbytes, "Liger": liger}
    return {
        column: make
        for (name, column), make in MAKERS.items()
        if name == kernel and installed.get(column, torch) is not None
    }


# ---- bitsandbytes


def bitsandbytes_dequantize(weights: list[list[NF4Storage]]) -> Callable:
    """Return the dequantisation of each weight by itself."""

    def state(w: NF4Storage):
        quant_state = bitsandbytes.functional.QuantState
        nested = quant_state(
            w.nested_absmax, code=w.nested_code, blocksize=w.nested_blocksize, dtype=torch.float32
        )
        return quant_state(
            w.absmax,
            shape=torch.Size(w.shape),
            code=w.code,
            blocksize=w.blocksize,
            quant_type="nf4",
            dtype=torch.bfloat16,
            offset=w.nested_offset,
            state2=nested,
        )

    dequantize = bitsandbytes.functional.dequantize_4bit
    states = [(w.packed.view(-1, 1), state(w)) for group in weights for w in group]
    return lambda: [dequantize(packed, state) for packed, state in states]


def bitsandbytes_adamw_8bit(values: Tensor, grads: Tensor, *rest: Tensor) -> Callable:
    """Return an update with 8-bit moments."""
    p = torch.nn.Parameter(values.clone())
    p.grad = grads
    optimizer = bitsandbytes.optim.AdamW8bit(
        [p], lr=2e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )

    def run() -> Tensor:
        optimizer.step()
        return p.detach()

    return run


# ---- Liger


def liger_rms_norm(x, weight, eps) -> Callable:
    """Return RMSNorm."""
    return lambda: (liger.LigerRMSNormFunction.apply(x, weight, eps),)


def liger_add_rms_norm(x, residual, weight, eps, *_) -> Callable:
    """Return the fused addition and RMSNorm.

    Liger's residual stream is bf16: it moves 8 bytes an element, ours moves 14.
    """
    add_norm = liger.LigerFusedAddRMSNormFunction
    return lambda: add_norm.apply(x, residual, weight, eps)[:1]  # of (y, s)


def liger_rms_norm_backward(dy, x, weight, rstd, dresidual) -> Callable:
    """Return the backward of the fused addition and RMSNorm, with x as the sum.

    The gradient of s comes in beside that of y, as in ours.
    """
    x = x.clone().requires_grad_()
    y, s = liger.LigerFusedAddRMSNormFunction.apply(x, torch.zeros_like(x), weight, 1e-5)
    return lambda: torch.autograd.grad((y, s), x, (dy, dresidual), retain_graph=True)


def liger_rope(q, k, cos, sin, positions) -> Callable:
    """Return RoPE on q and k: Liger rotates (1, heads, rows, K), stored as (1, rows, heads, K)."""
    q, k = (x[None].transpose(1, 2) for x in (q, k))
    cos, sin = (table[positions.long()].repeat(1, 2)[None] for table in (cos, sin))

    def run() -> list[Tensor]:
        return [x.transpose(1, 2)[0] for x in liger.LigerRopeFunction.apply(q, k, cos, sin)]

    return run


def liger_swiglu(gate, up) -> Callable:
    """Return SwiGLU."""
    return lambda: (liger.LigerSiLUMulFunction.apply(gate, up),)


def liger_swiglu_backward(dout, gate, up) -> Callable:
    """Return the backward of SwiGLU. It overwrites gate and up: only the first result is right."""
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    out = liger.LigerSiLUMulFunction.apply(gate, up)
    return lambda: torch.autograd.grad(out, (gate, up), dout, retain_graph=True)


def liger_linear_cross_entropy(hidden, weight, targets) -> Callable:
    """Return the loss and its gradient, head included."""
    loss_of = liger_transformers.LigerFusedLinearCrossEntropyLoss()
    hidden = hidden.detach().requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        loss = loss_of(weight, hidden, targets)
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]

    return run


# ---- torch's attention


def flash(q, k, v, start, end, scale, lengths) -> Callable:
    """Return torch's variable-length flash attention. It takes grouped k and v as they are."""
    cu_seqlens, max_seqlen = _cu_seqlens(lengths, q.device), max(lengths)
    args = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, True)
    forward = torch.ops.aten._flash_attention_forward
    return lambda: forward(q, k, v, *args, False, scale=scale)[:1]


def flash_backward(dout, q, k, v, out, lse, start, end, scale, lengths) -> Callable:
    """Return the backward of torch's variable-length flash attention, after its forward."""
    cu_seqlens, max_seqlen = _cu_seqlens(lengths, q.device), max(lengths)
    args = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, True)
    forward = torch.ops.aten._flash_attention_forward
    out, lse, rng, unused, _ = forward(q, k, v, *args, False, scale=scale)
    backward = torch.ops.aten._flash_attention_backward
    return lambda: backward(dout, q, k, v, out, lse, *args, rng, unused, scale=scale)


def _cu_seqlens(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def cudnn(q, k, v, start, end, scale, lengths) -> Callable | None:
    """Return cuDNN's attention, or None if the samples differ in length."""
    if len(set(lengths)) > 1:
        return None
    return partial(_cudnn, *_batched(lengths, q, k, v), scale)


def cudnn_backward(dout, q, k, v, out, lse, start, end, scale, lengths) -> Callable | None:
    """Return the backward of cuDNN's attention, or None if the samples differ in length."""
    if len(set(lengths)) > 1:
        return None
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = _cudnn(*_batched(lengths, *leaves), scale)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def _cudnn(q, k, v, scale) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def _batched(lengths: tuple[int, ...], *packed: Tensor) -> list[Tensor]:
    return [x.unflatten(0, (len(lengths), -1)).transpose(1, 2) for x in packed]


def flex(q, k, v, start, end, scale, lengths) -> Callable:
    """Return torch.compile's attention under a mask of the samples.

    Its inputs need gradients, so forward and backward compile once.
    """
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return partial(_flex, *leaves, scale, _sample_mask(lengths, q.device))


def flex_backward(dout, q, k, v, out, lse, start, end, scale, lengths) -> Callable:
    """Return the backward of torch.compile's attention, after its forward."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = _flex(*leaves, scale, _sample_mask(lengths, q.device))
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


@cache
def _compiled_flex() -> Callable:
    return torch.compile(flex_attention, dynamic=False)


def _flex(q, k, v, scale, mask) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = _compiled_flex()(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


@cache
def _sample_mask(lengths: tuple[int, ...], device: torch.device):
    counts = torch.tensor(lengths, device=device)
    sample = torch.arange(len(lengths), device=device).repeat_interleave(counts)

    def sees(b, h, i, j):
        return (j <= i) & (sample[i] == sample[j])

    return create_block_mask(sees, None, None, len(sample), len(sample), device=device)


MAKERS = {  # (kernel, column) -> maker
    ("dequantize_nf4", "bitsandbytes"): bitsandbytes_dequantize,
    ("adamw_8bit_", "bitsandbytes"): bitsandbytes_adamw_8bit,
    ("rms_norm", "Liger"): liger_rms_norm,
    ("add_rms_norm_", "Liger"): liger_add_rms_norm,
    ("rms_norm_backward", "Liger"): liger_rms_norm_backward,
    ("rope_", "Liger"): liger_rope,
    ("swiglu", "Liger"): liger_swiglu,
    ("swiglu_backward", "Liger"): liger_swiglu_backward,
    ("linear_cross_entropy", "Liger"): liger_linear_cross_entropy,
    ("attention", "flash"): flash,
    ("attention_backward", "flash"): flash_backward,
    ("attention", "cuDNN"): cudnn,
    ("attention_backward", "cuDNN"): cudnn_backward,
    ("attention", "compile"): flex,
    ("attention_backward", "compile"): flex_backward,
}
