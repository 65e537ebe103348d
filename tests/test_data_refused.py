"""Wrong datasets are refused with file, line number and expectation."""

import json
import re
import struct

import pytest
from labelled_records import PAIR
from tokenizer_files import write_chat_tokenizer

from minitune.data.sources.sources import load_dataset
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.data.tokenize_dataset import tokenize_dataset


@pytest.fixture
def tokenizer(tmp_path):
    """Return a tokenizer with a chat template and 295 tokens."""
    return Tokenizer.from_folder(write_chat_tokenizer(tmp_path / "tokenizer"))


KNOWN = r'known are .*{"messages": \[...\]}.*{"input_ids": \[...\], "labels": \[...\]}'
LINES = [
    (
        '{"text": "a"',
        r"not JSON: Expecting ',' delimiter at column 13: the text ends inside a value; each line",
    ),
    ('{"text": "a",}', "at column 14: remove the comma before the }; each line"),
    ('{"text": ["a",]}', "at column 15: remove the comma before the ]; each line"),
    ('{"text": "a"},', "at column 14: remove the comma behind the value; each line"),
    ('{"text": "a"} {"text": "b"}', "at column 15: a second value follows the first; each"),
    ("{'text': 'a'}", "at column 2: write double quotes around keys and texts; each line"),
    ('{"text": None}', "at column 10: write null, true and false, not Python's words; each"),
    ('{"text": "a\tb"}', r"at column 12: write a line break as \\n"),
    (
        "{",
        "at column 2: the text ends inside a value; each line holds one JSON object, or the file",
    ),
    ('["text"]', f"holds a list, not an object; {KNOWN}"),
    (
        '{"question": "a", "answer": "b"}',
        f"unknown shape with the fields question, answer; {KNOWN}",
    ),
    ("{}", rf"unknown shape with the fields \(none\); {KNOWN}"),
    ('{"prompt": "a"}', f'unknown shape with the fields prompt; {KNOWN}; "completion" is missing'),
    (
        '{"Instruction": "a", "Output": "b"}',
        r'did you mean "instruction" by "Instruction", "output" by "Output"\?',
    ),
    ('{"text": "a", "text": "b"}', 'JSON that cannot be read: the key "text" stands twice'),
    ('{"text": 3}', '"text" is a number, expected a text'),
    ('{"text": null}', '"text" is null, expected a text'),
    ('{"messages": "a"}', '"messages" is a text, expected a list of at least one'),
    ('{"messages": []}', '"messages" is an empty list, expected a list of at least one'),
    ('{"messages": [{"content": "a"}]}', r'"messages"\[0\] is not a message'),
    ('{"conversations": [{"form": "human", "value": "a"}]}', "with the keys form, value; expected"),
    ('{"messages": [{"role": "user"}]}', r'"messages"\[0\] has no content'),
    (
        '{"messages": [{"role": "user", "content": 3}]}',
        r'the content of "messages"\[0\] is a number',
    ),
    (
        '{"conversations": [{"from": "narrator", "value": "a"}]}',
        r'"conversations"\[0\] is from .narrator.; known are human',
    ),
    ('{"conversations": [{"from": "gpt"}]}', r'"conversations"\[0\] has no content'),
    ('{"prompt": "a", "completion": ["b"]}', '"completion" is a list, expected a text'),
    ('{"prompt": ["a"], "completion": "b"}', r'"prompt"\[0\] is not a message'),
    ('{"instruction": "a", "output": {}}', '"output" is an object, expected a text'),
    ('{"text": "a\\ud800"}', "half a surrogate pair; save the text in valid UTF-8"),
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
        '{"messages": [{"role": "user", "content": '
        '[{"type": "text", "text": "a"}, {"type": "image"}]}]}',
        "the content of message 1 has a part 'image'; parts are",
    ),
    (
        '{"messages": [{"role": "user", "content": ["a"]}]}',
        "the content of message 1 has a part 'a'; parts are",
    ),
    (
        f'{{"text": {"[" * 100_000}',
        "JSON that is nested too deeply to be read; .*each line holds",
    ),
    (
        f'{{"text": 1{"0" * 5000}}}',
        r"JSON that cannot be read: Exceeds the limit \(4300 digits\).*; each line holds",
    ),
    (
        '{"messages": [{"role": "user", "content": "a"}], "tools": "["}',
        "not JSON: Expecting value at column 2",
    ),
]


@pytest.mark.parametrize(("line", "message"), LINES)
def test_a_wrong_line_is_named_by_file_and_number(tokenizer, tmp_path, line, message):
    path = tmp_path / "orders.jsonl"
    path.write_text(f'\ufeff{{"text": "fine"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:3: .*{message}"):
        tokenize_dataset(path, tokenizer, 100)


RECORDS = [
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
    (
        {"messages": PAIR[:1]},
        {},
        r"dataset: none of its 1 samples has a token to train on\. "
        r"No answer to train on: 1, first dataset\[0\]\.$",
    ),
    (
        {"text": "a"},
        {"dataset_text_field": "body"},
        r'dataset\[0\]: .* fields text; .*; dataset_text_field is "body", which the record lacks',
    ),
]


@pytest.mark.parametrize(("record", "options", "message"), RECORDS)
def test_a_record_without_the_data_for_an_option_is_refused(tokenizer, record, options, message):
    with pytest.raises(ValueError, match=message):
        tokenize_dataset([record], tokenizer, 100, **options)


def test_an_error_about_cut_samples_names_the_length_to_raise(tokenizer):
    message = r"none of its 1 samples .* 1 of them were cut to max_length 5: raise it"
    with pytest.raises(ValueError, match=message):
        tokenize_dataset([{"messages": PAIR}], tokenizer, 5)
    with pytest.raises(ValueError, match="max_length is 1"):
        tokenize_dataset([{"messages": PAIR}], tokenizer, 1)


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


def test_a_wrong_offset_in_an_arrow_file_is_an_error_and_does_not_end_the_process(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    batch = arrow.record_batch([arrow.array(["ab", "c"])], ["text"])
    path = tmp_path / "x.arrow"
    with path.open("wb") as file, arrow.ipc.new_stream(file, batch.schema) as stream:
        stream.write_batch(batch)
    right, wrong = struct.pack("<3i", 0, 2, 3), struct.pack("<3i", 0, 9_000_000, 3)
    assert right in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(right, wrong))
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": path.name}]}))
    with pytest.raises(ValueError, match=r"x\.arrow: not an Arrow file .*offset"):
        load_dataset(tmp_path)
