"""The loss with a multiplier and a soft cap of the logits, against PyTorch; tanh of the kernels."""

import math

import numpy as np
import pytest
import torch
from kernel_checks import (
    as_function,
    assert_as_good_as_plain,
    double,
    in_each_dtype,
    kernel,
    normal,
    with_gradients,
)
from torch.nn import functional

from minitune.kernels import backend
from minitune.kernels.backend import tl, triton
from minitune.kernels.cross_entropy import linear_cross_entropy

options = pytest.mark.parametrize(
    ("multiplier", "softcap"), [(0.125, 0.0), (1.0, 3.0), (2.5, 30.0)]
)
implementations = pytest.mark.parametrize("use_kernel", [True, False], ids=["kernel", "reference"])


def plain_loss(hidden, weight, targets, multiplier, softcap):
    """Return the mean loss over 3 tokens of scaled and capped logits, in at least float32."""
    logits = hidden @ weight.to(hidden.dtype).T * multiplier
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return functional.cross_entropy(logits, targets, reduction="sum") / 3


@kernel
@in_each_dtype
@options
@pytest.mark.parametrize(("N", "D", "V"), [(7, 16, 423), (1, 8, 5), (4, 8, 4099)])
def test_scaled_and_capped_logits_err_at_most_twice_as_much_as_pytorch(
    N, D, V, multiplier, softcap, dtype, device
):
    hidden = normal(N, D, dtype=dtype, device=device)
    weight = normal(V, D, dtype=dtype, device=device)
    targets = torch.arange(N, device=device) * 31 % V
    targets[1:2], targets[-1] = -100, V - 1
    scaling = {"multiplier": multiplier, "softcap": softcap}
    results = linear_cross_entropy(hidden, weight, targets, 3, **scaling)
    alone, _ = linear_cross_entropy(hidden, weight, targets, 3, need_grad=False, **scaling)
    assert torch.equal(results[0], alone)

    def formula(hidden):
        return plain_loss(hidden, weight, targets, multiplier, softcap)

    exact = with_gradients(formula, [hidden.double()], None)
    plain = with_gradients(formula, [hidden], None)
    assert_as_good_as_plain(results, plain, exact)


@pytest.mark.usefixtures("triton_everywhere")
@implementations
def test_the_gradient_of_capped_logits_is_exact_far_beyond_the_cap(use_kernel, device, monkeypatch):
    """Logits of 0.01 to 1000 at a cap of 30: the slope of the cap falls to 0."""
    if not use_kernel:
        monkeypatch.setattr(backend, "use_triton", lambda x: False)
    weight = torch.logspace(-2, 3, 211, device=device)[:, None]
    targets = torch.tensor([0, 100, 190], device=device)
    hidden = torch.tensor([[1.0], [0.5], [-0.25]], device=device)
    buffer = torch.empty(3, 211, device=device)
    linear_cross_entropy(hidden, weight, targets, 1, logits_buffer=buffer, softcap=30.0)

    def losses(logits):
        return functional.cross_entropy(30 * torch.tanh(logits / 30), targets, reduction="sum")

    exact = with_gradients(losses, [(hidden * weight.T).double()], None)[1]
    assert (buffer.double() - exact).abs().max() < 2e-6
    assert buffer.isfinite().all()


@options
def test_the_gradient_of_the_loss_reference_with_options_passes_gradcheck(multiplier, softcap):
    weight, targets = double(9, 5).detach(), torch.tensor([3, -100, 8, 0])

    def forward(hidden):
        loss, dhidden = linear_cross_entropy(
            hidden, weight, targets, 3, 3, multiplier=multiplier, softcap=softcap
        )
        return loss, [dhidden]

    pair = as_function(forward, lambda dout, hidden, dhidden: dout * dhidden)
    assert torch.autograd.gradcheck(pair, double(4, 5))


@in_each_dtype
@pytest.mark.parametrize(("N", "D", "V"), [(7, 16, 423), (1, 8, 5), (300, 64, 1000)])
def test_a_multiplier_of_one_changes_no_bit_of_the_matmul(N, D, V, dtype, device, monkeypatch):
    """Old contents of the buffer, NaN here, do not reach the logits."""
    hidden = normal(N, D, dtype=dtype, device=device)
    weight = normal(V, D, dtype=dtype, device=device)
    logits = torch.full((N, V), math.nan, dtype=dtype, device=device)
    monkeypatch.setattr("minitune.kernels.cross_entropy._cross_entropy_", lambda *arguments: None)
    targets = torch.zeros(N, dtype=torch.long, device=device)
    linear_cross_entropy(hidden, weight, targets, 1, need_grad=False, logits_buffer=logits)
    assert torch.equal(logits, torch.mm(hidden, weight.t()))


def test_a_negative_soft_cap_is_refused():
    x, targets = normal(2, 8), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"softcap -1\.0; expected above 0, or 0 for none"):
        linear_cross_entropy(x, x, targets, 1, softcap=-1.0)


@triton.jit
def _tanh(x_ptr, tanh_ptr, slope_ptr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tanh, slope = backend.tanh_and_slope(tl.load(x_ptr + columns))
    tl.store(tanh_ptr + columns, tanh)
    tl.store(slope_ptr + columns, slope)


def test_tanh_and_its_slope_are_right_to_float32_for_tiny_and_for_huge_arguments(device):
    positive = np.logspace(-30, 2, 2039)
    around = np.linspace(0.24, 0.26, 2048 - 2039)
    x = torch.tensor(np.concatenate([positive, around]), dtype=torch.float32, device=device)
    for signed in (x, -x):
        tanh, slope = torch.empty_like(x), torch.empty_like(x)
        _tanh[(1,)](signed, tanh, slope, BLOCK=2048)
        exact = torch.tanh(signed.double())
        assert ((tanh.double() - exact) / exact).abs().max() < 3e-7
        exact_slope = 1 / torch.cosh(signed.double()).square()
        assert (slope.double() - exact_slope).abs().max() < 3e-7
        near = signed.abs() < 20
        assert ((slope.double() - exact_slope) / exact_slope)[near].abs().max() < 1e-5
    special = torch.zeros(2048, device=device)
    special[:4] = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    _tanh[(1,)](special, tanh, slope, BLOCK=2048)
    assert tanh[:2].tolist() == [1, -1] and slope[:2].tolist() == [0, 0]
    assert tanh[2].isnan() and tanh[3] == 0 and slope[3] == 1
