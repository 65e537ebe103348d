"""The bound that kernel results are held to, and inputs shared by several kernel tests.

The bound: both a kernel and the plain formula in the same dtype are compared with the formula in
float64. The kernel may err at most twice as much as the plain formula, plus 1e-6 of the largest
value in case the plain result is exact. Without a GPU the kernels run in Triton's interpreter,
whose bfloat16 is wrong. Therefore the CPU tests use float32 and float16, the GPU tests bfloat16
too.
"""

import math

import pytest
import torch
from conftest import GPU

from minitune.kernels import backend, lora_linear
from minitune.kernels.dequantize_nf4 import NF4Storage

DTYPES = [torch.float32, torch.float16, torch.bfloat16] if GPU else [torch.float32, torch.float16]
EPS = 1e-5
CODE = torch.linspace(-1, 1, 16).pow(3)  # stands in for NF4's 16 values
kernel = pytest.mark.usefixtures("triton_everywhere", "poisoned")
in_each_dtype = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def normal(*shape, dtype=torch.float32, device="cpu", seed=0):
    """Return normal random numbers, equal on all devices."""
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def strided(x):
    """Return the values of x as a slice of a wider tensor, between columns of NaN."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 24), math.nan, dtype=x.dtype, device=x.device)
    wide[..., 8:-16] = x
    return wide[..., 8:-16]


def with_gradients(formula, inputs, douts):
    """Return the outputs of the formula, then the gradients of its inputs that are not None."""
    inputs = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    outs = formula(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = torch.autograd.grad(outs, [x for x in inputs if x is not None], douts)
    return [*(out.detach() for out in outs), *grads]


def to(dtype, tensors):
    """Return the tensors in dtype; None stays None."""
    return [None if x is None else x.to(dtype) for x in tensors]


def assert_as_good_as_plain(results, plain, exact):
    """Hold each result to the bound, given the plain results and those in float64."""
    largest = max(e.abs().max().item() for e in exact)
    for i, (x, p, e) in enumerate(zip(results, plain, exact, strict=True)):
        assert x.shape == e.shape, f"result {i}: {tuple(x.shape)} instead of {tuple(e.shape)}"
        error = (x.double() - e).abs().max().item()
        plain_error = (p.double() - e).abs().max().item()
        allowed = 2 * plain_error + 1e-6 * largest
        assert error <= allowed, (
            f"result {i}: error {error:.3g}; plain PyTorch errs by {plain_error:.3g}"
        )


def judge(results, formula, inputs, douts):
    """Hold results (outputs, then gradients of the inputs) to the bound of the formula."""
    dtype = inputs[0].dtype
    plain = with_gradients(formula, inputs, to(dtype, douts))
    exact = with_gradients(formula, to(torch.float64, inputs), to(torch.float64, douts))
    assert_as_good_as_plain(results, plain, exact)


def as_function(forward, backward):
    """Return an autograd function made of a reference and its backward, for gradcheck."""

    class Pair(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            out, saved = forward(*inputs)
            ctx.save_for_backward(*inputs, *saved)
            return out

        @staticmethod
        def backward(ctx, dout):
            return backward(dout, *ctx.saved_tensors)

    return Pair.apply


def double(*shape, seed=0):
    """Return float64 random numbers that require gradients."""
    return normal(*shape, dtype=torch.float64, seed=seed).requires_grad_()


# ---- formulas


def plain_attention(q, k, v, seen, scale, softcap=0.0):
    """Return (out, lse) by the textbook formula, with the softmax in at least float32."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1).transpose(0, 1) for x in (k, v))
    scores = (q.transpose(0, 1) * scale) @ k.mT
    scores = scores.to(backend.accumulator(q.dtype))
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores.masked_fill(~seen, -math.inf)
    return (scores.softmax(-1).to(q.dtype) @ v).transpose(0, 1), scores.logsumexp(-1)


# ---- inputs


def bounds(lengths, device="cpu"):
    """Return start and end of packed sequences of these lengths."""
    lengths = torch.tensor(lengths)
    end = lengths.cumsum(0)
    return [x.repeat_interleave(lengths).to(device, torch.int32) for x in (end - lengths, end)]


def angles(positions, width, device):
    """Return RoPE's cos and sin tables (positions, width / 2)."""
    angle = torch.arange(positions)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    return angle.cos().to(device), angle.sin().to(device)


def extended(weights, a, b, dtype, device):
    """Return the extended weight of linears that share an input; an adapter may be None."""
    rows, width = sum(len(w) for w in weights), weights[0].shape[1]
    R = lora_linear.padded_rank(sum(0 if x is None else len(x) for x in a))
    weight = torch.zeros(rows + R, width + R, dtype=dtype, device=device)
    weight[:rows, :width] = torch.cat(weights)
    adapters = [(x, y, len(w)) for w, x, y in zip(weights, a, b, strict=True)]
    lora_linear.write_adapters_([(weight, adapters, rows, width)])
    return weight


def quantised(shape, nested, blocksize=64, device="cpu"):
    """Return a 4-bit weight of random bytes and scales, in which every byte and code occurs."""
    n = math.prod(shape)
    generator = torch.Generator().manual_seed(n)
    blocks = -(-n // blocksize)
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=generator)
    if nested:
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
        scales = {
            "nested_absmax": torch.rand(-(-blocks // 256), generator=generator),
            "nested_code": torch.randn(256, generator=generator),
            "nested_offset": torch.tensor(0.123),
        }
    else:
        absmax, scales = torch.rand(blocks, generator=generator), {}
    scales = {name: x.to(device) for name, x in scales.items()}
    packed, absmax, code = (x.to(device) for x in (packed, absmax, CODE))
    return NF4Storage(packed, absmax, code, shape, blocksize, **scales)
