"""Every Triton kernel against plain PyTorch, forward and backward, and every reference against autograd.

The bound: a kernel errs at most twice as much as the plain formula does in the same dtype, both measured against the
same formula in float64 (plus 1e-6 of the largest value, for results that happen to be exact). Without a GPU the
kernels run in Triton's interpreter, whose bfloat16 is wrong; so float32 and float16 there, and bfloat16 on a GPU.
"""

import functools
import math
from dataclasses import replace

import pytest
import torch
from conftest import GPU
from torch.nn import functional

from minitune.kernels import attention as attention_fwd
from minitune.kernels import attention_bwd, attention_cudnn, cross_entropy, launch, lora_linear, rms_norm, rope, swiglu
from minitune.kernels.attention import attention, attention_backward
from minitune.kernels.cross_entropy import linear_cross_entropy
from minitune.kernels.dequantize import Quantized, dequantize_nf4, dequantize_nf4_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16] if GPU else [torch.float32, torch.float16]
EPS = 1e-5
kernel = pytest.mark.usefixtures("triton_everywhere", "poisoned")
in_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


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
        assert error <= allowed, f"result {i}: error {error:.3g}; plain PyTorch errs by {plain_error:.3g}"


def judge(results, formula, inputs, douts):
    """results = outputs, then gradients of the inputs, each held to the bound."""
    dtype = inputs[0].dtype
    plain = with_gradients(formula, inputs, to(dtype, douts))
    exact = with_gradients(formula, to(torch.float64, inputs), to(torch.float64, douts))
    assert_as_good_as_plain(results, plain, exact)


def bounds(lengths, device="cpu"):
    """start and end of packed samples of these lengths."""
    lengths = torch.tensor(lengths)
    end = lengths.cumsum(0)
    return [x.repeat_interleave(lengths).to(device, torch.int32) for x in (end - lengths, end)]


# ---------------------------------------------------------------------------------------------------- RMSNorm


def plain_norm(x, weight):
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight).to(x.dtype)


@kernel
@in_each_dtype
@pytest.mark.parametrize("shape", [(3, 423), (1, 64), (5, 213)])
def test_rms_norm_and_its_backward_err_no_more_than_plain_pytorch(shape, dtype, device):
    x, dy, dresidual = (strided(normal(*shape, dtype=dtype, device=device, seed=s)) for s in range(3))
    weight = normal(shape[1], dtype=dtype, device=device)
    y, rstd = rms_norm.rms_norm(x, weight, EPS)
    dx = rms_norm.rms_norm_backward(dy, x, weight, rstd, dresidual)
    judge([y, x, dx], lambda x: (plain_norm(x, weight.to(x.dtype)), x + 0), [x], [dy, dresidual])
    alone = rms_norm.rms_norm_backward(dy, x, weight, rstd)
    judge([y, alone], lambda x: plain_norm(x, weight.to(x.dtype)), [x], [dy])


@kernel
@in_each_dtype
def test_add_rms_norm_normalises_the_rounded_sum(dtype, device):
    x, residual = (strided(normal(3, 423, dtype=dtype, device=device, seed=s)) for s in range(2))
    weight = normal(423, dtype=dtype, device=device)
    s, y, rstd = rms_norm.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(s, x + residual)
    for mine, theirs in zip((y, rstd), rms_norm.rms_norm(s, weight, EPS), strict=True):
        assert torch.equal(mine, theirs)


@kernel
def test_rms_norm_keeps_a_nan_in_its_row(device):
    x = normal(3, 64, device=device)
    x[1, 5] = math.nan
    s, y, _ = rms_norm.add_rms_norm(x, torch.zeros_like(x), torch.ones(64, device=device), EPS)
    assert y.isnan().any(dim=1).tolist() == [False, True, False]
    assert y[1].isnan().all()
    assert s.isnan().sum() == 1


# ---------------------------------------------------------------------------------------------------- RoPE


def angles(positions, width, device):
    angle = torch.arange(positions)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    return angle.cos().to(device), angle.sin().to(device)


def plain_rope(x, cos, sin):
    turned = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], dim=-1)
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.cat([cos, cos], -1)[:, None] + turned * torch.cat([sin, sin], -1)[:, None]).to(x.dtype)


@kernel
@in_each_dtype
@pytest.mark.parametrize(("N", "H", "G", "K"), [(7, 9, 3, 64), (1, 2, 1, 128), (13, 3, 3, 24)])
def test_rope_turns_q_and_k_of_a_fused_projection_in_place_and_back(N, H, G, K, dtype, device):
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
    # The way back is the gradient: <rope(x), dy> = <x, rope_inverse(dy)>.
    dq, dk = (normal(*x.shape, dtype=dtype, device=device, seed=5) for x in (q, k))
    grads = [dq.clone(), dk.clone()]
    rope.rope_(*grads, cos, sin, positions, inverse=True)
    for grad, x, dy in zip(grads, old, (dq, dk), strict=True):
        table = [t[positions] for t in (cos, sin)]
        exact = with_gradients(lambda x: plain_rope(x, *to(torch.float64, table)), [x.double()], [dy.double()])  # noqa: B023
        plain = with_gradients(lambda x: plain_rope(x, *table), [x], [dy])  # noqa: B023
        assert_as_good_as_plain([grad], plain[1:], exact[1:])


# ---------------------------------------------------------------------------------------------------- SwiGLU


@kernel
@in_each_dtype
@pytest.mark.parametrize("shape", [(3, 423), (1, 1024), (2, 1536), (213, 3)])
def test_swiglu_and_its_backward_err_no_more_than_plain_pytorch(shape, dtype, device):
    gate, up, dout = (strided(3 * normal(*shape, dtype=dtype, device=device, seed=s)) for s in range(3))
    out = swiglu.swiglu(gate, up)
    dgate, dup = swiglu.swiglu_backward(dout, gate, up)
    judge([out, dgate, dup], swiglu.swiglu_reference, [gate, up], [dout])
    wide = strided(torch.zeros_like(out))
    assert torch.equal(swiglu.swiglu(gate, up, out=wide), out)
    swiglu.swiglu_backward(dout, gate, up, gate, up, out=dout)  # in place of its inputs
    for mine, expected in ((gate, dgate), (up, dup), (dout, out)):
        assert torch.equal(mine, expected)


@kernel
def test_swiglu_is_finite_where_exp_overflows_and_nan_where_an_input_is(device):
    gate = torch.tensor([[-1e4, 1e4, 0.0, math.nan]], device=device)
    one = torch.ones_like(gate)
    assert torch.equal(swiglu.swiglu(gate, one)[:, :3], torch.tensor([[-0.0, 1e4, 0.0]], device=device))
    for x in (swiglu.swiglu(gate, one), *swiglu.swiglu_backward(one, gate, one)):
        assert x.isnan().tolist() == [[False, False, False, True]]


# ---------------------------------------------------------------------------------------------------- attention


def plain_attention(q, k, v, seen, scale):
    """The textbook formula in the dtype of its inputs, with the softmax in at least float32."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1).transpose(0, 1) for x in (k, v))
    scores = (q.transpose(0, 1) * scale) @ k.mT
    scores = scores.to(launch.accumulator(q.dtype)).masked_fill(~seen, -math.inf)
    return (scores.softmax(-1).to(q.dtype) @ v).transpose(0, 1), scores.logsumexp(-1)


def visible(start):
    row = torch.arange(len(start), device=start.device)
    return (row[None, :] <= row[:, None]) & (row[None, :] >= start[:, None])


def run_attention(lengths, H, G, K, dtype, device, **how):
    N = sum(lengths)
    fused = normal(N, (H + 2 * G) * K, dtype=dtype, device=device)
    q, k, v = (x.unflatten(1, (-1, K)) for x in fused.split([H * K, G * K, G * K], dim=1))
    dout = strided(normal(N, H, K, dtype=dtype, device=device, seed=1))
    start, end = bounds(lengths, device)
    out, lse = attention(q, k, v, start, end, K**-0.5, **how)
    grads = attention_backward(dout, q, k, v, out, lse, start, end, K**-0.5, **how)
    return (q, k, v), dout, visible(start), [out, lse, *grads]


@kernel
@in_each_dtype
@pytest.mark.parametrize(
    ("lengths", "H", "G", "K"),
    [
        ([213], 2, 1, 64),
        ([1], 1, 1, 64),
        ([3, 1, 70, 1, 100], 3, 1, 64),
        ([80, 140], 2, 2, 24),
        ([40, 30], 4, 2, 128),
        ([33, 5], 1, 1, 256),
    ],
    ids=str,
)
def test_attention_and_its_backward_err_no_more_than_plain_pytorch(lengths, H, G, K, dtype, device):
    inputs, dout, seen, results = run_attention(lengths, H, G, K, dtype, device)
    dlse = torch.zeros_like(results[1])
    judge(results, lambda q, k, v: plain_attention(q, k, v, seen, K**-0.5), inputs, [dout, dlse])


@kernel
def test_a_sample_attends_only_to_itself(device):
    """Other samples are changed, and not a bit of the one in the middle changes."""
    lengths = [40, 50, 60]
    mine = slice(40, 90)
    q, k, v, dout = (normal(150, 2, 16, device=device, seed=s) for s in range(4))
    start, end = bounds(lengths, device)
    results = []
    for _ in range(2):
        out, lse = attention(q, k, v, start, end, 0.25)
        results.append([out, lse.T, *attention_backward(dout, q, k, v, out, lse, start, end, 0.25)])
        for x in (q, k, v, dout):
            x[:40] *= 30
            x[90:] -= 5
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[mine], after[mine])
        assert not torch.equal(before, after)


@kernel
def test_attention_shows_a_nan_of_a_query_in_its_row_only(device):
    q, k, v = (normal(70, 1, 16, device=device, seed=s) for s in range(3))
    q[66] = math.nan
    out, lse = attention(q, k, v, *bounds([70], device), 0.25)
    assert out.isnan().all(-1)[:, 0].nonzero().tolist() == [[66]]
    assert lse.isnan()[0].nonzero().tolist() == [[66]]


@kernel
@pytest.mark.parametrize("longest", [1, 10**6])
def test_attention_is_right_with_the_tiles_for_any_length(longest, device, monkeypatch):
    """The heads of a group too, split over programs: PROGRAMS says how many those for long samples have to be."""
    monkeypatch.setattr(attention_bwd, "PROGRAMS", 40)
    assert attention_bwd.parts_of_a_group(10, 2, 6, longest) == (2 if longest > 1 else 1)
    for lengths, H, G, K in (([3, 150, 1, 100], 4, 2, 64), ([70, 1], 6, 1, 24), ([130], 3, 3, 128)):
        inputs, dout, seen, results = run_attention(lengths, H, G, K, torch.float16, device, longest=longest)
        dlse = torch.zeros_like(results[1])
        judge(results, lambda q, k, v: plain_attention(q, k, v, seen, K**-0.5), inputs, [dout, dlse])  # noqa: B023


@pytest.mark.usefixtures("triton_everywhere")
@pytest.mark.parametrize("triton", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("longest", [1, 10**6])
def test_attention_writes_its_results_into_columns_of_wider_rows(longest, triton, device, monkeypatch):
    if not triton:
        monkeypatch.setattr(launch, "use_triton", lambda x: False)
    H, G, K, lengths = 4, 2, 24, [40, 30]
    inputs, dout, _, (out, lse, *grads) = run_attention(lengths, H, G, K, torch.float32, device, longest=longest)
    start, end = bounds(lengths, device)
    row, drow = (torch.full((70, width), math.nan, device=device) for width in (H * K + 8, (H + 2 * G) * K + 16))
    buffer = row[:, : H * K].unflatten(1, (H, K))
    result, _ = attention(*inputs, start, end, K**-0.5, out=buffer, longest=longest)
    dbuffers = [x.unflatten(1, (-1, K)) for x in drow[:, :-16].split([H * K, G * K, G * K], dim=1)]
    dresults = attention_backward(dout, *inputs, result, lse, start, end, K**-0.5, *dbuffers, longest=longest)
    for x, given, alone in zip((result, *dresults), (buffer, *dbuffers), (out, *grads), strict=True):
        assert x is given
        assert torch.equal(x, alone)
    assert row[:, H * K :].isnan().all()
    assert drow[:, -16:].isnan().all()


def test_attention_refuses_buffers_and_lengths_that_do_not_fit():
    q, (start, end) = normal(6, 2, 8), bounds([3, 3])
    for wrong, message in ((q[:5], "expected \\(6"), (q.half(), "expected torch.float32"), (q.mT, "expected \\(6")):
        with pytest.raises(ValueError, match=message):
            attention(q, q, q, start, end, 1.0, out=wrong)
        with pytest.raises(ValueError, match=message):
            attention_backward(q, q, q, q, q, normal(2, 6), start, end, 1.0, dv=wrong)
    with pytest.raises(ValueError, match="head vectors of out have stride 2"):
        attention(q, q, q, start, end, 1.0, out=normal(6, 2, 16)[..., ::2])
    with pytest.raises(ValueError, match="6 rows are no whole number of samples of 4"):
        attention(q, q, q, start, end, 1.0, length=4)
    with pytest.raises(ValueError, match=r"scale -1\.0; expected above 0"):
        attention(q, q, q, start, end, -1.0)


def test_attention_runs_without_cudnn_where_there_is_none():
    q, (start, end) = normal(6, 2, 8), bounds([3, 3])
    expected = attention(q, q, q, start, end, 1.0)
    for x, e in zip(attention(q, q, q, start, end, 1.0, length=3), expected, strict=True):
        assert torch.equal(x, e)


# ---------------------------------------------------------------------------------------------------- LoRA linear


def extended(weights, a, b, dtype, device):
    """The extended weight of linears that share an input; an adapter may be None."""
    rows, width = sum(len(w) for w in weights), weights[0].shape[1]
    spare = lora_linear.columns_to_spare(sum(0 if x is None else len(x) for x in a))
    weight = torch.zeros(rows + spare, width + spare, dtype=dtype, device=device)
    weight[:rows, :width] = torch.cat(weights)
    lora_linear.write_adapters_(weight, [(x, y, len(w)) for w, x, y in zip(weights, a, b, strict=True)], rows, width)
    return weight


def beside_spare(x, spare):
    return torch.cat([x, torch.full((len(x), spare), math.nan, dtype=x.dtype, device=x.device)], 1)


def plain_lora(x, *adapters, weights, scaling):
    """Each linear on its own, as PEFT computes it; x (N, in), then A and B of each linear (None, None) without one."""
    outs = []
    for weight, a, b in zip(weights, adapters[::2], adapters[1::2], strict=True):
        out = functional.linear(x, weight.to(x.dtype))
        outs.append(out if a is None else out + scaling * functional.linear(functional.linear(x, a), b))
    return torch.cat(outs, 1)


@kernel
@in_each_dtype
@pytest.mark.parametrize(
    ("N", "D", "rows", "ranks"), [(3, 213, [70], [4]), (33, 64, [48, 16, 16], [8, 0, 8]), (1, 96, [40, 40], [16, 20])]
)
def test_lora_linears_and_their_gradients_err_no_more_than_plain_pytorch(N, D, rows, ranks, dtype, device):
    x, dy = normal(N, D, dtype=dtype, device=device), normal(N, sum(rows), dtype=dtype, device=device)
    weights = [normal(n, D, dtype=dtype, device=device, seed=n + i) / D**0.5 for i, n in enumerate(rows)]
    adapters = []
    for i, (n, R) in enumerate(zip(rows, ranks, strict=True)):
        shapes = [(R, D), (n, R)] if R else [None, None]
        adapters += [s and normal(*s, dtype=dtype, device=device, seed=9 * i) / s[1] ** 0.5 for s in shapes]
    weight = extended(weights, adapters[::2], adapters[1::2], dtype, device)
    spare = weight.shape[1] - D
    wide_x, wide_dy = beside_spare(x, spare), beside_spare(dy, spare)
    y = lora_linear.lora_linear(wide_x, weight, sum(rows), 0.7)
    dx = lora_linear.lora_linear_backward(wide_dy, weight, D, 0.7)
    pairs = lora_linear.lora_gradients(wide_dy, wide_x, list(zip(rows, ranks, strict=True)))
    gradients = [g for pair in pairs for g in pair]
    assert all(g.dtype == launch.accumulator(dtype) for g in gradients)
    formula = functools.partial(plain_lora, weights=weights, scaling=0.7)
    judge([y, dx, *gradients], formula, [x, *adapters], [dy])


@kernel
def test_a_lora_linear_adds_a_residual_and_its_adapter_alone_can_be_rewritten(device):
    x, w, residual = normal(5, 32, device=device), normal(24, 32, device=device), normal(5, 24, device=device)
    a, b = normal(4, 32, device=device), normal(24, 4, device=device)
    weight = extended([w], [a], [b], torch.float32, device)
    lora_linear.write_adapters_(weight, [(-a, b, 24)], 24, 32)
    wide = beside_spare(x, lora_linear.columns_to_spare(4))
    y = lora_linear.lora_linear(wide, weight, 24, 2.0, residual=residual)
    assert torch.allclose(y, residual + x @ w.T - 2 * x @ a.T @ b.T, atol=1e-4)
    assert torch.equal(weight[:24, :32], w) and not weight[24:, 32:].any()


def test_without_an_adapter_the_extended_weight_is_the_weight():
    x, w, dy = normal(5, 32), normal(24, 32), normal(5, 24)
    assert lora_linear.columns_to_spare(0) == 0
    assert torch.equal(lora_linear.lora_linear(x, w, 24, 0.0), x @ w.T)
    assert torch.equal(lora_linear.lora_linear_backward(dy, w, 32, 0.0), dy @ w)
    assert lora_linear.lora_linear_backward(dy, w, 32, 0.0, need_dx=False) is None
    assert lora_linear.lora_gradients(dy, x, [(24, 0)]) == []


# ---------------------------------------------------------------------------------------------------- loss


@kernel
@in_each_dtype
@pytest.mark.parametrize("tile_rows", [None, 3])
@pytest.mark.parametrize(("N", "D", "V"), [(7, 16, 423), (1, 8, 5), (4, 8, 4099)])
def test_linear_cross_entropy_errs_no_more_than_plain_pytorch(N, D, V, tile_rows, dtype, device):
    hidden, weight = normal(N, D, dtype=dtype, device=device), normal(V, D, dtype=dtype, device=device)
    targets = torch.arange(N, device=device) * 31 % V
    targets[1:2], targets[-1] = -100, V - 1
    loss, dhidden = linear_cross_entropy(hidden, weight, targets, 3, tile_rows)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, linear_cross_entropy(hidden, weight, targets, 3, tile_rows, need_grad=False)[0])

    def formula(hidden):
        logits = hidden @ weight.to(hidden.dtype).T
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return functional.cross_entropy(wide, targets, reduction="sum") / 3

    exact = with_gradients(formula, [hidden.double()], None)
    plain = with_gradients(formula, [hidden], None)
    assert_as_good_as_plain([loss, dhidden], plain, exact)
    assert not dhidden[1:2].any()


@kernel
def test_ignored_rows_have_no_loss_and_no_gradient_even_when_they_are_nan(device):
    hidden, weight = normal(3, 8, device=device), normal(50, 8, device=device)
    hidden[1] = math.nan
    targets = torch.tensor([4, -100, 7], device=device)
    denominator = torch.tensor(2, device=device)
    loss, dhidden = linear_cross_entropy(hidden, weight, targets, denominator)
    torch.testing.assert_close(loss, functional.cross_entropy(hidden[[0, 2]] @ weight.T, targets[[0, 2]]))
    assert not dhidden[1].any()
    loss, dhidden = linear_cross_entropy(hidden, weight, torch.tensor([4, 1, 7], device=device), denominator)
    assert loss.isnan()
    assert dhidden.isnan().any(1).tolist() == [False, True, False]


def test_a_target_outside_the_vocabulary_is_refused_on_the_cpu():
    for wrong in (50, -1):
        with pytest.raises(ValueError, match=rf"target \[{wrong}\] is outside the vocabulary of 50"):
            linear_cross_entropy(normal(2, 8), normal(50, 8), torch.tensor([3, wrong]), 2)


# ---------------------------------------------------------------------------------------------------- NF4

CODE = torch.linspace(-1, 1, 16).pow(3)


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
    return Quantized(packed.to(device), absmax.to(device), CODE.to(device), shape, blocksize, **scales)


@kernel
@in_each_dtype
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("shape", [(3, 423), (130, 256), (1, 64)])
def test_dequantize_kernel_equals_the_reference_bit_for_bit(shape, nested, dtype, device):
    weight = quantised(shape, nested, device=device)
    assert torch.equal(dequantize_nf4(weight, dtype), dequantize_nf4_reference(weight, dtype))


@kernel
@pytest.mark.parametrize("width", [192, 423])
def test_weights_of_one_width_are_dequantised_below_each_other_into_a_part_of_wider_rows(width, device):
    weights = [quantised((rows, width), nested, device=device) for rows, nested in ((70, True), (3, True), (1, False))]
    for chosen in (weights[:2], weights):  # stored in one way, and not
        rows = sum(weight.shape[0] for weight in chosen)
        wide = torch.full((rows + 2, width + 5), 7.0, device=device)
        out = wide[1:-1, :width]
        assert dequantize_nf4(chosen, torch.float32, out=out) is out
        assert torch.equal(out, torch.cat([dequantize_nf4_reference(w, torch.float32) for w in chosen]))
        assert (wide[:, width:] == 7).all() and (wide[[0, -1]] == 7).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_dequantize_reference_equals_bitsandbytes_bit_for_bit(nested, dtype):
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = normal(96, 200, dtype=dtype)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")
    scales = {}
    if nested:
        scales = {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code, "nested_offset": state.offset}
    mine = Quantized(packed, state.absmax, state.code, (96, 200), **scales)
    assert torch.equal(dequantize_nf4(mine, dtype), bnb.dequantize_4bit(packed, state))


def test_dequantize_reference_is_the_formula_over_several_chunks(monkeypatch):
    monkeypatch.setattr("minitune.kernels.dequantize.CHUNK", 128)
    weight = quantised((30, 128), nested=True)
    nibbles = torch.stack([weight.packed >> 4, weight.packed & 15], dim=1).flatten().int()
    block = torch.arange(30 * 128) // 64
    scale = weight.nested_code[weight.absmax.int()[block]] * weight.nested_absmax[block // 256]
    expected = CODE[nibbles] * (scale + weight.nested_offset)
    assert torch.equal(dequantize_nf4(weight, torch.float32).flatten(), expected)


def test_dequantize_refuses_sizes_that_do_not_fit_the_shape():
    weight = quantised((4, 64), nested=False)
    with pytest.raises(ValueError, match="128 packed bytes for shape"):
        dequantize_nf4(replace(weight, shape=(5, 64)), torch.float32)
    with pytest.raises(ValueError, match="3 scales; 256 elements in blocks of 64 have 4"):
        dequantize_nf4(replace(weight, absmax=torch.ones(3)), torch.float32)
    with pytest.raises(ValueError, match="differ in in_features"):
        dequantize_nf4([weight, quantised((4, 128), nested=False)], torch.float32)


# ---------------------------------------------------------------------------------------------------- all of them


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


def test_the_backward_of_the_norm_reference_passes_gradcheck():
    weight = double(7).detach()
    norm = as_function(
        lambda x: (lambda y, rstd: (y, [rstd]))(*rms_norm.rms_norm_reference(x, weight, EPS)),
        lambda dy, x, rstd: rms_norm.rms_norm_backward_reference(dy, x, weight, rstd),
    )
    assert torch.autograd.gradcheck(norm, double(3, 7))


def test_the_backward_of_the_swiglu_reference_passes_gradcheck():
    pair = as_function(
        lambda gate, up: (swiglu.swiglu_reference(gate, up), []),
        lambda dout, gate, up: swiglu.swiglu_backward_reference(dout, gate, up)[:2],
    )
    assert torch.autograd.gradcheck(pair, (double(3, 5), double(3, 5, seed=1)))


def test_the_backward_of_the_attention_reference_passes_gradcheck():
    start, end = bounds([3, 1, 4])
    pair = as_function(
        lambda q, k, v: (
            lambda out, lse: (out, [out, lse])
        )(*attention_fwd.attention_reference(q, k, v, start, end, 0.4)),
        lambda dout, q, k, v, out, lse: attention_bwd.attention_backward_reference(
            dout, q, k, v, out, lse, start, end, 0.4
        ),
    )  # fmt: skip
    assert torch.autograd.gradcheck(pair, (double(8, 4, 8), double(8, 2, 8, seed=1), double(8, 2, 8, seed=2)))


def test_the_gradients_of_a_lora_linear_pass_gradcheck():
    weight = double(4, 5).detach()

    def forward(x, a, b):
        whole = extended([weight], [a], [b], x.dtype, "cpu")
        wide = beside_spare(x, whole.shape[1] - 5)
        return lora_linear.lora_linear(wide, whole, 4, 0.7), [wide, whole]

    def backward(dy, x, a, b, wide, whole):
        wide_dy = beside_spare(dy, whole.shape[1] - 5)
        dx = lora_linear.lora_linear_backward(wide_dy, whole, 5, 0.7)
        return dx, *lora_linear.lora_gradients(wide_dy, wide, [(4, 2)])[0]

    pair = as_function(forward, backward)
    assert torch.autograd.gradcheck(pair, (double(3, 5), double(2, 5), double(4, 2)))


def test_the_gradient_of_the_loss_reference_passes_gradcheck():
    weight, targets = double(9, 5).detach(), torch.tensor([3, -100, 8, 0])
    pair = as_function(
        lambda hidden: (lambda loss, dhidden: (loss, [dhidden]))(*linear_cross_entropy(hidden, weight, targets, 3, 3)),
        lambda dout, hidden, dhidden: dout * dhidden,
    )
    assert torch.autograd.gradcheck(pair, double(4, 5))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("triton", [False, True], ids=["reference", "triton"])
def test_no_rows_give_empty_results_and_a_loss_of_zero(triton, device, monkeypatch):
    monkeypatch.setattr(launch, "use_triton", lambda x: triton)
    x, weight = torch.empty(0, 16, device=device), normal(24, 16, device=device)
    y, rstd = rms_norm.rms_norm(x, weight[0], EPS)
    assert (y.shape, rstd.shape) == ((0, 16), (0,))
    assert rms_norm.rms_norm_backward(x, x, weight[0], rstd).shape == (0, 16)
    assert swiglu.swiglu_backward(x, x, x)[0].shape == (0, 16)
    q, bound = torch.empty(0, 2, 8, device=device), torch.empty(0, dtype=torch.int32, device=device)
    rope.rope_(q, q, *angles(4, 8, device), bound)
    out, lse = attention(q, q, q, bound, bound, 1.0)
    assert (out.shape, lse.shape) == ((0, 2, 8), (2, 0))
    assert attention_backward(q, q, q, q, out, lse, bound, bound, 1.0)[1].shape == (0, 2, 8)
    a, b = normal(4, 16, device=device), normal(24, 4, device=device)
    wide = extended([weight], [a], [b], weight.dtype, device)
    x_wide, dy = (torch.empty(0, n, device=device) for n in (wide.shape[1], wide.shape[0]))
    assert lora_linear.lora_linear(x_wide, wide, 24, 1.0).shape == (0, 24)
    assert lora_linear.lora_linear_backward(dy, wide, 16, 1.0).shape == (0, 16)
    assert not any(g.any() for g in lora_linear.lora_gradients(dy, x_wide, [(24, 4)])[0])
    loss, dhidden = linear_cross_entropy(x, weight, bound.long(), 1)
    assert (loss.item(), dhidden.shape) == (0.0, (0, 16))


REFUSED = {
    "norm": (lambda x: rms_norm.rms_norm(x, x[0, :5], EPS), "weight is (5,); rows of x hold 16"),
    "rows": (lambda x: swiglu.swiglu(x.T, x.T), "the rows of gate have stride 16"),
    "pair": (lambda x: swiglu.swiglu(x, x.half()), "up is (3, 16) torch.float16; gate is (3, 16) torch.float32"),
    "rope": (lambda x: rope.rope_(x[:, None], x[:, None], x[:, :4], x[:, :4], x[:, 0].long()), "needs (positions, 8)"),
    "heads": (lambda x: attention(x.view(3, 2, 8), *[x.view(3, 2, 8)[:, :0]] * 2, x, x, 1.0), "2 query heads are not"),
    "bound": (lambda x: attention(*[x[:, None]] * 3, x[:, 0], x[:, 0], 1.0), "start is (3,) torch.float32"),
    "width": (lambda x: attention(*[x[:, None, :12]] * 3, x[:, 0], x[:, 0], 1.0), "head width 12; expected a multiple"),
    "linear": (lambda x: lora_linear.lora_linear(x, x[:, :5], 3, 1.0), "x is (3, 16); an extended weight (3, 5)"),
    "adapter": (
        lambda x: lora_linear.write_adapters_(x, [(x, x, 3)], 3, 16),
        "b (3, 16); expected contiguous (3, 16) and",
    ),
    "spare": (
        lambda x: lora_linear.write_adapters_(x, [(x, x.new_zeros(3, 3), 3)], 3, 16),
        "has (0, 0) rows and columns to spare",
    ),
    "loss": (lambda x: linear_cross_entropy(x, x, torch.zeros(2), 1), "targets are (2,); hidden has 3 rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_its_shape(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        call(normal(3, 16))
    assert message in str(error.value)


def test_cross_entropy_tiles_hold_at_most_256_mib_of_logits(monkeypatch):
    rows = []
    monkeypatch.setattr(
        cross_entropy, "_cross_entropy_", lambda logits, targets, losses, need_grad: rows.append(logits.shape[0])
    )
    hidden = torch.empty(3000, 8, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(128256, 8, dtype=torch.bfloat16, device="meta")
    linear_cross_entropy(hidden, weight, torch.empty(3000, dtype=torch.long, device="meta"), 1)
    assert rows == [1046, 1046, 908]


# ---------------------------------------------------------------------------------------------------- GPU only


@pytest.mark.gpu
class TestBeyondTwoToThe31:
    """Tensors of more than 2^31 elements: their last rows are those of a small tensor with the same rows."""

    def test_rowwise_kernels_reach_the_last_row(self):
        N, D = 2**31 // 4096 + 5, 4096
        x = torch.empty(N, D, dtype=torch.bfloat16, device="cuda")
        x[-3:] = normal(3, D, dtype=x.dtype, device="cuda")
        x[:-3] = 0
        weight = normal(D, dtype=x.dtype, device="cuda")
        tail = x[-3:].clone()
        y, rstd = rms_norm.rms_norm(x, weight, EPS)
        assert torch.equal(y[-3:], rms_norm.rms_norm(tail, weight, EPS)[0])
        assert torch.equal(
            rms_norm.rms_norm_backward(x, x, weight, rstd, x)[-3:],
            rms_norm.rms_norm_backward(tail, tail, weight, rstd[-3:].clone(), tail),
        )
        del y
        assert torch.equal(swiglu.swiglu(x, x)[-3:], swiglu.swiglu(tail, tail))
        assert torch.equal(swiglu.swiglu_backward(x, x, x)[0][-3:], swiglu.swiglu_backward(tail, tail, tail)[0])
        positions = torch.arange(N, device="cuda") % 64
        table = angles(64, 128, "cuda")
        rope.rope_(x.view(N, 32, 128), x.view(N, 32, 128)[:, :0].contiguous(), *table, positions)
        expected = tail.view(3, 32, 128).clone()
        rope.rope_(expected, expected[:, :0].contiguous(), *table, positions[-3:].clone())
        assert torch.equal(x[-3:].view(3, 32, 128), expected)

    def test_attention_reaches_the_last_sample(self):
        T, K, H = 128, 128, 32
        N = 2**31 // (H * K) + T
        N -= N % T
        q = torch.zeros(N, H, K, dtype=torch.bfloat16, device="cuda")
        k, v = (torch.zeros(N, H, K, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        tail = [normal(T, H, K, dtype=q.dtype, device="cuda", seed=s) for s in range(3)]
        for x, t in zip((q, k, v), tail, strict=True):
            x[-T:] = t
        start, end = bounds([T] * (N // T), "cuda")
        out, lse = attention(q, k, v, start, end, K**-0.5, longest=T)
        small, small_lse = attention(*tail, *bounds([T], "cuda"), K**-0.5, longest=T)
        assert torch.equal(out[-T:], small)
        grads = attention_backward(q, q, k, v, out, lse, start, end, K**-0.5, longest=T)
        expected = attention_backward(tail[0], *tail, small, small_lse, *bounds([T], "cuda"), K**-0.5, longest=T)
        for x, e in zip(grads, expected, strict=True):
            assert torch.equal(x[-T:], e)

    def test_matmul_loss_and_dequantisation_reach_the_last_row(self):
        N, D, F = 2**31 // 8192 + 3, 64, 8192
        x = normal(N, D, dtype=torch.bfloat16, device="cuda")
        weight = normal(F, D, dtype=x.dtype, device="cuda")
        exact = x[-3:].double() @ weight.double().T
        y = lora_linear.lora_linear(x, weight, F, 1.0)
        assert_as_good_as_plain([y[-3:]], [functional.linear(x[-3:], weight)], [exact])
        back = lora_linear.lora_linear_backward(y, weight, D, 1.0)
        assert_as_good_as_plain([back[-3:]], [y[-3:] @ weight], [y[-3:].double() @ weight.double()])
        del y, back
        targets = torch.zeros(N, dtype=torch.long, device="cuda")
        loss, dhidden = linear_cross_entropy(x, weight, targets, 1, tile_rows=N)
        small = linear_cross_entropy(x[-3:], weight, targets[-3:], 1)[1]
        torch.testing.assert_close(dhidden[-3:], small, rtol=2**-7, atol=1e-3)
        assert loss.isfinite()
        stored = quantised((N, F), nested=True, device="cuda")
        whole = dequantize_nf4(stored, torch.bfloat16)
        blocks = 3 * F // 64
        packed, absmax = stored.packed[-3 * F // 2 :], stored.absmax[-blocks:]
        first = N * F // 64 - blocks
        nested = torch.arange(first, first + blocks, device="cuda") // 256
        scale = stored.nested_code[absmax.int()] * stored.nested_absmax[nested] + stored.nested_offset
        nibbles = torch.stack([packed >> 4, packed & 15], dim=1).flatten().int()
        expected = (CODE.cuda()[nibbles] * scale.repeat_interleave(64)).bfloat16()
        assert torch.equal(whole[-3:].flatten(), expected)


@pytest.mark.gpu
@in_each_dtype
@pytest.mark.parametrize(("N", "H", "G", "K"), [(1500, 9, 3, 64), (1100, 8, 2, 128)])
def test_attention_holds_its_bound_at_real_sizes(N, H, G, K, dtype):
    inputs, dout, seen, results = run_attention([N // 2, 7, N // 2 - 7], H, G, K, dtype, "cuda")
    dlse = torch.zeros_like(results[1])
    judge(results, lambda q, k, v: plain_attention(q, k, v, seen, K**-0.5), inputs, [dout, dlse])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("lengths", "H", "G", "K"), [([1024] * 2, 32, 8, 128), ([300, 1500, 7, 200], 9, 3, 64)], ids=str
)
def test_the_backward_of_attention_repeats_bit_for_bit(lengths, H, G, K):
    _, _, _, first = run_attention(lengths, H, G, K, torch.bfloat16, "cuda")
    for _ in range(5):
        for x, again in zip(first, run_attention(lengths, H, G, K, torch.bfloat16, "cuda")[3], strict=True):
            assert torch.equal(x, again)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("B", "L", "H", "G", "K"), [(2, 512, 8, 2, 128), (4, 119, 9, 3, 64), (1, 700, 4, 4, 96), (8, 16, 2, 1, 64)]
)
def test_cudnn_holds_the_bound_and_mixes_with_the_kernels(B, L, H, G, K, dtype):
    inputs, dout, seen, results = run_attention([L] * B, H, G, K, dtype, "cuda", length=L)
    if not attention_cudnn.cudnn_supports(*inputs, L):
        pytest.skip("cuDNN does not take this here")
    dlse = torch.zeros_like(results[1])
    judge(results, lambda q, k, v: plain_attention(q, k, v, seen, K**-0.5), inputs, [dout, dlse])
    start, end = bounds([L] * B, "cuda")
    scale, (out, lse) = K**-0.5, results[:2]
    mixed = attention_backward(dout, *inputs, out, lse, start, end, scale)
    judge([out, lse, *mixed], lambda q, k, v: plain_attention(q, k, v, seen, scale), inputs, [dout, dlse])
    row, drow = (
        torch.zeros(B * L, H * K + 16, dtype=dtype).cuda(),
        torch.zeros(B * L, (H + 2 * G) * K, dtype=dtype).cuda(),
    )
    buffer = row[:, : H * K].unflatten(1, (H, K))
    dbuffers = [x.unflatten(1, (-1, K)) for x in drow.split([H * K, G * K, G * K], dim=1)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(*inputs, start, end, scale, out=buffer, length=L)
        attention_backward(dout, *inputs, buffer, lse, start, end, scale, *dbuffers, length=L)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(buffer, out)
    judge([buffer, lse, *dbuffers], lambda q, k, v: plain_attention(q, k, v, seen, scale), inputs, [dout, dlse])


@pytest.mark.gpu
@in_each_dtype
@pytest.mark.parametrize(("N", "D", "F"), [(2048, 4096, 14336), (1900, 576, 1536)])
def test_lora_linear_holds_its_bound_at_real_sizes(N, D, F, dtype):
    x, dy = normal(N, D, dtype=dtype, device="cuda"), normal(N, F, dtype=dtype, device="cuda")
    weight, a, b = (0.02 * normal(*s, dtype=dtype, device="cuda") for s in ((F, D), (16, D), (F, 16)))
    whole = extended([weight], [a], [b], dtype, "cuda")
    wide_x, wide_dy = (beside_spare(x, whole.shape[1] - D) for x in (x, dy))
    results = [lora_linear.lora_linear(wide_x, whole, F, 2.0), lora_linear.lora_linear_backward(wide_dy, whole, D, 2.0)]
    results += lora_linear.lora_gradients(wide_dy, wide_x, [(F, 16)])[0]
    judge(results, functools.partial(plain_lora, weights=[weight], scaling=2.0), [x, a, b], [dy])


@pytest.mark.gpu
def test_no_kernel_waits_for_the_gpu():
    x, weight = normal(64, 64, device="cuda"), normal(64, 64, device="cuda")
    start, end = bounds([30, 34], "cuda")
    positions, targets = torch.arange(64, device="cuda"), torch.arange(64, device="cuda")
    cos, sin = angles(64, 32, "cuda")
    a, b = normal(8, 64, device="cuda"), normal(64, 8, device="cuda")
    stored, whole = quantised((64, 64), nested=True, device="cuda"), torch.zeros(128, 128, device="cuda")

    def everything():
        dequantize_nf4(stored, whole.dtype, out=whole[:64, :64])
        lora_linear.write_adapters_(whole, [(a, b, 64)], 64, 64)
        s, y, rstd = rms_norm.add_rms_norm(x, x, weight[0], EPS)
        rms_norm.rms_norm_backward(y, s, weight[0], rstd, y)
        wide = torch.cat([y, y], 1)
        q = lora_linear.lora_linear(wide, whole, 64, 1.0).view(64, 2, 32)
        rope.rope_(q, q[:, :1].contiguous(), cos, sin, positions)
        out, lse = attention(q, q, q, start, end, 1.0)
        attention_backward(out, q, q, q, out, lse, start, end, 1.0)
        swiglu.swiglu_backward(x, x, swiglu.swiglu(x, x))
        linear_cross_entropy(x, weight, targets, 64)
        lora_linear.lora_linear_backward(wide, whole, 64, 1.0)
        lora_linear.lora_gradients(wide, wide, [(64, 8)])

    everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
