"""A file of prompts becomes a file of answers, which an interruption does not cost."""

import contextlib
import json
import os
import signal

import pytest
import torch
from tiny import draw_adapter, make_tiny_model

from minitune import FastLanguageModel
from minitune.commands.answering import Answerer
from minitune.commands.generate import main
from minitune.data.records.prompt_records import read_prompt

HELLO = {"role": "user", "content": "Hello"}
RECORDS = [
    {"prompt": "Lisbon", "id": 7, "note": "Grüße"},
    {"messages": [{"role": "system", "content": "Be brief."}, HELLO]},
    {"prompt": [HELLO, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Go"}]},
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
    {"instruction": "Add", "input": "2 3", "output": "5", "history": [["a", "b"]]},
]
CONVERSATIONS = [  # as transformers would be given them
    [{"role": "user", "content": "Lisbon"}],
    RECORDS[1]["messages"],
    RECORDS[2]["prompt"],
    [HELLO],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "Add\n\n2 3"},
    ],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a base model, and beside it an adapter."""
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model(folder / "base")
    model, _ = FastLanguageModel.from_pretrained(folder / "base", device="cpu", load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=2)
    draw_adapter(model, b=0.3)
    model.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def command(folder, tmp_path):
    """Return a function that answers a list of records, or a file, and returns the exit code."""

    def answer(records, *flags, model="base"):
        path = records
        if isinstance(records, list):
            path = tmp_path / "prompts.jsonl"
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        files = ["--input", str(path), "--output", str(tmp_path / "answers.jsonl")]
        settings = ["--device", "cpu", "--no-load-in-4bit", "--max-new-tokens", "5"]
        return main(["--model", str(folder / model), *files, *settings, *flags])

    return answer


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def load(folder, name="base"):
    return FastLanguageModel.from_pretrained(folder / name, device="cpu", load_in_4bit=False)


def test_each_record_gets_the_answer_to_its_conversation(folder, command, tmp_path, capsys):
    assert command(RECORDS, "--chunk-size", "2") == 0
    model, tokenizer = load(folder)
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True) for c in CONVERSATIONS]
    answers = model.generate(prompts, max_new_tokens=5)
    expected = tokenizer.batch_decode(answers, skip_special_tokens=True)
    written = lines_of(tmp_path / "answers.jsonl")
    assert written == [
        record | {"answer": text} for record, text in zip(RECORDS, expected, strict=True)
    ]
    error = " ".join(capsys.readouterr().err.split())
    assert "answers at the end of a conversation are left out of its prompt (1 record of" in error
    assert "5 records" in error and sorted(os.listdir(tmp_path)) == [
        "answers.jsonl",
        "prompts.jsonl",
    ]


def test_lines_of_text_give_several_answers_of_both_sides_with_logprobs(folder, command, tmp_path):
    (tmp_path / "p.txt").write_text("Lisbon\n\nHello\n")
    flags = ["--num-return-sequences", "2", "--temperature", "1", "--seed", "3"]
    flags += ["--compare", "--logprobs", "--raw", "--answer-field", "out"]
    assert command(tmp_path / "p.txt", *flags, model="adapter") == 0
    model, tokenizer = load(folder, "adapter")
    written = lines_of(tmp_path / "answers.jsonl")
    assert [record["prompt"] for record in written] == ["Lisbon", "Hello"]
    for record in written:
        prompt = tokenizer.encode(record["prompt"])
        for key, adapter in (("out", None), ("out_base", False)):
            ids, logprobs = record[f"{key}_token_ids"], record[f"{key}_logprobs"]
            assert record[key] == tokenizer.batch_decode(ids, skip_special_tokens=True)
            for row, found in zip(ids, logprobs, strict=True):
                logits = logits_of(model, [*prompt, *row], adapter)[len(prompt) - 1 : -1]
                expected = logits.log_softmax(-1)[range(len(row)), row]
                assert found == pytest.approx(expected.tolist(), abs=1e-4)
        assert record["out"][0] != record["out"][1]
    assert [record["out"] for record in written] != [record["out_base"] for record in written]


def logits_of(model, ids, adapter):
    """Return the logits (T, V) of a text, with the adapter or, if `adapter` is False, without."""
    with torch.no_grad(), contextlib.nullcontext() if adapter is None else model.disable_adapter():
        return model(input_ids=torch.tensor([ids])).logits[0].float()


def test_a_stopped_run_goes_on_behind_its_last_answer(command, tmp_path, monkeypatch, capsys):
    flags = ["--chunk-size", "2", "--temperature", "1"]
    assert command(RECORDS, *flags) == 0
    output, partial = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.partial"
    whole = output.read_bytes()
    output.unlink()
    calls, answers = [], Answerer.answers

    def interrupted(self, prompts, *arguments):
        calls.append(len(prompts))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return answers(self, prompts, *arguments)

    monkeypatch.setattr(Answerer, "answers", interrupted)
    assert command(RECORDS, *flags) == 130
    assert "2 of 5 prompts are answered; the same command with --resume" in capsys.readouterr().err
    assert command(RECORDS, *flags) == 2
    assert "holds the answers of a run that was stopped; go on with" in capsys.readouterr().err
    assert command(RECORDS, *flags, "--resume", "--seed", "1") == 2
    assert "because another --seed gave these answers" in capsys.readouterr().err
    assert command(RECORDS[1:], *flags, "--resume") == 2
    assert "because another --input gave these answers" in capsys.readouterr().err
    with partial.open("ab") as file:
        file.write(b'{"prompt": "cut')  # as kill -9 leaves it
    assert command(RECORDS, *flags, "--resume", "--chunk-size", "1") == 0
    assert calls == [2, 2, 1, 1, 1] and output.read_bytes() == whole and not partial.exists()
    assert command(RECORDS, *flags) == 2
    assert "answers.jsonl exists; choose another name" in capsys.readouterr().err
    assert command(RECORDS, *flags, "--resume") == 0 and len(calls) == 5
    assert command(RECORDS[:1], *flags, "--overwrite") == 0
    assert output.read_bytes() == whole.splitlines(keepends=True)[0]


BAD = [
    ({"prompt": ""}, '"prompt" is empty, so there is no prompt'),
    ({"text": "x"}, "no prompt in the fields text; known are"),
    ({"prompt": "x", "messages": [HELLO]}, '"messages", each of which is a prompt'),
    ({"prompt": "x", "image": "a.png"}, '"image": models of this package read text only'),
    ({"prompt": "x", "answer": "y"}, 'the record holds "answer", which the answer would replace'),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "holds answers only"),
    ({"prompt": "x", "chat_template_kwargs": {"mood": 1}}, 'leaves out "mood" of'),
    ({"prompt": "lamp " * 300}, "but prompt and answer together may have 256"),
    ([1], "holds a list, not an object"),
]


def test_bad_records_are_named_before_a_model_is_loaded(command, monkeypatch, capsys):
    monkeypatch.setattr(FastLanguageModel, "from_pretrained", None)
    assert command([RECORDS[0], *(record for record, _ in BAD)]) == 2
    first, *lines = capsys.readouterr().err.splitlines()
    assert first.endswith(f"prompts.jsonl: {len(BAD)} records are bad")
    for number, (line, (_, message)) in enumerate(zip(lines, BAD, strict=True), 2):
        assert f"prompts.jsonl:{number}: " in line and message in line


WRONG = [
    (["--logprobs"], "--logprobs belongs to a file of prompts"),
    (["--input", "p.jsonl"], "--output is missing"),
    (["--input", "p", "--output", "a.csv"], "a.csv: answers are JSON lines; name a.jsonl"),
    (["--input", "p", "--output", "a", "--prompt", "x"], "--prompt and --input exclude"),
    (["--min-p", "0.5"], "takes the likeliest token, so min_p=0.5 would change nothing"),
    (["--raw", "--system", "x"], "so nothing holds the system message"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_flags_that_do_not_fit_are_refused_before_a_model_is_loaded(flags, message, capsys):
    assert main(["--model", "nowhere", *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_input_is_never_the_output(command, tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"prompt": "x"}\n')
    assert command(path, "--overwrite") == 2
    assert "is the file of the prompts too" in capsys.readouterr().err
    assert path.read_text() == '{"prompt": "x"}\n'


def test_a_system_message_of_the_command_is_for_records_without_one(folder):
    _, tokenizer = load(folder)
    own, other = (read_prompt(record, tokenizer, "Be kind.").ids for record in RECORDS[1:3])
    assert own == tokenizer.apply_chat_template(CONVERSATIONS[1], add_generation_prompt=True)
    messages = [{"role": "system", "content": "Be kind."}, *CONVERSATIONS[2]]
    assert other == tokenizer.apply_chat_template(messages, add_generation_prompt=True)
