"""Bad records are listed at once or left out, and the banner says what happened to the data."""

import json

import pytest
from tokenizer_files import write_chat_tokenizer
from training_runs import RECORDS, make_smallest_model, new_trainer

from minitune.config.cli import run_command
from minitune.config.fields import ListedErrors
from minitune.data.sources.sources import check_first_records
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.data.tokenize_dataset import tokenize_dataset


@pytest.fixture
def tokenizer(tmp_path):
    """Return a tokenizer with a chat template."""
    return Tokenizer.from_folder(write_chat_tokenizer(tmp_path / "tokenizer"))


def write_lines(path, lines):
    """Write a file and return its path."""
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_the_first_20_bad_records_are_listed_with_their_lines_and_all_are_counted(
    tokenizer, tmp_path
):
    good, bad = '{"text": "fine"}', ['{"text": 3}', "[1]", '{"text": "a']
    lines = [bad[i % 3] if i % 2 else good for i in range(1200)]
    path = write_lines(tmp_path / "mixed.jsonl", lines)
    with pytest.raises(ListedErrors) as error:
        tokenize_dataset(path, tokenizer, 100)
    first, *listed, last = str(error.value).splitlines()
    assert first.startswith(f"{path}: 600 of 1,200 records cannot be used (skip_bad=True")
    assert [line.split(": ")[0] for line in listed] == [f"{path}:{2 * i + 2}" for i in range(20)]
    assert "holds a list, not an object" in listed[0] and "not JSON" in listed[2]
    assert '"text" is a number' in listed[1]
    assert last == "... and 580 more"


def test_the_remedy_of_bad_records_is_told_once(tokenizer):
    records = [{"question": "a"}, {"question": "a"}, {"text": 3}, {"answer": "b"}]
    with pytest.raises(ListedErrors) as error:
        tokenize_dataset(records, tokenizer, 100)
    _, first, second, third, last = str(error.value).splitlines()
    assert first.startswith("dataset[0]: unknown shape with the fields question; known are")
    assert second == "dataset[1]: unknown shape with the fields question"
    assert third == 'dataset[2]: "text" is a number, expected a text'
    assert last.startswith("dataset[3]: unknown shape with the fields answer; known are")


def test_a_single_bad_record_is_one_line_that_begins_with_its_place(tokenizer, tmp_path):
    path = write_lines(tmp_path / "one.jsonl", ['{"text": "fine"}', '{"text": 3}'])
    with pytest.raises(ValueError) as error:
        tokenize_dataset(path, tokenizer, 100)
    assert str(error.value).startswith(f"{path}:2: ") and len(str(error.value).splitlines()) == 1


def test_skip_bad_leaves_exactly_the_bad_records_out_and_reports_them(tokenizer):
    records = [{"text": f"line {i}"} for i in range(9)]
    mixed = [*records[:4], {"text": None}, {"texts": "a"}, *records[4:]]
    kept = tokenize_dataset(mixed, tokenizer, 100, skip_bad=True)
    assert list(kept.samples) == list(tokenize_dataset(records, tokenizer, 100).samples)
    assert [kept.samples.origin(i) for i in (3, 4)] == ["dataset[3]", "dataset[6]"]
    assert kept.report.bad.count == 2 and kept.report.records == 11
    assert [text.split(":")[0] for text in kept.report.bad.origins] == ["dataset[4]", "dataset[5]"]


def test_a_dataset_of_bad_records_alone_is_refused_also_with_skip_bad(tokenizer):
    with pytest.raises(ValueError, match=r"each of its 2 records is bad; the first is dataset\[0"):
        tokenize_dataset([{"text": 1}, {"text": 2}], tokenizer, 100, skip_bad=True)


def test_a_file_without_a_record_that_can_be_read_is_refused_at_once(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", ["{", "}", "{"])
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .*; none of the first 3 records can be"):
        check_first_records(path)
    check_first_records(write_lines(path, ["{", '{"text": "a"}']))


def test_a_command_prints_listed_errors_line_by_line_and_others_in_one_line(capsys):
    def fail(error):
        raise error

    assert run_command("train", fail, ListedErrors("two:\n  a\nb")) == 2
    assert capsys.readouterr().err == "train: error: two:\na\nb\n"
    assert run_command("train", fail, ValueError("one:\n  a\nb")) == 2
    assert capsys.readouterr().err == "train: error: one: a b\n"


def test_the_banner_names_bad_records_and_notes_of_both_datasets(tmp_path, capsys):
    folder = make_smallest_model(tmp_path / "model")
    empty = {"messages": [RECORDS[0]["messages"][0], {"role": "assistant", "content": ""}]}
    trainer = new_trainer(
        folder,
        tmp_path / "run",
        eval_dataset=[empty, *RECORDS],
        records=[*RECORDS, {"text": 3}],
        skip_bad=True,
        max_steps=1,
    )
    trainer.train()
    lines = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    data = next(line for line in lines if line.startswith("data "))
    assert "24 samples" in data and data.endswith("; 1 bad records left out")
    assert any(line.startswith("note left out: dataset[24]: ") for line in lines)
    assert any(line.startswith("eval data 25 samples") for line in lines)
    assert "note an answer is empty (1 of 25 records, first dataset[0])" in lines


def test_a_finished_run_is_evaluated_if_evaluation_data_is_given(tmp_path, capsys):
    folder, output = make_smallest_model(tmp_path / "model"), tmp_path / "run"
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    new_trainer(folder, output, **settings).train()
    trainer = new_trainer(
        folder, output, eval_dataset=RECORDS[:4], eval_strategy="epoch", resume=True, **settings
    )
    trainer.train()
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 2 and metrics[-1]["eval_loss"] == trainer.evaluate()["eval_loss"]
    assert f"eval_loss {metrics[-1]['eval_loss']:.4f}" in capsys.readouterr().err
