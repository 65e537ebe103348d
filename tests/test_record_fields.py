"""A key that no reader takes is harmless, ignored on purpose with a note, or refused by name."""

import math
import re

import numpy as np
import pytest
from labelled_records import PAIR, sample_of, text_of, trained
from record_templates import FORGETS_REASONING, WHOLE
from tokenizer_files import CHATML, write_chat_tokenizer

from minitune.data.records.record_formats import render_record
from minitune.data.samples import EMPTY_ANSWER, LabelOptions
from minitune.data.templates.chat_template import EARLIER_REASONING
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.data.tokenize_dataset import tokenize_dataset

USER, ANSWER = PAIR
CALLS = [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"x": 1}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": CALLS}
ALPACA = {"instruction": "How many?", "input": "", "output": "Four é."}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Return a function that makes the tokenizer of a chat template."""

    def tokenizer(template=WHOLE):
        return Tokenizer.from_folder(write_chat_tokenizer(tmp_path_factory.mktemp("t"), template))

    return tokenizer


def notes_of(record, tokenizer, **options):
    """Return the notes on a record."""
    return render_record(record, tokenizer, LabelOptions(**options)).notes


def messages(*changed):
    """Return a record of messages."""
    return {"messages": list(changed)}


def with_call(**changes):
    """Return a record whose call has other keys."""
    return messages(USER, {**CALL, "tool_calls": [{**CALLS[0], **changes}]})


DEEP: list = []
for _ in range(200):
    DEEP = [DEEP]

REFUSED = [
    # unknown keys, at every depth
    ({"messages": PAIR, "tool": [{}, 1]}, r'nothing reads "tool"; did you mean tools\?'),
    ({"messages": PAIR, "comment": "x"}, r'reads "comment"; .*ignore_fields=\["comment"\]$'),
    ({"mesages": PAIR}, 'did you mean "messages" by "mesages"'),
    ({"text": "a", "conversation": PAIR}, r'"conversation"; did you mean conversations'),
    ({"text": "a", 3: "b"}, 'nothing reads "3"'),
    (
        messages({**USER, "comment": "x"}, ANSWER),
        r'reads "comment" of "messages"\[0\].*ignore_fields=\["messages.comment"\]$',
    ),
    (
        messages(USER, {**ANSWER, "contnt": "x"}),
        r'"contnt" of "messages"\[1\]; did you mean content',
    ),
    (messages(USER, {**ANSWER, "refusal": "no"}), 'reads "refusal" of'),
    (messages(USER, {**ANSWER, "value": "x"}), 'reads "value" of'),
    (messages(USER, {**ANSWER, "tools": [{"name": "x"}]}), r'reads "tools" of "messages"\[1\]'),
    ({"conversations": [{"from": "gpt", "value": "a", "role": "user"}]}, 'reads "role" of'),
    ({"conversations": [{"from": "gpt", "value": "a", "content": "b"}]}, 'reads "content" of'),
    (
        messages({"role": "user", "content": [{"type": "text", "text": "a", "more": "x"}]}, ANSWER),
        r'reads "more" of part 0 of "messages"\[0\]',
    ),
    (with_call(why="x"), r'reads "why" of a tool call of "messages"\[1\]'),
    (
        with_call(function={"name": "add", "arguments": {}, "parameters": {"x": 1}}),
        r'reads "parameters" of the function of a tool call of "messages"\[1\]',
    ),
    ({**ALPACA, "inptu": "x"}, r'reads "inptu"; did you mean input'),
    ({"prompt": "a", "completion": "b", "system": "x"}, 'reads "system"'),
    ({"prompt": "a", "completion": "b", "tools": [{"name": "x"}]}, 'reads "tools"'),
    ({"input_ids": [5, 6], "position_ids": [0, 0]}, '"position_ids" is not positions that count'),
    ({"input_ids": [5, 6], "seq_lengths": [1, 1]}, '"seq_lengths" is not one sequence a record'),
    ({"input_ids": [5, 6], "token_type_ids": [0, 1]}, '"token_type_ids" is not zeros'),
    # records that are not for this training
    ({"prompt": PAIR[:1], "chosen": PAIR[1:], "rejected": PAIR[1:]}, "preference record: keep one"),
    (
        {"messages": PAIR, "chosen": "a", "rejected": "b"},
        '"chosen", "rejected": this is a preference',
    ),
    ({"prompt": "a", "completion": "b", "label": True}, '"label": this is a preference record'),
    ({"messages": PAIR, "images": ["a.png"]}, '"images": only text is trained on'),
    ({"audio": {"path": "a.mp3"}, "text": "a"}, '"audio": only text is trained on'),
    # two shapes, or one fact twice
    ({"text": "a", "messages": PAIR}, 'has "messages" and "text".*dataset_text_field="text"'),
    ({"text": "a", **ALPACA}, 'has "text" and "instruction/output"'),
    ({"conversations": PAIR, "messages": PAIR}, 'has "messages" and "conversations"'),
    ({"input_ids": [5], "text": "a"}, 'has "input_ids" and "text"'),
    (
        {"messages": [{"role": "system", "content": "a"}, *PAIR], "system": "b"},
        '"system" and a system message hold different texts',
    ),
    ({"messages": PAIR, "system": "a", "system_prompt": "b"}, "hold different texts"),
    (
        {"messages": PAIR, "tools": [{"name": "a"}], "functions": [{"name": "a"}]},
        "tools stand under",
    ),
    (messages(USER, {**CALL, "function_call": {"name": "add"}}), "tool_calls and function_call"),
    (
        messages(USER, {**ANSWER, "thinking": "a", "reasoning": "b"}),
        "message 2 holds different texts",
    ),
    # roles
    (
        messages({"role": "narrator", "content": "a"}, ANSWER),
        "'narrator' of .*known are system, user",
    ),
    (
        messages(USER, {"role": "Assistant", "content": "a"}),
        "'Assistant' of .* write \"assistant\"",
    ),
    (messages(USER, {"role": "model", "content": "a"}), "'model' of .* write \"assistant\""),
    ({"conversations": [{"from": ["gpt"], "value": "a"}]}, r"\[0\] is from \['gpt'\]; known are"),
    ({"conversations": [{"from": {"a": 1}, "value": "a"}]}, r"\[0\] is from {'a': 1}; known are"),
    ({"prompt": [USER], "completion": [USER]}, '"completion" holds no message of the role "assist'),
    # labels
    (
        messages(USER, {**ANSWER, "weight": 0.5}),
        r'"weight" of "messages"\[1\] is 0.5; expected 0 or 1',
    ),
    (messages({**USER, "train": True}, ANSWER), 'the loss counts no message of the role "user"'),
    (messages(USER, {**ANSWER, "weight": 0, "train": True}), "contradicts another"),
    (
        {"prompt": [USER, {**ANSWER, "weight": 1}, USER], "completion": [ANSWER]},
        "only the completion",
    ),
    # calls and tools
    (with_call(function={"name": "add", "arguments": "[1]"}), "a list, expected an object"),
    (with_call(function={"name": "add", "arguments": "x = 1"}), "are not JSON: .* at column 1"),
    (with_call(function={"name": "add", "arguments": '{"x": 1, "x": 2}'}), '"x" stands twice'),
    (with_call(function={"name": "add", "arguments": "[" * 5000}), "nested too deeply"),
    (
        with_call(function={"name": "add", "arguments": {"a": DEEP}}),
        "nested deeper than 100 levels",
    ),
    (with_call(function={"arguments": {}}), 'has no "name" of a function'),
    (messages(USER, {**CALL, "tool_calls": ["add"]}), "a tool call of .* is a text"),
    (messages(USER, {**CALL, "tool_calls": {"name": "add"}}), "expected a list"),
    (
        {"conversations": [{"from": "function_call", "value": "add()"}]},
        "a function_call that is not JSON",
    ),
    ({"messages": PAIR, "tools": {"name": "add"}}, '"tools" is an object, expected a list'),
    ({"messages": PAIR, "tools": ["add"]}, "not JSON"),
    ({"messages": PAIR, "tools": [3]}, r'"tools"\[0\] is a number, expected an object'),
    ({"messages": PAIR, "tools": [{"name": "a", "run": object}]}, "holds a type, expected values"),
    # further columns
    ({**ALPACA, "history": ["a", "b"]}, r"\"history\"\[0\] is 'a', expected"),
    ({**ALPACA, "history": [["a", None]]}, r'"history"\[0\] is'),
    ({**ALPACA, "system": ["x"]}, '"system" is a list, expected a text'),
    ({"messages": PAIR, "chat_template_kwargs": [1]}, "is a list, expected an object"),
    ({"messages": PAIR, "chat_template_kwargs": {"tools": []}}, 'cannot set "tools"'),
    ({"messages": PAIR, "chat_template_kwargs": {"depth": 3}}, 'leaves out "depth" of "chat_templ'),
    (messages({**USER, "name": "Ann"}, ANSWER), "leaves out the name of message 1"),
    # values of tables
    ({"text": math.nan}, '"text" is null, expected a text'),
    (
        {"messages": [{"role": "user", "content": math.nan}, ANSWER]},
        r'"messages"\[0\] has no content',
    ),
    ({"messages": ["a", "b"]}, r'"messages"\[0\] is not a message'),
    ({"messages": [{1: "a"}]}, r'"messages"\[0\] is not a message'),
]


@pytest.mark.parametrize(("record", "message"), REFUSED, ids=[pair[1] for pair in REFUSED])
def test_a_record_whose_text_would_be_lost_is_refused_by_name(make, record, message):
    with pytest.raises(ValueError, match=message):
        render_record(record, make(), LabelOptions())


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (messages(USER, {"reasoning": "Two.", **ANSWER}), "leaves out the reasoning of message 2"),
        (messages(USER, CALL, ANSWER), "leaves out the tool calls of message 2"),
        ({"messages": PAIR, "tools": [{"name": "add"}]}, "leaves out the tools"),
        ({"messages": PAIR, "chat_template_kwargs": {"persona": 1}}, 'leaves out "persona" of'),
    ],
)
def test_a_text_that_the_template_leaves_out_is_an_error_or_a_note(make, record, message):
    tokenizer = make(CHATML)
    with pytest.raises(ValueError, match=message):
        render_record(record, tokenizer, LabelOptions())
    notes = notes_of(record, tokenizer, dropped_text="warn")
    kind = re.sub(r" of message \d", "", message)
    assert any(kind in note for note in notes), notes


def test_harmless_and_empty_keys_change_nothing(make):
    tokenizer = make()
    plain = sample_of({"messages": PAIR}, tokenizer)
    about = {"id": 3, "source": "x", "metadata": {"system": "x"}, "category": "y", "score": 0.5}
    empty = {"comment": None, "other": "", "images": [], "notes": {"a": None}, "rank2": math.nan}
    arrays = {"chosen": np.array([])}
    record = {**about, **empty, **arrays, "messages": [{**USER, "id": "m1", "audio": None}, ANSWER]}
    assert sample_of(record, tokenizer) == plain
    assert notes_of(record, tokenizer) == ()


def test_ignored_fields_are_left_out_with_a_note(make):
    tokenizer = make()
    call = {**CALLS[0], "why": "x"}
    record = {
        "messages": [{**USER, "comment": "x"}, {**CALL, "tool_calls": [call]}, ANSWER],
        "title": "x",
    }
    names = ("title", "messages.comment", "messages.tool_calls.why", "absent")
    notes = notes_of(record, tokenizer, ignore_fields=names)
    assert notes == tuple(
        f'"{name}" is left out, because ignore_fields names it' for name in names[:3]
    )
    expected = sample_of(messages(USER, CALL, ANSWER), tokenizer)
    assert sample_of(record, tokenizer, ignore_fields=names) == expected
    found = tokenize_dataset([record] * 3, tokenizer, 500, ignore_fields=names).report.notes
    absent = found.pop('ignore_fields names "absent", but no record holds a value there')
    assert set(found) == set(notes) and (absent.count, absent.origins) == (3, ["dataset"])


def test_a_column_that_repeats_a_message_is_no_loss(make):
    tokenizer = make()
    record = {"prompt": "How many?", "prompt_id": "x", "messages": PAIR}
    assert sample_of(record, tokenizer) == sample_of({"messages": PAIR}, tokenizer)
    assert notes_of(record, tokenizer) == ('"prompt" repeats a message',)
    with pytest.raises(ValueError, match='nothing reads "prompt"'):
        render_record({**record, "prompt": "How many"}, tokenizer, LabelOptions())


def test_the_users_text_field_decides_between_two_shapes(make):
    tokenizer = make()
    both = {"text": "Four", "messages": PAIR, "system": "x"}
    sample = sample_of(both, tokenizer, dataset_text_field="text")
    assert trained(sample, tokenizer) == ["<|bos|>Four<|end|>"]
    notes = notes_of(both, tokenizer, dataset_text_field="text")
    assert '"messages" is left out, because dataset_text_field is "text"' in notes
    assert '"system" is left out, because dataset_text_field is "text"' in notes
    chosen = sample_of(both, tokenizer, ignore_fields=("text", "system"))
    assert trained(chosen, tokenizer) == ["Four é.<|end|>"]
    unioned = {"text": None, "messages": PAIR, "prompt": None, "completion": None}
    assert trained(sample_of(unioned, tokenizer), tokenizer) == ["Four é.<|end|>"]


def test_an_empty_answer_is_noted(make):
    tokenizer = make()
    blank = {"role": "assistant", "content": " \n"}
    for record in (
        messages(USER, blank),
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]},
        {**ALPACA, "output": ""},
        {"prompt": "a", "completion": " "},
        {"prompt": [USER], "completion": [blank]},
    ):
        assert EMPTY_ANSWER in notes_of(record, tokenizer), record
    for record in (messages(USER, CALL), messages(USER, {**blank, "weight": 0}, USER, ANSWER)):
        assert EMPTY_ANSWER not in notes_of(record, tokenizer), record
    assert "a text is empty" in notes_of({"text": " "}, tokenizer)
    assert "no answer to train on" in notes_of(messages(USER), tokenizer)


def test_texts_without_the_chat_template_are_noted_if_there_is_one(make):
    pair = {"prompt": "How many?", "completion": " Four"}
    (note,) = notes_of(pair, make())
    assert "as plain text" in note and "messages" in note
    assert notes_of(pair, make(None)) == ()


def test_alpaca_without_a_template_writes_the_system_column_and_refuses_the_rest(make):
    tokenizer = make(None)
    text = text_of(sample_of({**ALPACA, "system": "Count."}, tokenizer), tokenizer)
    assert text.startswith("<|bos|>Count.\n\n### Instruction:\nHow many?\n\n### Response:\n")
    for key in ("history", "tools", "chat_template_kwargs"):
        with pytest.raises(ValueError, match=f'"{key}" needs a chat template'):
            render_record({**ALPACA, key: [["a", "b"]]}, tokenizer, LabelOptions())


def test_turns_are_split_if_history_loses_its_reasoning_or_the_user_asks(make):
    thought = {**ANSWER, "reasoning_content": "Two, two."}
    record = messages(USER, thought, USER, thought)
    forgets, whole = make(FORGETS_REASONING), make(WHOLE)
    rendered = render_record(record, forgets, LabelOptions())
    assert len(rendered.parts) == 2
    assert "the chat template rewrites earlier turns, so each answer is a sample" in rendered.notes
    for part in rendered.parts:
        assert [part.text[begin:end] for begin, end in part.spans] == [
            "<think>Two, two.</think>Four é.<|end|>"
        ]
    assert len(render_record(record, whole, LabelOptions()).parts) == 1
    assert len(render_record(record, whole, LabelOptions(split_turns=True)).parts) == 2
    joined = render_record(record, forgets, LabelOptions(split_turns=False))
    assert len(joined.parts) == 1 and EARLIER_REASONING in joined.notes
    with pytest.raises(ValueError, match="leaves out the reasoning of message 2"):
        render_record(record, forgets, LabelOptions(assistant_only_loss=False))
    unfinished = messages(USER, thought, USER)
    notes = notes_of(unfinished, whole, split_turns=True)
    assert "messages after the last answer are left out" in notes


def test_an_option_that_contradicts_the_record_or_another_is_refused(make):
    excluded = {**ANSWER, "weight": 0}
    for record, options, message in (
        (messages(USER, excluded), {"assistant_only_loss": False}, "message 2 is excluded"),
        (
            {"prompt": [USER], "completion": [excluded]},
            {"completion_only_loss": False},
            "message 2 is excluded",
        ),
        (
            messages(*PAIR),
            {"assistant_only_loss": False, "split_turns": True},
            "split_turns=True makes a sample of each answer",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            render_record(record, make(), LabelOptions(**options))


def test_a_role_that_the_template_names_is_rendered(make):
    tokenizer = make("{% if messages[0].role == 'ipython' %}!{% endif %}" + CHATML)
    record = messages({"role": "ipython", "content": "20"}, ANSWER)
    assert text_of(sample_of(record, tokenizer), tokenizer).startswith(
        "!<|bos|><|start|>ipython\n20"
    )


def test_numbers_that_json_lacks_are_rendered_in_arguments(make):
    record = with_call(function={"name": "add", "arguments": '{"x": NaN, "y": -Infinity}'})
    text = text_of(sample_of(record, make()), make())
    assert '{"x": NaN, "y": -Infinity}' in text
