"""Generation before and during a run: it changes no bit, and leaves the memory to the run."""

import gc

import pytest
import torch
from micro_step_checks import GRAPH_SHAPE, WIDE_SHAPE
from tiny import make_tiny_model
from training_runs import RECORDS, adapter_bytes, new_trainer, read_metrics

from minitune import TrainerCallback
from minitune.device import free_memory
from minitune.model.causal_lm import CausalLM

PROMPTS = [[5, 6, 7], [8] * 70]
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3, "logging_steps": 1}
GENERATED = {
    "sample_prompts": ("3 lamps to Oslo",),
    "score_answer": lambda answer: len(answer),
    "eval_max_new_tokens": 12,
}
SMALL_MEMORY = 4 << 20  # bytes that a driver takes without being asked
ROUNDING = 2 << 20  # bytes by which PyTorch may round up one large tensor


class Generates(TrainerCallback):
    """A callback that generates after each evaluation, and keeps the memory."""

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        """Generate with a cache that stays."""
        model.generate(PROMPTS, max_new_tokens=5, do_sample=True, seed=state.global_step)


def numbers(output) -> list[dict]:
    """Return the losses and gradient norms of a run, and its evaluation losses."""
    names = ("step", "loss", "eval_loss", "grad_norm")
    records = [record for record in read_metrics(output) if "samples" not in record]
    return [{name: record[name] for name in names if name in record} for record in records]


def plain_run(folder, output, **options) -> int | None:
    """Train without generation; return the peak of the largest plan, or None on a CPU.

    A plan counts what is allocated, so trainers of earlier runs are collected before and after.
    """
    gc.collect()
    trainer = new_trainer(folder, output, RECORDS[:3], **EVALUATED, **options)
    trainer.train()
    largest = trainer.planner.largest
    del trainer
    gc.collect()
    return largest and largest.peak


def generating_run(folder, output, **options):
    """Train after and with generation, and return the trainer."""
    trainer = new_trainer(folder, output, RECORDS[:3], **EVALUATED, **GENERATED, **options)
    trainer.model.generate(PROMPTS * 16, max_new_tokens=40)
    trainer.add_callback(Generates())
    trainer.train()
    return trainer


def assert_same_runs(folder, tmp_path, **options):
    """Assert that generation changes no number of a run.

    Return the peak of the plan without generation, and the trainer that generated.
    """
    peak = plain_run(folder, tmp_path / "plain", **options)
    trainer = generating_run(folder, tmp_path / "run", **options)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "plain")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "plain")
    assert any("eval_score" in record for record in read_metrics(tmp_path / "run"))
    return peak, trainer


def test_a_step_begins_without_the_memory_of_generation(smallest, tmp_path, monkeypatch):
    freed = []
    free = CausalLM.free_generation_memory

    def counted(model):
        freed.append(model)
        free(model)

    monkeypatch.setattr(CausalLM, "free_generation_memory", counted)
    _, trainer = assert_same_runs(smallest, tmp_path)
    # before the memory is planned, and at each of the 3 steps
    assert sum(model is trainer.model for model in freed) >= 4


@pytest.mark.gpu
@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_generation_changes_no_bit_of_a_run_with_graphs(tmp_path, load_in_4bit):
    folder = make_tiny_model(tmp_path / "model", **GRAPH_SHAPE)
    options = {"device": "cuda", "dtype": torch.bfloat16, "load_in_4bit": load_in_4bit}
    assert_same_runs(folder, tmp_path, model_options=options)


@pytest.mark.gpu
def test_after_generation_a_run_plans_with_the_memory_of_before(tmp_path):
    folder = make_tiny_model(tmp_path / "model", **WIDE_SHAPE)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    peak, trainer = assert_same_runs(folder, tmp_path, model_options=options)
    # Generation has allocated the buffers for dequantised weights already, and rounded them.
    assert abs(trainer.planner.largest.peak - peak) <= ROUNDING
    model, device = trainer.model, trainer.model.device
    free = []
    for answers in (32, 32, 1):  # the first call loads the kernels, which stay
        model.generate(PROMPTS * answers, max_new_tokens=40)
        held = torch.cuda.memory_allocated()
        model.free_generation_memory()
        gc.collect()
        free.append((free_memory(device), torch.cuda.memory_allocated()))
        assert free[-1][1] < held
    assert free[2][1] == free[1][1] == free[0][1]
    assert abs(free[1][0] - free[0][0]) <= SMALL_MEMORY
