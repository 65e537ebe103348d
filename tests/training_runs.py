"""Small training runs on the CPU, and helpers that read and interrupt them."""

import json
import signal
from pathlib import Path

import pytest
from tiny import make_tiny_model

from minitune import FastLanguageModel, SFTConfig, SFTTrainer

RECORDS = [
    {
        "messages": [
            {"role": "user", "content": f"{i} lamps to {city}"},
            {"role": "assistant", "content": " ".join(["blue lamp"] * (1 + i % 5)) + f" {i}"},
        ]
    }
    for i, city in enumerate(["Lisbon", "Köln", "Paris", "Oslo"] * 6)
]
# A step of this model takes a few milliseconds.
SMALLEST = {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 64}
ADAPTER_FILE = "adapter/adapter_model.safetensors"


def make_smallest_model(folder: Path, **changes) -> Path:
    """Write the model that trains fastest, and return its folder.

    changes: arguments of make_tiny_model that replace SMALLEST.
    """
    return make_tiny_model(folder, **(SMALLEST | changes))


def new_trainer(folder, output, eval_dataset=None, records=RECORDS, model_options=None, **settings):
    """Return a trainer of a new adapter: 5 samples a step, no checkpoints.

    model_options: arguments of from_pretrained.
    settings: those of SFTConfig, and score_answer of SFTTrainer.
    """
    options = {"max_seq_length": 128, "device": "cpu", **(model_options or {})}
    model, tokenizer = FastLanguageModel.from_pretrained(folder, **options)
    model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8)
    defaults = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 5,
        "save_strategy": "no",
    }
    score_answer = settings.pop("score_answer", None)
    args = SFTConfig(output_dir=output, **(defaults | settings))
    return SFTTrainer(model, args, records, eval_dataset, tokenizer, score_answer=score_answer)


def read_metrics(output: Path) -> list[dict]:
    """Return the records in metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def without_times(records: list[dict]) -> list[dict]:
    """Return records without the values that depend on the clock or on the process."""
    return [
        {
            name: value
            for name, value in record.items()
            if "second" not in name and name not in ("eval_runtime", "peak_memory_bytes")
        }
        for record in records
    ]


def adapter_bytes(output: Path) -> bytes:
    """Return the adapter that a run wrote."""
    return (output / ADAPTER_FILE).read_bytes()


def checkpoint_names(output: Path) -> list[str]:
    """Return the names of the checkpoints of a run."""
    return sorted(path.name for path in output.glob("checkpoint-*"))


def edit_json(path: Path, **values) -> None:
    """Replace values of an object in a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def train_with_ctrl_c(trainer: SFTTrainer, step: int, times: int = 1) -> None:
    """Train, and press Ctrl-C while `step` steps are done."""
    accumulate = trainer.accumulate

    def interrupted(samples):
        for _ in range(times if trainer.progress.step == step else 0):
            signal.raise_signal(signal.SIGINT)
        return accumulate(samples)

    trainer.accumulate = interrupted
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)
