"""Each form of a record is rendered as transformers renders the messages that it stands for."""

import json

import pytest
from labelled_records import sample_of, text_of, trained
from record_templates import WHOLE
from tokenizer_files import write_chat_tokenizer

from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.data.tokenize_dataset import tokenize_dataset

USER = {"role": "user", "content": "How many?"}
ANSWER = {"role": "assistant", "content": "Four é."}
SYSTEM = {"role": "system", "content": "Count."}
THOUGHT = {"role": "assistant", "reasoning_content": "Two, two.", "content": "Four é."}
CITY = {"city": "Pàris", "days": 2, "near": {"also": ["Lyon", None]}}
FUNCTION = {"name": "weather", "arguments": CITY}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": FUNCTION}],
}
RESULT = {"role": "tool", "content": '{"t": 20}'}
CALLED = [USER, CALL, RESULT, ANSWER]
SCHEMA = {
    "name": "weather",
    "description": "The weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["a"]}}},
}
TOOLS = [{"type": "function", "function": SCHEMA}]
TEXT_CALL = {"name": "weather", "arguments": json.dumps(CITY)}
NULLS = {"tool_calls": None, "name": None, "reasoning": None, "refusal": None, "weight": None}
TOOLS_OF_A_TABLE = json.loads(json.dumps(TOOLS))
TOOLS_OF_A_TABLE[0]["function"]["parameters"]["properties"] |= {"days": None}


def value_parts(**parts):
    """Return content in parts {"type", "value"}."""
    return [{"type": kind, "value": value} for kind, value in parts.items()]


def turn(speaker, value, **more):
    """Return a turn in ShareGPT's words."""
    return {"from": speaker, "value": value, **more}


# the record, the messages that it stands for, the stretches that are trained on (None: the answer)
KINDS = {
    "null keys": ({"messages": [{**USER, **NULLS}, {**ANSWER, **NULLS}]}, [USER, ANSWER]),
    "null content beside a call": (
        {"messages": [USER, {**CALL, "content": None}, RESULT, ANSWER]},
        CALLED,
    ),
    "missing content beside a call": (
        {
            "messages": [
                USER,
                {"role": "assistant", "tool_calls": CALL["tool_calls"]},
                RESULT,
                ANSWER,
            ]
        },
        CALLED,
    ),
    "arguments in JSON text": (
        {"messages": [USER, {**CALL, "tool_calls": [{"function": TEXT_CALL}]}, RESULT, ANSWER]},
        CALLED,
    ),
    "calls in JSON text": (
        {
            "messages": [
                USER,
                {**CALL, "tool_calls": json.dumps(CALL["tool_calls"])},
                RESULT,
                ANSWER,
            ]
        },
        CALLED,
    ),
    "OpenAI's older function_call": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "function_call": TEXT_CALL},
                {**RESULT, "role": "function", "name": "weather"},
                ANSWER,
            ]
        },
        CALLED,
    ),
    "reasoning": ({"messages": [USER, {"reasoning": "Two, two.", **ANSWER}]}, [USER, THOUGHT]),
    "thinking": ({"messages": [USER, {"thinking": "Two, two.", **ANSWER}]}, [USER, THOUGHT]),
    "parts with values": (
        {
            "messages": [
                {"role": "user", "content": value_parts(text="How many?"), "loss_weight": 0.0},
                {
                    "role": "assistant",
                    "content": value_parts(reasoning="Two, two.", text="Four é."),
                    "loss_weight": 1.0,
                },
            ]
        },
        [USER, THOUGHT],
    ),
    "a call in a part with a value": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": value_parts(tool_call=json.dumps(FUNCTION))},
                RESULT,
                ANSWER,
            ]
        },
        CALLED,
    ),
    "a system column": (
        {"conversations": [turn("human", "How many?"), turn("gpt", "Four é.")], "system": "Count."},
        [SYSTEM, USER, ANSWER],
    ),
    "a system column that repeats the system message": (
        {"messages": [SYSTEM, USER, ANSWER], "system": "Count."},
        [SYSTEM, USER, ANSWER],
    ),
    "a system_prompt column": (
        {"messages": [USER, ANSWER], "system_prompt": "Count.", "system": ""},
        [SYSTEM, USER, ANSWER],
    ),
    "ShareGPT's calls": (
        {
            "conversations": [
                turn("human", "How many?"),
                turn("function_call", json.dumps(FUNCTION)),
                turn("observation", '{"t": 20}'),
                turn("gpt", "Four é."),
            ]
        },
        CALLED,
    ),
    "ShareGPT's words beside OpenAI's": (
        {"conversations": [USER, turn("gpt", "Four é.", weight=1.0)]},
        [USER, ANSWER],
    ),
    "ShareGPT's words under messages": (
        {"messages": [turn("user", "How many?"), turn("model", "Four é.")]},
        [USER, ANSWER],
    ),
    "Alpaca's system and history": (
        {
            "instruction": "How",
            "input": "many?",
            "output": "Four é.",
            "system": "Count.",
            "history": [["How many?", "Four é."]],
        },
        [SYSTEM, USER, ANSWER, {"role": "user", "content": "How\n\nmany?"}, ANSWER],
    ),
    "a system column beside a pair": (
        {"prompt": [USER], "completion": [ANSWER], "system": "Count."},
        [SYSTEM, USER, ANSWER],
    ),
    "a conversation that the assistant begins": (
        {"messages": [ANSWER, USER, ANSWER]},
        [ANSWER, USER, ANSWER],
    ),
}
TOOL_FORMS = {
    "a list": {"tools": TOOLS},
    "a JSON text": {"tools": json.dumps(TOOLS)},
    "JSON texts": {"tools": [json.dumps(TOOLS[0])]},
    "functions": {"functions": [SCHEMA]},
    "a table's nulls": {"tools": TOOLS_OF_A_TABLE},
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Return our tokenizer and transformers', with a template that writes every text."""
    transformers = pytest.importorskip("transformers")
    folder = write_chat_tokenizer(tmp_path_factory.mktemp("whole"), WHOLE)
    referee = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<|bos|>", eos_token="<|end|>"
    )
    referee.chat_template = WHOLE
    return Tokenizer.from_folder(folder), referee


def rendered_answers(messages):
    """Return the texts of the assistant's messages as WHOLE writes them."""
    texts = []
    for message in messages:
        if message["role"] == "assistant":
            thought = message.get("reasoning_content")
            text = f"<think>{thought}</think>" if thought else ""
            text += message["content"]
            for call in message.get("tool_calls", []):
                text += f"<call>{json.dumps(call['function'], ensure_ascii=False)}</call>"
            texts.append(f"{text}<|end|>")
    return texts


@pytest.mark.parametrize("kind", KINDS)
def test_a_form_of_a_record_is_rendered_and_trained_as_its_messages(tokenizers, kind):
    tokenizer, referee = tokenizers
    record, messages = KINDS[kind]
    sample = sample_of(record, tokenizer)
    assert text_of(sample, tokenizer) == referee.apply_chat_template(messages, tokenize=False)
    assert trained(sample, tokenizer) == rendered_answers(messages)


@pytest.mark.parametrize("form", TOOL_FORMS)
def test_each_form_of_tools_is_rendered_as_the_list(tokenizers, form):
    tokenizer, referee = tokenizers
    expected = referee.apply_chat_template([USER, ANSWER], tools=TOOLS, tokenize=False)
    sample = sample_of({"messages": [USER, ANSWER], **TOOL_FORMS[form]}, tokenizer)
    assert text_of(sample, tokenizer) == expected
    pair = {"prompt": [USER], "completion": [ANSWER], **TOOL_FORMS[form]}
    assert sample_of(pair, tokenizer) == sample


def test_tools_in_a_system_message_are_the_tools_of_the_conversation(tokenizers):
    tokenizer, referee = tokenizers
    expected = referee.apply_chat_template([SYSTEM, USER, ANSWER], tools=TOOLS, tokenize=False)
    record = {"messages": [{**SYSTEM, "tools": json.dumps(TOOLS)}, USER, ANSWER]}
    assert text_of(sample_of(record, tokenizer), tokenizer) == expected


def test_chat_template_kwargs_reach_the_template(tokenizers):
    tokenizer, referee = tokenizers
    expected = referee.apply_chat_template([USER, ANSWER], persona="é!", tokenize=False)
    for values in ({"persona": "é!", "other": None}, '{"persona": "é!"}'):
        record = {"messages": [USER, ANSWER], "chat_template_kwargs": values}
        assert text_of(sample_of(record, tokenizer), tokenizer) == expected


def test_a_key_that_only_the_template_knows_reaches_it(tokenizers):
    tokenizer, referee = tokenizers
    messages = [{**USER, "mood": "glad"}, ANSWER]
    sample = sample_of({"messages": messages}, tokenizer)
    assert text_of(sample, tokenizer) == referee.apply_chat_template(messages, tokenize=False)


def test_a_turn_of_weight_zero_has_no_labels(tokenizers):
    tokenizer, _ = tokenizers
    later = {"role": "assistant", "content": "Five."}
    for mark in (
        {"weight": 0},
        {"weight": 0.0},
        {"train": False},
        {"loss": 0},
        {"training": False},
    ):
        turns = {"messages": [USER, {**ANSWER, **mark}, USER, later]}
        assert trained(sample_of(turns, tokenizer), tokenizer) == ["Five.<|end|>"], mark
        shared = [turn("human", "How many?", weight=0), turn("gpt", "Four é.", **mark)]
        sample = sample_of({"conversations": [*shared, USER, later]}, tokenizer)
        assert trained(sample, tokenizer) == ["Five.<|end|>"], mark
    pair = {"prompt": [USER], "completion": [{**ANSWER, "weight": 0}, USER, later]}
    rest = "\n<|start|>user\nHow many?<|end|>\n<|start|>assistant\nFive.<|end|>"
    assert trained(sample_of(pair, tokenizer), tokenizer) == [rest]
    answers = trained(sample_of(pair, tokenizer, assistant_only_loss=True), tokenizer)
    assert answers == ["Five.<|end|>"]


def test_the_rows_of_a_table_equal_the_records_that_it_was_made_from(tokenizers):
    pyarrow, _ = pytest.importorskip("pyarrow"), pytest.importorskip("pandas")
    tokenizer, _ = tokenizers
    records = [
        {"messages": CALLED, "tools": TOOLS, "text": None},
        {"messages": [SYSTEM, USER, THOUGHT], "tools": None, "text": None},
        {"messages": None, "tools": None, "text": "How many?"},
        {"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER], "tools": [{"name": "add"}]},
    ]
    expected = tokenize_dataset(records, tokenizer, 500).samples
    table = pyarrow.Table.from_pylist(records)
    for rows in (table.to_pylist(), table.to_pandas().to_dict("records")):
        assert list(tokenize_dataset(rows, tokenizer, 500).samples) == list(expected)


@pytest.mark.slow
def test_messages_and_pairs_become_the_texts_that_trl_makes_of_them(tokenizers):
    utilities = pytest.importorskip("trl.data_utils")
    tokenizer, referee = tokenizers
    beside = {"chat_template_kwargs": {"persona": "é!"}}
    for tools in (None, TOOLS):
        example = {"messages": CALLED, **beside}
        expected = utilities.apply_chat_template(example, referee, tools)["text"]
        assert text_of(sample_of({**example, "tools": tools}, tokenizer), tokenizer) == expected
        example = {"prompt": [SYSTEM, USER], "completion": [THOUGHT], **beside}
        expected = utilities.apply_chat_template(example, referee, tools)
        sample = sample_of({**example, "tools": tools}, tokenizer)
        assert text_of(sample, tokenizer) == expected["prompt"] + expected["completion"]
        assert trained(sample, tokenizer) == [expected["completion"].rstrip("\n")]
