"""LoRA linears, and head with loss, against PyTorch, within kernel_checks.py's bound."""

import functools
import math

import pytest
import torch
from kernel_checks import (
    as_function,
    assert_as_good_as_plain,
    double,
    extended,
    in_each_dtype,
    judge,
    kernel,
    normal,
    with_gradients,
)
from torch.nn import functional

from minitune.kernels import backend, cross_entropy, lora_linear
from minitune.kernels.cross_entropy import linear_cross_entropy, logits_columns

# ---- LoRA linear


def beside_lora_columns(x, R):
    """Return x in a buffer with R more columns, which hold NaN."""
    return torch.cat([x, torch.full((len(x), R), math.nan, dtype=x.dtype, device=x.device)], 1)


def plain_lora(x, *adapters, weights, scaling):
    """Compute each linear on its own, as PEFT does.

    x: (N, in).
    adapters: A and B of each linear in turn, or None twice for a linear without an adapter.
    """
    outs = []
    for weight, a, b in zip(weights, adapters[::2], adapters[1::2], strict=True):
        out = functional.linear(x, weight.to(x.dtype))
        if a is not None:
            out = out + scaling * functional.linear(functional.linear(x, a), b)
        outs.append(out)
    return torch.cat(outs, 1)


@kernel
@in_each_dtype
@pytest.mark.parametrize(
    ("N", "D", "rows", "ranks"),
    [(3, 213, [70], [4]), (33, 64, [48, 16, 16], [8, 0, 8]), (1, 96, [40, 40], [16, 20])],
)
def test_lora_linears_and_their_gradients_err_at_most_twice_as_much_as_pytorch(
    N, D, rows, ranks, dtype, device
):
    x = normal(N, D, dtype=dtype, device=device)
    dy = normal(N, sum(rows), dtype=dtype, device=device)
    weights = [
        normal(n, D, dtype=dtype, device=device, seed=n + i) / D**0.5 for i, n in enumerate(rows)
    ]
    adapters = []
    for i, (n, R) in enumerate(zip(rows, ranks, strict=True)):
        for shape in ((R, D), (n, R)):
            matrix = normal(*shape, dtype=dtype, device=device, seed=9 * i) if R else None
            adapters.append(matrix / shape[1] ** 0.5 if R else None)
    weight = extended(weights, adapters[::2], adapters[1::2], dtype, device)
    R = weight.shape[1] - D
    wide_x, wide_dy = beside_lora_columns(x, R), beside_lora_columns(dy, R)
    y = lora_linear.lora_linear_(wide_x, weight, sum(rows), 0.7)
    dx = lora_linear.lora_linear_backward_(wide_dy, weight, D, 0.7)
    pairs = lora_linear.lora_gradients(wide_dy, wide_x, list(zip(rows, ranks, strict=True)))
    gradients = [g for pair in pairs for g in pair]
    assert all(g.dtype == backend.accumulator(dtype) for g in gradients)
    formula = functools.partial(plain_lora, weights=weights, scaling=0.7)
    judge([y, dx, *gradients], formula, [x, *adapters], [dy])


def test_the_multiplier_of_a_lora_linear_scales_its_output_and_every_gradient():
    weight = extended([normal(6, 8)], [normal(2, 8)], [normal(6, 2)], torch.float32, "cpu")
    R, results = weight.shape[1] - 8, []
    for multiplier in (1.0, 0.25):
        wide_x, wide_dy = (beside_lora_columns(normal(5, width), R) for width in (8, 6))
        y = lora_linear.lora_linear_(wide_x, weight, 6, 0.7, multiplier=multiplier)
        dx = lora_linear.lora_linear_backward_(wide_dy, weight, 8, 0.7, multiplier=multiplier)
        ((dA, dB),) = lora_linear.lora_gradients(wide_dy, wide_x, [(6, 2)], multiplier)
        results.append((y, dx, dA, dB))
    for plain, scaled in zip(*results, strict=True):
        torch.testing.assert_close(scaled, 0.25 * plain)


def adapter_targets(device):
    """Yield targets of write_adapters_ with three adapters, one, and none."""
    for out, width, ranks in ((70, 33, [4, 0, 8]), (16, 200, [3]), (24, 16, [0])):
        rows = [out // len(ranks)] * (len(ranks) - 1)
        rows.append(out - sum(rows))
        adapters = []
        for R, n in zip(ranks, rows, strict=True):
            a, b = normal(R, width, seed=R), normal(n, R, seed=n)
            adapters.append((a.to(device), b.to(device), n) if R else (None, None, n))
        yield torch.full((out + 16, width + 16), 7.0, device=device), adapters, out, width


@kernel
def test_the_adapters_of_several_weights_are_written_in_one_launch(device):
    found, expected = list(adapter_targets(device)), list(adapter_targets(device))
    lora_linear.write_adapters_(found)
    for target in expected:
        lora_linear.write_adapters_reference_(*target)
    for mine, reference in zip(found, expected, strict=True):
        assert torch.equal(mine[0], reference[0])
    assert (found[1][0] != 7).sum() == 3 * (16 + 200) and (found[2][0] == 7).all()


@kernel
def test_a_lora_linear_adds_to_a_tensor_and_its_adapter_alone_can_be_rewritten(device):
    x, w, total = (normal(*shape, device=device) for shape in ((5, 32), (24, 32), (5, 24)))
    a, b = normal(4, 32, device=device), normal(24, 4, device=device)
    weight = extended([w], [a], [b], torch.float32, device)
    lora_linear.write_adapters_([(weight, [(-a, b, 24)], 24, 32)])
    wide = beside_lora_columns(x, lora_linear.padded_rank(4))
    before = total.clone()
    assert lora_linear.lora_linear_(wide, weight, 24, 2.0, add_to=total) is total
    assert torch.allclose(total, before + x @ w.T - 2 * x @ a.T @ b.T, atol=1e-4)
    assert torch.equal(weight[:24, :32], w) and not weight[24:, 32:].any()


@kernel
@in_each_dtype
def test_a_product_is_not_rounded_before_it_is_added(dtype, device):
    x, w, total = (
        normal(*shape, dtype=dtype, device=device) for shape in ((5, 32), (24, 32), (5, 24))
    )
    total = total.float()
    exact = total.double() + x.double() @ w.double().T
    lora_linear.lora_linear_(x, w, 24, 0.0, add_to=total)
    assert (total - exact).abs().max() < 1e-5 * exact.abs().max()


def test_without_an_adapter_the_extended_weight_is_the_weight():
    x, w, dy = normal(5, 32), normal(24, 32), normal(5, 24)
    assert lora_linear.padded_rank(0) == 0
    assert torch.equal(lora_linear.lora_linear_(x, w, 24, 0.0), x @ w.T)
    assert torch.equal(lora_linear.lora_linear_backward_(dy, w, 32, 0.0), dy @ w)
    assert lora_linear.lora_linear_backward_(dy, w, 32, 0.0, need_dx=False) is None
    assert lora_linear.lora_gradients(dy, x, [(24, 0)]) == []


def test_the_gradients_of_a_lora_linear_pass_gradcheck():
    weight = double(4, 5).detach()

    def forward(x, a, b):
        whole = extended([weight], [a], [b], x.dtype, "cpu")
        wide = beside_lora_columns(x, whole.shape[1] - 5)
        return lora_linear.lora_linear_(wide, whole, 4, 0.7), [wide, whole]

    def backward(dy, x, a, b, wide, whole):
        wide_dy = beside_lora_columns(dy, whole.shape[1] - 5)
        dx = lora_linear.lora_linear_backward_(wide_dy, whole, 5, 0.7)
        return dx, *lora_linear.lora_gradients(wide_dy, wide, [(4, 2)])[0]

    pair = as_function(forward, backward)
    assert torch.autograd.gradcheck(pair, (double(3, 5), double(2, 5), double(4, 2)))


@pytest.mark.gpu
@in_each_dtype
@pytest.mark.parametrize(("N", "D", "F"), [(2048, 4096, 14336), (1900, 576, 1536)])
def test_lora_linear_holds_its_bound_at_real_sizes(N, D, F, dtype):
    x, dy = normal(N, D, dtype=dtype, device="cuda"), normal(N, F, dtype=dtype, device="cuda")
    weight, a, b = (
        0.02 * normal(*s, dtype=dtype, device="cuda") for s in ((F, D), (16, D), (F, 16))
    )
    whole = extended([weight], [a], [b], dtype, "cuda")
    wide_x, wide_dy = (beside_lora_columns(x, whole.shape[1] - D) for x in (x, dy))
    results = [
        lora_linear.lora_linear_(wide_x, whole, F, 2.0),
        lora_linear.lora_linear_backward_(wide_dy, whole, D, 2.0),
    ]
    results += lora_linear.lora_gradients(wide_dy, wide_x, [(F, 16)])[0]
    judge(results, functools.partial(plain_lora, weights=[weight], scaling=2.0), [x, a, b], [dy])


# ---- loss


@kernel
@in_each_dtype
@pytest.mark.parametrize("tile_rows", [None, 3])
@pytest.mark.parametrize(("N", "D", "V"), [(7, 16, 423), (1, 8, 5), (4, 8, 4099)])
def test_linear_cross_entropy_errs_at_most_twice_as_much_as_pytorch(
    N, D, V, tile_rows, dtype, device
):
    hidden = normal(N, D, dtype=dtype, device=device)
    weight = normal(V, D, dtype=dtype, device=device)
    targets = torch.arange(N, device=device) * 31 % V
    targets[1:2], targets[-1] = -100, V - 1
    loss, dhidden = linear_cross_entropy(hidden, weight, targets, 3, tile_rows)
    alone, none = linear_cross_entropy(hidden, weight, targets, 3, tile_rows, need_grad=False)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, alone) and none is None

    def formula(hidden):
        logits = hidden @ weight.to(hidden.dtype).T
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return functional.cross_entropy(wide, targets, reduction="sum") / 3

    exact = with_gradients(formula, [hidden.double()], None)
    plain = with_gradients(formula, [hidden], None)
    assert_as_good_as_plain([loss, dhidden], plain, exact)
    assert not dhidden[1:2].any()


def row_gradients(logits, targets):
    """Return softmax - onehot by PyTorch's autograd, in the dtype of logits."""
    return with_gradients(
        lambda x: functional.cross_entropy(x, targets, reduction="sum"), [logits], None
    )[1]


def loss_of_exact_logits(N, V, device, sure_by=None):
    """Return (softmax - onehot, logits, targets) for logits of spread 8 that are exact in float32.

    hidden holds powers of two and D is 1, so the matmul rounds nothing.
    sure_by: distances of the targets' logits above all others; by default targets are random.
    """
    weight = 8 * normal(V, 1, device=device)
    hidden = 2.0 ** -(torch.arange(N, device=device) % 3)[:, None]
    targets = torch.arange(N, device=device) * 31 % V
    if sure_by is not None:
        targets[:] = V - 1
        hidden = torch.ones(N, 1, device=device)
        weight[-1] = weight[:-1].max() + sure_by
    logits_buffer = torch.empty(N, V, device=device)
    linear_cross_entropy(hidden, weight, targets, 1, logits_buffer=logits_buffer)
    return logits_buffer, hidden * weight.T, targets


def relative_error(x, exact):
    return ((x.double() - exact).norm() / exact.norm()).item()


implementations = pytest.mark.parametrize("triton", [True, False], ids=["kernel", "reference"])


@pytest.mark.usefixtures("triton_everywhere")
@implementations
@pytest.mark.parametrize("V", [423, 4099])
def test_the_gradient_of_wide_logits_errs_at_most_twice_as_much_as_pytorch(
    V, triton, device, monkeypatch
):
    if not triton:
        monkeypatch.setattr(backend, "use_triton", lambda x: False)
    found, logits, targets = loss_of_exact_logits(64, V, device)
    exact = row_gradients(logits.double(), targets)
    plain_error = relative_error(row_gradients(logits, targets), exact)
    assert relative_error(found, exact) <= 2 * plain_error


@pytest.mark.usefixtures("triton_everywhere")
@implementations
@pytest.mark.parametrize("sure_by", [0.0, 4.0, 16.0])
def test_the_gradient_keeps_its_digits_if_the_model_is_sure_of_the_target(
    sure_by, triton, device, monkeypatch
):
    """PyTorch subtracts two numbers near 1: its relative error reaches 0.3 at sure_by 16."""
    if not triton:
        monkeypatch.setattr(backend, "use_triton", lambda x: False)
    found, logits, targets = loss_of_exact_logits(2, 4099, device, sure_by)
    assert relative_error(found, row_gradients(logits.double(), targets)) < 2e-6


@pytest.mark.gpu
def test_the_gradient_of_wide_logits_holds_its_bound_at_a_real_vocabulary():
    found, logits, targets = loss_of_exact_logits(64, 128256, "cuda")
    exact = row_gradients(logits.double(), targets)
    plain_error = relative_error(row_gradients(logits, targets), exact)
    assert relative_error(found, exact) <= 2 * plain_error
    for sure_by in (0.0, 4.0, 16.0):
        found, logits, targets = loss_of_exact_logits(2, 128256, "cuda", sure_by)
        assert relative_error(found, row_gradients(logits.double(), targets)) < 2e-6


@kernel
def test_ignored_rows_have_no_loss_and_no_gradient_even_if_they_are_nan(device):
    hidden, weight = normal(3, 8, device=device), normal(50, 8, device=device)
    hidden[1] = math.nan
    targets = torch.tensor([4, -100, 7], device=device)
    denominator = torch.tensor(2, device=device)
    loss, dhidden = linear_cross_entropy(hidden, weight, targets, denominator)
    expected = functional.cross_entropy(hidden[[0, 2]] @ weight.T, targets[[0, 2]])
    torch.testing.assert_close(loss, expected)
    assert not dhidden[1].any()
    targets = torch.tensor([4, 1, 7], device=device)
    loss, dhidden = linear_cross_entropy(hidden, weight, targets, denominator)
    assert loss.isnan()
    assert dhidden.isnan().any(1).tolist() == [False, True, False]


@kernel
def test_logits_are_written_into_the_callers_buffer(device):
    hidden, weight = normal(5, 8, device=device), normal(50, 8, device=device)
    logits_buffer = torch.zeros(2, 50, device=device)
    targets = torch.tensor([4, -100, 7, 0, 49], device=device)
    expected = linear_cross_entropy(hidden, weight, targets, 3, tile_rows=2)
    found = linear_cross_entropy(hidden, weight, targets, 3, logits_buffer=logits_buffer)
    assert all(map(torch.equal, found, expected))
    assert logits_buffer[0, 49] < 0  # softmax - 1 at the target of the last row
    wider = torch.full((2, logits_columns(50)), math.nan, device=device)  # 56 columns
    found = linear_cross_entropy(hidden, weight, targets, 3, logits_buffer=wider)
    assert all(map(torch.equal, found, expected)) and wider[:, 50:].isnan().all()
    message = r"logits_buffer is .*; expected \(rows, 50 or more\) torch.float32"
    for wrong in (logits_buffer[:, 1:], logits_buffer.double(), logits_buffer[:0]):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(hidden, weight, targets, 3, logits_buffer=wrong)


def test_a_target_outside_the_vocabulary_is_refused_on_the_cpu():
    for wrong in (50, -1):
        message = rf"target \[{wrong}\] is outside the vocabulary of 50"
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(normal(2, 8), normal(50, 8), torch.tensor([3, wrong]), 2)


def test_the_gradient_of_the_loss_reference_passes_gradcheck():
    weight, targets = double(9, 5).detach(), torch.tensor([3, -100, 8, 0])

    def forward(hidden):
        loss, dhidden = linear_cross_entropy(hidden, weight, targets, 3, 3)
        return loss, [dhidden]

    pair = as_function(forward, lambda dout, hidden, dhidden: dout * dhidden)
    assert torch.autograd.gradcheck(pair, double(4, 5))


def test_cross_entropy_tiles_hold_at_most_256_mib_of_logits(monkeypatch):
    rows = []
    monkeypatch.setattr(
        cross_entropy,
        "_cross_entropy_",
        lambda logits, *rest: rows.append(logits.shape[0]),
    )
    hidden = torch.empty(3000, 8, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(128256, 8, dtype=torch.bfloat16, device="meta")
    linear_cross_entropy(hidden, weight, torch.empty(3000, dtype=torch.long, device="meta"), 1)
    assert rows == [1046, 1046, 908]
