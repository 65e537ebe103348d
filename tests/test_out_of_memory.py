"""A GPU that really runs out of memory, and a driver that really refuses to pin some."""

import json

import pytest
import torch
from test_micro_step import random_samples
from tiny import make_tiny_model

from minitune import FastLanguageModel, SFTConfig, SFTTrainer
from minitune.device import pin
from minitune.memory import planner

pytestmark = [pytest.mark.gpu, pytest.mark.alone]

SHAPE = {
    "hidden": 1024,
    "layers": 8,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 128,
    "ffn": 3584,
    "vocab": 4096,
}


def losses(folder, output, host_memory):
    trained, tokenizer = FastLanguageModel.from_pretrained(
        folder, max_seq_length=1024, dtype=torch.bfloat16
    )
    FastLanguageModel.get_peft_model(trained, r=16)
    records = [
        {"input_ids": s.input_ids, "labels": s.labels}
        for s in random_samples([1024] * 24, vocab=400)
    ]
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "micro_step_tokens": 8192,
        "host_memory": host_memory,
    }
    args = SFTConfig(output_dir=str(output), logging_steps=1, save_strategy="no", **settings)
    SFTTrainer(trained, args, records, processing_class=tokenizer).train()
    return [
        json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("host_memory", ["0GiB", "4GiB"])
def test_a_gpu_with_less_memory_than_it_said_is_trained_on_with_a_smaller_plan(
    tmp_path, monkeypatch, host_memory
):
    folder = make_tiny_model(tmp_path / "m", **SHAPE, positions=1024)
    whole = losses(folder, tmp_path / "whole", host_memory)
    free, total = planner.free_memory, torch.cuda.get_device_properties(0).total_memory
    monkeypatch.setattr(planner, "free_memory", lambda device: free(device) + (400 << 20))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((1 << 30) / total)
    with pytest.warns(
        UserWarning,
        match=r"out of memory in step 1, though .* were planned .* trying the step again",
    ):
        found = losses(folder, tmp_path / "short", host_memory)
    assert len(found) == 3 and found == pytest.approx(whole, rel=1e-2)


def test_memory_that_the_driver_does_not_pin_is_an_error_and_the_gpu_goes_on():
    memory, owner = torch.empty(1 << 20, dtype=torch.uint8), torch.nn.Identity()
    pin(memory, owner)
    with pytest.raises(
        MemoryError, match=r"the host refuses to pin 0.00 GiB of memory \(CUDA error 712\)"
    ):
        pin(memory, owner)  # it is already
    assert torch.ones(3, device="cuda").sum() == 3
