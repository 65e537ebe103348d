"""train_on_responses_only: marks in plain texts, and their check on conversations."""

import random

import pytest
from training_runs import (
    RECORDS,
    adapter_bytes,
    make_smallest_model,
    new_trainer,
    train_with_ctrl_c,
)

from minitune import train_on_responses_only
from minitune.data.response_marks import response_spans

USER, ASSISTANT = "<|im_start|>user\n", "<|im_start|>assistant\n"
MARKS = {"instruction_part": USER, "response_part": ASSISTANT}


@pytest.fixture(scope="module")
def smallest(tmp_path_factory):
    return make_smallest_model(tmp_path_factory.mktemp("smallest"))


def chatml_texts(seed=0, count=12):
    """Return conversations in ChatML: some begin with a system turn, some end with a question."""
    draw, texts = random.Random(seed), []
    for i in range(count):
        text = "<|im_start|>system\nBe brief.<|im_end|>\n" if i % 3 == 0 else ""
        for turn in range(1 + i % 3):
            text += f"{USER}{draw.randint(1, 99)} lamps?<|im_end|>\n"
            text += f"{ASSISTANT}blue {draw.choice(['Köln', 'Oslo', '東京'])} {turn}<|im_end|>\n"
        texts.append(text + (f"{USER}more?<|im_end|>\n" if i % 4 == 3 else ""))
    return texts


def labels_by_tokens(ids, instruction, response):
    """Return labels by Unsloth's definition, on tokens: after a response, up to an instruction."""
    labels, position, trained = [-100] * len(ids), 0, False
    while position < len(ids):
        if not trained and ids[position : position + len(response)] == response:
            position, trained = position + len(response), True
        elif trained and ids[position : position + len(instruction)] == instruction:
            position, trained = position + len(instruction), False
        else:
            if trained:
                labels[position] = ids[position]
            position += 1
    return labels


def test_labels_of_plain_texts_are_those_of_a_search_among_the_tokens(smallest, tmp_path):
    records = [{"text": text} for text in chatml_texts()]
    trainer = new_trainer(smallest, tmp_path, records[:5], records)
    whole = trainer.train_dataset
    assert whole["labels"] == whole["input_ids"]
    assert train_on_responses_only(trainer, **MARKS) is trainer
    encode = trainer.tokenizer.encode
    marks = [encode(mark, add_special_tokens=False) for mark in (USER, ASSISTANT)]
    for view in (trainer.train_dataset, trainer.eval_dataset):
        for row in view:
            assert row["labels"] == labels_by_tokens(row["input_ids"], *marks)
    assert trainer.train_dataset["input_ids"] == whole["input_ids"]
    stop = trainer.tokenizer.eos_token_ids[0]
    assert all(stop in row["labels"] for row in trainer.train_dataset)


def test_answers_reach_from_a_response_mark_to_the_next_instruction_mark():
    text = "Q:a A:b A:c Q:d Q:e A:f"
    spans = response_spans(text, "Q:", "A:")
    assert [text[begin:end] for begin, end in spans] == ["b A:c ", "f"]
    assert response_spans("Q:a", "Q:", "A:") == [] and response_spans("A:", "Q:", "A:") == [(2, 2)]


def test_headings_of_texts_without_special_tokens_are_marks_too(smallest, tmp_path):
    records = [{"text": f"### Q:\n{i} lamps?\n### A:\nblue {i}"} for i in range(5)]
    trainer = new_trainer(smallest, tmp_path, records=records)
    train_on_responses_only(trainer, "### Q:\n", "### A:\n")
    for i, row in enumerate(trainer.train_dataset):
        labels = [label for label in row["labels"] if label != -100]
        assert trainer.tokenizer.decode(labels, skip_special_tokens=False) == f"blue {i}<|im_end|>"


def test_conversations_keep_the_labels_of_their_structure(smallest, tmp_path):
    trainer = new_trainer(smallest, tmp_path, assistant_only_loss=False)
    structural = new_trainer(smallest, tmp_path)
    assert trainer.train_dataset["labels"] != structural.train_dataset["labels"]
    train_on_responses_only(trainer, **MARKS, num_proc=2)
    assert trainer.train_dataset["labels"] == structural.train_dataset["labels"]


def test_samples_without_an_answer_are_counted_as_skipped(smallest, tmp_path):
    records = [{"text": text} for text in [*chatml_texts(count=4), f"{USER}one?<|im_end|>\n"]]
    trainer = new_trainer(smallest, tmp_path, records=records)
    train_on_responses_only(trainer, **MARKS)
    assert len(trainer.train_dataset) == 4 and trainer.data.train.skipped == 1
    (note,) = trainer.data.train.report.notes
    assert note == "response_part does not occur in a text"


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        (
            (USER, "<|assistant|>\n"),
            r"response_part '<\|assistant\|>\\n' occurs in none of .*lamps",
        ),
        (("[INST]", ASSISTANT), r"instruction_part '\[INST\]' occurs in none of the first 24"),
        ((USER, ""), "response_part is empty"),
    ],
)
def test_a_mark_that_does_not_occur_is_refused_with_the_text(smallest, tmp_path, marks, message):
    trainer = new_trainer(smallest, tmp_path)
    before = trainer.train_dataset["labels"]
    with pytest.raises(ValueError, match=message):
        train_on_responses_only(trainer, *marks)
    assert trainer.train_dataset["labels"] == before


def test_data_that_cannot_be_read_again_or_holds_tokens_is_refused(smallest, tmp_path):
    records = [{"text": text} for text in chatml_texts()]
    trainer = new_trainer(smallest, tmp_path, records=iter(records))
    with pytest.raises(ValueError, match="an iterator, which is read once; pass a list"):
        train_on_responses_only(trainer, **MARKS)
    tokens = [{"input_ids": row} for row in trainer.train_dataset["input_ids"]]
    with pytest.raises(ValueError, match="the record holds tokens; give labels"):
        train_on_responses_only(new_trainer(smallest, tmp_path, records=tokens), **MARKS)


def test_a_run_with_marks_continues_with_the_same_bits_and_not_without_them(smallest, tmp_path):
    records = [{"text": text} for text in chatml_texts()]
    settings = {"records": records, "max_steps": 5, "save_strategy": "steps", "save_steps": 1}
    for name in ("whole", "interrupted"):
        trainer = new_trainer(smallest, tmp_path / name, **settings)
        train_on_responses_only(trainer, **MARKS)
        if name == "whole":
            trainer.train()
        else:
            train_with_ctrl_c(trainer, 2)
    without = new_trainer(smallest, tmp_path / "interrupted", resume=True, **settings)
    with pytest.raises(ValueError, match=r"the data changed"):
        without.train()
    resumed = new_trainer(smallest, tmp_path / "interrupted", resume=True, **settings)
    train_on_responses_only(resumed, **MARKS).train()
    assert adapter_bytes(tmp_path / "interrupted") == adapter_bytes(tmp_path / "whole")


def test_marks_as_settings_label_as_the_function_does(smallest, tmp_path):
    records = [{"text": text} for text in chatml_texts()]
    trainer = new_trainer(smallest, tmp_path, records=records)
    train_on_responses_only(trainer, **MARKS)
    by_settings = new_trainer(smallest, tmp_path, records=records, **MARKS)
    assert by_settings.train_dataset["labels"] == trainer.train_dataset["labels"]
    assert len(RECORDS) == len(new_trainer(smallest, tmp_path, **MARKS).train_dataset)
    for settings in ({"response_part": "A:"}, {**MARKS, "assistant_only_loss": False}):
        with pytest.raises(ValueError, match=r"give both|leave one of them out"):
            new_trainer(smallest, tmp_path, **settings)
