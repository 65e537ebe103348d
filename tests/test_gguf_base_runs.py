"""Runs on a GGUF file: plans, resume, recorded settings, outputs, next commands and refusals."""

import json
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from command_inputs import train, train_arguments, write_inputs
from gguf_files import make_tiny_gguf
from safetensors.torch import load_file
from test_eval_only import last_eval_loss, loss_of
from training_runs import ADAPTER_FILE, adapter_bytes, new_trainer, read_metrics, without_times

from minitune import FastLanguageModel
from minitune.commands.__main__ import main
from minitune.data import token_cache
from minitune.data.sources.sources import open_sources
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.base import model_files as model_files_module
from minitune.gguf.base.model_files import model_files
from minitune.training.check_base import check_base
from minitune.training.checkpoint import STATE

SMALL = {"layers": 1, "heads": 2, "kv_heads": 1}
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return a folder with datasets and base.gguf, a Q4_K_M file with a tied head."""
    inputs = write_inputs(tmp_path_factory.mktemp("inputs"))
    make_tiny_gguf(inputs, "q4_k_m", **SMALL).rename(inputs / "base.gguf")
    return inputs


@pytest.fixture
def base(inputs):
    """Return the GGUF file."""
    return inputs / "base.gguf"


def on_base(base: Path, output: Path, *more: str) -> list[str]:
    """Return the arguments of a run of two steps on a GGUF file."""
    return train_arguments(base.parent, output, "--model", str(base), "--r", "2", *more)


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """Return the folder of a finished run with evaluations and merged models."""
    output = tmp_path_factory.mktemp("runs") / "1"
    more = ("--eval-data", str(inputs / "data.jsonl"), "--merge", "--gguf", "q8_0")
    assert train(on_base(inputs / "base.gguf", output, *more)) == 0
    return output


# ---- resume


@pytest.mark.parametrize(("method", "tie"), [("q4_k_m", True), ("q8_0", False)])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(tmp_path, method, tie):
    file = make_tiny_gguf(tmp_path, method, tie=tie, **SMALL)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    new_trainer(file, straight, max_steps=4, **CHECKPOINTS).train()
    shutil.copytree(straight, resumed)
    for name in ("checkpoint-4", "adapter"):
        shutil.rmtree(resumed / name)
    new_trainer(file, resumed, max_steps=4, **CHECKPOINTS, resume=True).train()
    assert without_times(read_metrics(resumed)) == without_times(read_metrics(straight))
    for name in (ADAPTER_FILE, "checkpoint-4/optimizer.safetensors"):
        assert (resumed / name).read_bytes() == (straight / name).read_bytes()


def test_a_run_that_began_with_a_relative_path_is_resumed_from_anywhere(
    base, tmp_path, monkeypatch
):
    monkeypatch.chdir(base.parent)
    started, straight = tmp_path / "started", tmp_path / "straight"
    saving = ("--save-strategy", "steps", "--save-steps", "2", "--lr-scheduler-type", "constant")
    assert train(on_base(Path("base.gguf"), started, *saving)) == 0
    assert train(on_base(base, straight, *saving, "--max-steps", "4")) == 0
    monkeypatch.chdir(tmp_path)
    config = started / "config.toml"
    assert tomllib.loads(config.read_text())["model"] == str(base)
    assert train(["--config", str(config), "--resume", "--max-steps", "4"]) == 0
    state = json.loads((started / "checkpoint-4" / STATE).read_text())
    assert state["identity"]["model"] == str(base)
    assert adapter_bytes(started) == adapter_bytes(straight)


def test_a_run_is_resumed_on_the_moved_file_and_refused_on_another_or_none(base, tmp_path, capsys):
    file, output = tmp_path / "base.gguf", tmp_path / "run"
    shutil.copy(base, file)
    new_trainer(file, output, max_steps=2, **CHECKPOINTS).train()
    (tmp_path / "moved").mkdir()
    moved = file.rename(tmp_path / "moved" / file.name)
    capsys.readouterr()
    new_trainer(moved, output, max_steps=2, **CHECKPOINTS, resume=True).train()
    assert "warning" not in capsys.readouterr().err

    content = bytearray(moved.read_bytes())  # the same name and size, and another last block
    content[-5] ^= 1
    file.write_bytes(content)
    trainer = new_trainer(file, output, max_steps=3, **CHECKPOINTS, resume=True)
    with pytest.raises(ValueError, match=r"the weights of .*base.gguf are not those that the run"):
        trainer.train()
    file.unlink()
    with pytest.raises(ValueError, match=r"base.gguf: not found"):
        trainer.train()


def test_a_run_ends_with_its_best_checkpoint(base, tmp_path):
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    settings = CHECKPOINTS | {"save_steps": 1} | evaluating
    trainer = new_trainer(base, tmp_path, [{"text": "lamps"}], max_steps=3, **settings)
    trainer.train()
    best = tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    assert adapter_bytes(tmp_path) == (best / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_load_in_4bit_changes_nothing(base, load_in_4bit):
    model, _ = FastLanguageModel.from_pretrained(base, load_in_4bit=load_in_4bit, device="cpu")
    assert model.weight_formats == ("Q4_K", "Q6_K")


def test_the_recorded_config_says_that_the_linears_have_few_bits(base, tmp_path):
    new_trainer(base, tmp_path, max_steps=1).train()
    assert tomllib.loads((tmp_path / "config.toml").read_text())["load_in_4bit"] is True


# ---- what a run on a GGUF file prints and writes


def test_the_banner_names_the_types_and_the_next_commands_export_the_adapter(
    base, tmp_path, capsys
):
    assert train(on_base(base, tmp_path / "run 1")) == 0
    error = capsys.readouterr().err
    assert "linears Q4_K and Q6_K" in " ".join(error.split())
    commands = [shlex.split(line[11:]) for line in error.splitlines()[-4:]]
    generate, exported, server, report = commands
    run, adapter = str(tmp_path / "run 1"), str(tmp_path / "run 1" / "adapter.gguf")
    assert generate[2:4] == ["--model", run] and "--no-load-in-4bit" not in generate
    assert exported[2:] == ["--model", run, "--gguf-adapter", adapter]
    assert server == ["llama-server", "-m", str(base), "--lora", adapter]
    assert report[2:] == [run]
    assert main(["export", *exported[2:]]) == 0
    assert Path(adapter).is_file()


def test_a_run_writes_the_merged_folder_and_a_gguf_file(finished, capsys):
    merged = load_file(finished / "merged" / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in merged.values())
    assert (finished / "base-minitune-Q8_0.gguf").is_file()
    assert main(["generate", "--model", str(finished / "merged"), "--prompt", "number 0"]) == 0


def test_a_run_answers_and_is_evaluated_as_the_file_with_its_adapter(base, finished, capsys):
    prompt = ("--prompt", "number 0", "--max-new-tokens", "8", "--device", "cpu")
    answers = []
    for model in (["--model", str(finished)], ["--model", str(base), "--adapter", str(finished)]):
        assert main(["generate", *model, *prompt]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and answers[0].strip()
    loss = loss_of(capsys, "--model", finished)[0]
    assert loss == pytest.approx(last_eval_loss(finished), abs=1e-4)
    data = ("--eval-data", base.parent / "data.jsonl", "--max-seq-length", "128")
    assert loss_of(capsys, "--model", base, *data)[0] > loss


def test_a_file_in_32_bit_is_called_so(tmp_path, capsys):
    file = make_tiny_gguf(tmp_path, "f32", **SMALL)
    new_trainer(file, tmp_path / "run", max_steps=1).train()
    assert "linears 32-bit" in " ".join(capsys.readouterr().err.split())


def test_data_is_shown_with_the_tokenizer_of_the_file(base, capsys):
    data = ("--data", str(base.parent / "data.jsonl"))
    shown = []
    for model in (base, base.parent / "plain"):
        assert main(["data", "show", "--model", str(model), *data]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "number 0" in shown[0]


def test_a_plan_counts_the_types_of_the_file(base, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["plan", "--model", str(base)]) == 0
    out = capsys.readouterr().out
    assert f"{base}: 0.00 B parameters\nlinears in Q4_K and Q6_K, r 16" in out
    arguments = ["--model", str(base), "--memory-budget", "8GiB"]
    assert main(["plan", *arguments]) == 0
    plan = capsys.readouterr().out
    assert main(["plan", *arguments, "--no-load-in-4bit"]) == 0
    assert capsys.readouterr().out == plan  # a GGUF file keeps its own types
    assert train(["--plan", *arguments]) == 0
    assert capsys.readouterr().out == plan


# ---- the cache of tokens


@pytest.mark.parametrize("tokenizer", ["bpe", "llama3", "spm"])
def test_each_process_finds_the_tokens_that_another_one_cached(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(token_cache, "MIN_BYTES", 0)
    file = make_tiny_gguf(tmp_path, "f16", tokenizer=tokenizer, **SMALL)
    (tmp_path / "data.jsonl").write_text('{"text": "blue lamps"}\n')
    folders, keys = [], []
    for _ in range(2):
        model_files_module._folder_of.cache_clear()  # another process makes a folder of its own
        folders.append(model_files(file))
        sources = open_sources(tmp_path / "data.jsonl")
        keys.append(token_cache.dataset_key(sources, Tokenizer.from_folder(folders[-1]), {}))
    assert folders[0] != folders[1]
    assert keys[0] == keys[1] is not None


# ---- refused


def test_an_output_that_holds_the_base_is_not_replaced(finished, inputs, capsys):
    before = sorted(finished.rglob("*"))
    model = finished / "base-minitune-Q8_0.gguf"
    for option in ("--overwrite", "--resume"):
        arguments = train_arguments(inputs, finished, option, "--model", str(model))
        assert train(arguments) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and f"{model} is needed, but lies in" in error
    assert sorted(finished.rglob("*")) == before


def test_what_a_gguf_file_has_no_weights_for_is_refused_with_the_remedy(base, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(base, device="cpu")
    FastLanguageModel.get_peft_model(model, r=2)
    with pytest.raises(ValueError, match=r"not NF4; write them as a folder of 16 bit first"):
        model.save_4bit(tmp_path / "nf4")
    with pytest.raises(ValueError, match=r"base\.gguf as it is served, so there is nothing to che"):
        check_base(model, [])
    for merge_base in ("nf4", "original"):
        message = rf"merge_base '{merge_base}': .*base\.gguf; merge_base must be 'auto'"
        with pytest.raises(ValueError, match=message):
            model.save_pretrained_merged(tmp_path / "m", tokenizer, merge_base=merge_base)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_16bit": True}, "load_in_16bit=True: .*save_pretrained_merged, and load that"),
        (
            {"load_in_16bit": True, "load_in_4bit": False},
            "load_in_16bit=True: .*in the types that it has; .*save_pretrained_merged",
        ),
        ({"gguf_file": "base.gguf"}, "give the path of the GGUF file itself as model_name"),
        ({"offload_embedding": True}, "offload_embedding is not available: the head of this model"),
    ],
)
def test_loading_arguments_that_a_file_cannot_follow_are_refused(base, options, message):
    with pytest.raises(ValueError, match=message):
        FastLanguageModel.from_pretrained(base, device="cpu", **options)


def test_a_missing_file_is_named_with_those_beside_it(base, capsys):
    message = rf"^GGUF file .*bas\.gguf does not exist; {base.parent} holds base\.gguf$"
    with pytest.raises(ValueError, match=message):
        FastLanguageModel.from_pretrained(base.with_name("bas.gguf"))
    message = r"^GGUF file nowhere/base\.gguf does not exist$"
    with pytest.raises(ValueError, match=message):
        FastLanguageModel.from_pretrained("nowhere/base.gguf")
    assert main(["plan", "--model", "nowhere/base.gguf"]) == 2
    assert "GGUF file nowhere/base.gguf does not exist" in capsys.readouterr().err


def test_a_command_refuses_before_it_trains(base, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(on_base(base, output, "--merge", "--merge-base", "nf4")) == 2
    assert "--merge-base must be 'auto'" in capsys.readouterr().err
    assert not output.exists()
    assert main(["export", "--model", str(base), "--save-4bit", str(tmp_path / "nf4")]) == 2
    assert "not NF4" in capsys.readouterr().err
    assert not (tmp_path / "nf4").exists()


def test_check_base_says_in_a_run_that_there_is_nothing_to_check(base, tmp_path, capsys):
    assert train(on_base(base, tmp_path / "run", "--check-base")) == 0
    assert "so there is nothing to check" in " ".join(capsys.readouterr().err.split())
