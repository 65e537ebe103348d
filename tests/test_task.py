"""The demonstration's task: the generator writes the shipped files, and the two splits share nothing that counts."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from minitune.data.jsonl import load_dataset

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo_data", ROOT / "scripts" / "demonstration" / "make_task.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def splits():
    folder = ROOT / "scripts" / "demonstration"
    read = {split: load_dataset(folder / f"{split}.jsonl") for split in ("train", "heldout")}
    return {split: [record["messages"] for _, record in records] for split, records in read.items()}


def words(text):
    return set(re.findall(r"\w+", text.lower()))


def skeleton(text):
    return " ".join(re.findall(r"\w+", text.lower()))


def test_the_generator_writes_the_files_of_the_repository_byte_for_byte(demo, tmp_path):
    demo.main(["--output-dir", str(tmp_path)])
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / "scripts" / "demonstration" / name).read_bytes()
    demo.main(["--output-dir", str(tmp_path), "--seed", "1"])
    assert (tmp_path / "train.jsonl").read_bytes() != (
        ROOT / "scripts" / "demonstration" / "train.jsonl"
    ).read_bytes()


def test_the_tables_of_the_two_splits_share_no_frame_and_no_word_of_a_value(demo):
    frames, used = {}, {}
    for split in ("train", "heldout"):
        frames[split] = {
            skeleton(frame) for kind in demo.FIELDS for frame in demo.frames(split, kind)
        }
        assert len(frames[split]) == sum(len(demo.frames(split, kind)) for kind in demo.FIELDS)
        used[split] = {
            word
            for table in demo.VALUES[split]
            for value in demo.values(split, table)
            for word in words(value)
        }
    assert not frames["train"] & frames["heldout"]
    assert not used["train"] & used["heldout"]
    assert all(len(demo.frames("train", kind)) >= 30 for kind in demo.FIELDS)


def test_the_texts_of_the_two_splits_share_no_frame_and_no_name_item_service_or_city(demo, splits):
    frames, used = {}, {}
    for split, conversations in splits.items():
        frames[split], used[split] = set(), set()
        for _, question, answer in conversations:
            text, fields = question["content"], json.loads(answer["content"])
            for field in ("name", "item", "service", "city"):
                used[split] |= words(fields.get(field, ""))
            for field in sorted(set(fields) - {"type"}, key=lambda field: -len(str(fields[field]))):
                text = re.sub(
                    rf"(?<!\w){re.escape(str(fields[field]))}(?!\w)", f" _{field}_ ", text, count=1
                )
            frames[split].add(skeleton(text))
    assert not frames["train"] & frames["heldout"]
    assert not used["train"] & used["heldout"]
    assert len(frames["heldout"]) == 48


def test_every_answer_is_copied_from_its_text_in_the_fixed_order(demo, splits):
    kinds = []
    for conversations in splits.values():
        for system, question, answer in conversations:
            assert [m["role"] for m in (system, question, answer)] == [
                "system",
                "user",
                "assistant",
            ]
            fields = json.loads(answer["content"])
            assert tuple(fields) == ("type", *demo.FIELDS[fields["type"]])
            assert (
                json.dumps(fields, separators=(",", ":"), ensure_ascii=False) == answer["content"]
            )
            assert all(
                str(fields[field]) in question["content"] for field in demo.FIELDS[fields["type"]]
            )
            kinds.append(fields["type"])
    assert len(splits["train"]) == 384
    assert kinds.count("order") == kinds.count("booking") == kinds.count("log")
    texts = [
        question["content"] for conversations in splits.values() for _, question, _ in conversations
    ]
    assert len(set(texts)) == len(texts)
