"""The training loop: sums, order of samples, evaluation, lack of memory, refused arguments."""

import math
import tomllib

import pytest
import torch
from safetensors.torch import load_file
from tiny import draw_adapter, make_tiny_model
from training_runs import RECORDS, new_trainer, read_metrics

from minitune import FastLanguageModel, SFTConfig, SFTTrainer
from minitune.training.checkpoint import RunSize
from minitune.training.micro_step import MicroStep
from minitune.training.run_data import epoch_order


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def sample_losses(trainer, samples):
    """Return the mean loss of each sample and its number of targets, one forward pass a sample."""
    losses = []
    with torch.no_grad():
        for sample in samples:
            labels = torch.tensor(sample.labels)
            losses.append(trainer.model(torch.tensor(sample.input_ids), labels=labels).loss.item())
    return losses, [sum(label != -100 for label in sample.labels[1:]) for sample in samples]


def mean_over_tokens(losses, counts):
    total = sum(loss * count for loss, count in zip(losses, counts, strict=True))
    return total / sum(counts)


@pytest.mark.parametrize("packing", [False, True])
def test_split_of_a_step_into_micro_steps_changes_neither_loss_nor_gradients(
    tiny, tmp_path, packing
):
    trainer = new_trainer(tiny, tmp_path, packing=packing, max_length=64)
    draw_adapter(trainer.model, 0.1)  # B is zero at first, and A then has no gradient
    parameters = [p for _, p in trainer.model.trainable_parameters()]
    samples = trainer.order.samples_of_step(0)
    tokens = sum(len(sample.input_ids) for sample in samples)
    results = {}
    for parts in (1, 2, 4):
        trainer.micro_step_tokens = math.ceil(tokens / parts) + 40 * (parts > 1)
        for p in parameters:
            p.grad = None
        loss = trainer.accumulate(samples)
        results[parts] = loss, torch.cat([p.grad.flatten() for p in parameters])
    losses, counts = sample_losses(trainer, samples)
    mean = mean_over_tokens(losses, counts)
    assert len(set(counts)) > 1  # otherwise a mean of means would pass as well
    for loss, gradient in results.values():
        assert loss.item() == pytest.approx(mean, rel=1e-5)
        assert (gradient - results[1][1]).norm() <= 1e-5 * results[1][1].norm()


def test_evaluation_loss_is_the_mean_over_all_trained_on_tokens(tiny, tmp_path, monkeypatch):
    trainer = new_trainer(tiny, tmp_path, RECORDS[:7], micro_step_tokens=100)
    monkeypatch.setattr("minitune.training.metrics.EVAL_SAMPLES_PER_PACKING", 3)
    losses, counts = sample_losses(trainer, trainer.data.evaluation.samples)
    mean = mean_over_tokens(losses, counts)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(mean, rel=1e-5)


def test_order_of_samples_is_a_function_of_seed_and_epoch(smallest, tmp_path):
    assert epoch_order(1, 0, 50) == epoch_order(1, 0, 50)
    assert sorted(epoch_order(1, 3, 50)) == list(range(50))
    assert len({epoch_order(seed, epoch, 50) for seed in (1, 2) for epoch in (0, 1)}) == 4
    trainer = new_trainer(smallest, tmp_path, seed=7)
    steps = range(trainer.size.steps_per_epoch)
    epoch = [sample for step in steps for sample in trainer.order.samples_of_step(step)]
    assert len(epoch) == len(RECORDS)
    assert {tuple(s.input_ids) for s in epoch} == {
        tuple(s.input_ids) for s in trainer.data.train.samples
    }


def test_steps_count_samples_and_with_packing_rows(smallest, tmp_path):
    plain = new_trainer(smallest, tmp_path, gradient_accumulation_steps=2, num_train_epochs=1.5)
    assert plain.size == RunSize(units_per_step=10, steps_per_epoch=3, total_steps=5)
    packed = new_trainer(
        smallest, tmp_path, packing=True, max_length=128, per_device_train_batch_size=2
    )
    longest = max(len(sample.input_ids) for sample in packed.data.train.samples)
    samples = packed.order.samples_of_step(0)
    assert len(samples) > 2
    assert 2 * longest < sum(len(sample.input_ids) for sample in samples) <= 2 * 128


def test_training_lowers_the_loss_and_fills_the_run_folder(tiny, tmp_path, capsys):
    output = tmp_path / "run"
    trainer = new_trainer(
        tiny,
        output,
        RECORDS[:4],
        max_steps=12,
        logging_steps=5,
        logging_first_step=True,
        save_strategy="steps",
        save_steps=5,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=6,
    )
    first = trainer.evaluate()["eval_loss"]
    result = trainer.train()
    assert sorted(path.name for path in output.iterdir()) == [
        "adapter",
        "checkpoint-10",
        "checkpoint-12",
        "config.toml",
        "metrics.jsonl",
        "outputs.json",
        "run.json",
    ]
    records = read_metrics(output)
    losses = [record for record in records if "loss" in record]
    assert [record["step"] for record in losses] == [1, 5, 10, 12]
    assert set(losses[0]) == {
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "seconds",
        "peak_memory_bytes",
    }
    evaluations = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert len(evaluations) == 2 and evaluations[-1] < 0.5 * first
    assert evaluations[-1] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)
    steps_of_records = (1, 4, 5, 2)
    weighted = sum(
        steps * record["loss"] for steps, record in zip(steps_of_records, losses, strict=True)
    )
    assert result.global_step == 12 and result.training_loss == pytest.approx(weighted / 12)
    error = capsys.readouterr().err
    assert "24 samples" in error and "step 12/12  epoch 2.40  loss" in error
    settings = tomllib.loads((output / "config.toml").read_text())
    assert settings["output_dir"] == str(output)
    assert settings["max_length"] == 128 and settings["r"] == 4
    saved = load_file(output / "adapter" / "adapter_model.safetensors")
    for name, p in trainer.model.trainable_parameters():
        assert torch.equal(saved["base_model.model." + name], p)


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(smallest, tmp_path):
    trainer = new_trainer(
        smallest, tmp_path, max_steps=8, logging_steps=1, save_strategy="steps", save_steps=2
    )
    accumulate = trainer.accumulate

    def poisoned(samples):
        return accumulate(samples) * (math.nan if trainer.progress.step == 4 else 1)

    trainer.accumulate = poisoned
    with pytest.raises(ValueError, match=r"loss became nan at step 5 .*checkpoint-4"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
        "config.toml",
        "metrics.jsonl",
        "outputs.json",
        "run.json",
    ]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_model_data_and_settings_that_do_not_go_together_are_refused(smallest, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(smallest, max_seq_length=64, device="cpu")
    with pytest.raises(ValueError, match="no adapter to train"):
        SFTTrainer(model, SFTConfig(), RECORDS, processing_class=tokenizer)
    FastLanguageModel.get_peft_model(model, r=2)
    for settings, data, message in [
        ({}, None, "train_dataset is missing"),
        ({"max_length": 100}, RECORDS, "max_length 100 is more than the max_seq_length 64"),
        ({"eval_strategy": "epoch"}, RECORDS, "there is no eval_dataset"),
        ({}, tmp_path / "absent.jsonl", "absent.jsonl"),
    ]:
        with pytest.raises(ValueError, match=message):
            SFTTrainer(model, SFTConfig(**settings), data, processing_class=tokenizer)
    with pytest.raises(ValueError, match="resume needs output_dir"):
        SFTTrainer(model, SFTConfig(), RECORDS, processing_class=tokenizer).train(
            resume_from_checkpoint=True
        )


def test_a_memory_budget_that_decides_nothing_is_refused(smallest, tmp_path):
    with pytest.raises(
        ValueError, match=r"memory_budget 8GiB decides what a GPU saves .* the model is on cpu"
    ):
        new_trainer(smallest, tmp_path, memory_budget="8GiB")


# ---- out of memory


def test_gpu_out_of_memory_says_what_needs_less(smallest, tmp_path, monkeypatch):
    trainer = new_trainer(smallest, tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
    loss = trainer.model.rows_loss

    def full(*arguments, **options):
        if trainer.progress.step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss(*arguments, **options)

    monkeypatch.setattr(trainer.model, "rows_loss", full)
    words = (
        r"step 3.*; lower micro_step_tokens .*max_length .*use_gradient_checkpointing to true "
        r".*load_in_4bit .*point-2"
    )
    with (
        pytest.warns(UserWarning, match="trying the step again"),
        pytest.raises(ValueError, match=words),
    ):
        trainer.train()


def test_a_step_out_of_memory_is_done_again_with_a_smaller_plan(
    smallest, tmp_path, recwarn, monkeypatch
):
    settings = {"max_steps": 3, "logging_steps": 1}
    new_trainer(smallest, tmp_path / "whole", **settings).train()
    trainer = new_trainer(smallest, tmp_path / "short", micro_step_tokens=64, **settings)
    call, failures = MicroStep.__call__, []

    def sometimes(micro_step, batch, denominator):
        loss = call(micro_step, batch, denominator)
        # the step's gradients have been added already
        if trainer.progress.step == 1 and len(failures) < 2:
            failures.append(trainer.planner.memory_budget)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    monkeypatch.setattr(MicroStep, "__call__", sometimes)
    trainer.train()
    assert failures[0] > failures[1] > trainer.planner.memory_budget > 0
    messages = [str(warning.message) for warning in recwarn]
    said = [message for message in messages if "trying the step again" in message]
    assert len(said) == 2
    assert "cpu is out of memory in step 2" in said[0]
    whole, short = (read_metrics(tmp_path / name) for name in ("whole", "short"))
    assert [r["tokens"] for r in whole] == [r["tokens"] for r in short]
    assert [r["loss"] for r in whole] == pytest.approx([r["loss"] for r in short], rel=1e-5)


def test_an_evaluation_out_of_memory_is_done_again_with_what_training_kept(
    smallest, tmp_path, monkeypatch
):
    trainer = new_trainer(smallest, tmp_path / "run", eval_dataset=RECORDS[:4], max_steps=1)
    expected, closed, loss = trainer.evaluate()["eval_loss"], [], trainer.model.rows_loss

    def full(*arguments, **options):
        if not closed:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(*arguments, **options)

    monkeypatch.setattr(trainer.model, "rows_loss", full)
    monkeypatch.setattr(trainer.micro_step, "close", lambda: closed.append(True))
    assert trainer.evaluate()["eval_loss"] == expected and len(closed) == 1


def test_a_host_that_pins_no_memory_is_done_without(smallest, tmp_path, monkeypatch):
    trainer = new_trainer(smallest, tmp_path / "run", max_steps=2, logging_steps=1)
    call, asked = MicroStep.__call__, []

    def refused(micro_step, batch, denominator):
        asked.append(micro_step.planner.host_budget)
        if micro_step.planner.host_budget:
            raise MemoryError("the host refuses to pin 3.00 GiB of memory (CUDA error 2)")
        return call(micro_step, batch, denominator)

    monkeypatch.setattr(MicroStep, "__call__", refused)
    trainer.planner.host_budget = 4 << 30
    with pytest.warns(UserWarning, match="refuses to pin 3.00 GiB .*: activations stay on the GPU"):
        trainer.train()
    assert asked[0] == 4 << 30 and not any(asked[1:])
    assert len(read_metrics(tmp_path / "run")) >= 2
