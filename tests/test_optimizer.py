"""FlatAdamW moves parameters as torch.optim.AdamW does, and schedules are those of transformers."""

import math

import pytest
import torch
from adamw_states import in_float32, normal
from tiny import make_tiny_model
from torch import nn

from minitune import FastLanguageModel, SFTConfig, SFTTrainer
from minitune.config.training_config import SCHEDULES
from minitune.training.checkpoint import load_checkpoint, save_checkpoint
from minitune.training.optimizer import FlatAdamW, learning_rate_factor, warmup_count

CITIES = ["Lisbon", "Köln", "Paris", "Oslo"] * 6
RECORDS = [
    {"prompt": f"{i} lamps to {city}:", "completion": " ".join(["blue lamp"] * (1 + i % 5))}
    for i, city in enumerate(CITIES)
]


def matrices(seed=0):
    """Return four random matrices of odd shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in [(4, 33), (7, 4), (1, 1), (4, 4)]]


def two_copies():
    """Return the same parameters twice."""
    return ([nn.Parameter(m) for m in matrices()] for _ in range(2))


# ---- against torch.optim


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_flat_adamw_moves_parameters_as_torch_adamw_does(weight_decay, max_grad_norm):
    ours, theirs = two_copies()
    betas = (0.8, 0.95)
    optimizer = FlatAdamW(ours, betas=betas, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    reference = torch.optim.AdamW(theirs, betas=betas, weight_decay=weight_decay)
    for step in range(200):
        lr = 1e-2 * (1 + step % 3)
        grads = [g * 10 ** (step % 4 - 3) for g in matrices(seed=step + 1)]
        optimizer.zero_grad()
        for p, q, g in zip(ours, theirs, grads, strict=True):
            p.grad += g
            q.grad = g.clone()
        reference.param_groups[0]["lr"] = lr
        norm = nn.utils.clip_grad_norm_(theirs, max_grad_norm or math.inf)
        torch.testing.assert_close(optimizer.step(lr), norm, rtol=1e-6, atol=0)
        assert torch.equal(optimizer.grads, torch.cat([g.flatten() for g in grads]))
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_a_large_epsilon_counts_as_in_torch():
    ours, theirs = two_copies()
    optimizer, reference = FlatAdamW(ours, eps=0.1), torch.optim.AdamW(theirs, eps=0.1)
    reference.param_groups[0].update(lr=1e-2, weight_decay=0.0)
    for step in range(3):
        for p, q, g in zip(ours, theirs, matrices(seed=step + 1), strict=True):
            p.grad, q.grad = g, g.clone()
        optimizer.step(1e-2)
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_rate_may_be_a_tensor():
    number, tensor = two_copies()
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


def test_replaced_values_and_gradients_are_copied_into_the_buffer():
    ours, theirs = two_copies()
    optimizer, reference = FlatAdamW(ours), torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.0)
    for step in range(3):
        for p, q, g in zip(ours, theirs, matrices(seed=step + 1), strict=True):
            p.grad = None  # as after zero_grad(set_to_none=True): backward makes a new tensor
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


# ---- 8-bit moments


def test_moments_of_8_bits_take_2_03_bytes_a_parameter_and_follow_the_gradient():
    parameters = [nn.Parameter(normal(64, 100)), nn.Parameter(normal(32, 64, seed=1))]
    start = torch.cat([p.detach().flatten().clone() for p in parameters])
    exact = FlatAdamW([nn.Parameter(p.detach().clone()) for p in parameters])
    optimizer = FlatAdamW(parameters, eight_bit=True)
    for step in range(30):
        for each in (optimizer, exact):
            each.grads.copy_(normal(8448, seed=step % 7))
            each.step(1e-2)
    moments = optimizer.state_dict().values()
    assert sum(t.nbytes for t in moments) == 8448 * (2 + 8 / 256)
    m, v = in_float32(list(moments))
    assert (m - exact.exp_avg).norm() < 0.04 * exact.exp_avg.norm()
    assert (v - exact.exp_avg_sq).norm() < 0.03 * exact.exp_avg_sq.norm()
    assert (optimizer.values - exact.values).norm() < 0.03 * (exact.values - start).norm()


def new_trainer(folder, output, **settings):
    """Return a trainer of 24 steps on RECORDS."""
    model, tokenizer = FastLanguageModel.from_pretrained(folder, max_seq_length=128, device="cpu")
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    args = SFTConfig(
        output_dir=output,
        learning_rate=5e-3,
        per_device_train_batch_size=8,
        max_steps=24,
        **settings,
    )
    return SFTTrainer(model, args, RECORDS, None, tokenizer)


def test_training_with_8bit_moments_learns_as_with_float32_and_resumes_bit_for_bit(tmp_path):
    folder = make_tiny_model(tmp_path / "tiny")
    eight_bit = {"optim": "adamw_8bit", "save_strategy": "steps", "save_steps": 12}
    exact = new_trainer(folder, tmp_path / "32")
    trainer = new_trainer(folder, tmp_path / "8", **eight_bit)
    exact_loss, loss = exact.train().training_loss, trainer.train().training_loss
    assert trainer.optimizer.exp_avg.dtype == torch.uint8
    assert exact_loss != loss and abs(loss - exact_loss) < 0.005 * exact_loss
    exact_last, last = (
        each.accumulate(each.order.samples_of_step(0)).item() for each in (exact, trainer)
    )
    assert exact_last < 0.5 and abs(last - exact_last) < 0.02 * exact_last  # it began above 8
    resumed = new_trainer(folder, tmp_path / "8", **eight_bit)
    resumed.train(resume_from_checkpoint=tmp_path / "8" / "checkpoint-12")
    for name, x in trainer.optimizer.state_dict().items():
        assert torch.equal(resumed.optimizer.state_dict()[name], x), name
    assert torch.equal(resumed.optimizer.values, trainer.optimizer.values)


@pytest.mark.parametrize(("saved", "optim"), [(True, "adamw_8bit"), (False, "adamw_torch")])
def test_checkpoint_with_moments_of_the_other_kind_says_which_optim_continues(
    saved, optim, tmp_path
):
    folder = make_tiny_model(tmp_path / "tiny")
    model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=128, device="cpu")
    FastLanguageModel.get_peft_model(model, r=4)
    parameters = [p for _, p in model.trainable_parameters()]
    checkpoint = tmp_path / "checkpoint-1"
    save_checkpoint(model, FlatAdamW(parameters, eight_bit=saved), {}, checkpoint)
    other = FlatAdamW(parameters, eight_bit=not saved)
    with pytest.raises(ValueError, match=f"continue with optim '{optim}'"):
        load_checkpoint(model, other, checkpoint)


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


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 20), (1, 1), (5, 5)])
def test_schedules_equal_those_of_transformers(kind, warmup, total):
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = transformers.get_scheduler(
        kind, optimizer, num_warmup_steps=warmup, num_training_steps=total
    )
    for step in range(total + 2):
        expected = schedule.get_last_lr()[0]
        assert learning_rate_factor(kind, step, warmup, total) == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(("warmup", "total", "cycles"), [(0, 7, 2), (3, 20, 3), (5, 5, 4)])
def test_waves_of_the_learning_rate_equal_those_of_transformers(warmup, total, cycles):
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = transformers.get_cosine_with_hard_restarts_schedule_with_warmup(
        optimizer, warmup, total, num_cycles=cycles
    )
    for step in range(total + 2):
        factor = learning_rate_factor("cosine_with_restarts", step, warmup, total, cycles)
        assert factor == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_a_schedule_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="'square' is not known; choose linear, cosine"):
        learning_rate_factor("square", 1, 0, 7)


@pytest.mark.parametrize(
    ("warmup_steps", "warmup_ratio", "expected"), [(5, 0.5, 5), (0.1, 0, 10), (0, 0.033, 4)]
)
def test_warmup_is_a_number_of_steps_or_a_share_of_all(warmup_steps, warmup_ratio, expected):
    assert warmup_count(warmup_steps, warmup_ratio, 100) == expected
