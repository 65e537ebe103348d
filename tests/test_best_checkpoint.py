"""A run stops early and ends with its best checkpoint, as in transformers."""

import random

import pytest
import torch
from safetensors.torch import load_file
from training_runs import (
    RECORDS,
    adapter_bytes,
    checkpoint_names,
    make_smallest_model,
    new_trainer,
    train_with_ctrl_c,
)

from minitune import EarlyStoppingCallback
from minitune.training.trainer import Trainer


@pytest.fixture(scope="module")
def smallest(tmp_path_factory):
    return make_smallest_model(tmp_path_factory.mktemp("smallest"))


def with_losses(monkeypatch, losses, name="eval_loss"):
    """Let the evaluation after step n return the n-th of `losses`, also under another name."""

    def evaluation(trainer, eval_dataset=None):
        loss = losses[trainer.progress.step - 1]
        return {"eval_loss": loss, name: loss}

    monkeypatch.setattr(Trainer, "_evaluation", evaluation)


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 1,
    "load_best_model_at_end": True,
}


@pytest.mark.parametrize("seed", range(6))
def test_early_stopping_stops_where_that_of_transformers_stops(
    smallest, tmp_path, monkeypatch, seed
):
    transformers = pytest.importorskip("transformers")
    draw = random.Random(seed)
    losses = [draw.choice([1.0, 1.1, 1.2, 1.3, 1.4]) for _ in range(12)]
    is_score = seed >= 4
    with_losses(monkeypatch, losses, "eval_f1" if is_score else "eval_loss")
    score = {"metric_for_best_model": "f1", "score_answer": lambda answer: {"f1": 0}}
    results = []
    for cls in (EarlyStoppingCallback, transformers.EarlyStoppingCallback):
        output = tmp_path / cls.__module__
        settings = {**BEST, "save_total_limit": 1, "max_steps": 12, **(score if is_score else {})}
        trainer = new_trainer(smallest, output, RECORDS[:2], **settings)
        trainer.add_callback(cls(2 + seed % 2, 0.15 * (seed % 3)))
        results.append((trainer.train().global_step, trainer.state.best_global_step))
    best = max if is_score else min
    assert results[0] == results[1]
    assert results[0][1] == 1 + losses.index(best(losses[: results[0][0]]))


def test_the_best_checkpoint_is_the_result_and_stays(smallest, tmp_path, monkeypatch, capsys):
    with_losses(monkeypatch, [1.5, 1.2, 1.3, 1.4, 1.6])
    output = tmp_path / "run"
    trainer = new_trainer(smallest, output, RECORDS[:2], max_steps=5, save_total_limit=1, **BEST)
    trainer.train()
    assert checkpoint_names(output) == ["checkpoint-2", "checkpoint-5"]
    best = output / "checkpoint-2" / "adapter_model.safetensors"
    assert adapter_bytes(output) == best.read_bytes()
    saved = load_file(best)
    held = dict(trainer.model.trainable_parameters())
    assert len(held) == len(saved)
    assert all(torch.equal(p, saved[f"base_model.model.{name}"]) for name, p in held.items())
    state = trainer.state
    assert (state.best_metric, state.best_global_step) == (1.2, 2)
    assert state.best_model_checkpoint == str(output / "checkpoint-2")
    assert "step 2, eval_loss 1.2000: the result is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("limit", "kept"), [(1, [2, 6]), (2, [2, 6]), (3, [2, 5, 6]), (None, [1, 2, 3, 4, 5, 6])]
)
def test_save_total_limit_counts_the_best_checkpoint(smallest, tmp_path, monkeypatch, limit, kept):
    with_losses(monkeypatch, [1.5, 1.2, 1.3, 1.4, 1.6, 1.7])
    output, settings = tmp_path / "run", {**BEST, "max_steps": 6, "save_total_limit": limit}
    new_trainer(smallest, output, RECORDS[:2], **settings).train()
    assert checkpoint_names(output) == [f"checkpoint-{step}" for step in kept]


def test_the_best_of_the_saved_steps_counts_if_the_best_step_was_not_saved(
    smallest, tmp_path, monkeypatch
):
    with_losses(monkeypatch, [1.0, 1.4, 1.2, 1.3])
    settings = {**BEST, "save_steps": 2, "max_steps": 4}
    trainer = new_trainer(smallest, tmp_path / "run", RECORDS[:2], **settings)
    trainer.train()
    assert trainer.state.best_global_step == 1
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-4")


def test_save_strategy_best_saves_after_each_lower_loss(smallest, tmp_path, monkeypatch):
    with_losses(monkeypatch, [1.5, 1.2, 1.3, 1.1])
    settings = {**BEST, "save_strategy": "best", "max_steps": 4}
    new_trainer(smallest, tmp_path / "run", RECORDS[:2], **settings).train()
    assert checkpoint_names(tmp_path / "run") == ["checkpoint-1", "checkpoint-2", "checkpoint-4"]


def test_early_stopping_and_the_best_loss_survive_an_interruption(smallest, tmp_path, monkeypatch):
    with_losses(monkeypatch, [1.5, 1.2, 1.3, 1.4, 1.5, 1.0])
    settings = {**BEST, "max_steps": 6, "save_total_limit": 2}
    results = []
    for name in ("whole", "interrupted"):
        trainer = new_trainer(smallest, tmp_path / name, RECORDS[:2], **settings)
        trainer.add_callback(EarlyStoppingCallback(3))
        if name == "interrupted":
            train_with_ctrl_c(trainer, 3)
            trainer = new_trainer(smallest, tmp_path / name, RECORDS[:2], resume=True, **settings)
            trainer.add_callback(EarlyStoppingCallback(3))
        step = trainer.train().global_step
        results.append((step, trainer.state.best_metric, adapter_bytes(tmp_path / name)))
    assert results[0] == results[1] and results[0][:2] == (5, 1.2)


def test_early_stopping_without_evaluations_is_refused(smallest, tmp_path):
    trainer = new_trainer(smallest, tmp_path / "run")
    trainer.add_callback(EarlyStoppingCallback())
    with pytest.raises(ValueError, match="needs evaluations; choose eval_strategy"):
        trainer.train()
    with pytest.raises(ValueError, match="early_stopping_patience is 0"):
        EarlyStoppingCallback(0)
