"""Records of runs that never ran: their curves look like those of a real one."""

import math
import random

from minitune.report.run_record import RunRecord
from minitune.training.run_facts import DataRecord

PROMPTS = ("The phone broke after a day.", "Do you ship to Spain?")
BARS = [(21, 31, 4), (32, 47, 30), (48, 63, 101)]


def training_records(steps, rate=2e-4, seed=0, noise=0.09):
    """Return a record for each step: a loss that falls, and a rate that falls to 0."""
    draw = random.Random(seed)
    return [
        {
            "step": step,
            "epoch": 3 * step / steps,
            "loss": 0.6 + 2.2 * math.exp(-12 * step / steps) + draw.gauss(0, noise),
            "learning_rate": rate * (1 - step / steps),
            "grad_norm": 0.4 + math.exp(-5 * step / steps) + draw.random() / 4,
            "tokens": 1830 * step,
            "tokens_per_second": 15_600 + draw.gauss(0, 300),
            "seconds": 0.118 * step,
            "peak_memory_bytes": int(2**30 * (13.1 + min(1.7, 5 * step / steps))),
        }
        for step in range(1, steps + 1)
    ]


def example_run(name="runs/letters", steps=40, rate=2e-4, seed=0, prompts=PROMPTS, **changes):
    """Return a finished run.

    changes: fields of RunRecord that replace those made here.
    """
    every = max(1, steps // 4)
    evaluated = range(0, steps + 1, every)
    fields = {
        "steps_done": steps,
        "total_steps": steps,
        "is_finished": True,
        "seconds": 0.118 * steps,
        "training": training_records(steps, rate, seed),
        "evaluations": [
            {"step": step, "eval_loss": 0.7 + 2 * math.exp(-9 * step / steps)} for step in evaluated
        ],
        "samples": [
            {
                "step": step,
                "samples": [{"prompt": p, "answer": f"{step} to {p}"} for p in prompts],
            }
            for step in evaluated
        ],
        "settings": {"model": "models/base", "learning_rate": rate, "r": 16, "output_dir": name},
        "facts": [("model", "base: 8,030.3 M parameters"), ("versions", "torch 2.11.0")],
        "plan": [("weights", "5.31 GiB"), ("peak", "14.90 GiB")],
        "data": [DataRecord("data", [("records", "135")], BARS, ["2 answers are empty"])],
    }
    return RunRecord(name=name, **(fields | changes))
