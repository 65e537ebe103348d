"""The demonstration's task: the generator writes the shipped files; the splits share no name."""

import json
import re
from pathlib import Path

import pytest
from demonstration import make_task
from demonstration.task_tables import VALUES

from minitune.data.sources.sources import load_dataset

DEMONSTRATION = Path(__file__).parent.parent / "scripts" / "demonstration"
FILES = ("train.jsonl", "heldout.jsonl")


@pytest.fixture(scope="module")
def splits():
    """Return split -> the conversations of the shipped file."""
    conversations = {}
    for name in FILES:
        records = load_dataset(DEMONSTRATION / name)
        conversations[name.removesuffix(".jsonl")] = [record["messages"] for _, record in records]
    return conversations


def words(text):
    """Return the set of words of a text in lower case."""
    return set(re.findall(r"\w+", text.lower()))


def skeleton(text):
    """Return a text in lower case without punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


def test_the_generator_writes_the_files_of_the_repository_byte_for_byte(tmp_path):
    make_task.main(["--output-dir", str(tmp_path)])
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (DEMONSTRATION / name).read_bytes()
    make_task.main(["--output-dir", str(tmp_path), "--seed", "1"])
    name = FILES[0]
    assert (tmp_path / name).read_bytes() != (DEMONSTRATION / name).read_bytes()


def test_the_tables_of_the_two_splits_share_no_frame_and_no_word_of_a_value():
    frames, used = {}, {}
    for split in ("train", "heldout"):
        listed = [frame for kind in make_task.FIELDS for frame in make_task.frames(split, kind)]
        frames[split] = {skeleton(frame) for frame in listed}
        assert len(frames[split]) == len(listed)
        values = [value for table in VALUES[split] for value in make_task.values(split, table)]
        used[split] = {word for value in values for word in words(value)}
    assert not frames["train"] & frames["heldout"]
    assert not used["train"] & used["heldout"]
    assert all(len(make_task.frames("train", kind)) >= 30 for kind in make_task.FIELDS)


def test_the_texts_of_the_two_splits_share_no_frame_and_no_name_item_service_or_city(splits):
    frames, used = {}, {}
    for split, conversations in splits.items():
        frames[split], used[split] = set(), set()
        for _, question, answer in conversations:
            text, fields = question["content"], json.loads(answer["content"])
            for field in ("name", "item", "service", "city"):
                used[split] |= words(fields.get(field, ""))
            del fields["type"]
            longest_first = sorted(sorted(fields), key=lambda name: -len(str(fields[name])))
            for field in longest_first:
                value = re.escape(str(fields[field]))
                text = re.sub(rf"(?<!\w){value}(?!\w)", f" _{field}_ ", text, count=1)
            frames[split].add(skeleton(text))
    assert not frames["train"] & frames["heldout"]
    assert not used["train"] & used["heldout"]
    assert len(frames["heldout"]) == 48


def test_every_answer_is_copied_from_its_text_in_the_fixed_order(splits):
    conversations = [*splits["train"], *splits["heldout"]]
    kinds = []
    for messages in conversations:
        assert [message["role"] for message in messages] == ["system", "user", "assistant"]
        question, answer = messages[1]["content"], messages[2]["content"]
        fields = json.loads(answer)
        names = make_task.FIELDS[fields["type"]]
        assert tuple(fields) == ("type", *names)
        assert json.dumps(fields, separators=(",", ":"), ensure_ascii=False) == answer
        assert all(str(fields[name]) in question for name in names)
        kinds.append(fields["type"])
    assert len(splits["train"]) == 384
    assert kinds.count("order") == kinds.count("booking") == kinds.count("log")
    assert len({question["content"] for _, question, _ in conversations}) == len(conversations)
