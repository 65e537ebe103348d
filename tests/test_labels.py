"""The labels of a sample come from the record's structure; transformers is the referee."""

import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled_records import PAIR, TURNS, sample_of, text_of, trained
from tokenizer_files import CHATML, FOOT, HEAD, TAGGED, write_chat_tokenizer

from minitune.data.templates.answer_spans import _prompt_end
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.data.tokenize_dataset import tokenize_dataset

FORGETFUL = (
    HEAD + "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}<|end|>\n" + FOOT
)


@pytest.fixture
def make(tmp_path):
    """Return a function that makes the tokenizer of a chat template."""

    def tokenizer(template=CHATML):
        return Tokenizer.from_folder(write_chat_tokenizer(tmp_path, template))

    return tokenizer


def test_a_stop_token_that_equals_the_pad_token_is_trained_on(make):
    tokenizer = make()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    labels = sample_of({"messages": PAIR}, tokenizer).labels
    assert labels.count(tokenizer.eos_token_id) == 1


def test_an_answer_repeated_in_the_question_is_not_trained_on_there(make):
    tokenizer = make()
    echo = [
        {"role": "user", "content": "<|start|>assistant\nFour"},
        {"role": "assistant", "content": "Four"},
    ]
    sample = sample_of({"messages": echo}, tokenizer)
    assert trained(sample, tokenizer) == ["Four<|end|>"]
    assert sample.labels[-6:] != [-100] * 6


def test_labels_equal_transformers_assistant_mask_if_the_template_marks_answers(make, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = make(TAGGED)
    referee = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<|bos|>", eos_token="<|end|>"
    )
    referee.chat_template = TAGGED
    spaced = [
        {"role": "user", "content": "  "},
        {"role": "assistant", "content": "\n Four  \u2028é\U0001f600"},
    ]
    for messages in (PAIR, TURNS, TURNS + spaced):
        expected = referee.apply_chat_template(
            messages, return_assistant_tokens_mask=True, return_dict=True
        )
        sample = sample_of({"messages": messages}, tokenizer)
        assert sample.input_ids == expected["input_ids"]
        assert [int(label != -100) for label in sample.labels] == expected["assistant_masks"]


CONTENT = st.text(
    st.characters(exclude_characters="\ufdd0\ufdd1", exclude_categories=["Cs"]), max_size=8
)


@settings(max_examples=60)
@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))
def test_rendering_prefixes_finds_the_same_spans_as_generation_tags(tmp_path_factory, turns):
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    folder = tmp_path_factory.getbasetemp() / "prefixes"
    samples = []
    for template in (CHATML, TAGGED):
        tokenizer = Tokenizer.from_folder(write_chat_tokenizer(folder, template))
        samples.append(sample_of({"messages": messages}, tokenizer))
    assert samples[0] == samples[1]


def test_a_template_that_forgets_earlier_turns_is_refused_by_the_name_of_what_it_forgets(
    make, tmp_path
):
    tokenizer = make(FORGETFUL)
    path = tmp_path / "turns.jsonl"
    path.write_text("\n" + json.dumps({"messages": TURNS}), encoding="utf-8")
    message = (
        r"turns.jsonl:2: the chat template leaves out the content of message 1 \(system\), "
        r"the content of message 3 \(assistant\); .* dropped_text=\"warn\""
    )
    with pytest.raises(ValueError, match=message):
        tokenize_dataset(path, tokenizer, 500)


def test_an_empty_answer_inside_a_token_trains_on_nothing(make):
    tokenizer = make(
        "{{ messages[0].content }} ma{% generation %}{{ messages[1].content }}{% endgeneration %}ny"
    )
    record = {"messages": [PAIR[0], {"role": "assistant", "content": ""}]}
    with pytest.raises(ValueError, match="none of its 1 samples has a token to train on"):
        tokenize_dataset([record], tokenizer, 100)


def test_every_byte_of_a_character_unknown_to_sentencepiece_is_trained_on(tmp_path):
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["how many four five six seven"] * 5),
            model_writer=file,
            vocab_size=290,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + m.content }}:"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    record = {"messages": [PAIR[0], {"role": "assistant", "content": "é four"}]}
    sample = sample_of(record, tokenizer)
    assert text_of(sample, tokenizer) == "<s> How many?:é four</s>"
    assert trained(sample, tokenizer) == ["é four</s>"]


def test_truncation_keeps_the_beginning_and_samples_without_a_label_are_counted(make):
    tokenizer = make()
    records = [{"text": "How many?" * 20}, {"messages": PAIR}, {"text": "Four"}, {"input_ids": []}]
    dataset = tokenize_dataset(records, tokenizer, 10)
    sizes = [len(sample.input_ids) for sample in dataset.samples]
    assert sizes == [10, len(tokenizer.encode("Four<|end|>"))]
    assert dataset.samples[0].input_ids.tolist() == tokenizer.encode("How many?" * 20)[:10]
    assert (dataset.skipped, dataset.truncated) == (2, 2)


def test_a_label_on_the_first_token_alone_does_not_count(make):
    record = {"input_ids": [5, 6], "labels": [5, -100]}
    with pytest.raises(ValueError, match="none of its 1 samples has a token to train on"):
        tokenize_dataset([record], make(), 10)


def test_progress_counts_the_records_in_order(make):
    calls, tokenizer = [], make()
    records = [{"text": str(i)} for i in range(2500)]
    dataset = tokenize_dataset(records, tokenizer, 9, progress=lambda *at: calls.append(at))
    assert calls == [(1000, 2500), (2000, 2500), (2500, 2500)]
    digits = [tokenizer.decode(s.input_ids, skip_special_tokens=True) for s in dataset.samples]
    assert digits == [str(i) for i in range(2500)]


@pytest.mark.parametrize("beginning", ["", "B", "<|end|>", "<|end|>\n\n"])
def test_the_generation_prompt_is_found_behind_another_beginning(beginning):
    prompt, shown = "A<|assistant|>\n", f"{beginning}<|assistant|>\n"
    assert _prompt_end(prompt, shown + "42") == len(shown)
