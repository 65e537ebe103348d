"""Answers to sample_prompts: when they are given, and that they change nothing."""

import pytest
import torch
from tiny import make_tiny_model
from training_runs import (
    RECORDS,
    SMALLEST,
    adapter_bytes,
    edit_json,
    new_trainer,
    read_metrics,
    train_with_ctrl_c,
    without_times,
)

from minitune.config.cli import parse
from minitune.training import sample_answers

PROMPTS = ("3 lamps to Oslo", "one, two\nthree\x1b[2J")
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 5, "save_steps": 2}


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """Let answers end after a few tokens."""
    monkeypatch.setattr(sample_answers, "ANSWER_TOKENS", 12)


def sampled_steps(output):
    return [record["step"] for record in read_metrics(output) if "samples" in record]


def without_samples(output):
    return [record for record in without_times(read_metrics(output)) if "samples" not in record]


def test_answers_come_before_between_and_after_the_steps_and_change_no_bit(
    smallest, tmp_path, capsys
):
    plain, sampled = tmp_path / "plain", tmp_path / "sampled"
    new_trainer(smallest, plain, RECORDS[:5], **EVALUATED).train()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    trainer = new_trainer(smallest, sampled, RECORDS[:5], **EVALUATED, sample_prompts=PROMPTS)
    trainer.train()
    assert torch.equal(torch.get_rng_state(), state)
    assert adapter_bytes(sampled) == adapter_bytes(plain)
    assert without_samples(sampled) == without_samples(plain)
    assert sampled_steps(sampled) == [0, 2, 4, 5]
    last = read_metrics(sampled)[-1]["samples"]
    assert [sample["prompt"] for sample in last] == list(PROMPTS)
    model, tokenizer = trainer.model, trainer.processing_class
    for prompt, sample in zip(PROMPTS, last, strict=True):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True
        )
        answer = model.generate([ids], max_new_tokens=sample_answers.ANSWER_TOKENS, do_sample=False)
        assert sample["answer"] == tokenizer.decode(answer[0], skip_special_tokens=True).strip()
    shown = capsys.readouterr().err
    assert "\x1b" not in shown and "one, two⏎three<U+001B>[2J" in shown


def test_a_resumed_run_answers_at_no_step_twice(smallest, tmp_path):
    settings = {"max_steps": 4, "sample_prompts": PROMPTS, "logging_steps": 1}
    train_with_ctrl_c(new_trainer(smallest, tmp_path, **settings), step=1)
    new_trainer(smallest, tmp_path, **settings, resume=True).train()
    assert sampled_steps(tmp_path) == [0, 4]
    new_trainer(smallest, tmp_path, **settings, resume=True).train()  # it is finished
    assert sampled_steps(tmp_path) == [0, 4]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_lack_of_memory_costs_the_answers_and_not_the_run(
    smallest, tmp_path, monkeypatch, capsys, error
):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(sample_answers, "greedy_answers", refuse)
    trainer = new_trainer(smallest, tmp_path, max_steps=2, sample_prompts=PROMPTS)
    assert trainer.train().global_step == 2
    assert capsys.readouterr().err.count("no answers to sample_prompts at step") == 2


@pytest.mark.parametrize(("text", "count"), [("lamp " * 200, "tokens"), ("", "has 0 tokens")])
def test_a_prompt_without_room_for_an_answer_is_refused_before_the_run(tmp_path, text, count):
    folder = make_tiny_model(tmp_path / "model", **SMALLEST)
    edit_json(folder / "tokenizer_config.json", chat_template=None)
    records = [{"text": "blue lamp"}] * 5
    output = tmp_path / "run"
    trainer = new_trainer(folder, output, records=records, max_steps=1, sample_prompts=[text])
    with pytest.raises(ValueError, match=f"sample_prompts: .*{count}.*max_seq_length, which is"):
        trainer.train()
    assert not output.exists()


def test_commas_do_not_split_prompts_of_the_command_line():
    command = ["--model", "m", "--data", "d", "--sample-prompts", "one, two", "three"]
    assert parse(command).sft.sample_prompts == ("one, two", "three")
