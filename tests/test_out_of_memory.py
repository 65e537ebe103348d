"""A step that runs out of memory is repeated with a smaller plan; a driver may refuse to pin."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from micro_step_checks import WIDE_SHAPE, random_samples
from tiny import make_tiny_model

from minitune import FastLanguageModel, SFTConfig, SFTTrainer
from minitune.device import pin
from minitune.memory import planner as planner_module
from minitune.memory.planner import Planner
from minitune.model.activations import SaveLevel
from minitune.training.cuda_graphs import MAX_SMALLER_PLANS
from minitune.training.out_of_memory import halve_until_fits, retry_on_oom

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")
NO_PINNED_MEMORY = MemoryError("the host refuses to pin 3.00 GiB of memory")


class Attempts:
    """Stands for the accumulation of a step: it raises the given errors in turn, then succeeds.

    calls: the calls of zero_grad, of the accumulation itself, and of the micro-step's close.
    """

    def __init__(self, planner, *errors):
        self.errors = list(errors)
        self.calls = []
        device = torch.device("cpu")
        self._micro_step = SimpleNamespace(
            planner=planner,
            model=SimpleNamespace(device=device),
            close=lambda: self.calls.append("close"),
        )

    def accumulate(self):
        """Raise the next error, or return the loss."""
        self.calls.append("accumulate")
        if self.errors:
            raise self.errors.pop(0)
        return "loss"

    def run(self):
        """Run the step with retries."""
        zero_grad = partial(self.calls.append, "zero_grad")
        return retry_on_oom(self._micro_step, zero_grad, 7, self.accumulate)


def test_each_retry_clears_the_gradients_and_has_a_sixth_less_memory():
    planner = Planner(None, 1 << 30)
    attempts = Attempts(planner, OUT_OF_MEMORY, OUT_OF_MEMORY)
    with pytest.warns(UserWarning, match="cpu is out of memory in step 7") as said:
        assert attempts.run() == "loss"
    assert attempts.calls == ["zero_grad", "accumulate", "close"] * 2 + ["zero_grad", "accumulate"]
    assert planner.memory_budget == pytest.approx((5 / 6) ** 2 * 2**30)
    assert len(said) == 2 and "within 0.83 GiB" in str(said[0].message)


@pytest.mark.filterwarnings("ignore:cpu is out of memory")
def test_after_the_last_retry_the_error_is_raised():
    attempts = Attempts(Planner(None, 1 << 30), *[OUT_OF_MEMORY] * 9)
    with pytest.raises(torch.OutOfMemoryError):
        attempts.run()
    assert attempts.calls.count("accumulate") == MAX_SMALLER_PLANS + 1


def test_without_pinned_memory_activations_stay_on_the_gpu():
    planner = Planner(None, 1 << 30, host_budget=4 << 30)
    with pytest.warns(UserWarning, match="refuses to pin 3.00 GiB .*: activations stay on the GPU"):
        assert Attempts(planner, NO_PINNED_MEMORY).run() == "loss"
    assert planner.host_budget == 0 and planner.memory_budget == 1 << 30


@pytest.mark.parametrize(
    ("planner", "error"),
    [
        (Planner(SaveLevel.INPUT), OUT_OF_MEMORY),
        (Planner(None, 1 << 30), NO_PINNED_MEMORY),
    ],
    ids=["a fixed level", "nothing offloaded"],
)
def test_an_error_that_no_other_plan_can_avoid_is_raised_at_once(planner, error):
    attempts = Attempts(planner, error)
    with pytest.raises(type(error)):
        attempts.run()
    assert attempts.calls == ["zero_grad", "accumulate"]


@pytest.mark.parametrize(
    ("limit", "max_seqlen", "expected"),
    [(8192, 512, 8192), (8191, 512, 4096), (1, 512, 1024), (1, 3000, 4096)],
)
def test_a_micro_step_is_halved_until_it_fits_but_holds_the_longest_sample(
    limit, max_seqlen, expected
):
    assert halve_until_fits(8192, max_seqlen, lambda tokens: tokens > limit) == expected


# ---- on a GPU


def losses(folder, output, host_memory):
    """Return the losses of three steps of 8 samples of 1024 tokens."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        folder, max_seq_length=1024, dtype=torch.bfloat16
    )
    FastLanguageModel.get_peft_model(model, r=16)
    samples = random_samples([1024] * 24, vocab=400)
    records = [{"input_ids": sample.input_ids, "labels": sample.labels} for sample in samples]
    args = SFTConfig(
        output_dir=str(output),
        max_steps=3,
        per_device_train_batch_size=8,
        micro_step_tokens=8192,
        host_memory=host_memory,
        logging_steps=1,
        save_strategy="no",
    )
    SFTTrainer(model, args, records, processing_class=tokenizer).train()
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("host_memory", ["0GiB", "4GiB"])
def test_a_gpu_with_less_memory_than_it_reports_trains_with_a_smaller_plan(
    tmp_path, monkeypatch, host_memory
):
    folder = make_tiny_model(tmp_path / "m", **WIDE_SHAPE, positions=1024)
    whole = losses(folder, tmp_path / "whole", host_memory)
    free, total = planner_module.free_memory, torch.cuda.get_device_properties(0).total_memory
    monkeypatch.setattr(planner_module, "free_memory", lambda device: free(device) + (400 << 20))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((1 << 30) / total)
    message = r"out of memory in step 1, although .* were planned; trying the step again within"
    with pytest.warns(UserWarning, match=message):
        found = losses(folder, tmp_path / "short", host_memory)
    assert len(found) == 3 and found == pytest.approx(whole, rel=1e-2)


@pytest.mark.gpu
@pytest.mark.alone
def test_memory_that_the_driver_does_not_pin_is_an_error_and_the_gpu_goes_on():
    memory, owner = torch.empty(1 << 20, dtype=torch.uint8), torch.nn.Identity()
    pin(memory, owner)
    message = r"the host refuses to pin 0.00 GiB of memory \(CUDA error 712\)"
    with pytest.raises(MemoryError, match=message):
        pin(memory, owner)  # it is pinned already
    assert torch.ones(3, device="cuda").sum() == 3
