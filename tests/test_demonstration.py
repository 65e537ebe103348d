"""The demonstration asks, trains and asks again, and counts only exact answers."""

import pytest
from command_inputs import train, write_inputs
from demonstration import demo


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return a folder with a tiny model and datasets."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def demo_arguments(inputs, *more):
    """Return the arguments of a demonstration with a tiny model on the CPU."""
    return [
        *("--demo", "--model", str(inputs / "model")),
        *("--max-seq-length", "256", "--device", "cpu"),
        *more,
    ]


def test_the_demonstration_asks_trains_asks_again_and_can_be_repeated(
    inputs, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second run replaces the first one's folder
        assert train(demo_arguments(inputs, "--max-steps", "2")) == 0
        out, error = capsys.readouterr()
        assert out.count("of 48 held-out answers exactly right") == 2 and "step 2/2" in error
        assert "generate.py --model runs/demo " in error
        assert "llama-server -m runs/demo/model-minitune-Q8_0.gguf" in error
    written = {path.name for path in (tmp_path / "runs" / "demo").iterdir()}
    assert written == {
        "adapter",
        "config.toml",
        "merged",
        "metrics.jsonl",
        "model-minitune-Q8_0.gguf",
        "outputs.json",
        "run.json",
    }


def test_the_demonstration_keeps_foreign_files_in_its_folder(inputs, tmp_path, capsys):
    (tmp_path / "mine.gguf").write_bytes(b"mine")
    more = ("--max-steps", "1", "--no-merge", "--output-dir", str(tmp_path))
    assert train(demo_arguments(inputs, *more)) == 0
    assert (tmp_path / "mine.gguf").read_bytes() == b"mine"
    assert (tmp_path / "model-minitune-Q8_0.gguf").is_file()
    assert train(demo_arguments(inputs, *more)) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_an_answer_is_right_only_if_it_equals_the_expected_one():
    records = []
    for content in "abcd":
        question = {"role": "user", "content": "?"}
        records.append({"messages": [question, {"role": "assistant", "content": content}]})
    text = demo.table(records, ["", "b ", "C", "x"], ["a", "b", "c", "x"])
    assert "before    0 of 4" in text
    assert "after     3 of 4 held-out answers exactly right (75%)" in text
