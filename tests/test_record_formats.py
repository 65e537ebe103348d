"""Each shape of a record becomes the right text and trains on the right part of it."""

import functools

import pytest
import torch
from labelled_records import ANSWER, PAIR, TURNS, sample_of, text_of, trained
from tokenizer_files import CHATML, TAGGED, write_chat_tokenizer

from minitune.data.samples import Sample
from minitune.data.tokenization.tokenizer import Tokenizer

SHAREGPT = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Four é."}]


@pytest.fixture
def make(tmp_path):
    """Return a function that makes the tokenizer of a chat template."""

    def tokenizer(template=CHATML):
        return Tokenizer.from_folder(write_chat_tokenizer(tmp_path, template))

    return tokenizer


@pytest.mark.parametrize(
    "record",
    [
        {"messages": PAIR},
        {"conversations": SHAREGPT},
        {"conversations": PAIR},
        {"instruction": "How many?", "input": "", "output": "Four é."},
        {"prompt": PAIR[:1], "completion": PAIR[1:]},
    ],
)
@pytest.mark.parametrize("template", [CHATML, TAGGED])
def test_every_conversational_shape_trains_on_the_answer_and_its_stop_token(make, record, template):
    tokenizer = make(template)
    sample = sample_of(record, tokenizer)
    question = "<|bos|><|start|>user\nHow many?<|end|>\n"
    assert text_of(sample, tokenizer) == f"{question}<|start|>assistant\n{ANSWER}\n"
    assert trained(sample, tokenizer) == [ANSWER]


def test_alpacas_input_follows_the_instruction_and_headings_replace_a_missing_template(make):
    record = {"instruction": "Add.", "input": "2 2", "output": "4"}
    tokenizer = make()
    text = text_of(sample_of(record, tokenizer), tokenizer)
    assert "<|start|>user\nAdd.\n\n2 2<|end|>" in text
    tokenizer = make(template=None)
    sample = sample_of(record, tokenizer)
    prompt = "### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:\n"
    assert text_of(sample, tokenizer) == f"<|bos|>{prompt}4<|end|>"
    assert trained(sample, tokenizer) == ["4<|end|>"]


def test_prompt_and_completion_get_one_bos_and_one_eos_and_train_on_the_completion(make):
    tokenizer = make()
    for completion in (" Four", " Four<|end|>"):
        sample = sample_of({"prompt": "How many?", "completion": completion}, tokenizer)
        assert text_of(sample, tokenizer) == "<|bos|>How many? Four<|end|>"
        assert trained(sample, tokenizer) == [" Four<|end|>"]


def test_a_token_across_the_border_belongs_to_the_completion(make):
    tokenizer = make()
    assert len(tokenizer.encode("How many", add_special_tokens=False)) == 2
    sample = sample_of({"prompt": "How ma", "completion": "ny"}, tokenizer)
    assert trained(sample, tokenizer) == [" many<|end|>"]


def test_plain_text_trains_on_everything_with_one_bos_and_one_eos(make):
    tokenizer = make()
    for text in ("How many?", "<|bos|>How many?", "How many?<|end|>"):
        sample = sample_of({"text": text, "id": 3}, tokenizer)
        assert text_of(sample, tokenizer) == "<|bos|>How many?<|end|>"
        assert sample.labels == sample.input_ids
    sample = sample_of({"body": "Four"}, tokenizer, dataset_text_field="body")
    assert trained(sample, tokenizer) == ["<|bos|>Four<|end|>"]


def test_a_conversation_that_was_rendered_to_text_before_gets_no_second_bos(make):
    tokenizer = make()
    text = tokenizer.apply_chat_template(PAIR, tokenize=False)
    ids = sample_of({"text": text}, tokenizer).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1


def test_tokens_are_taken_unchanged(make):
    tokenizer = make()
    record = {"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}
    assert sample_of(record, tokenizer) == Sample([5, 6, 7], [-100, 6, -100])
    assert sample_of({"input_ids": torch.tensor([5, 6])}, tokenizer) == Sample([5, 6], [5, 6])


def test_masks_beside_tokens_choose_the_labels_unless_switched_off(make):
    sample = functools.partial(sample_of, tokenizer=make())
    both = {
        "input_ids": [5, 6, 7, 8],
        "completion_mask": [0, 1, 1, 1],
        "assistant_masks": [1, 1, 0, 1],
    }
    cases = [
        ({}, [-100, 6, -100, 8]),
        ({"completion_only_loss": True, "assistant_only_loss": True}, [-100, 6, -100, 8]),
        ({"completion_only_loss": False}, [5, 6, -100, 8]),
        ({"assistant_only_loss": False}, [-100, 6, 7, 8]),
    ]
    for options, labels in cases:
        assert sample(both, **options) == Sample([5, 6, 7, 8], labels), options
    labelled = {"labels": [5, 6, 7, -100], "attention_mask": torch.ones(4, dtype=torch.int64)}
    assert sample({**both, **labelled}) == Sample([5, 6, 7, 8], [-100, 6, -100, -100])
    unmasked = {"input_ids": [5, 6], "labels": [-100, 6], "completion_mask": None}
    assert sample(unmasked, completion_only_loss=True) == Sample([5, 6], [-100, 6])


def test_content_in_text_parts_equals_their_joined_text(make):
    tokenizer = make()
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}]
    question = {"role": "user", "content": parts}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Four é."}]}
    expected = sample_of({"messages": PAIR}, tokenizer)
    assert sample_of({"messages": [question, PAIR[1]]}, tokenizer) == expected
    assert sample_of({"prompt": [question], "completion": [answer]}, tokenizer) == expected
    assert tokenizer.apply_chat_template([PAIR[0], answer]) == tokenizer.apply_chat_template(PAIR)


def test_tools_reach_the_template_as_a_list_or_as_json(make):
    tokenizer = make("{% for tool in tools %}{{ tool['name'] }} {% endfor %}" + CHATML)
    for tools in ([{"name": "add"}], '[{"name": "add"}]'):
        text = text_of(sample_of({"messages": PAIR, "tools": tools}, tokenizer), tokenizer)
        assert text.startswith("add <|bos|><|start|>user")


def test_the_two_loss_options_mean_the_same_as_in_trl(make):
    tokenizer = make()

    def trained_text(record, **options):
        return trained(sample_of(record, tokenizer, **options), tokenizer)

    whole = [tokenizer.apply_chat_template(TURNS, tokenize=False)]
    later = "\n<|start|>user\nAnd now?<|end|>\n<|start|>assistant\n"
    messages = {"messages": TURNS}
    assert trained_text(messages) == [ANSWER, ANSWER]
    assert trained_text(messages, assistant_only_loss=False) == whole

    chat = {"prompt": TURNS[:2], "completion": TURNS[2:]}
    assert trained_text(chat) == [ANSWER + later + ANSWER]
    assert trained_text(chat, completion_only_loss=False) == whole
    assert trained_text(chat, assistant_only_loss=True) == [ANSWER, ANSWER]
    both = {"assistant_only_loss": True, "completion_only_loss": False}
    assert trained_text(chat, **both) == [ANSWER, ANSWER]
    answered_before = {"prompt": TURNS[:4], "completion": TURNS[4:]}
    assert trained_text(answered_before, assistant_only_loss=True) == [ANSWER]

    plain = {"prompt": "How", "completion": " Four"}
    assert trained_text(plain, completion_only_loss=False) == ["<|bos|>How Four<|end|>"]
