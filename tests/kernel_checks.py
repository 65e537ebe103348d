"""How the tests of the kernels judge a result, and what they feed to more than one kernel.

The bound: a kernel errs at most twice as much as the plain formula does in the same dtype, both measured against the
same formula in float64 (plus 1e-6 of the largest value, for results that happen to be exact). Without a GPU the
kernels run in Triton's interpreter, whose bfloat16 is wrong; so float32 and float16 there, and bfloat16 on a GPU.
"""

import math

import pytest
import torch
from conftest import GPU

from minitune.kernels import lora_linear
from minitune.kernels.dequantize import QuantizedWeight

DTYPES = [torch.float32, torch.float16, torch.bfloat16] if GPU else [torch.float32, torch.float16]
EPS = 1e-5
CODE = torch.linspace(-1, 1, 16).pow(3)  # in place of NF4's 16 values
kernel = pytest.mark.usefixtures("triton_everywhere", "poisoned")
in_each_dtype = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def normal(*shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def strided(x):
    """The same values as a slice of a wider tensor, between columns of NaN."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 24), math.nan, dtype=x.dtype, device=x.device)
    wide[..., 8:-16] = x
    return wide[..., 8:-16]


def with_gradients(formula, inputs, douts):
    """The outputs of the formula, then the gradients of its inputs; None among the inputs stays None."""
    inputs = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    outs = formula(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = torch.autograd.grad(outs, [x for x in inputs if x is not None], douts)
    return [*(out.detach() for out in outs), *grads]


def to(dtype, tensors):
    return [None if x is None else x.to(dtype) for x in tensors]


def assert_as_good_as_plain(results, plain, exact):
    largest = max(e.abs().max().item() for e in exact)
    for i, (x, p, e) in enumerate(zip(results, plain, exact, strict=True)):
        assert x.shape == e.shape, f"result {i}: {tuple(x.shape)} instead of {tuple(e.shape)}"
        error, plain_error = ((y.double() - e).abs().max().item() for y in (x, p))
        allowed = 2 * plain_error + 1e-6 * largest
        assert error <= allowed, (
            f"result {i}: error {error:.3g}; plain PyTorch errs by {plain_error:.3g}"
        )


def judge(results, formula, inputs, douts):
    """results = outputs, then gradients of the inputs, each held to the bound."""
    dtype = inputs[0].dtype
    plain = with_gradients(formula, inputs, to(dtype, douts))
    exact = with_gradients(formula, to(torch.float64, inputs), to(torch.float64, douts))
    assert_as_good_as_plain(results, plain, exact)


def as_function(forward, backward):
    """An autograd function out of a reference and its backward, so that gradcheck can look at the pair."""

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
    return normal(*shape, dtype=torch.float64, seed=seed).requires_grad_()


# ---------------------------------------------------------------------------------------------------- inputs


def bounds(lengths, device="cpu"):
    """start and end of packed samples of these lengths."""
    lengths = torch.tensor(lengths)
    end = lengths.cumsum(0)
    return [x.repeat_interleave(lengths).to(device, torch.int32) for x in (end - lengths, end)]


def angles(positions, width, device):
    angle = torch.arange(positions)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    return angle.cos().to(device), angle.sin().to(device)


def extended(weights, a, b, dtype, device):
    """The extended weight of linears that share an input; an adapter may be None."""
    rows, width = sum(len(w) for w in weights), weights[0].shape[1]
    spare = lora_linear.padded_rank(sum(0 if x is None else len(x) for x in a))
    weight = torch.zeros(rows + spare, width + spare, dtype=dtype, device=device)
    weight[:rows, :width] = torch.cat(weights)
    adapters = [(x, y, len(w)) for w, x, y in zip(weights, a, b, strict=True)]
    lora_linear.write_adapters_([(weight, adapters, rows, width)])
    return weight


def quantised(shape, nested, blocksize=64, device="cpu"):
    """Random bytes and scales: every byte and every code occurs."""
    n = math.prod(shape)
    generator = torch.Generator().manual_seed(n)
    blocks = -(-n // blocksize)
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=generator)
    if not nested:
        absmax, scales = torch.rand(blocks, generator=generator), {}
    else:
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
        scales = {
            "nested_absmax": torch.rand(-(-blocks // 256), generator=generator),
            "nested_code": torch.randn(256, generator=generator),
            "nested_offset": torch.tensor(0.123),
        }
    scales = {name: x.to(device) for name, x in scales.items()}
    return QuantizedWeight(
        packed.to(device), absmax.to(device), CODE.to(device), shape, blocksize, **scales
    )
