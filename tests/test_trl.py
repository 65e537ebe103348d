"""Loss and gradient norm of every step beside TRL's SFTTrainer, on the same records and order.

Both train the same adapter on the same random model in float32. TRL gets a chat template whose
`{% generation %}` blocks enclose exactly the spans that minitune finds: the answer and its stop
token. minitune gets the same template without the blocks, so it has to find the spans.
"""

import json
from pathlib import Path

import pytest
import torch
from tiny import make_tiny_model

from minitune import FastLanguageModel, SFTConfig, SFTTrainer
from minitune.training.run_data import epoch_order

datasets, peft, transformers, trl = map(
    pytest.importorskip, ("datasets", "peft", "transformers", "trl")
)

pytestmark = pytest.mark.filterwarnings("ignore")

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CITIES = ("Lisbon", "Köln", "Paris", "東京")
SETTINGS = {
    "max_steps": 7,  # an epoch of 40 samples in steps of 6: the last step has four
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "linear",
    "logging_steps": 1,
    "save_strategy": "no",
    "max_length": 110,  # cuts the longest samples
    "weight_decay": 0.01,
    "max_grad_norm": 0.5,
}
SEED = 42


def conversations() -> list[dict]:
    """Return records of one to three turns, with a system text and white space around answers."""
    records = []
    for i in range(40):
        messages = [{"role": "system", "content": "Answer briefly."}] if i % 3 == 0 else []
        for turn in range(1 + i % 3):
            question = f"{i} lamps to {CITIES[(i + turn) % 4]}?"
            answer = " ".join(["blue lamp"] * (i % 4)) + f" {i * turn}\n"
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        records.append({"messages": messages})
    return records


def completions() -> list[dict]:
    """Return records of two texts."""
    return [
        {"prompt": f"{i} lamps to {CITIES[i % 4]}:", "completion": " blue" * (i % 5) + f" {i}."}
        for i in range(40)
    ]


def in_order_of_training(records: list[dict]) -> list[dict]:
    """Return the records in the order in which minitune's first epoch visits them."""
    return [records[i] for i in epoch_order(SEED, 0, len(records))]


def minitune_metrics(folder: Path, records: list[dict], output: Path) -> tuple[list, Path]:
    """Train, and return (loss, gradient norm) of each step and the folder of the first adapter."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        folder, max_seq_length=128, dtype=torch.float32, load_in_4bit=False, device="cpu"
    )
    model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8)
    for name, parameter in model.trainable_parameters():
        if "lora_B" in name:  # a B of zeros would leave A without a gradient in the first step
            generator = torch.Generator().manual_seed(len(name))
            parameter.data.normal_(std=0.05, generator=generator)
    start = output / "start"
    model.save_pretrained(start)
    args = SFTConfig(output_dir=str(output / "run"), seed=SEED, **SETTINGS)
    SFTTrainer(model, args, records, processing_class=tokenizer).train()
    lines = (output / "run" / "metrics.jsonl").read_text().splitlines()
    return [(row["loss"], row["grad_norm"]) for row in map(json.loads, lines)], start


def trl_metrics(folder: Path, adapter: Path, records: list[dict], output: Path, **options) -> list:
    """Train with TRL from the same adapter, and return (loss, gradient norm) of each step."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = MARKED
    args = trl.SFTConfig(
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        dataset_num_proc=None,
        gradient_checkpointing=False,
        **SETTINGS,
        **options,
    )
    trainer = trl.SFTTrainer(
        model, args, train_dataset=datasets.Dataset.from_list(records), processing_class=tokenizer
    )
    trainer.train()
    return [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    ("make_records", "option"),
    [(conversations, "assistant_only_loss"), (completions, "completion_only_loss")],
    ids=["messages", "prompt and completion"],
)
def test_every_step_has_the_loss_and_gradient_of_trl(tmp_path, make_records, option):
    folder = make_tiny_model(tmp_path / "model", hidden=32, layers=1, heads=2, kv_heads=1, ffn=64)
    (folder / "chat_template.jinja").write_text(PLAIN)
    records = make_records()
    ours, adapter = minitune_metrics(folder, records, tmp_path)
    records = in_order_of_training(records)
    theirs = trl_metrics(folder, adapter, records, tmp_path / "trl", **{option: True})
    assert len(ours) == SETTINGS["max_steps"]
    for (loss, norm), (trl_loss, trl_norm) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(trl_loss, rel=1e-5)
        assert norm == pytest.approx(trl_norm, rel=1e-4)
