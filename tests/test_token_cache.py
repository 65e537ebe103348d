"""Tokens on disk equal tokens in memory, and a wrong entry is rebuilt instead of used."""

import json
import shutil

import numpy as np
import pytest
from tokenizer_files import write_chat_tokenizer
from training_runs import RECORDS, make_smallest_model, new_trainer

from minitune.data import token_cache
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.data.tokenize_dataset import tokenize_dataset


@pytest.fixture(autouse=True)
def small_files_are_cached(monkeypatch):
    """Cache files of every size, and write tokens to disk often."""
    monkeypatch.setattr(token_cache, "MIN_BYTES", 0)
    monkeypatch.setattr(token_cache, "FLUSHED", 7)


@pytest.fixture
def tokenizer(tmp_path):
    """Return a tokenizer with a chat template."""
    return Tokenizer.from_folder(write_chat_tokenizer(tmp_path / "tokenizer"))


@pytest.fixture
def path(tmp_path):
    """Return a file of records of which one is cut to length and one has no label."""
    records = [*RECORDS, {"text": "How many? " * 40}, {"messages": RECORDS[0]["messages"][:1]}]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def assert_same(found, expected):
    assert list(found.samples) == list(expected.samples)
    assert found.report == expected.report
    assert found.samples.targets.tolist() == expected.samples.targets.tolist()
    assert [found.samples.origin(i) for i in range(5)] == [
        expected.samples.origin(i) for i in range(5)
    ]
    assert found.samples.fingerprint() == expected.samples.fingerprint()


def test_an_entry_gives_the_samples_and_the_report_that_are_kept_in_memory(
    tokenizer, path, tmp_path
):
    cache, memory = tmp_path / "cache", tokenize_dataset(path, tokenizer, 60)
    assert memory.skipped == 1 and 0 < memory.truncated < len(memory.samples)
    written = tokenize_dataset(path, tokenizer, 60, cache=cache)
    read = tokenize_dataset(path, tokenizer, 60, cache=cache)
    assert (written.is_cached, read.is_cached) == (False, True)
    assert isinstance(read.samples.input_ids, np.memmap)
    for dataset in (written, read):
        assert_same(dataset, memory)
    assert [entry.name for entry in cache.iterdir()] == [read.key]


def test_every_change_of_data_tokenizer_or_options_makes_another_entry(tokenizer, path, tmp_path):
    cache, folder = tmp_path / "cache", tmp_path / "other"
    shutil.copytree(tokenizer.folder, folder)
    keys = [tokenize_dataset(path, tokenizer, 60, cache=cache).key]
    for options in ({"max_length": 61}, {"skip_bad": True}, {"assistant_only_loss": False}):
        arguments = {"max_length": 60, "cache": cache} | options
        keys.append(tokenize_dataset(path, tokenizer, **arguments).key)
    (folder / "added_tokens.json").write_text("{}")
    other = Tokenizer.from_folder(folder)
    keys.append(tokenize_dataset(path, other, 60, cache=cache).key)
    other.chat_template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    keys.append(tokenize_dataset(path, other, 60, cache=cache).key)
    dated = [
        tokenize_dataset(path, other, 60, cache=cache, template_date=f"2026-01-0{day}").key
        for day in (1, 2)
    ]
    assert dated == keys[-1:] * 2  # this template does not write the day
    other.chat_template = "{{ strftime_now('%d') }}" + other.chat_template
    for day in (1, 2):
        options = {"cache": cache, "template_date": f"2026-01-0{day}"}
        keys.append(tokenize_dataset(path, other, 60, **options).key)
    copy = tmp_path / "copy.jsonl"  # its name is part of the places that messages name
    shutil.copy(path, copy)
    keys.append(tokenize_dataset(copy, tokenizer, 60, cache=cache).key)
    path.write_text(path.read_text().replace("Lisbon", "Lissabon"))
    keys.append(tokenize_dataset(path, tokenizer, 60, cache=cache).key)
    assert len(set(keys)) == len(keys)


def _flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def _rewrite(change):
    """Return a function that changes the values of an array file and corrects its checksum."""

    def damage(path):
        values = np.load(path)
        change(values)
        np.save(path, values)
        description = path.parent / token_cache.DESCRIPTION
        content = json.loads(description.read_text())
        place = ["input_ids.npy", "labels.npy", "samples.npy"].index(path.name)
        content["checksums"][place] = token_cache.zlib.crc32(values)
        description.write_text(json.dumps(content))

    return damage


def _set(position, value):
    return _rewrite(lambda values: values.__setitem__(position, value))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("input_ids.npy", _flip_a_bit),
        ("labels.npy", _flip_a_bit),
        ("samples.npy", _flip_a_bit),
        ("labels.npy", lambda path: path.write_bytes(path.read_bytes()[:-8])),
        ("input_ids.npy", lambda path: path.unlink()),
        ("input_ids.npy", lambda path: np.save(path, np.array([None], object))),
        ("dataset.json", lambda path: path.write_text("[]")),
        ("dataset.json", lambda path: path.write_text('{"format": 1}')),
        ("dataset.json", lambda path: path.write_text(path.read_text().replace('"key": "', "k"))),
        ("input_ids.npy", _set(3, 10**6)),
        ("labels.npy", _set(3, -7)),
        ("samples.npy", _set((0, 1), 10**9)),
        ("samples.npy", _set((1, 1), -1)),
        ("samples.npy", _set((3, 1), 4)),
        ("samples.npy", _set((5, 1), 99)),
    ],
)
def test_a_damaged_or_foreign_entry_is_rebuilt(tokenizer, path, tmp_path, name, damage):
    cache, memory = tmp_path / "cache", tokenize_dataset(path, tokenizer, 60)
    key = tokenize_dataset(path, tokenizer, 60, cache=cache).key
    damage(cache / key / name)
    rebuilt = tokenize_dataset(path, tokenizer, 60, cache=cache)
    assert not rebuilt.is_cached
    assert_same(rebuilt, memory)
    assert tokenize_dataset(path, tokenizer, 60, cache=cache).is_cached


def test_records_in_memory_and_failures_leave_no_cache(tokenizer, path, tmp_path):
    cache = tmp_path / "cache"
    assert tokenize_dataset(RECORDS, tokenizer, 60, cache=cache).key is None
    path.write_text(path.read_text() + '{"text": 3}\n')
    with pytest.raises(ValueError, match='"text" is a number'):
        tokenize_dataset(path, tokenizer, 60, cache=cache)
    assert not cache.exists()


def test_a_repeated_run_reads_the_tokens_and_a_run_on_other_data_replaces_them(
    path, tmp_path, capsys
):
    folder, output = make_smallest_model(tmp_path / "model"), tmp_path / "run"
    new_trainer(folder, output, records=path, max_steps=2).train()
    losses = (output / "metrics.jsonl").read_text().split('"loss": ')[1].split(",")[0]
    entries = list((output / "tokenized").iterdir())
    assert len(entries) == 1 and "the cache" not in capsys.readouterr().err
    other = output / "tokenized" / "own notes"
    other.mkdir()
    left_over = output / "tokenized" / f".{'0' * 32}.partial"
    left_over.mkdir()
    new_trainer(folder, output, records=path, max_steps=2, overwrite=True).train()
    assert "read from the cache" in capsys.readouterr().err
    assert (output / "metrics.jsonl").read_text().split('"loss": ')[1].split(",")[0] == losses
    path.write_text(path.read_text().replace("Lisbon", "Lissabon"))
    new_trainer(folder, output, records=path, max_steps=2, overwrite=True).train()
    assert {entry.name for entry in (output / "tokenized").iterdir()} & {
        "own notes",
        entries[0].name,
    } == {"own notes"}
    assert not left_over.exists()
    assert "tokenized" not in json.loads((output / "outputs.json").read_text())["names"]
