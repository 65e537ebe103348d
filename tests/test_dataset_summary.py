"""The numbers of a dataset against values counted by hand."""

from itertools import pairwise

import numpy as np
import pytest
from tokenizer_files import write_chat_tokenizer

from minitune.data.dataset_report import Occurrences
from minitune.data.inspector import dataset_summary
from minitune.data.inspector.dataset_summary import Bar, histogram, summarize
from minitune.data.inspector.summary_text import fault_rows, places, summary_text, total_rows
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.data.tokenize_dataset import tokenize_dataset

BOS, END = 0, 1
NEWLINE = 201  # byte-level BPE's token of a line break in this vocabulary
IGNORED = -100


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Return a tokenizer whose BOS has the id 0 and whose EOS has the id 1."""
    tokenizer = Tokenizer.from_folder(write_chat_tokenizer(tmp_path_factory.mktemp("chat")))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (BOS, (END,))
    assert tokenizer.decode([NEWLINE]) == "\n"
    return tokenizer


def record(ids, first_trained=1):
    labels = [IGNORED if i < first_trained else index for i, index in enumerate(ids)]
    return {"input_ids": ids, "labels": labels}


RECORDS = [
    record([BOS, 40, 41, END], 2),
    record([BOS, BOS, 42, 43, 44, END], 3),
    record([BOS, 40, 41, END], 1),  # the tokens of the first, with other labels
    record([BOS, 45, 46], 2),  # no stop token
    record([BOS, 45, 46], 3),  # nothing is trained on
    record([BOS, 47, END, NEWLINE, NEWLINE], 1),  # white space behind the stop token
    record([BOS, 47, END, 48], 1),  # a text behind the stop token
    record([BOS, *range(50, 62), END], 1),  # cut to 10 tokens
    {"input_ids": [BOS, 5, END, 6, 7, END], "labels": [IGNORED, 5, END, IGNORED, 7, END]},
]


def summary_of(records, tokenizer, max_length=10):
    return summarize(tokenize_dataset(records, tokenizer, max_length), tokenizer, max_length)


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_the_numbers_are_those_counted_by_hand(tokenizer, monkeypatch, block):
    monkeypatch.setattr(dataset_summary, "BLOCK_TOKENS", block)
    summary = summary_of(RECORDS, tokenizer)
    assert (summary.report.records, summary.samples) == (9, 8)
    assert summary.tokens == 4 + 6 + 4 + 3 + 5 + 4 + 10 + 6
    assert summary.trained == 2 + 3 + 3 + 1 + 4 + 3 + 9 + 4
    assert (summary.shortest, summary.median, summary.longest) == (3, 4.5, 10)
    assert summary.stretches == 9 and summary.stops == {"<|end|>": 6}
    assert summary.endless == Occurrences(3, ["dataset[3]", "dataset[6]", "dataset[7]"])
    assert summary.doubled_bos == Occurrences(1, ["dataset[1]"])
    assert summary.duplicates == Occurrences(1, ["dataset[2] = dataset[0]"])
    assert summary.report.skipped == Occurrences(1, ["dataset[4]"])
    assert summary.report.truncated == Occurrences(1, ["dataset[7]"])
    # 10 | 6 + 4 | 6 + 4 | 5 + 4 | 3
    assert summary.rows == 5 and summary.row_share == 42 / 50


def test_labels_that_are_shifted_are_named(tokenizer):
    shifted = {"input_ids": [BOS, 40, 41, END], "labels": [40, 41, END, IGNORED]}
    summary = summary_of([record([BOS, 40, 41, END]), shifted], tokenizer)
    assert summary.other_labels == Occurrences(1, ["dataset[1]"])
    assert "other labels            1  labels differ from the tokens" in summary_text(summary)


def test_a_tokenizer_without_special_tokens_gives_no_stop_and_no_doubled_bos(tokenizer):
    special, tokenizer.special = tokenizer.special, {}
    ends = tokenizer.eos_token_ids
    try:
        tokenizer.__dict__["eos_token_ids"] = ()
        summary = summary_of(RECORDS, tokenizer)
    finally:
        tokenizer.special = special
        tokenizer.__dict__["eos_token_ids"] = ends
    assert (summary.stops, summary.endless.count, summary.doubled_bos.count) == ({}, 9, 0)


def test_every_duplicate_is_counted_and_the_first_ones_are_named(tokenizer):
    summary = summary_of([record([BOS, 40, END])] * 30, tokenizer)
    assert summary.duplicates.count == 29
    assert summary.duplicates.origins[-1] == "dataset[20] = dataset[0]"


def test_a_sample_that_a_weight_repeats_is_no_duplicate(tokenizer):
    dataset = tokenize_dataset(RECORDS[:2], tokenizer, 10)
    repeated = dataset.samples.take(np.array([0, 1, 0, 1, 1]))
    summary = summarize(type(dataset)(repeated, dataset.report), tokenizer, 10)
    assert (summary.samples, summary.tokens, summary.duplicates.count) == (5, 26, 0)
    assert summary.doubled_bos.count == 3


def test_equal_hashes_of_different_samples_make_no_duplicate(tokenizer, monkeypatch):
    monkeypatch.setattr(dataset_summary, "hash", lambda tokens: 0, raising=False)
    assert summary_of(RECORDS, tokenizer).duplicates.origins == ["dataset[2] = dataset[0]"]


@pytest.mark.parametrize(("shortest", "longest", "bars"), [(1, 5000, 12), (50, 400, 7)])
def test_the_histogram_holds_every_sample_once(shortest, longest, bars):
    lengths = np.random.default_rng(0).integers(shortest, longest, 1000)
    found = histogram(lengths)
    assert len(found) == bars and sum(bar.count for bar in found) == 1000
    assert found[0].first == lengths.min() and found[-1].last == lengths.max()
    assert all(a.last + 1 == b.first for a, b in pairwise(found))
    assert all(((lengths >= x.first) & (lengths <= x.last)).sum() == x.count for x in found)


def test_bars_are_equally_wide_if_the_lengths_are_alike_and_grow_otherwise():
    assert histogram(np.array([7])) == [Bar(7, 7, 1)]
    alike = histogram(np.array([54] * 150 + [70] * 34 + [84] * 200))
    assert alike[0] == Bar(54, 54, 150) and alike[-1] == Bar(80, 84, 200) and len(alike) == 7
    assert {bar.last - bar.first for bar in alike[1:-1]} == {4}
    grown = histogram(np.array([1, 4, 4, 6, 10]))
    assert grown[2:] == [Bar(3, 3, 0), Bar(4, 5, 2), Bar(6, 7, 1), Bar(8, 10, 1)]


def test_places_in_one_file_share_its_name():
    found = Occurrences(6, ["a.jsonl:3", "a.jsonl:9", "b.jsonl:4", "dataset[7]"])
    assert places(found) == "a.jsonl:3, 9, b.jsonl:4, dataset[7] and 2 more"
    copies = places(Occurrences(2, ["a.jsonl:9 = a.jsonl:3", "b.jsonl:2 = a.jsonl:3"]))
    assert copies.replace("\u00a0", " ") == "a.jsonl:9 = 3, b.jsonl:2 = a.jsonl:3"
    assert places(Occurrences(1, ["a\x1b[2J\n.jsonl:3"])) == "a<U+001B>[2J⏎.jsonl:3"


def test_the_summary_is_printed_as_written_here(tokenizer):
    summary = summary_of(RECORDS, tokenizer)
    summary.report.add_notes(["the chat template leaves out the tools"], "dataset[3]")
    assert summary_text(summary) == EXPECTED
    coloured = summary_text(summary, colour=True)
    assert "\x1b[33mdoubled BOS             1\x1b[0m  dataset[1]" in coloured
    assert "\nempty answers           0\n" in coloured


EXPECTED = """\
records                 9  input_ids 9
samples                 8
tokens                 42
trained on             29  69.0% of the tokens
longest sample         10  tokens; median 4.5, shortest 3, limit 10
packed rows             5  of 10 tokens, 84.0% full

samples by length in tokens
                    3 - 4  ████████████████████████████████████████ 4
                    5 - 9  ██████████████████████████████ 3
                       10  ██████████ 1

truncated               1  cut to 10 tokens: dataset[7]
skipped                 1  no token to train on: dataset[4]
empty answers           0
bad records             0
duplicates              1  the same tokens as an earlier sample: dataset[2] = dataset[0]
no stop token           3  of 9 trained-on stretches (6 end in <|end|>): dataset[3], dataset[6],
                           dataset[7]
doubled BOS             1  dataset[1]
other labels            0
note                    1  the chat template leaves out the tools: dataset[3]"""


def test_bad_records_are_listed_with_their_reasons(tokenizer):
    summary = summary_of(RECORDS, tokenizer)
    for line in range(25):
        summary.report.bad.add(f"a.jsonl:{line}: not\x1b JSON")
    text = summary_text(summary)
    assert "\nbad records            25  left out, listed below\n" in text
    assert "\n\nbad records, left out\n  a.jsonl:0: not<U+001B> JSON\n" in text
    assert text.endswith("\n  and 5 more")


def test_rows_name_faults_only_if_they_occur(tokenizer):
    summary = summary_of(RECORDS[:1], tokenizer)
    assert not any(row.is_fault for row in [*total_rows(summary), *fault_rows(summary)])
    assert any(row.is_fault for row in fault_rows(summary_of(RECORDS, tokenizer)))
