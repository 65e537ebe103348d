"""The AdamW kernels against PyTorch, and their 8-bit moments against bitsandbytes."""

import math

import pytest
import torch
from adamw_states import SETTINGS, gradients, in_float32, new_moments, normal, update_

from minitune.kernels import backend
from minitune.kernels.adamw import _quantize, adamw_, adamw_8bit_
from minitune.kernels.backend import tl, triton
from minitune.kernels.global_norm import global_norm
from minitune.model.nf4 import dynamic_map
from minitune.training.optimizer import moment_tables

CPU = torch.device("cpu")
kernel = pytest.mark.usefixtures("triton_everywhere", "poisoned")
sizes = pytest.mark.parametrize("P", [1, 255, 256, 1025, 17000])
on_both = pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


# ---- against PyTorch


def each_step(grads, device, monkeypatch, eight_bit=False, **settings):
    """Yield [values, norm, *moments] after each update, by the kernels and by PyTorch.

    Both start each update from the state that PyTorch computed on the CPU.
    """
    P = len(grads[0])
    plain = [normal(P), torch.zeros(()), *new_moments(P, eight_bit, "cpu")]
    for step, g in enumerate(grads, 1):
        ours = [t.clone().to(device) for t in plain]
        for state, use_triton in ((ours, True), (plain, False)):
            w, norm, *moments = state
            monkeypatch.setattr(backend, "use_triton", lambda x, answer=use_triton: answer)
            on_device = g.to(w.device)
            norm.copy_(global_norm(on_device))
            options = {**SETTINGS, **settings}
            update_(w, on_device, moments, norm, lr=1e-2 * step, step=step, **options)
        yield [t.cpu() for t in ours], plain


@kernel
@sizes
@pytest.mark.parametrize(
    "settings", [{}, {"max_grad_norm": 0.0}, {"weight_decay": 0.0, "max_grad_norm": 1e6}]
)
def test_adamw_kernel_equals_pytorch(P, settings, device, monkeypatch):
    grads = [gradients(P, seed) for seed in range(1, 4)]
    for ours, plain in each_step(grads, device, monkeypatch, **settings):
        for x, y in zip(ours, plain, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-6, atol=1e-7)


@kernel
@sizes
@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 0.0}])
def test_8bit_kernel_equals_pytorch_except_for_values_on_a_border(P, settings, device, monkeypatch):
    g = gradients(P, 1)
    # the second gradient makes m small: its block's scale must follow
    grads = [g, -0.8 * g, gradients(P, 2)]
    for ours, plain in each_step(grads, device, monkeypatch, True, **settings):
        w, norm, m, v, *absmax = zip(ours, plain, strict=True)
        for x, y in (w, norm, *absmax):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)
        for x, y in (m, v):
            different = (x.int() - y.int()).abs()
            assert different.max() <= 1 and different.sum() <= max(1, P // 1000)


def blocks_around(borders, table, signed):
    """Return blocks (count, 256) of borders, values, decades and random numbers.

    Each number comes with its six nearest neighbours. The last number of a block is 1, so that the
    block's scale is 1.
    """
    decades = 10.0 ** torch.arange(-9, 1)
    random = 10 ** (-9 * torch.rand(4000))
    x = torch.cat([borders[:-1], table, decades, random, torch.zeros(2)])
    around = [x]
    for direction in (math.inf, -math.inf):
        y = x
        for _ in range(3):
            y = torch.nextafter(y, torch.tensor(direction))
            around.append(y)
    x = torch.cat([*around, *(-y for y in around)]).clamp(-1 if signed else 0, 1)
    x = torch.cat([x, x.new_zeros(-len(x) % 255)]).view(-1, 255)
    return torch.cat([x, torch.ones(len(x), 1)], dim=1)


@kernel
@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_the_nearest_values_everywhere(signed, device):
    table, borders = moment_tables(CPU)[0 if signed else 2 :][:2]
    x = blocks_around(borders, table, signed)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=device)
    quantize_rows[(len(x),)](x.to(device), borders.to(device), codes, SIGNED=signed)
    assert torch.equal(codes.cpu().int(), torch.bucketize(x, borders[:-1], out_int32=True))


@triton.jit
def quantize_rows(x_ptr, borders_ptr, codes_ptr, SIGNED: tl.constexpr):
    """Quantise one row of 256 numbers a program."""
    at = tl.program_id(0) * 256 + tl.arange(0, 256)
    codes, _absmax = _quantize(tl.load(x_ptr + at), borders_ptr, SIGNED)
    tl.store(codes_ptr + at, codes)


@kernel
@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("eight_bit", [False, True])
def test_gradient_of_nan_reaches_its_parameter_and_with_clipping_all(
    eight_bit, bad, clip, device, monkeypatch
):
    P = 700
    g = gradients(P, 1)
    g[300] = bad
    grads = [g, gradients(P, 2)]
    *_, last = each_step(grads, device, monkeypatch, eight_bit, max_grad_norm=clip)
    lost = torch.zeros(P, dtype=torch.bool)
    lost[300] = True
    if eight_bit:
        lost[256:512] = True  # the block has lost its scale
    if clip and bad is math.nan:
        lost[:] = True
    for w, norm, *moments in last:
        assert torch.isfinite(norm), "the second gradient is finite"
        for x in in_float32(moments):
            assert torch.equal(~torch.isfinite(x), lost)
        assert torch.equal(~torch.isfinite(w), lost)


@kernel
@pytest.mark.parametrize("eight_bit", [False, True])
def test_gradients_of_zero_move_parameters_by_weight_decay_only(eight_bit, device, monkeypatch):
    *_, last = each_step([torch.zeros(300)] * 2, device, monkeypatch, eight_bit)
    for w, norm, *moments in last:
        assert norm == 0 and all((x == 0).all() for x in in_float32(moments))
        torch.testing.assert_close(w, normal(300) * (1 - 1e-3) * (1 - 2e-3), rtol=1e-6, atol=0)


@kernel
@pytest.mark.parametrize("P", [1, 4095, 16385, 40000])
def test_norm_equals_that_of_float64(P, device):
    x = gradients(P, 1, device)
    torch.testing.assert_close(global_norm(x).double(), x.double().norm(), rtol=2e-7, atol=0)


def test_wrong_shapes_dtypes_and_steps_are_refused_by_name():
    x, codes = torch.zeros(300), torch.zeros(300, dtype=torch.uint8)
    norm, tables, absmax = torch.zeros(()), moment_tables(CPU), torch.zeros(2)
    with pytest.raises(ValueError, match=r"grads is \(299,\) .* expected \(300,\) torch.float32"):
        adamw_(x, x[1:], x, x, norm, lr=1.0, step=1, **SETTINGS)
    with pytest.raises(ValueError, match=r"exp_avg is .*float32 .* expected .*uint8"):
        adamw_8bit_(x, x, x, codes, absmax, absmax, tables, norm, lr=1.0, step=1, **SETTINGS)
    with pytest.raises(ValueError, match="step is 0; the first update is step 1"):
        adamw_(x, x, x, x, norm, lr=1.0, step=0, **SETTINGS)
    with pytest.raises(ValueError, match="expected a contiguous vector"):
        global_norm(x.view(3, 100))


# ---- against bitsandbytes


def test_tables_equal_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        expected = functional.create_dynamic_map(signed=signed)
        assert torch.equal(dynamic_map(CPU, signed=signed), expected)


@kernel
def test_negative_first_moment_never_becomes_zero_and_a_positive_one_may(device, monkeypatch):
    g = torch.zeros(256)
    g[:5] = torch.tensor([1.0, 1e-9, -1e-9, 2.8e-7, -2.8e-7])
    for states in each_step([g], device, monkeypatch, True, max_grad_norm=0.0):
        for _, _, m, *_ in states:
            assert m[:6].tolist() == [255, 127, 126, 128, 126, 127]


def bitsandbytes_step_(g, state, step, lr):
    """Update state (values, m and v codes, m and v scales) in place, with weight decay 0.1."""
    functional = pytest.importorskip("bitsandbytes.functional")
    w, m, v, *absmax = state
    maps = [moment_tables(g.device)[row].contiguous() for row in (0, 2)]
    functional.optimizer_update_8bit_blockwise(
        "adam", g, w, m, v, 0.9, 0.999, 0.0, 0.0, 1e-8, step, lr, *maps, *absmax, weight_decay=0.1
    )


def our_step_(g, state, step, lr):
    """Update the same state in place by our function."""
    w, *moments = state
    settings = {**SETTINGS, "max_grad_norm": 0.0}
    update_(w, g, moments, global_norm(g), lr=lr, step=step, **settings)


@on_both
def test_8bit_step_equals_that_of_bitsandbytes_from_the_same_state(where):
    """Compare values, scales and codes after each step.

    bitsandbytes' CPU code searches its table coarsely. So the claim about codes that holds on both
    devices is: our rounded moments are never further from the exact moments than theirs.
    """
    P, lr = 20000, 1e-3
    theirs = [normal(P, device=where), *new_moments(P, True, where)]
    for step in range(1, 21):
        g = gradients(P, step, where)
        ours = [t.clone() for t in theirs]
        m, v = in_float32(theirs[1:])
        our_step_(g, ours, step, lr)
        bitsandbytes_step_(g, theirs, step, lr)
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=5e-3 * lr)
        for x, y in zip(ours[3:], theirs[3:], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=0)
        exact = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        moments = zip(exact, in_float32(ours[1:]), in_float32(theirs[1:]), ours[3:], strict=True)
        for x, a, b, absmax in moments:
            rounding = 1e-4 * x.abs() + 3e-7 * absmax.repeat_interleave(256)[:P]
            assert not ((a - x).abs() > (b - x).abs() + rounding).any()
        if where == "cuda":
            for x, y in zip(ours[1:3], theirs[1:3], strict=True):
                different = (x.int() - y.int()).abs()
                assert different.max() <= 1 and (different > 0).float().mean() < 5e-3


@on_both
def test_20_steps_in_8_bit_end_near_those_of_bitsandbytes(where):
    """Values that are rounded differently part by 0.5% of one step on average, by one at most."""
    P, lr = 20000, 1e-2
    ours, theirs = ([normal(P, device=where), *new_moments(P, True, where)] for _ in range(2))
    for step in range(1, 21):
        our_step_(gradients(P, step, where), ours, step, lr)
        bitsandbytes_step_(gradients(P, step, where), theirs, step, lr)
    away = (ours[0] - theirs[0]).abs()
    assert away.mean() < 5e-3 * lr and away.max() < lr
