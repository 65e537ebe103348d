"""The flat optimizer against torch.optim, its kernels against PyTorch, 8-bit moments against bitsandbytes."""

import math

import pytest
import torch
from tiny import make_tiny_model
from torch import nn

from minitune import FastLanguageModel, SFTConfig, SFTTrainer
from minitune.kernels import backend
from minitune.kernels.adamw import _quantize, adamw_, adamw_8bit_, dequantize_moment, global_norm
from minitune.kernels.backend import tl, triton
from minitune.model.nf4 import dynamic_map
from minitune.training.checkpoint import load_checkpoint, save_checkpoint
from minitune.training.optimizer import FlatAdamW, learning_rate_factor, moment_tables, warmup_count

CPU = torch.device("cpu")
SETTINGS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0}
kernel = pytest.mark.usefixtures("triton_everywhere", "poisoned")
sizes = pytest.mark.parametrize("P", [1, 255, 256, 1025, 17000])


def normal(*shape, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def gradients(P, seed, device="cpu"):
    """Of blocks of very different size, as those of A and B are."""
    return normal(P, seed=seed, device=device) * 10.0 ** -(
        torch.arange(P, device=device) // 256 % 5
    )


def new_moments(P, eight_bit, device):
    if not eight_bit:
        return list(torch.zeros(2, P, device=device))
    codes, absmax = torch.zeros(2, P, dtype=torch.uint8), torch.zeros(2, -(-P // 256))
    return [t.to(device) for t in (*codes, *absmax)]


def update_(w, g, moments, norm, **settings):
    """adamw_ or adamw_8bit_, by what the moments are."""
    if len(moments) == 2:
        adamw_(w, g, *moments, norm, **settings)
    else:
        adamw_8bit_(w, g, *moments, moment_tables(w.device), norm, **settings)


def in_float32(moments):
    if len(moments) == 2:
        return moments
    m, v, m_absmax, v_absmax = moments
    tables = moment_tables(m.device)
    return dequantize_moment(m, m_absmax, tables[0]), dequantize_moment(v, v_absmax, tables[2])


# ---- against torch.optim


def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in [(4, 33), (7, 4), (1, 1), (4, 4)]]


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_flat_adamw_moves_parameters_as_torch_adamw_does(weight_decay, max_grad_norm):
    ours, theirs = ([nn.Parameter(m) for m in matrices()] for _ in range(2))
    optimizer = FlatAdamW(
        ours, betas=(0.8, 0.95), weight_decay=weight_decay, max_grad_norm=max_grad_norm
    )
    reference = torch.optim.AdamW(theirs, betas=(0.8, 0.95), weight_decay=weight_decay)
    for step in range(200):
        lr = 1e-2 * (1 + step % 3)
        optimizer.zero_grad()
        for p, q, g in zip(ours, theirs, matrices(seed=step + 1), strict=True):
            p.grad += g * 10 ** (step % 4 - 3)
            q.grad = g * 10 ** (step % 4 - 3)
        reference.param_groups[0]["lr"] = lr
        norm = nn.utils.clip_grad_norm_(theirs, max_grad_norm or math.inf)
        torch.testing.assert_close(optimizer.step(lr), norm, rtol=1e-6, atol=0)
        assert torch.equal(
            optimizer.grads,
            torch.cat([g.flatten() * 10 ** (step % 4 - 3) for g in matrices(step + 1)]),
        )
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_rate_may_be_a_tensor():
    number, tensor = ([nn.Parameter(m) for m in matrices()] for _ in range(2))
    for parameters, lr in ((number, 1e-2), (tensor, torch.tensor(1e-2))):
        for p, g in zip(parameters, matrices(seed=1), strict=True):
            p.grad = g
        FlatAdamW(parameters, weight_decay=0.1).step(lr)
    for p, q in zip(number, tensor, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_parameters_and_gradients_are_views_of_one_buffer():
    parameters = [nn.Parameter(m) for m in matrices()]
    optimizer = FlatAdamW(parameters)
    optimizer.values.fill_(3.0)
    optimizer.grads.fill_(5.0)
    assert all((p == 3).all() and (p.grad == 5).all() for p in parameters)


def test_replaced_values_and_gradients_are_taken_over():
    ours, theirs = ([nn.Parameter(m) for m in matrices()] for _ in range(2))
    optimizer, reference = FlatAdamW(ours), torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.0)
    for step in range(3):
        for p, q, g in zip(ours, theirs, matrices(seed=step + 1), strict=True):
            p.grad = None  # as zero_grad(set_to_none=True) leaves it; backward then makes a tensor of its own
            p.grad, q.grad = g.clone(), g.clone()
        if step == 1:
            ours[0].data = ours[0].data * 2  # a new tensor
            ours[1].data.mul_(3)  # in place
            theirs[0].data.mul_(2)
            theirs[1].data.mul_(3)
        optimizer.step(1e-2)
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    optimizer.values.zero_()
    assert all((p == 0).all() for p in ours)


# ---- the kernels against plain PyTorch


def each_step(grads, device, monkeypatch, eight_bit=False, **settings):
    """[values, norm, *moments] after each update, by the kernels and by PyTorch on the CPU, from the same state."""
    P = len(grads[0])
    plain = [normal(P), torch.zeros(()), *new_moments(P, eight_bit, "cpu")]
    for step, g in enumerate(grads, 1):
        ours = [t.clone().to(device) for t in plain]
        for (w, norm, *moments), answer in ((ours, True), (plain, False)):
            monkeypatch.setattr(backend, "use_triton", lambda x, answer=answer: answer)
            there = g.to(w.device)
            norm.copy_(global_norm(there))
            update_(w, there, moments, norm, lr=1e-2 * step, step=step, **{**SETTINGS, **settings})
        yield [t.cpu() for t in ours], plain


@kernel
@sizes
@pytest.mark.parametrize(
    "settings", [{}, {"max_grad_norm": 0.0}, {"weight_decay": 0.0, "max_grad_norm": 1e6}]
)
def test_adamw_kernel_equals_pytorch(P, settings, device, monkeypatch):
    for ours, plain in each_step(
        [gradients(P, s) for s in range(1, 4)], device, monkeypatch, **settings
    ):
        for x, y in zip(ours, plain, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-6, atol=1e-7)


@kernel
@sizes
@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 0.0}])
def test_8bit_kernel_equals_pytorch_but_for_values_on_a_border(P, settings, device, monkeypatch):
    g = gradients(P, 1)
    grads = [
        g,
        -0.8 * g,
        gradients(P, 2),
    ]  # the second makes m small: nothing but the block's own numbers may scale it
    for ours, plain in each_step(grads, device, monkeypatch, True, **settings):
        w, norm, m, v, *absmax = zip(ours, plain, strict=True)
        for x, y in (w, norm, *absmax):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)
        for x, y in (m, v):
            different = (x.int() - y.int()).abs()
            assert different.max() <= 1 and different.sum() <= max(1, P // 1000)


@kernel
@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_the_nearest_values_everywhere(signed, device):
    """Every border, value and decade, the numbers right beside them, and random ones."""
    table, borders = moment_tables(CPU)[0 if signed else 2 :][:2]
    x = torch.cat(
        [
            borders[:-1],
            table,
            10.0 ** torch.arange(-9, 1),
            10 ** (-9 * torch.rand(4000)),
            torch.zeros(2),
        ]
    )
    around = [x]
    for direction in (math.inf, -math.inf):
        y = x
        for _ in range(3):
            y = torch.nextafter(y, torch.tensor(direction))
            around.append(y)
    x = torch.cat([*around, *(-y for y in around)]).clamp(-1 if signed else 0, 1)
    x = torch.cat([x, x.new_zeros(-len(x) % 255)]).view(-1, 255)
    x = torch.cat(
        [x, torch.ones(len(x), 1)], dim=1
    )  # so that the largest magnitude of each block is 1
    codes = torch.empty(x.shape, dtype=torch.uint8, device=device)
    on_device = x.to(device), borders.to(device)
    quantize_rows[(len(x),)](*on_device, codes, SIGNED=signed)
    assert torch.equal(codes.cpu().int(), torch.bucketize(x, borders[:-1], out_int32=True))


@triton.jit
def quantize_rows(x_ptr, borders_ptr, codes_ptr, SIGNED: tl.constexpr):
    at = tl.program_id(0) * 256 + tl.arange(0, 256)
    codes, _absmax = _quantize(tl.load(x_ptr + at), borders_ptr, SIGNED)
    tl.store(codes_ptr + at, codes)


@kernel
@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter
@pytest.mark.parametrize("eight_bit", [False, True])
def test_gradient_of_nan_reaches_its_parameter_and_with_clipping_all(
    eight_bit, device, monkeypatch
):
    P = 700
    for bad in (math.nan, math.inf):
        g = gradients(P, 1)
        g[300] = bad
        for clip in (0.0, 1.0):
            both = [g, gradients(P, 2)]
            *_, last = each_step(both, device, monkeypatch, eight_bit, max_grad_norm=clip)
            for w, norm, *moments in last:
                assert torch.isfinite(norm), "the second gradient is finite"
                gone = torch.zeros(P, dtype=torch.bool)
                gone[300] = True
                if eight_bit:
                    gone[256:512] = True  # its block has lost its scale
                if clip and bad is math.nan:
                    gone[:] = True
                for x in in_float32(moments):
                    assert torch.equal(~torch.isfinite(x), gone)
                assert torch.equal(~torch.isfinite(w), gone)


@kernel
@pytest.mark.parametrize("eight_bit", [False, True])
def test_gradients_of_zero_move_nothing_but_by_weight_decay(eight_bit, device, monkeypatch):
    *_, last = each_step([torch.zeros(300)] * 2, device, monkeypatch, eight_bit)
    for w, norm, *moments in last:
        assert norm == 0 and all((x == 0).all() for x in in_float32(moments))
        torch.testing.assert_close(w, normal(300) * (1 - 1e-3) * (1 - 2e-3), rtol=1e-6, atol=0)


@kernel
@pytest.mark.parametrize("P", [1, 4095, 16385, 40000])
def test_norm_is_that_of_float64(P, device):
    x = gradients(P, 1, device)
    torch.testing.assert_close(global_norm(x).double(), x.double().norm(), rtol=2e-7, atol=0)


def test_what_does_not_fit_is_refused_by_name():
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


# ---- 8-bit moments


def test_tables_equal_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(CPU), functional.create_dynamic_map(signed=True))
    assert torch.equal(dynamic_map(CPU, signed=False), functional.create_dynamic_map(signed=False))


@kernel
def test_negative_first_moment_never_becomes_zero_and_a_positive_one_may(device, monkeypatch):
    g = torch.zeros(256)
    g[:5] = torch.tensor([1.0, 1e-9, -1e-9, 2.8e-7, -2.8e-7])
    for states in each_step([g], device, monkeypatch, True, max_grad_norm=0.0):
        for _, _, m, *_ in states:
            assert m[:6].tolist() == [255, 127, 126, 128, 126, 127]


def step_of_bitsandbytes(g, state, step, lr):
    """One update of state (values, m codes, v codes, m absmax, v absmax), in place, weight decay 0.1."""
    functional = pytest.importorskip("bitsandbytes.functional")
    w, m, v, *absmax = state
    maps = [moment_tables(g.device)[row].contiguous() for row in (0, 2)]
    functional.optimizer_update_8bit_blockwise(
        "adam", g, w, m, v, 0.9, 0.999, 0.0, 0.0, 1e-8, step, lr, *maps, *absmax, weight_decay=0.1
    )


def our_step(g, state, step, lr):
    w, *moments = state
    update_(w, g, moments, global_norm(g), lr=lr, step=step, **{**SETTINGS, "max_grad_norm": 0.0})


on_both = pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@on_both
def test_8bit_step_equals_that_of_bitsandbytes_from_the_same_state(where):
    """Its CPU code searches coarsely, so of codes only this is the same everywhere: ours are never further away."""
    P, lr = 20000, 1e-3
    theirs = [normal(P, device=where), *new_moments(P, True, where)]
    for step in range(1, 21):
        g, ours, m, v = (
            gradients(P, step, where),
            [t.clone() for t in theirs],
            *in_float32(theirs[1:]),
        )
        our_step(g, ours, step, lr)
        step_of_bitsandbytes(g, theirs, step, lr)
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=5e-3 * lr)
        for x, y in zip(ours[3:], theirs[3:], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=0)
        exact = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        for x, a, b, absmax in zip(
            exact, in_float32(ours[1:]), in_float32(theirs[1:]), ours[3:], strict=True
        ):
            further = (a - x).abs() > (
                b - x
            ).abs() + 1e-4 * x.abs() + 3e-7 * absmax.repeat_interleave(256)[:P]
            assert not further.any()
        if where == "cuda":
            for x, y in zip(ours[1:3], theirs[1:3], strict=True):
                different = (x.int() - y.int()).abs()
                assert different.max() <= 1 and (different > 0).float().mean() < 5e-3


@on_both
def test_20_steps_in_8_bit_end_where_those_of_bitsandbytes_do(where):
    """Apart go only values that were rounded differently: on average by 0.5% of a single step, none by a whole one."""
    P, lr = 20000, 1e-2
    ours, theirs = ([normal(P, device=where), *new_moments(P, True, where)] for _ in range(2))
    for step in range(1, 21):
        our_step(gradients(P, step, where), ours, step, lr)
        step_of_bitsandbytes(gradients(P, step, where), theirs, step, lr)
    away = (ours[0] - theirs[0]).abs()
    assert away.mean() < 5e-3 * lr and away.max() < lr


def test_moments_of_8_bits_take_2_03_bytes_a_parameter_and_follow_the_gradient():
    parameters = [nn.Parameter(normal(64, 100)), nn.Parameter(normal(32, 64, seed=1))]
    optimizer = FlatAdamW(parameters, eight_bit=True)
    exact = FlatAdamW([nn.Parameter(p.detach().clone()) for p in parameters])
    for step in range(30):
        for each in (optimizer, exact):
            each.grads.copy_(normal(8448, seed=step % 7))
            each.step(1e-2)
    assert sum(t.nbytes for t in optimizer.state_dict().values()) == 8448 * (2 + 8 / 256)
    m, v = in_float32(list(optimizer.state_dict().values()))
    assert (m - exact.exp_avg).norm() < 0.04 * exact.exp_avg.norm()
    assert (v - exact.exp_avg_sq).norm() < 0.03 * exact.exp_avg_sq.norm()
    moved = exact.values - torch.cat([normal(64, 100).flatten(), normal(32, 64, seed=1).flatten()])
    assert (optimizer.values - exact.values).norm() < 0.03 * moved.norm()


# ---- training with 8-bit moments


RECORDS = [
    {"prompt": f"{i} lamps to {city}:", "completion": " ".join(["blue lamp"] * (1 + i % 5))}
    for i, city in enumerate(["Lisbon", "Köln", "Paris", "Oslo"] * 6)
]


def new_trainer(folder, output, **settings):
    model, tokenizer = FastLanguageModel.from_pretrained(folder, max_seq_length=128, device="cpu")
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    settings = {
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 8,
        "max_steps": 24,
        **settings,
    }
    return SFTTrainer(model, SFTConfig(output_dir=output, **settings), RECORDS, None, tokenizer)


def test_training_with_8bit_moments_learns_as_with_float32_and_goes_on_bit_for_bit(tmp_path):
    folder, save = make_tiny_model(tmp_path / "tiny"), {"save_strategy": "steps", "save_steps": 12}
    exact, trainer = (
        new_trainer(folder, tmp_path / "32"),
        new_trainer(folder, tmp_path / "8", optim="adamw_8bit", **save),
    )
    losses = [each.train().training_loss for each in (exact, trainer)]
    assert trainer.optimizer.exp_avg.dtype == torch.uint8
    assert losses[0] != losses[1] and abs(losses[1] - losses[0]) < 0.005 * losses[0]
    last = [each.accumulate(each.samples_of_step(0)).item() for each in (exact, trainer)]
    assert last[0] < 0.5 and abs(last[1] - last[0]) < 0.02 * last[0]  # it began above 8
    again = new_trainer(folder, tmp_path / "8", optim="adamw_8bit", **save)
    again.train(resume_from_checkpoint=tmp_path / "8" / "checkpoint-12")
    for name, x in trainer.optimizer.state_dict().items():
        assert torch.equal(again.optimizer.state_dict()[name], x), name
    assert torch.equal(again.optimizer.values, trainer.optimizer.values)


@pytest.mark.parametrize(("saved", "optim"), [(True, "adamw_8bit"), (False, "adamw_torch")])
def test_checkpoint_with_moments_of_the_other_kind_says_which_optim_goes_on(saved, optim, tmp_path):
    folder = make_tiny_model(tmp_path / "tiny")
    model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=128, device="cpu")
    FastLanguageModel.get_peft_model(model, r=4)
    parameters = [p for _, p in model.trainable_parameters()]
    save_checkpoint(model, FlatAdamW(parameters, eight_bit=saved), {}, tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=f"continue with optim '{optim}'"):
        load_checkpoint(
            model, FlatAdamW(parameters, eight_bit=not saved), tmp_path / "checkpoint-1"
        )


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("eight_bit", [False, True])
def test_steps_on_the_gpu_wait_for_nothing_compile_once_and_repeat_bit_for_bit(eight_bit):
    results = []
    for _ in range(2):
        parameters = [nn.Parameter(normal(256, 333, seed=s, device="cuda")) for s in range(3)]
        optimizer = FlatAdamW(parameters, weight_decay=0.1, max_grad_norm=1.0, eight_bit=eight_bit)
        optimizer.step(1.0)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(3):
                optimizer.zero_grad()
                optimizer.grads.normal_(generator=torch.Generator("cuda").manual_seed(step))
                optimizer.step(1e-2 * step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([optimizer.values, *optimizer.state_dict().values()])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


# ---- the schedules


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 20), (1, 1), (5, 5)])
def test_schedules_equal_those_of_transformers(kind, warmup, total):
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = transformers.get_scheduler(
        kind, optimizer, num_warmup_steps=warmup, num_training_steps=total
    )
    for step in range(total + 2):
        assert learning_rate_factor(kind, step, warmup, total) == pytest.approx(
            schedule.get_last_lr()[0], abs=1e-12
        )
        optimizer.step()
        schedule.step()


def test_warmup_is_a_number_of_steps_or_a_share_of_all():
    assert [warmup_count(5, 0.5, 100), warmup_count(0.1, 0, 100), warmup_count(0, 0.033, 100)] == [
        5,
        10,
        4,
    ]
