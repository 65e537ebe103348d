"""Training in float16: the loss scale, repeated overflows, resumed runs, refusals."""

import math
import re
import shutil

import pytest
import torch
from tiny import draw_adapter, make_tiny_model
from training_runs import (
    ADAPTER_FILE,
    RECORDS,
    adapter_bytes,
    edit_json,
    make_smallest_model,
    new_trainer,
    read_metrics,
    without_times,
)
from weight_folders import edit_tensors

from minitune import TrainerCallback
from minitune.model import precision
from minitune.training import loss_scale
from minitune.training.checkpoint import REMEDY
from minitune.training.evaluation import evaluate
from minitune.training.loss_scale import MAX_SCALE, MIN_SCALE, BeyondFloat16, LossScale
from minitune.training.optimizer import FlatAdamW

STEPS = 4
RUN = {"max_steps": STEPS, "logging_steps": 1, "lr_scheduler_type": "linear"}


class StartScale(TrainerCallback):
    """Sets the scale before the first step, and records the scale after each step."""

    def __init__(self, trainer, scale):
        self.trainer, self.scale, self.after = trainer, scale, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.progress.loss_scale.scale = self.scale

    def on_step_end(self, args, state, control, **kwargs):
        self.after.append(self.trainer.progress.loss_scale.scale)


def float16_trainer(folder, output, dtype="float16", device="cpu", **settings):
    options = {"dtype": dtype, "load_in_4bit": False, "device": device}
    return new_trainer(folder, output, model_options=options, **(RUN | settings))


def losses(output):
    return [record["loss"] for record in read_metrics(output) if "loss" in record]


def run_from_scale(folder, output, scale, **settings):
    """Train from a scale; return the samples and learning rates of all passes, and the trainer."""
    trainer, passes = float16_trainer(folder, output, **settings), []
    callback, accumulate = StartScale(trainer, scale), trainer.accumulate

    def recorded(samples):
        ids = tuple(tuple(sample.input_ids) for sample in samples)
        passes.append((trainer.progress.step, ids))
        return accumulate(samples)

    trainer.accumulate = recorded
    trainer.add_callback(callback)
    trainer.train()
    return passes, callback.after, trainer


# ---- a run


@pytest.fixture(scope="module")
def in_float32(smallest, tmp_path_factory):
    """Return a run in float32."""
    output = tmp_path_factory.mktemp("float32") / "run"
    trainer = float16_trainer(smallest, output, "float32")
    trainer.train()
    return output, trainer


def test_losses_and_gradient_norms_are_those_of_float32_up_to_rounding(
    smallest, in_float32, tmp_path
):
    float16_trainer(smallest, tmp_path).train()
    pairs = zip(read_metrics(tmp_path), read_metrics(in_float32[0]), strict=True)
    for ours, expected in list(pairs)[:STEPS]:
        assert ours["loss"] == pytest.approx(expected["loss"], rel=2e-3)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-2)


def test_metrics_hold_the_scale_in_float16_only(smallest, in_float32, tmp_path):
    float16_trainer(smallest, tmp_path).train()
    records = [record for record in read_metrics(tmp_path) if "loss" in record]
    assert [record["loss_scale"] for record in records] == [LossScale().scale] * STEPS
    assert not any("loss_scale" in record for record in read_metrics(in_float32[0]))
    assert in_float32[1].progress.loss_scale is None


def test_an_overflow_repeats_the_step_with_half_the_scale_and_loses_nothing(
    smallest, in_float32, tmp_path, capsys
):
    passes, after, trainer = run_from_scale(smallest, tmp_path / "forced", 2.0**24)
    repeats = len(passes) - STEPS
    assert repeats > 3
    assert after == [2.0 ** (24 - repeats)] * STEPS
    # all repeated passes are of the first step, on its samples
    steps = [step for step, _ in passes]
    assert steps == [0] * (1 + repeats) + [1, 2, 3]
    assert len({ids for step, ids in passes if step == 0}) == 1
    printed = capsys.readouterr().err
    assert printed.count("gradients overflow in step 1, which is repeated") == repeats
    assert trainer.progress.step == STEPS
    assert trainer.progress.tokens == in_float32[1].progress.tokens
    for name in ("learning_rate", "tokens", "step", "epoch"):
        ours, expected = read_metrics(tmp_path / "forced"), read_metrics(in_float32[0])
        assert [r[name] for r in ours[:STEPS]] == [r[name] for r in expected[:STEPS]]

    # the run is that which begins with the last scale
    run_from_scale(smallest, tmp_path / "direct", after[-1])
    assert adapter_bytes(tmp_path / "forced") == adapter_bytes(tmp_path / "direct")
    assert losses(tmp_path / "forced") == losses(tmp_path / "direct")


def test_an_overflow_in_a_later_step_changes_no_other_step(smallest, tmp_path, monkeypatch):
    float16_trainer(smallest, tmp_path / "straight").train()
    norm, calls = FlatAdamW.gradient_norm, []

    def third_is_infinite(optimizer):
        calls.append(optimizer.steps)
        return norm(optimizer) * (math.inf if len(calls) == 3 else 1)

    monkeypatch.setattr(FlatAdamW, "gradient_norm", third_is_infinite)
    float16_trainer(smallest, tmp_path / "repeated").train()
    assert calls == [0, 1, 2, 2, 3]
    # Half the scale shifts exponents, and changes the rounding of the smallest numbers only.
    assert losses(tmp_path / "repeated") == pytest.approx(losses(tmp_path / "straight"), rel=1e-4)


def test_the_split_of_a_step_changes_gradients_by_rounding_alone(smallest, tmp_path):
    trainer = float16_trainer(smallest, tmp_path)
    draw_adapter(trainer.model, 0.1)
    parameters = [p for _, p in trainer.model.trainable_parameters()]
    found = []
    for tokens in (4096, 40):
        trainer.micro_step_tokens = tokens
        for p in parameters:
            p.grad = None
        loss = trainer.accumulate(trainer.order.samples_of_step(0))
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in parameters])))
    (loss, gradients), (split_loss, split_gradients) = found
    assert split_loss == pytest.approx(loss, rel=1e-5)
    assert (split_gradients - gradients).norm() <= 5e-3 * gradients.norm()


def test_a_resumed_run_has_the_scale_and_the_bits_of_one_that_was_not_interrupted(
    smallest, tmp_path, monkeypatch
):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 7}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    float16_trainer(smallest, straight, **settings).train()
    shutil.copytree(straight, resumed)
    for name in ("checkpoint-6", "checkpoint-7", "adapter"):
        shutil.rmtree(resumed / name)
    trainer = float16_trainer(smallest, resumed, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.progress.loss_scale == LossScale(4 * LossScale().scale, 1)
    assert without_times(read_metrics(resumed)) == without_times(read_metrics(straight))
    for file in (ADAPTER_FILE, "checkpoint-7/optimizer.safetensors"):
        assert (resumed / file).read_bytes() == (straight / file).read_bytes()


@pytest.mark.parametrize(
    ("began", "continued", "expected"),
    [("float32", "float16", LossScale(steps=1)), ("float16", "float32", None)],
)
def test_a_run_that_goes_on_in_another_dtype_begins_or_drops_the_scale(
    smallest, tmp_path, capsys, began, continued, expected
):
    settings = {"save_strategy": "steps", "max_steps": 2, "save_steps": 1}
    float16_trainer(smallest, tmp_path, began, **settings).train()
    trainer = float16_trainer(smallest, tmp_path, continued, **settings)
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-1")
    assert f"dtype {began} -> {continued}" in " ".join(capsys.readouterr().err.split())
    assert trainer.progress.loss_scale == expected


def test_a_second_run_of_a_trainer_begins_at_step_0_with_the_first_scale(smallest, monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", STEPS)
    trainer = float16_trainer(smallest, None)
    for _ in range(2):
        trainer.train()
        assert trainer.progress.loss_scale == LossScale(2 * LossScale().scale, 0)
        records = [record for record in trainer.state.log_history if "loss" in record]
        assert [record["step"] for record in records] == [1, 2, 3, 4]
        scales = [record["loss_scale"] for record in records]
        assert scales == [LossScale().scale] * (STEPS - 1) + [2 * LossScale().scale]


# ---- float16 is too narrow


@pytest.fixture(scope="module")
def too_large(tmp_path_factory):
    """Return the folder of a model whose silu(gate) * up is beyond float16."""
    folder = make_smallest_model(tmp_path_factory.mktemp("too_large") / "model")

    def enlarge(tensors):
        for name in ("gate", "up"):
            tensors[f"model.layers.0.mlp.{name}_proj.weight"].mul_(1e3)

    edit_tensors(folder, enlarge)
    return folder


def test_a_loss_beyond_float16_stops_the_run_before_the_update_and_names_wider_dtypes(
    too_large, tmp_path
):
    trainer = float16_trainer(too_large, tmp_path / "run")
    before = [p.detach().clone() for _, p in trainer.model.trainable_parameters()]
    message = (
        r"step 1: the loss is (nan|inf) in float16; float16 holds numbers up to 65504: load the "
        r"model with dtype='bfloat16' or dtype='float32', .*; last checkpoint: none was saved"
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()
    for old, (_, p) in zip(before, trainer.model.trainable_parameters(), strict=True):
        assert torch.equal(old, p)
    float16_trainer(too_large, tmp_path / "wider", "float32").train()
    assert all(map(math.isfinite, losses(tmp_path / "wider")))


def test_an_evaluation_beyond_float16_is_refused_and_writes_no_record(too_large, tmp_path):
    text = "the evaluation loss is nan in float16; float16 holds numbers up to 65504: load the"
    settings = {"eval_dataset": RECORDS[:2], "eval_strategy": "steps", "eval_on_start": True}
    trainer = float16_trainer(too_large, tmp_path / "run", **settings)
    with pytest.raises(ValueError, match=f"^{text}"):
        trainer.evaluate()
    with pytest.raises(ValueError, match=f"^{text}"):
        evaluate(trainer.model, RECORDS[:2], trainer.processing_class)
    with pytest.raises(ValueError, match=f"^step 0: {text}.*; last checkpoint: none was saved"):
        trainer.train()
    assert read_metrics(tmp_path / "run") == trainer.state.log_history == []
    float16_trainer(too_large, tmp_path / "wider", "float32", **settings).train()
    assert math.isfinite(read_metrics(tmp_path / "wider")[0]["eval_loss"])


def test_answers_beyond_float16_are_a_warning_and_no_record(too_large, tmp_path, capsys):
    trainer = float16_trainer(too_large, tmp_path, sample_prompts=["hello"])
    with pytest.raises(ValueError, match="step 1: the loss is nan in float16"):
        trainer.train()
    printed = " ".join(capsys.readouterr().err.split())
    assert "no answers to sample_prompts at step 0: the logits of the next token are" in printed
    assert "load it with dtype='bfloat16' or dtype='float32'" in printed
    assert trainer.state.sample_answers == []


def test_an_evaluation_that_is_not_finite_is_refused_in_every_dtype(smallest, tmp_path):
    trainer = float16_trainer(smallest, tmp_path, "bfloat16", eval_dataset=RECORDS[:2])
    _, parameter = next(iter(trainer.model.trainable_parameters()))
    parameter.data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"the evaluation loss is nan in bfloat16: .* earlier"):
        trainer.evaluate()


def test_a_training_loss_that_is_not_finite_is_named_before_an_evaluation(smallest, tmp_path):
    class Damage(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                next(p for _, p in kwargs["model"].trainable_parameters()).data.fill_(math.nan)

    settings = {"eval_dataset": RECORDS[:2], "eval_strategy": "steps", "eval_steps": 2}
    trainer = float16_trainer(smallest, tmp_path, "float32", **settings | {"logging_steps": 4})
    trainer.add_callback(Damage)
    with pytest.raises(ValueError, match="loss became nan at step 2 and training stopped"):
        trainer.train()


def test_gradients_that_no_scale_makes_finite_stop_the_run(smallest, tmp_path, monkeypatch):
    infinite = torch.tensor(math.inf)
    monkeypatch.setattr(FlatAdamW, "gradient_norm", lambda optimizer: infinite)
    trainer = float16_trainer(smallest, tmp_path)
    with pytest.raises(ValueError, match=r"step 1: gradients .* down to a loss scale of 0\.000244"):
        trainer.train()
    assert trainer.optimizer.steps == 0


def test_the_remedy_names_no_bfloat16_if_the_gpu_has_none(monkeypatch):
    monkeypatch.setattr(precision, "is_bfloat16_supported", lambda device: False)
    with pytest.raises(BeyondFloat16, match=r"load the model with dtype='float32', or lower"):
        LossScale().accept(torch.tensor(math.nan), torch.tensor(1.0))


# ---- the scale


def test_the_scale_doubles_after_an_interval_without_overflow_up_to_its_limit(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    finite, infinite = torch.tensor(1.0), torch.tensor(math.inf)
    scale = LossScale(2.0**4)
    assert all(scale.accept(finite, finite) for _ in range(2))
    assert not scale.accept(finite, infinite)
    assert scale == LossScale(2.0**3, 0)
    assert all(scale.accept(finite, finite) for _ in range(3))
    assert scale == LossScale(2.0**4, 0)
    largest = LossScale(MAX_SCALE)
    assert all(largest.accept(finite, finite) for _ in range(7))
    assert largest.scale == MAX_SCALE
    assert not scale.accept(finite, torch.tensor(math.nan))
    smallest = LossScale(MIN_SCALE)
    with pytest.raises(BeyondFloat16):
        smallest.accept(finite, infinite)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "loss_scale is 7; expected an object"),
        ({"scale": "big", "steps": 0}, "loss_scale.scale is 'big'; expected a number from"),
        ({"scale": 0.0, "steps": 0}, "loss_scale.scale is 0.0; expected a number from"),
        ({"scale": 2.0**25, "steps": 0}, "loss_scale.scale is 33554432.0; expected a number from"),
        ({"scale": 3.7, "steps": 0}, "loss_scale.scale is 3.7; expected a power of two"),
        ({"scale": 64.0}, "loss_scale.steps is None; expected a whole number"),
    ],
)
def test_a_damaged_scale_in_a_checkpoint_is_refused(smallest, tmp_path, value, message):
    settings = {"save_strategy": "steps", "max_steps": 1, "save_steps": 1}
    float16_trainer(smallest, tmp_path, **settings).train()
    state = tmp_path / "checkpoint-1" / "state.json"
    progress = {"step": 1, "tokens": 9, "seconds": 1.0, "loss_sum": 1.0, "grad_norm": 1.0}
    edit_json(state, progress=progress | {"unlogged": [], "loss_scale": value})
    with pytest.raises(ValueError, match=re.escape(message) + f".*{REMEDY}"):
        float16_trainer(smallest, tmp_path, **settings).train(resume_from_checkpoint=True)


# ---- on a GPU


@pytest.mark.gpu
def test_a_run_on_a_gpu_repeats_overflows_and_stays_near_float32(tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    passes, after, _ = run_from_scale(folder, tmp_path / "forced", 2.0**24, device="cuda")
    assert len(passes) > STEPS
    run_from_scale(folder, tmp_path / "direct", after[-1], device="cuda")
    assert adapter_bytes(tmp_path / "forced") == adapter_bytes(tmp_path / "direct")
    float16_trainer(folder, tmp_path / "wider", "float32", device="cuda").train()
    assert losses(tmp_path / "direct") == pytest.approx(losses(tmp_path / "wider"), rel=5e-3)
