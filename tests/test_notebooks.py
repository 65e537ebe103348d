"""The usual notebooks run cell by cell, with only their imports changed."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import make_tiny_model
from training_runs import RECORDS

from minitune import FastLanguageModel

NOTEBOOKS = Path(__file__).parent / "notebooks"
SHAREGPT_ROLES = {"user": "human", "assistant": "gpt"}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Change to an empty folder with a base model and data, as a notebook finds them."""
    monkeypatch.chdir(tmp_path)
    make_tiny_model(tmp_path / "models" / "base")
    write_records("train.jsonl", RECORDS[:16])
    write_records("held_out.jsonl", RECORDS[16:])
    write_records("conversations.jsonl", map(as_sharegpt, RECORDS))
    return tmp_path


def write_records(name: str, records) -> None:
    """Write records as JSONL into the working directory."""
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))


def as_sharegpt(record: dict) -> dict:
    """Return a record of messages in the form of ShareGPT."""
    turns = [
        {"from": SHAREGPT_ROLES[message["role"]], "value": message["content"]}
        for message in record["messages"]
    ]
    return {"conversations": turns}


def run_notebook(name: str) -> dict:
    """Run a notebook's cells one after the other and return its variables."""
    text = (NOTEBOOKS / f"{name}.py").read_text(encoding="utf-8")
    variables = {"__name__": "__main__"}
    for number, cell in enumerate(re.split(r"^# %%.*$", text, flags=re.MULTILINE)):
        exec(compile(cell, f"{name}, cell {number}", "exec"), variables)
    return variables


def test_the_notebook_of_conversations_trains_on_the_answers_and_writes_every_file(workplace):
    cells = run_notebook("conversations")
    sample = RECORDS[3]["messages"]
    assert cells["trained"].strip() == sample[1]["content"] + "<|im_end|>"
    assert cells["trainer_stats"].global_step == 4
    assert cells["answers"][0].startswith("<|im_start|>user\n3 lamps to Oslo<|im_end|>")
    assert cells["reloaded"][0].startswith("<|im_start|>user\n3 lamps to Oslo<|im_end|>")
    trained = load_file(workplace / "outputs/adapter/adapter_model.safetensors")
    for folder in ("lora_model", "model_lora"):
        saved = load_file(workplace / folder / "adapter_model.safetensors")
        assert all(saved[key].equal(trained[key]) for key in trained | saved)
    assert (workplace / "model_16bit" / "model.safetensors").is_file()
    assert len(list((workplace / "model_gguf").glob("*.gguf"))) == 2


def test_the_notebook_of_instructions_trains_on_whole_texts_with_one_end_token(workplace):
    cells = run_notebook("instructions")
    assert cells["trainer_stats"].global_step == 3
    sample = cells["trainer"].train_dataset[0]
    assert list(sample["labels"]) == list(sample["input_ids"])
    end = cells["tokenizer"].eos_token_id
    assert list(sample["input_ids"]).count(end) == 1
    assert sample["input_ids"][-1] == end
    assert cells["answers"][0].startswith("Here is a task")


def test_the_notebook_of_an_evaluated_run_ends_with_its_best_checkpoint(workplace):
    cells = run_notebook("evaluation")
    trainer = cells["trainer"]
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    during = [entry["eval_loss"] for entry in history if entry["step"] > 0]
    assert trainer.state.best_metric == min(during)
    assert cells["after"]["eval_loss"] == pytest.approx(min(during), abs=1e-6)
    assert cells["before"]["eval_loss"] > min(during)
    assert cells["watcher"].seen
    best = load_file(workplace / "best" / "adapter_model.safetensors")
    kept = Path(trainer.state.best_model_checkpoint)
    stored = load_file(kept / "adapter_model.safetensors")
    assert all(best[key].equal(stored[key]) for key in best | stored)


def test_the_notebook_of_inference_answers_the_same_alone_and_in_a_padded_batch(workplace):
    for name, seed in (("adapter", 1), ("other_adapter", 2)):
        model, _ = FastLanguageModel.from_pretrained("models/base", max_seq_length=256)
        model = FastLanguageModel.get_peft_model(model, r=4 * seed, random_state=seed)
        for parameter_name, p in model.trainable_parameters():
            if "lora_B" in parameter_name:
                p.data.normal_(std=0.05)
        model.save_pretrained(name)
    cells = run_notebook("inference")
    assert cells["answers"] == cells["alone"]
    assert cells["streamed"] == cells["tokenizer"].decode(
        cells["_"][0][cells["ids"].shape[1] :], skip_special_tokens=True
    )
    assert cells["model"].lora.r == 8
    assert (workplace / "merged" / "model.safetensors").is_file()
    assert list((workplace / "gguf").glob("*.gguf"))
