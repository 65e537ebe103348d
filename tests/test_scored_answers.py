"""Evaluation by generation: which answers are scored, and that they change nothing."""

import tomllib

import numpy as np
import pytest
import torch
from command_inputs import train, train_arguments, write_inputs
from training_runs import (
    RECORDS,
    adapter_bytes,
    checkpoint_names,
    new_trainer,
    read_metrics,
    train_with_ctrl_c,
    without_times,
)

from minitune import FastLanguageModel, SFTConfig, write_report
from minitune.model.decoding.kv_cache import NoCacheRoom
from minitune.training.score_functions import ScoredRecord, ScoreError, read_score
from minitune.training.scored_answers import ScoredAnswers
from minitune.training.trainer import Trainer

EVALUATED = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "max_steps": 4,
    "learning_rate": 3e-2,
    "eval_max_new_tokens": 8,
}
FIRST = ScoredRecord("data.jsonl:1", {"messages": [], "kind": "city"}, "Oslo")


@pytest.fixture
def scored_model(smallest):
    options = {"max_seq_length": 128, "device": "cpu"}
    return FastLanguageModel.from_pretrained(smallest, **options)


def evaluations(output):
    return [record for record in read_metrics(output) if "eval_loss" in record]


def without_answers(output):
    return [
        {name: value for name, value in record.items() if not name.startswith("eval_")}
        | {"eval_loss": record.get("eval_loss")}
        for record in without_times(read_metrics(output))
    ]


# ---- in a run


def test_scores_are_means_over_the_answers_of_generate_and_change_no_bit(
    smallest, tmp_path, capsys
):
    seen = []

    def score(answer, reference, record):
        seen.append((answer, reference, record))
        return {"length": len(answer), "has_e": np.bool_("e" in answer)}

    plain, scored = tmp_path / "plain", tmp_path / "scored"
    new_trainer(smallest, plain, RECORDS[:5], **EVALUATED).train()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    trainer = new_trainer(
        smallest, scored, RECORDS[:5], score_answer=score, eval_answers=3, **EVALUATED
    )
    trainer.train()
    assert torch.equal(torch.get_rng_state(), state)
    assert adapter_bytes(scored) == adapter_bytes(plain)
    assert without_answers(scored) == without_answers(plain)
    assert [len(evaluations(path)) for path in (plain, scored)] == [2, 2]
    answers, last = [], evaluations(scored)[-1]
    for record in RECORDS[:3]:
        (question, reference), tokenizer = record["messages"], trainer.processing_class
        ids = tokenizer.apply_chat_template([question], add_generation_prompt=True)
        (tokens,) = trainer.model.generate([ids], max_new_tokens=8, do_sample=False)
        answers.append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
        assert (answers[-1], reference["content"], record) in seen
    assert last["eval_length"] == sum(map(len, answers)) / 3
    assert last["eval_has_e"] == sum("e" in answer for answer in answers) / 3
    assert last["eval_answers"] == 3 and last["eval_answers_cut"] in range(4)
    assert trainer.state.log_history[-2]["eval_length"] == last["eval_length"]
    assert "score_answer" not in tomllib.loads((scored / "config.toml").read_text())
    assert f"length {last['eval_length']:.4g}" in capsys.readouterr().err
    page = write_report(scored).read_text()
    assert page.count("Answers: length") == page.count("Answers: has_e") == 3


def test_a_resumed_run_has_the_scores_of_one_that_was_never_stopped(smallest, tmp_path):
    settings = {"score_answer": lambda answer: len(answer), "save_steps": 1, **EVALUATED}
    for name in ("whole", "stopped"):
        trainer = new_trainer(smallest, tmp_path / name, RECORDS[:2], **settings)
        if name == "stopped":
            train_with_ctrl_c(trainer, step=2)
            trainer = new_trainer(smallest, tmp_path / name, RECORDS[:2], resume=True, **settings)
        trainer.train()
    whole, stopped = (
        [{**record, "eval_answers_runtime": 0} for record in without_times(evaluations(path))]
        for path in (tmp_path / "whole", tmp_path / "stopped")
    )
    assert whole == stopped and len(whole) == 2 and whole[1]["eval_score"] > 0


def test_a_function_that_raises_costs_the_scores_and_not_the_run(smallest, tmp_path, capsys):
    def score(answer, reference):
        if answer != reference:  # the trial has the reference as its answer
            raise ZeroDivisionError("of a score")
        return 1.0

    trainer = new_trainer(smallest, tmp_path, RECORDS[:2], score_answer=score, **EVALUATED)
    assert trainer.train().global_step == 4
    printed = capsys.readouterr().err
    assert printed.count("no scores at step") == 2
    assert "no scores at step 4, and the run goes on: dataset[0]: score_answer score rai" in printed
    assert "raised ZeroDivisionError: of a score" in printed
    assert all("eval_score" not in record for record in evaluations(tmp_path))


def test_a_lack_of_memory_costs_the_scores_and_not_the_run(smallest, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise NoCacheRoom

    monkeypatch.setattr("minitune.training.scored_answers.greedy_answers", refuse)
    trainer = new_trainer(smallest, tmp_path, RECORDS[:2], score_answer="contains", **EVALUATED)
    assert trainer.train().global_step == 4
    assert capsys.readouterr().err.count("out of memory; lower eval_answers") == 2


def test_a_score_chooses_the_best_checkpoint_and_survives_an_interruption(
    smallest, tmp_path, monkeypatch, capsys
):
    scores = [0.2, 0.6, None, 0.4]  # the third one failed

    def evaluation(trainer, eval_dataset=None):
        value = scores[trainer.progress.step - 1]
        return {"eval_loss": 1.0} | ({} if value is None else {"eval_f1": value})

    monkeypatch.setattr(Trainer, "_evaluation", evaluation)
    settings = {
        **EVALUATED,
        "eval_steps": 1,
        "save_steps": 1,
        "save_strategy": "steps",
        "load_best_model_at_end": True,
        "metric_for_best_model": "f1",
        "score_answer": lambda answer: {"f1": 0},
    }
    output = tmp_path / "run"
    train_with_ctrl_c(new_trainer(smallest, output, RECORDS[:2], **settings), step=3)
    trainer = new_trainer(smallest, output, RECORDS[:2], resume=True, **settings)
    trainer.train()
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.6, 2)
    best = output / "checkpoint-2" / "adapter_model.safetensors"
    assert adapter_bytes(output) == best.read_bytes()
    assert "step 2, eval_f1 0.6000: the result is" in capsys.readouterr().err
    settings["save_strategy"], settings["load_best_model_at_end"] = "best", False
    new_trainer(smallest, tmp_path / "best", RECORDS[:2], **settings).train()
    assert checkpoint_names(tmp_path / "best") == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score_answer": "contains", "metric_for_best_model": "f1"}, "'f1', .* contains ret"),
        ({"metric_for_best_model": "f1"}, "'f1', which only score_answer can compute"),
        ({"score_answer": lambda reference: 1}, "<lambda> does not take answer; expected para"),
        ({"score_answer": lambda answer, text: 1}, "<lambda> takes text; expected parameters wi"),
        ({"score_answer": 3}, "score_answer is 3; expected a function"),
        ({"score_answer": lambda answer: None}, r"dataset\[0\]: .* returned None as score; ex"),
        ({"score_answer": "bleu"}, "FILE.py:FUNCTION, or choose exact_match or contains"),
    ],
)
def test_a_wrong_score_is_refused_before_the_run(smallest, tmp_path, settings, message):
    output = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        new_trainer(smallest, output, RECORDS[:2], **EVALUATED, **settings).train()
    assert not output.exists()


def test_a_score_without_evaluation_records_is_refused(smallest, tmp_path):
    with pytest.raises(ValueError, match="score_answer needs evaluation records"):
        new_trainer(smallest, tmp_path, score_answer="contains")
    with pytest.raises(ValueError, match="pass it to SFTTrainer"):
        SFTConfig(score_answer=len)


# ---- functions


@pytest.mark.parametrize(
    ("function", "scores"),
    [
        ("exact_match", {"eval_exact_match": 0.0}),
        ("contains", {"eval_contains": 1.0}),
        (lambda answer: np.float32(2), {"eval_score": 2.0}),
        (lambda answer, record: {"eval_a": record["kind"] == "city"}, {"eval_a": 1.0}),
        (lambda answer, *, reference, weight=1: torch.tensor(3), {"eval_score": 3.0}),
        (lambda **values: {"n": len(values)}, {"eval_n": 3.0}),
    ],
)
def test_a_function_gets_what_its_parameters_name(function, scores):
    assert read_score(function)("to Oslo", FIRST) == scores


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("good", "returned 'good' as f; expected a finite number or a bool"),
        (float("nan"), "returned nan as f"),
        (10**400, "returned a whole number of more than"),
        ({}, "returned an empty dict"),
        ({3: 1}, "a score named 3"),
        ({"loss": 1}, "a score named 'loss', which is a metric of its own"),
        ([1.0], r"returned \[1.0\] as f"),
    ],
)
def test_a_result_that_is_no_score_names_the_record(result, message):
    def f(answer):
        return result

    with pytest.raises(ScoreError, match=f"^data.jsonl:1: score_answer f .*{message}"):
        read_score(f)("to Oslo", FIRST)


# ---- prompts and references


def records_of(model, tokenizer, dataset, **settings):
    args = SFTConfig(**settings)
    score = read_score("contains")
    return ScoredAnswers(dataset, score, tokenizer, args, model.max_seq_length).records


def test_the_last_answer_is_the_reference_and_the_rest_is_the_prompt(scored_model):
    model, tokenizer = scored_model
    first, second = (record["messages"] for record in RECORDS[:2])
    pair = {"prompt": "two lamps: ", "completion": "blue lamp"}
    for settings in ({}, {"assistant_only_loss": False}, {"split_turns": True}):
        dataset = [{"messages": [*first, *second]}, *RECORDS[2:4]]
        found = records_of(model, tokenizer, dataset, eval_answers=2, **settings)
        prompt = tokenizer.apply_chat_template([*first, second[0]], add_generation_prompt=True)
        assert found[0].prompt == list(prompt)
        assert found[0].scored == ScoredRecord("dataset[0]", dataset[0], second[1]["content"])
        assert len(found) == 2 and found[1].scored.record is RECORDS[2]
    (found,) = records_of(model, tokenizer, iter([pair]), completion_only_loss=False)
    assert tokenizer.decode(found.prompt, skip_special_tokens=True) == "two lamps:"
    assert found.scored.reference == "blue lamp"


def test_records_without_a_prompt_are_refused_and_full_ones_are_left_out(scored_model, capsys):
    model, tokenizer = scored_model
    with pytest.raises(ValueError, match=r"dataset\[0\]: has no prompt, .* with response_part"):
        records_of(model, tokenizer, [{"text": "blue lamp"}])
    long = [{"role": "user", "content": "lamp " * 200}, {"role": "assistant", "content": "yes"}]
    found = records_of(model, tokenizer, [{"messages": long}, *RECORDS[:2]])
    assert [record.scored.origin for record in found] == ["dataset[1]", "dataset[2]"]
    assert "score_answer leaves out 1 of 3 evaluation records" in capsys.readouterr().err
    with pytest.raises(ValueError, match="none of the first 64 evaluation records has"):
        records_of(model, tokenizer, [{"messages": long}])


# ---- the command


def test_the_command_scores_by_a_function_in_a_file(tmp_path, capsys, monkeypatch):
    inputs = write_inputs(tmp_path)
    (inputs / "mine.py").write_text("def length(answer, reference):\n    return len(answer)\n")
    monkeypatch.chdir(inputs)
    more = ("--eval-data", "data.jsonl", "--score-answer", "mine.py:length", "--eval-answers", "2")
    short = ("--eval-max-new-tokens", "4", "--no-load-in-4bit")
    assert train(train_arguments(inputs, inputs / "run", *more, *short)) == 0
    settings = tomllib.loads((inputs / "run" / "config.toml").read_text())
    assert settings["score_answer"] == f"{inputs / 'mine.py'}:length"
    last = evaluations(inputs / "run")[-1]
    assert last["eval_answers"] == 2
    capsys.readouterr()
    alone = ("--eval-only", "--device", "cpu", "--model", "run")
    assert train([*alone, *more[2:], *short[:2]]) == 0
    out = capsys.readouterr().out
    assert f"length {last['eval_length']:.4g}, on 2 answers, " in out
    for wrong, message in (
        (["--score-answer", "no.py:length"], "no.py is no file"),
        (["--score-answer", "mine.py:width"], "mine.py has no function width"),
        (["--eval-answers", "2"], "--eval-answers belongs to --score-answer; give that too"),
    ):
        assert train([*alone, *wrong]) == 2
        assert message in capsys.readouterr().err
        assert train(train_arguments(inputs, inputs / "x", *more[:2], *wrong)) == 2
        assert message in capsys.readouterr().err
    (inputs / "mine.py").write_text("length = 3 / 0")
    assert train([*alone, *more[2:]]) == 2
    assert "mine.py fails with ZeroDivisionError: division by zero" in capsys.readouterr().err
    assert train(train_arguments(inputs, inputs / "x", *more[2:4])) == 2
    assert (
        "--score-answer scores answers at evaluations; give --eval-data" in capsys.readouterr().err
    )
