"""An evaluation without a run, and adapters that are trained further."""

import json
import math
import re
import tomllib

import pytest
from command_inputs import train, train_arguments, write_inputs

from minitune import FastLanguageModel, SFTConfig, SFTTrainer
from minitune.training.evaluation import evaluate

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return a folder with a tiny model, datasets, and a finished run with evaluations."""
    inputs = write_inputs(tmp_path_factory.mktemp("inputs"))
    (inputs / "eval.jsonl").write_text((inputs / "data.jsonl").read_text().splitlines()[3])
    more = ("--r", "2", "--learning-rate", "0.01", "--no-load-in-4bit", "--eval-data")
    assert train(train_arguments(inputs, inputs / "run", *more, str(inputs / "eval.jsonl"))) == 0
    return inputs


def last_eval_loss(run) -> float:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["eval_loss"] for record in records if "eval_loss" in record][-1]


def loss_of(capsys, *arguments) -> tuple[float, float, str]:
    """Return loss, perplexity and the text of --eval-only."""
    capsys.readouterr()
    assert train(["--eval-only", "--device", "cpu", *map(str, arguments)]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    loss, perplexity = re.match(r"eval_loss ([\d.]+), perplexity ([\d.e+]+), on ", out).groups()
    return float(loss), float(perplexity), out


def test_a_finished_run_is_evaluated_on_its_own_data_and_nothing_is_written(
    inputs, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = sorted((path, path.stat().st_mtime_ns) for path in inputs.rglob("*"))
    loss, perplexity, out = loss_of(capsys, "--model", inputs / "run")
    assert loss == pytest.approx(last_eval_loss(inputs / "run"), abs=1e-4)
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    assert "1 samples" in out and str(inputs / "run" / "adapter") in out
    assert sorted((path, path.stat().st_mtime_ns) for path in inputs.rglob("*")) == before
    assert not list(tmp_path.iterdir())
    base = ("--model", inputs / "model", "--no-load-in-4bit", "--max-seq-length", "128")
    data = ("--eval-data", inputs / "eval.jsonl")
    with_adapter = loss_of(capsys, *base, *data, "--adapter", inputs / "run")[0]
    assert with_adapter == loss
    assert loss_of(capsys, "--config", inputs / "run" / "config.toml")[0] == loss
    assert loss_of(capsys, *base, *data)[0] > loss


def test_the_loss_of_a_base_is_that_of_a_trainer_before_its_first_step(inputs, capsys):
    model, tokenizer = FastLanguageModel.from_pretrained(
        inputs / "model", max_seq_length=128, device="cpu", load_in_4bit=False
    )
    data = str(inputs / "data.jsonl")
    found = evaluate(model, data, tokenizer)
    arguments = ("--model", inputs / "model", "--no-load-in-4bit", "--eval-data", data)
    assert loss_of(capsys, *arguments)[0] == pytest.approx(found.loss, abs=1e-4)
    model = FastLanguageModel.get_peft_model(model, r=2)
    trainer = SFTTrainer(model, SFTConfig(), data, data, tokenizer)
    assert found.loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)
    assert found.samples == len(trainer.eval_dataset)


def test_an_evaluation_without_a_model_or_data_names_what_is_missing(inputs, capsys):
    for arguments, message in (
        ([], "--model is missing: train.py --eval-only --model DIR --eval-data FILE"),
        (["--model", str(inputs / "model")], "--eval-data is missing"),
        (["--data", "x"], "--data changes nothing in an evaluation; leave it out"),
        (["--model", str(inputs / "model"), "--eval-data", "absent"], "absent: no such file"),
    ):
        assert train(["--eval-only", *arguments]) == 2
        assert message in capsys.readouterr().err


def weights_of(run) -> bytes:
    return (run / ADAPTER).read_bytes()


def test_a_run_is_trained_further_from_its_adapter_into_a_new_run(inputs, tmp_path, capsys):
    further, again = tmp_path / "further", tmp_path / "again"
    more = ("--data", str(inputs / "data.jsonl"), "--device", "cpu", "--learning-rate", "0")
    common = (*more, "--max-steps", "1", "--no-load-in-4bit", "--max-seq-length", "128")
    arguments = ["--model", str(inputs / "run"), *common, "--output-dir", str(further)]
    assert train(arguments) == 0
    # With a learning rate of 0 the adapter stays: it began with the values of the first run.
    assert weights_of(further) == weights_of(inputs / "run")
    settings = tomllib.loads((further / "config.toml").read_text())
    assert settings["model"] == str(inputs / "model") and settings["r"] == 2
    assert settings["adapter"] == str(inputs / "run" / "adapter")
    # --adapter beside the base, and a repetition and a continuation of the run, are the same.
    base = ["--model", str(inputs / "model"), "--adapter", str(inputs / "run")]
    assert train([*base, *common, "--output-dir", str(again), "--r", "2"]) == 0
    assert weights_of(again) == weights_of(further)
    config = ["--config", str(further / "config.toml")]
    assert train([*config, "--resume", "--max-steps", "2"]) == 0
    assert "continued from checkpoint-1" in capsys.readouterr().err
    assert train([*config, "--overwrite", "--learning-rate", "0.01"]) == 0
    assert weights_of(further) != weights_of(again)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--r", "8"), "--r 8 differs from the adapter's --r 2"),
        (("--lora-alpha", "32"), "--lora-alpha 32.0 differs from the adapter's --lora-alpha 16"),
        (("--use-rslora",), "--use-rslora differs from the adapter's --no-use-rslora"),
        (("--target-modules", "q_proj"), "--target-modules q_proj differs from the adapter's"),
    ],
)
def test_other_settings_than_those_of_the_adapter_are_refused(
    inputs, tmp_path, capsys, flags, message
):
    arguments = train_arguments(inputs, tmp_path / "new", *flags, "--model", str(inputs / "run"))
    assert train(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and not (tmp_path / "new").exists()


def test_the_adapter_that_a_run_begins_from_is_not_overwritten(inputs, capsys):
    run = inputs / "run"
    before = weights_of(run)
    assert train(train_arguments(inputs, run, "--model", str(run), "--overwrite")) == 2
    assert "is needed, but lies in" in capsys.readouterr().err
    assert weights_of(run) == before
