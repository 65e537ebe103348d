"""Properties of all kernels: no rows, refused shapes, over 2^31 elements, no wait for the GPU."""

import pytest
import torch
from kernel_checks import (
    CODE,
    EPS,
    angles,
    assert_as_good_as_plain,
    bounds,
    extended,
    normal,
    quantised,
)
from torch.nn import functional

from minitune.kernels import backend, lora_linear, rms_norm, rope
from minitune.kernels.attention import attention, attention_backward
from minitune.kernels.cross_entropy import linear_cross_entropy
from minitune.kernels.dequantize_nf4 import dequantize_nf4
from minitune.kernels.gated_activation import gated_activation, gated_activation_backward


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("triton", [False, True], ids=["reference", "triton"])
def test_no_rows_give_empty_results_and_a_loss_of_zero(triton, device, monkeypatch):
    monkeypatch.setattr(backend, "use_triton", lambda x: triton)
    x, weight = torch.empty(0, 16, device=device), normal(24, 16, device=device)
    y, rstd = rms_norm.rms_norm(x, weight[0], EPS)
    assert (y.shape, rstd.shape) == ((0, 16), (0,))
    assert rms_norm.rms_norm_backward(x, x, weight[0], rstd).shape == (0, 16)
    assert gated_activation_backward(x, x, x)[0].shape == (0, 16)
    q = torch.empty(0, 2, 8, device=device)
    bound = torch.empty(0, dtype=torch.int32, device=device)
    rope.rope_(q, q, *angles(4, 8, device), bound)
    out, lse = attention(q, q, q, bound, bound, 1.0)
    assert (out.shape, lse.shape) == ((0, 2, 8), (2, 0))
    assert attention_backward(q, q, q, q, out, lse, bound, bound, 1.0)[1].shape == (0, 2, 8)
    a, b = normal(4, 16, device=device), normal(24, 4, device=device)
    wide = extended([weight], [a], [b], weight.dtype, device)
    x_wide, dy = (torch.empty(0, n, device=device) for n in (wide.shape[1], wide.shape[0]))
    assert lora_linear.lora_linear_(x_wide, wide, 24, 1.0).shape == (0, 24)
    assert lora_linear.lora_linear_backward_(dy, wide, 16, 1.0).shape == (0, 16)
    assert not any(g.any() for g in lora_linear.lora_gradients(dy, x_wide, [(24, 4)])[0])
    loss, dhidden = linear_cross_entropy(x, weight, bound.long(), 1)
    assert (loss.item(), dhidden.shape) == (0.0, (0, 16))


REFUSED = {  # name -> (call on x (3, 16), part of the message)
    "norm": (
        lambda x: rms_norm.rms_norm(x, x[0, :5], EPS),
        "weight is (5,) with stride (1,); rows of x hold 16",
    ),
    "rows": (
        lambda x: gated_activation(x.T, x.T),
        "gate is (16, 3) torch.float32 on cpu with strides (1, 16); "
        "expected (16, 3) torch.float32 on cpu with contiguous rows",
    ),
    "pair": (
        lambda x: gated_activation(x, x.half()),
        "up is (3, 16) torch.float16 on cpu with strides (16, 1); expected (3, 16) torch.float32",
    ),
    "device": (
        lambda x: rms_norm.add_rms_norm_(x, x.to("meta"), x[0], EPS),
        "addend is (3, 16) torch.float32 on meta with strides (16, 1); "
        "expected (3, 16) torch.float32 on cpu",
    ),
    "rope": (
        lambda x: rope.rope_(x[:, None], x[:, None], x[:, :4], x[:, :4], x[:, 0].long()),
        "needs (positions, 8)",
    ),
    "heads": (
        lambda x: attention(x.view(3, 2, 8), *[x.view(3, 2, 8)[:, :0]] * 2, x, x, 1.0),
        "2 query heads are not",
    ),
    "bound": (
        lambda x: attention(*[x[:, None]] * 3, x[:, 0], x[:, 0], 1.0),
        "start is (3,) torch.float32",
    ),
    "width": (
        lambda x: attention(*[x[:, None, :12]] * 3, x[:, 0], x[:, 0], 1.0),
        "head width 12; expected a multiple",
    ),
    "row stride": (
        lambda x: attention(
            *[torch.empty_strided((3, 1, 16), (2**24, 16, 1), device="meta")] * 3,
            *[torch.zeros(3, dtype=torch.int32)] * 2,
            1.0,
        ),
        "rows of q are 16777216 elements apart; expected at most 16777215",
    ),
    "linear": (
        lambda x: lora_linear.lora_linear_(x, x[:, :5], 3, 1.0),
        "x is (3, 16); the extended weight is (3, 5)",
    ),
    "adapter": (
        lambda x: lora_linear.write_adapters_([(x, [(x, x, 3)], 3, 16)]),
        "b (3, 16); expected contiguous (3, 16) and",
    ),
    "spare": (
        lambda x: lora_linear.write_adapters_([(x, [(x, x.new_zeros(3, 3), 3)], 3, 16)]),
        "has (0, 0) LoRA rows and columns",
    ),
    "loss": (
        lambda x: linear_cross_entropy(x, x, torch.zeros(2), 1),
        "targets is (2,); hidden has 3 rows",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_do_not_fit_are_refused_with_their_shape(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        call(normal(3, 16))
    assert message in str(error.value)


# ---- GPU only


@pytest.mark.gpu
class TestBeyondTwoToThe31:
    """Tensors of more than 2^31 elements, whose last rows equal those of a small tensor."""

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
        assert torch.equal(gated_activation(x, x)[-3:], gated_activation(tail, tail))
        assert torch.equal(
            gated_activation_backward(x, x, x)[0][-3:],
            gated_activation_backward(tail, tail, tail)[0],
        )
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
        out, lse = attention(q, k, v, start, end, K**-0.5, max_seqlen=T)
        small, small_lse = attention(*tail, *bounds([T], "cuda"), K**-0.5, max_seqlen=T)
        assert torch.equal(out[-T:], small)
        grads = attention_backward(q, q, k, v, out, lse, start, end, K**-0.5, max_seqlen=T)
        expected = attention_backward(
            tail[0], *tail, small, small_lse, *bounds([T], "cuda"), K**-0.5, max_seqlen=T
        )
        for x, e in zip(grads, expected, strict=True):
            assert torch.equal(x[-T:], e)

    def test_matmul_loss_and_dequantisation_reach_the_last_row(self):
        N, D, F = 2**31 // 8192 + 3, 64, 8192
        x = normal(N, D, dtype=torch.bfloat16, device="cuda")
        weight = normal(F, D, dtype=x.dtype, device="cuda")
        exact = x[-3:].double() @ weight.double().T
        y = lora_linear.lora_linear_(x, weight, F, 1.0)
        assert_as_good_as_plain([y[-3:]], [functional.linear(x[-3:], weight)], [exact])
        back = lora_linear.lora_linear_backward_(y, weight, D, 1.0)
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
        scale = (
            stored.nested_code[absmax.int()] * stored.nested_absmax[nested] + stored.nested_offset
        )
        nibbles = torch.stack([packed >> 4, packed & 15], dim=1).flatten().int()
        expected = (CODE.cuda()[nibbles] * scale.repeat_interleave(64)).bfloat16()
        assert torch.equal(whole[-3:].flatten(), expected)


@pytest.mark.gpu
def test_no_kernel_waits_for_the_gpu():
    x, weight = normal(64, 64, device="cuda"), normal(64, 64, device="cuda")
    start, end = bounds([30, 34], "cuda")
    positions = targets = torch.arange(64, device="cuda")
    cos, sin = angles(64, 32, "cuda")
    a, b = normal(8, 64, device="cuda"), normal(64, 8, device="cuda")
    stored = quantised((64, 64), nested=True, device="cuda")
    whole = torch.zeros(128, 128, device="cuda")
    residual = torch.zeros_like(x)

    def everything():
        dequantize_nf4(stored, whole.dtype, out=whole[:64, :64])
        lora_linear.write_adapters_([(whole, [(a, b, 64)], 64, 64)])
        y, rstd = rms_norm.add_rms_norm_(x, x, weight[0], EPS, residual=residual)
        rms_norm.rms_norm_backward(y, x, weight[0], rstd, y, addend=x)
        wide = torch.cat([y, y], 1)
        q = lora_linear.lora_linear_(wide, whole, 64, 1.0).view(64, 2, 32)
        rope.rope_(q, q[:, :1].contiguous(), cos, sin, positions)
        out, lse = attention(q, q, q, start, end, 1.0)
        attention_backward(out, q, q, q, out, lse, start, end, 1.0)
        gated_activation_backward(x, x, gated_activation(x, x))
        linear_cross_entropy(x, weight, targets, 64)
        lora_linear.lora_linear_backward_(wide, whole, 64, 1.0)
        lora_linear.lora_gradients(wide, wide, [(64, 8)])

    everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
