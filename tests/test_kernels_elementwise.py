"""RMSNorm, RoPE, gated activation and embedding against PyTorch, by kernel_checks.py's bound."""

import functools
import math

import pytest
import torch
from kernel_checks import (
    EPS,
    angles,
    as_function,
    assert_as_good_as_plain,
    double,
    in_each_dtype,
    judge,
    kernel,
    normal,
    strided,
    to,
    with_gradients,
)

from minitune.kernels import embedding, qk_norm_rope, rms_norm, rope
from minitune.kernels.gated_activation import (
    ACTIVATIONS,
    gated_activation,
    gated_activation_backward,
    gated_activation_backward_reference,
    gated_activation_reference,
)

# ---- RMSNorm


def plain_norm(x, weight):
    """Return the RMSNorm of x, computed in at least float32."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight).to(x.dtype)


@kernel
@in_each_dtype
@pytest.mark.parametrize("shape", [(3, 423), (1, 64), (5, 213)])
def test_rms_norm_and_its_backward_err_at_most_twice_as_much_as_pytorch(shape, dtype, device):
    x, dy, dresidual = (
        strided(normal(*shape, dtype=dtype, device=device, seed=s)) for s in range(3)
    )
    weight = normal(shape[1], dtype=dtype, device=device)
    y, rstd = rms_norm.rms_norm(x, weight, EPS)
    dx = rms_norm.rms_norm_backward(dy, x, weight, rstd, dresidual)
    judge([y, x, dx], lambda x: (plain_norm(x, weight.to(x.dtype)), x + 0), [x], [dy, dresidual])
    alone = rms_norm.rms_norm_backward(dy, x, weight, rstd)
    judge([y, alone], lambda x: plain_norm(x, weight.to(x.dtype)), [x], [dy])


@kernel
@in_each_dtype
def test_the_norm_of_a_sum_does_not_round_the_sum_and_adds_to_the_residual(dtype, device):
    x, addend, dy, dresidual = (
        strided(normal(3, 423, dtype=dtype, device=device, seed=s)) for s in range(4)
    )
    weight = normal(423, dtype=dtype, device=device)
    residual = strided(normal(3, 423, device=device, seed=4))
    before = residual.clone()
    y, rstd = rms_norm.add_rms_norm_(x, addend, weight, EPS, residual=residual)
    dx = rms_norm.rms_norm_backward(dy, x, weight, rstd, addend=addend)
    assert torch.equal(residual, before + addend)
    judge(
        [y, dx, dx], lambda x, addend: plain_norm(x + addend, weight.to(x.dtype)), [x, addend], [dy]
    )
    exact = x.float() + addend
    alone, same = rms_norm.rms_norm(exact, weight.float(), EPS)
    assert torch.equal(y, alone.to(dtype)) and torch.allclose(rstd, same, rtol=1e-6)
    dx = rms_norm.rms_norm_backward(dy, x, weight, rstd, dresidual, addend)
    expected = rms_norm.rms_norm_backward(
        dy.float(), exact, weight.float(), rstd, dresidual.float()
    )
    assert torch.equal(dx, expected.to(dtype))


@kernel
@in_each_dtype
def test_rms_norm_takes_the_float32_residual_stream_and_returns_a_narrower_y(dtype, device):
    x, weight = normal(3, 64, device=device), normal(64, dtype=dtype, device=device)
    y = torch.empty(3, 64, dtype=dtype, device=device)
    _, rstd = rms_norm.rms_norm(x, weight, EPS, out=y)
    assert torch.equal(y, rms_norm.rms_norm(x, weight.float(), EPS)[0].to(dtype))
    dx = rms_norm.rms_norm_backward(y, x, weight, rstd)
    assert dx.dtype == dtype
    assert torch.equal(dx, rms_norm.rms_norm_backward(y.float(), x, weight.float(), rstd).to(dtype))


@kernel
@in_each_dtype
def test_a_norm_adds_its_offset_to_the_weight_in_float32(dtype, device):
    """Offsets of 1 and weights near -1: in 16 bit the rounded sum would lose digits."""
    x, addend, dy = (normal(3, 213, dtype=dtype, device=device, seed=s) for s in range(3))
    weight = (normal(213, device=device) / 64 - 1).to(dtype)
    y, rstd = rms_norm.rms_norm(x, weight, EPS, offset=1.0)
    dx = rms_norm.rms_norm_backward(dy, x, weight, rstd, offset=1.0)
    exact = weight.float() + 1

    def formula(x):
        return plain_norm(x, exact.to(torch.float64 if x.dtype == torch.float64 else torch.float32))

    judge([y, dx], formula, [x], [dy])
    y, rstd = rms_norm.add_rms_norm_(x, addend, weight, EPS, offset=1.0)
    dx = rms_norm.rms_norm_backward(dy, x, weight, rstd, addend=addend, offset=1.0)
    same, rstd = rms_norm.add_rms_norm_(x, addend, exact, EPS)
    assert torch.equal(y, same)
    # A GPU may join the sum with another operation, which rounds once less.
    other = rms_norm.rms_norm_backward(dy, x, exact, rstd, addend=addend)
    assert torch.allclose(dx, other, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@kernel
def test_rms_norm_keeps_a_nan_in_its_row(device):
    x = normal(3, 64, device=device)
    x[1, 5] = math.nan
    y, _ = rms_norm.add_rms_norm_(x, torch.zeros_like(x), torch.ones(64, device=device), EPS)
    assert y.isnan().any(dim=1).tolist() == [False, True, False]
    assert y[1].isnan().all()


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_backward_of_the_norm_reference_passes_gradcheck(offset):
    weight = double(7).detach()

    def forward(x):
        y, rstd = rms_norm.rms_norm_reference(x, weight, EPS, offset)
        return y, [rstd]

    def backward(dy, x, rstd):
        return rms_norm.rms_norm_backward_reference(dy, x, weight, rstd, offset=offset)

    norm = as_function(forward, backward)
    assert torch.autograd.gradcheck(norm, double(3, 7))


# ---- RoPE


def plain_rope(x, cos, sin):
    """Return x rotated as in Hugging Face's Llama, computed in at least float32."""
    turned = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], dim=-1)
    wide = x if x.dtype == torch.float64 else x.float()
    cos, sin = (torch.cat([table, table], -1)[:, None] for table in (cos, sin))
    return (wide * cos + turned * sin).to(x.dtype)


@kernel
@in_each_dtype
@pytest.mark.parametrize(("N", "H", "G", "K"), [(7, 9, 3, 64), (1, 2, 1, 128), (13, 3, 3, 24)])
def test_rope_rotates_q_and_k_of_a_fused_projection_in_place_and_back(N, H, G, K, dtype, device):
    fused = normal(N, (H + 2 * G) * K, dtype=dtype, device=device)
    before = fused.clone()
    q, k = fused[:, : H * K].view(N, H, K), fused[:, H * K : (H + G) * K].view(N, G, K)
    old = [q.clone(), k.clone()]
    cos, sin = angles(40, K, device)
    positions = torch.arange(N, device=device) * 7 % 40
    rope.rope_(q, k, cos, sin, positions)
    for new, x in zip((q, k), old, strict=True):
        plain = plain_rope(x, cos[positions], sin[positions])
        exact = plain_rope(x.double(), cos[positions].double(), sin[positions].double())
        assert_as_good_as_plain([new], [plain], [exact])
    assert torch.equal(fused[:, (H + G) * K :], before[:, (H + G) * K :])
    # The inverse rotation is the gradient: <rope(x), dy> = <x, rope_inverse(dy)>.
    dq, dk = (normal(*x.shape, dtype=dtype, device=device, seed=5) for x in (q, k))
    grads = [dq.clone(), dk.clone()]
    rope.rope_(*grads, cos, sin, positions, inverse=True)
    table = [t[positions] for t in (cos, sin)]
    wide_table = to(torch.float64, table)
    for grad, x, dy in zip(grads, old, (dq, dk), strict=True):
        exact = with_gradients(lambda x: plain_rope(x, *wide_table), [x.double()], [dy.double()])
        plain = with_gradients(lambda x: plain_rope(x, *table), [x], [dy])
        assert_as_good_as_plain([grad], plain[1:], exact[1:])


@kernel
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_rope_scales_queries_at_each_position_and_no_keys(inverse, device):
    q, k = normal(7, 3, 24, device=device), normal(7, 1, 24, device=device, seed=1)
    cos, sin = angles(40, 24, device)
    positions = torch.arange(7, device=device) * 5
    scale = 1 + torch.arange(40, device=device) / 10
    expected = [q.clone(), k.clone()]
    rope.rope_reference_(*expected, cos, sin, positions, inverse, scale)
    unscaled = k.clone()
    rope.rope_(q, k, cos, sin, positions, inverse, scale)
    rope.rope_(q.clone(), unscaled, cos, sin, positions, inverse)
    torch.testing.assert_close([q, k], expected)
    assert torch.equal(k, unscaled)


# ---- RMSNorm of each head, then RoPE


def plain_qk_norm_rope(x, H, weights, cos, sin):
    """Return the heads of x (N, H + G, K) normalised and rotated as in Hugging Face's Qwen3."""
    heads = [plain_norm(x[:, :H], weights[0]), plain_norm(x[:, H:], weights[1])]
    return plain_rope(torch.cat(heads, dim=1), cos, sin)


@kernel
@in_each_dtype
@pytest.mark.parametrize(("N", "H", "G", "K"), [(7, 9, 3, 64), (1, 2, 1, 128), (13, 3, 3, 24)])
def test_norm_and_rope_of_heads_err_at_most_twice_as_much_as_pytorch(N, H, G, K, dtype, device):
    fused = normal(N, (H + 2 * G) * K, dtype=dtype, device=device)
    x = fused[:, : (H + G) * K].view(N, H + G, K)  # a view between the columns of v
    before, dv = fused.clone(), normal(N, G * K, dtype=dtype, device=device, seed=3)
    weights = [normal(K, dtype=dtype, device=device, seed=i) * 10.0 ** (2 - i) for i in (1, 2)]
    weights[0][::5] = 0  # y alone could not give these elements of x back
    cos, sin = angles(40, K, device)
    positions = torch.arange(N, device=device) * 7 % 40
    tables = (cos, sin, positions)
    y = qk_norm_rope.qk_norm_rope(x, H, *weights, EPS, *tables)
    assert y.is_contiguous() and torch.equal(fused, before)

    dy = normal(N, H + G, K, dtype=dtype, device=device, seed=5)
    dfused = torch.cat([dy.flatten(1), dv], dim=1)
    dx = dfused[:, : (H + G) * K].view(N, H + G, K)
    qk_norm_rope.qk_norm_rope_backward_(dx, x, H, *weights, EPS, *tables)
    assert torch.equal(dfused[:, (H + G) * K :], dv)

    def formula(x):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows = to(wide, [cos[positions], sin[positions]])
        return plain_qk_norm_rope(x, H, to(x.dtype, weights), *rows)

    judge([y, dx], formula, [x], [dy])


@kernel
@in_each_dtype
def test_the_norms_of_heads_add_their_offset_to_both_weights(dtype, device):
    x, dy = (normal(3, 5, 24, dtype=dtype, device=device, seed=s) for s in range(2))
    weights = [(normal(24, device=device, seed=s) / 64 - 1).to(dtype) for s in (3, 4)]
    rest = EPS, *angles(9, 24, device), torch.tensor([4, 0, 8], device=device)
    exact = [weight.float() + 1 for weight in weights]
    y = qk_norm_rope.qk_norm_rope(x, 3, *weights, *rest, offset=1.0)
    assert torch.equal(y, qk_norm_rope.qk_norm_rope(x, 3, *exact, *rest))
    expected = dy.clone()
    qk_norm_rope.qk_norm_rope_backward_(dy, x, 3, *weights, *rest, offset=1.0)
    qk_norm_rope.qk_norm_rope_backward_(expected, x, 3, *exact, *rest)
    assert torch.equal(dy, expected)


def test_the_backward_of_the_norm_and_rope_reference_passes_gradcheck():
    weights, (cos, sin) = double(2, 8), angles(9, 8, "cpu")
    arguments = (3, *weights, EPS, cos.double(), sin.double(), torch.tensor([4, 0, 8]), 1.0)
    function = as_function(
        lambda x: (qk_norm_rope.qk_norm_rope_reference(x, *arguments), ()),
        lambda dy, x: qk_norm_rope.qk_norm_rope_backward_reference(dy, x, *arguments),
    )
    assert torch.autograd.gradcheck(function, double(3, 5, 8))


# ---- gated activation


each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


@kernel
@in_each_dtype
@each_activation
@pytest.mark.parametrize("shape", [(3, 423), (1, 1024), (2, 1536), (23, 3)])
def test_a_gated_activation_and_its_backward_err_at_most_twice_as_much_as_pytorch(
    shape, activation, dtype, device
):
    gate, up, dout = (
        strided(3 * normal(*shape, dtype=dtype, device=device, seed=s)) for s in range(3)
    )
    out = gated_activation(gate, up, activation=activation)
    dgate, dup = gated_activation_backward(dout, gate, up, activation=activation)
    formula = functools.partial(gated_activation_reference, activation=activation)
    judge([out, dgate, dup], formula, [gate, up], [dout])
    wide = strided(torch.zeros_like(out))
    assert torch.equal(gated_activation(gate, up, out=wide, activation=activation), out)
    destinations = {"dgate": gate, "dup": up, "out": dout}  # overwrites its inputs
    gated_activation_backward(dout, gate, up, **destinations, activation=activation)
    for mine, expected in ((gate, dgate), (up, dup), (dout, out)):
        assert torch.equal(mine, expected)


@kernel
@each_activation
def test_a_gated_activation_is_finite_if_exp_overflows_and_nan_if_an_input_is(activation, device):
    gate = torch.tensor([[-1e4, 1e4, 0.0, math.nan]], device=device)
    one = torch.ones_like(gate)
    out = gated_activation(gate, one, activation=activation)
    assert torch.equal(out[:, :3], torch.tensor([[-0.0, 1e4, 0.0]], device=device))
    for x in (out, *gated_activation_backward(one, gate, one, activation=activation)):
        assert x.isnan().tolist() == [[False, False, False, True]]


@each_activation
def test_the_backward_of_the_gated_activation_reference_passes_gradcheck(activation):
    pair = as_function(
        lambda gate, up: (gated_activation_reference(gate, up, activation), []),
        lambda *inputs: gated_activation_backward_reference(*inputs, activation)[:2],
    )
    assert torch.autograd.gradcheck(pair, (double(3, 5), double(3, 5, seed=1)))


def test_an_unknown_activation_is_refused_by_name():
    x = normal(3, 8)
    with pytest.raises(ValueError, match="activation 'gelu'; expected silu or gelu_tanh"):
        gated_activation(x, x, activation="gelu")
    with pytest.raises(ValueError, match="activation 'gelu'; expected silu or gelu_tanh"):
        gated_activation_backward(x, x, x, activation="gelu")


# ---- embedding


@pytest.mark.usefixtures("triton_everywhere", "poisoned")
@pytest.mark.parametrize("D", [64, 423, 4100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_embedding_returns_rows_of_the_table(D, dtype, device):
    table = normal(50, D, device=device)
    ids = torch.tensor([3, 49, 0, 3, 17], dtype=torch.int32, device=device)
    assert torch.equal(embedding.embed(ids, table, dtype), table[ids.long()].to(dtype))
    assert embedding.embed(ids[:0], table, dtype).shape == (0, D)
    narrow, multiplier = table.to(dtype), D**0.5
    expected = (narrow[ids.long()].float() * multiplier).to(dtype)
    assert torch.equal(embedding.embed(ids, narrow, dtype, multiplier), expected)
    with pytest.raises(ValueError, match="expected contiguous rows"):
        embedding.embed(ids, table[:, ::2], dtype)
