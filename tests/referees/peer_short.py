"""A timed fine-tune of a peer on short samples, through TRL's SFTTrainer.

It returns a record with the keys of scripts/benchmark/records.py.
"""

import argparse
import statistics
import tempfile
import time
from typing import Any

from benchmark.records import (
    ACCUMULATION,
    memory_figures,
    short_figures,
    short_settings,
    short_texts,
    synchronize,
)
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from referees.peer_steps import LoadPeer, configuration, load_timed


class StepClock(TrainerCallback):
    """The time at which the device finished each optimizer step."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, *_, **__):
        """Wait for the device and record the time."""
        synchronize()
        self.ends.append(time.perf_counter())


def time_short_samples(a: argparse.Namespace, load: LoadPeer) -> dict[str, Any]:
    """Return the record of a run on short samples; a.batch is per_device_train_batch_size."""
    model, tokenizer, loading = load_timed(a, load)
    texts, clock = short_texts(), StepClock()
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            dataset_text_field="text",
            dataset_num_proc=1,
            max_length=a.tokens,
            packing=False,
            **short_settings(a),
            logging_steps=10,
            report_to="none",
        )
        trainer = SFTTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"text": texts}),
            callbacks=[clock],
            args=args,
        )
        start = time.perf_counter()
        trainer.train()
    figures = short_figures(
        ends=[end - start for end in clock.ends],
        losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        warmup=a.warmup,
        samples=a.batch * ACCUMULATION,
        # A letter is a token; the end token follows.
        mean_length=statistics.mean(len(text) + 1 for text in texts),
    )
    return configuration(a) | loading | memory_figures() | figures
