"""From records to labelled tokens; transformers is the referee where it does the same."""

import json
import re

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from minitune.data.jsonl import load_dataset
from minitune.data.record_formats import Sample
from minitune.data.tokenize_dataset import tokenize_dataset
from minitune.data.tokenizer import Tokenizer as OurTokenizer

PAIR = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Four é."}]
TURNS = [
    {"role": "system", "content": "Count."},
    *PAIR,
    {"role": "user", "content": "And now?"},
    PAIR[1],
]
HEAD = "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n"
FOOT = "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
CHATML = HEAD + "{{ m['content'] }}<|end|>\n" + FOOT
TAGGED = (
    HEAD
    + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    + "{% else %}{{ m['content'] }}<|end|>{% endif %}{{ '\n' }}"
    + FOOT
)
FORGETFUL = (
    HEAD + "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}<|end|>\n" + FOOT
)


@pytest.fixture(scope="session")
def library():
    """A byte-level tokenizer whose pad token is its EOS token, and which puts a BOS before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(token, special=True, normalized=False)
        for token in ("<|bos|>", "<|end|>", "<|start|>")
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(
        ["How many? Four. And now? user assistant system Count."] * 3, trainer
    )
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]),
        ]
    )
    return tokenizer


@pytest.fixture
def make(tmp_path, library):
    def tokenizer(template=CHATML, eos="<|end|>"):
        library.save(str(tmp_path / "tokenizer.json"))
        config = {
            "bos_token": "<|bos|>",
            "eos_token": eos,
            "pad_token": "<|end|>",
            "chat_template": template,
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return OurTokenizer.from_folder(tmp_path)

    return tokenizer


def trained(sample, tokenizer):
    """The stretches of text that are trained on."""
    stretches, previous = [], False
    for label in sample.labels:
        if label != -100:
            stretches = [*stretches, []] if not previous else stretches
            stretches[-1].append(label)
        previous = label != -100
    return [tokenizer.decode(stretch, skip_special_tokens=False) for stretch in stretches]


def one(record, tokenizer, max_length=500, **options):
    prepared = tokenize_dataset([record], tokenizer, max_length, **options)
    for sample in prepared.samples:
        assert len(sample.labels) == len(sample.input_ids)
        pairs = zip(sample.labels, sample.input_ids, strict=True)
        assert all(label in (-100, token) for label, token in pairs)
    return prepared.samples[0]


def text_of(sample, tokenizer):
    return tokenizer.decode(sample.input_ids, skip_special_tokens=False)


# the shapes

ANSWER = "Four é.<|end|>"
SHAREGPT = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Four é."}]


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
    sample = one(record, tokenizer)
    assert (
        text_of(sample, tokenizer)
        == f"<|bos|><|start|>user\nHow many?<|end|>\n<|start|>assistant\n{ANSWER}\n"
    )
    assert trained(sample, tokenizer) == [ANSWER]


def test_alpaca_s_input_follows_the_instruction_and_without_a_template_the_prompt_is_written_out(
    make,
):
    record = {"instruction": "Add.", "input": "2 2", "output": "4"}
    tokenizer = make()
    assert "<|start|>user\nAdd.\n\n2 2<|end|>" in text_of(one(record, tokenizer), tokenizer)
    tokenizer = make(template=None)
    sample = one(record, tokenizer)
    prompt = "### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:\n"
    assert text_of(sample, tokenizer) == f"<|bos|>{prompt}4<|end|>"
    assert trained(sample, tokenizer) == ["4<|end|>"]


def test_prompt_and_completion_get_one_bos_and_one_eos_and_train_on_the_completion(make):
    tokenizer = make()
    for completion in (" Four", " Four<|end|>"):
        sample = one({"prompt": "How many?", "completion": completion}, tokenizer)
        assert text_of(sample, tokenizer) == "<|bos|>How many? Four<|end|>"
        assert trained(sample, tokenizer) == [" Four<|end|>"]


def test_a_token_across_the_border_belongs_to_the_completion(make):
    tokenizer = make()
    assert len(tokenizer.encode("How many", add_special_tokens=False)) == 2
    sample = one({"prompt": "How ma", "completion": "ny"}, tokenizer)
    assert trained(sample, tokenizer) == [" many<|end|>"]


def test_plain_text_trains_on_everything_with_one_bos_and_one_eos(make):
    tokenizer = make()
    for text in ("How many?", "<|bos|>How many?", "How many?<|end|>"):
        sample = one({"text": text, "id": 3}, tokenizer)
        assert text_of(sample, tokenizer) == "<|bos|>How many?<|end|>"
        assert sample.labels == sample.input_ids
    assert trained(one({"body": "Four"}, tokenizer, dataset_text_field="body"), tokenizer) == [
        "<|bos|>Four<|end|>"
    ]


def test_a_conversation_that_was_rendered_to_text_before_is_not_given_a_second_bos(make):
    tokenizer = make()
    text = tokenizer.apply_chat_template(PAIR, tokenize=False)
    assert one({"text": text}, tokenizer).input_ids.count(tokenizer.bos_token_id) == 1


def test_tokens_are_taken_as_they_are(make):
    tokenizer = make()
    assert one({"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}, tokenizer) == Sample(
        [5, 6, 7], [-100, 6, -100]
    )
    assert one({"input_ids": torch.tensor([5, 6])}, tokenizer) == Sample([5, 6], [5, 6])


def test_masks_beside_tokens_say_what_is_trained_on_unless_switched_off(make):
    tokenizer = make()
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
        assert one(both, tokenizer, **options) == Sample([5, 6, 7, 8], labels), options
    loss_rows = {
        **both,
        "labels": [5, 6, 7, -100],
        "attention_mask": torch.ones(4, dtype=torch.int64),
    }
    assert one(loss_rows, tokenizer) == Sample([5, 6, 7, 8], [-100, 6, -100, -100])
    without = {"input_ids": [5, 6], "labels": [-100, 6], "completion_mask": None}
    assert one(without, tokenizer, completion_only_loss=True) == Sample([5, 6], [-100, 6])


def test_content_in_text_parts_is_their_text(make):
    tokenizer = make()
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}]
    expected = one({"messages": PAIR}, tokenizer)
    assert one({"messages": [{"role": "user", "content": parts}, PAIR[1]]}, tokenizer) == expected
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Four é."}]}
    assert (
        one({"prompt": [{"role": "user", "content": parts}], "completion": [answer]}, tokenizer)
        == expected
    )
    assert tokenizer.apply_chat_template([PAIR[0], answer]) == tokenizer.apply_chat_template(PAIR)


def test_tools_reach_the_template_as_a_list_or_as_json(make):
    tokenizer = make("{% for tool in tools %}{{ tool['name'] }} {% endfor %}" + CHATML)
    for tools in ([{"name": "add"}], '[{"name": "add"}]'):
        text = text_of(one({"messages": PAIR, "tools": tools}, tokenizer), tokenizer)
        assert text.startswith("add <|bos|><|start|>user")


def test_the_two_switches_mean_what_they_mean_in_trl(make):
    tokenizer = make()
    whole = [tokenizer.apply_chat_template(TURNS, tokenize=False)]
    chat = {"prompt": TURNS[:2], "completion": TURNS[2:]}
    assert trained(one({"messages": TURNS}, tokenizer), tokenizer) == [ANSWER, ANSWER]
    assert (
        trained(one({"messages": TURNS}, tokenizer, assistant_only_loss=False), tokenizer) == whole
    )
    later = "\n<|start|>user\nAnd now?<|end|>\n<|start|>assistant\n"
    assert trained(one(chat, tokenizer), tokenizer) == [ANSWER + later + ANSWER]
    assert trained(one(chat, tokenizer, completion_only_loss=False), tokenizer) == whole
    assert trained(one(chat, tokenizer, assistant_only_loss=True), tokenizer) == [ANSWER, ANSWER]
    both = one(chat, tokenizer, assistant_only_loss=True, completion_only_loss=False)
    assert trained(both, tokenizer) == [ANSWER, ANSWER]
    answered_before = {"prompt": TURNS[:4], "completion": TURNS[4:]}
    assert trained(one(answered_before, tokenizer, assistant_only_loss=True), tokenizer) == [ANSWER]
    plain = one({"prompt": "How", "completion": " Four"}, tokenizer, completion_only_loss=False)
    assert trained(plain, tokenizer) == ["<|bos|>How Four<|end|>"]


# the labels


def test_pad_equal_to_eos_leaves_the_stop_token_trained_on(make):
    tokenizer = make()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert one({"messages": PAIR}, tokenizer).labels.count(tokenizer.eos_token_id) == 1


def test_an_answer_repeated_in_the_question_is_not_trained_on_there(make):
    tokenizer = make()
    echo = [
        {"role": "user", "content": "<|start|>assistant\nFour"},
        {"role": "assistant", "content": "Four"},
    ]
    sample = one({"messages": echo}, tokenizer)
    assert trained(sample, tokenizer) == ["Four<|end|>"]
    assert sample.labels[-6:] != [-100] * 6


def test_labels_are_transformers_assistant_mask_where_the_template_marks_answers(
    make, library, tmp_path
):
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
        sample = one({"messages": messages}, tokenizer)
        assert sample.input_ids == expected["input_ids"]
        assert [int(label != -100) for label in sample.labels] == expected["assistant_masks"]


CONTENT = st.text(
    st.characters(exclude_characters="\ufdd0\ufdd1", exclude_categories=["Cs"]), max_size=8
)


@settings(max_examples=60)
@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))
def test_rendering_prefixes_finds_what_generation_tags_mark(library, tmp_path_factory, turns):
    messages = []
    for question, answer in turns:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    folder = tmp_path_factory.getbasetemp() / "prefixes"
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|bos|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    samples = []
    for template in (CHATML, TAGGED):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        samples.append(one({"messages": messages}, OurTokenizer.from_folder(folder)))
    assert samples[0] == samples[1]


def test_a_template_that_rewrites_earlier_turns_is_refused_by_line_and_trains_on_everything_when_told(
    make, tmp_path
):
    tokenizer = make(FORGETFUL)
    path = tmp_path / "turns.jsonl"
    path.write_text("\n" + json.dumps({"messages": TURNS}), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"turns.jsonl:2: the chat template renders .* message 3 differently"
    ):
        tokenize_dataset(path, tokenizer, 500)
    assert len(tokenize_dataset(path, tokenizer, 500, assistant_only_loss=False).samples) == 1


def test_an_empty_answer_inside_a_token_trains_on_nothing(make):
    tokenizer = make(
        "{{ messages[0].content }} ma{% generation %}{{ messages[1].content }}{% endgeneration %}ny"
    )
    with pytest.raises(ValueError, match="none of its 1 samples has a token to train on"):
        tokenize_dataset([{"messages": [PAIR[0], {"role": "assistant", "content": ""}]}], tokenizer, 100)


def test_every_byte_of_a_character_that_sentencepiece_does_not_know_is_trained_on(tmp_path):
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
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + m.content }}:{% else %}{{ m.content }}</s>"
        "{% endif %}{% endfor %}",
        encoding="utf-8",
    )
    tokenizer = OurTokenizer.from_folder(tmp_path)
    sample = one({"messages": [PAIR[0], {"role": "assistant", "content": "é four"}]}, tokenizer)
    assert text_of(sample, tokenizer) == "<s> How many?:é four</s>"
    assert trained(sample, tokenizer) == ["é four</s>"]


def test_truncation_keeps_the_beginning_and_samples_without_a_label_are_counted(make):
    tokenizer = make()
    records = [{"text": "How many?" * 20}, {"messages": PAIR}, {"text": "Four"}, {"input_ids": []}]
    prepared = tokenize_dataset(records, tokenizer, 10)
    assert [len(sample.input_ids) for sample in prepared.samples] == [
        10,
        len(tokenizer.encode("Four<|end|>")),
    ]
    assert prepared.samples[0].input_ids == tokenizer.encode("How many?" * 20)[:10]
    assert (prepared.skipped, prepared.truncated) == (2, 2)


def test_a_label_on_the_first_token_alone_is_no_label(make):
    tokenizer = make()
    with pytest.raises(ValueError, match="none of its 1 samples has a token to train on"):
        tokenize_dataset([{"input_ids": [5, 6], "labels": [5, -100]}], tokenizer, 10)


def test_progress_reaches_the_number_of_records_in_order(make):
    calls, tokenizer = [], make()
    prepared = tokenize_dataset(
        [{"text": str(i)} for i in range(2500)], tokenizer, 9, progress=lambda *at: calls.append(at)
    )
    assert calls == [(1000, 2500), (2000, 2500), (2500, 2500)]
    digits = [tokenizer.decode(sample.input_ids) for sample in prepared.samples]
    assert digits == [str(i) for i in range(2500)]


# wrong input

KNOWN = r'known are .*{"messages": \[...\]}.*{"input_ids": \[...\], "labels": \[...\]}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"not JSON: Expecting ',' delimiter at column 13; known are"),
        ('["text"]', f"holds a list, not an object; {KNOWN}"),
        (
            '{"question": "a", "answer": "b"}',
            f"unknown shape with the fields question, answer; {KNOWN}",
        ),
        ("{}", rf"unknown shape with the fields \(none\); {KNOWN}"),
        ('{"prompt": "a"}', "unknown shape with the fields prompt"),
        ('{"text": 3}', '"text" is a number, expected a text'),
        ('{"text": null}', '"text" is null, expected a text'),
        ('{"messages": "a"}', '"messages" is a text, expected a list of at least one'),
        ('{"messages": []}', '"messages" is a list, expected a list of at least one'),
        ('{"messages": [{"content": "a"}]}', r'"messages"\[0\] is not a message'),
        ('{"messages": [{"role": "user"}]}', r'"messages"\[0\] has no content'),
        (
            '{"messages": [{"role": "user", "content": 3}]}',
            r'the content of "messages"\[0\] is a number',
        ),
        (
            '{"conversations": [{"from": "narrator", "value": "a"}]}',
            "a turn is from 'narrator'; known are human",
        ),
        ('{"conversations": [{"from": "gpt"}]}', r'"conversations"\[0\] has no content'),
        ('{"prompt": "a", "completion": ["b"]}', '"completion" is a list, expected a text'),
        ('{"prompt": ["a"], "completion": "b"}', r'"prompt"\[0\] is not a message'),
        ('{"instruction": "a", "output": {}}', '"output" is a dict, expected a text'),
        ('{"text": "a\\ud800"}', "surrogates not allowed"),
        (
            '{"messages": [{"role": "user", "content": "a"}], "tools": 3}',
            '"tools" is a number, expected a list',
        ),
        ('{"input_ids": [1, 2], "labels": [1]}', "2 input_ids but 1 labels"),
        ('{"input_ids": [1, 2.5]}', '"input_ids" is not a list of whole numbers'),
        ('{"input_ids": [1, 300]}', "input_ids hold 300, but the tokenizer's ids are 0 to 294"),
        ('{"input_ids": [1, 2], "labels": [-1, 2]}', "labels hold -1, but"),
        (
            '{"input_ids": [1, 2], "attention_mask": [1, 0]}',
            '"attention_mask" holds a 0; .* leave padded tokens out',
        ),
        (
            '{"input_ids": [1, 2], "attention_mask": [1]}',
            '"attention_mask" is not a list of 2 zeros and ones',
        ),
        (
            '{"input_ids": [1, 2], "completion_mask": [1, 2]}',
            '"completion_mask" is not a list of 2 zeros and ones',
        ),
        (
            '{"input_ids": [1, 2], "assistant_masks": "10"}',
            '"assistant_masks" is not a list of whole numbers',
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]}',
            "the content of message 1 has a part 'image'; parts are",
        ),
        (
            '{"messages": [{"role": "user", "content": ["a"]}]}',
            "the content of message 1 has a part 'a'; parts are",
        ),
        (f'{{"text": {"[" * 100_000}', "JSON that is nested too deeply to be read; known are"),
        (
            f'{{"text": 1{"0" * 5000}}}',
            r"JSON that cannot be read: Exceeds the limit \(4300 digits\).*; known are",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}], "tools": "["}',
            "not JSON: Expecting value at column 2",
        ),
    ],
)
def test_a_wrong_line_is_named_by_file_and_number(make, tmp_path, line, message):
    path = tmp_path / "orders.jsonl"
    path.write_text(f'\ufeff{{"text": "fine"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:3: .*{message}"):
        tokenize_dataset(path, make(), 100)


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        (
            {"text": "a"},
            {"assistant_only_loss": True},
            "assistant_only_loss=True needs records with conversations",
        ),
        (
            {"text": "a"},
            {"completion_only_loss": True},
            "completion_only_loss=True needs records with prompt and",
        ),
        (
            {"messages": PAIR},
            {"completion_only_loss": True},
            "completion_only_loss=True needs records with prompt and",
        ),
        (
            {"prompt": "a", "completion": "b"},
            {"assistant_only_loss": True},
            "assistant_only_loss=True needs",
        ),
        (
            {"input_ids": [5, 6]},
            {"completion_only_loss": True},
            "needs records with completion_mask or labels",
        ),
        (
            {"input_ids": [5, 6]},
            {"assistant_only_loss": True},
            "needs records with assistant_masks or labels",
        ),
        ({"messages": PAIR[:1]}, {}, r"dataset: none of its 1 samples has a token to train on\.$"),
        (
            {"text": "a"},
            {"dataset_text_field": "body"},
            r"dataset\[0\]: unknown shape with the fields text",
        ),
    ],
)
def test_a_record_that_cannot_be_trained_on_as_asked_is_refused(make, record, options, message):
    with pytest.raises(ValueError, match=message):
        tokenize_dataset([record], make(), 100, **options)


def test_nothing_left_after_cutting_names_the_length_to_raise(make):
    with pytest.raises(
        ValueError, match=r"none of its 1 samples .* 1 of them were cut to max_length 5: raise it"
    ):
        tokenize_dataset([{"messages": PAIR}], make(), 5)
    with pytest.raises(ValueError, match="max_length is 1"):
        tokenize_dataset([{"messages": PAIR}], make(), 1)


def test_a_file_that_is_missing_empty_or_not_utf8_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl: no such file"):
        load_dataset(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: holds no record"):
        load_dataset(str(tmp_path / "empty.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl:2: not UTF-8: .* at byte 10"):
        load_dataset(tmp_path / "latin.jsonl")
    with pytest.raises(ValueError, match="dataset: holds no record"):
        load_dataset([])
    with pytest.raises(ValueError, match=r"dataset\[1\]: holds a text, not an object"):
        load_dataset([{}, "a"])
