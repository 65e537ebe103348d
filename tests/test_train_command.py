"""The train command: imports, errors, and runs that are resumed, repeated or interrupted."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from command_inputs import train, train_arguments, write_inputs

from minitune import FastLanguageModel, SFTConfig, SFTTrainer
from minitune.commands.next_commands import command_line

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "train.py"
FORBIDDEN = {
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "huggingface_hub",
}
# A process that runs a script finds the package by itself, without PYTHONPATH or installation.
ENVIRONMENT = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
ENVIRONMENT["OMP_NUM_THREADS"] = "1"
ADAPTER = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return a folder with a tiny model and datasets."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_training_from_the_command_line_imports_no_hugging_face_trainer_stack(inputs, tmp_path):
    program = f"""
import runpy, sys
sys.argv[0] = {str(SCRIPT)!r}
sys.path.insert(0, {str(SCRIPT.parent)!r})
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print(end.code)
print(sorted({FORBIDDEN!r} & set(sys.modules)), "torch" in sys.modules)
"""
    data = str(inputs / "data.jsonl")
    output = tmp_path / "run"
    more = ("--merge", "--gguf", "f16", "--eval-data", data)
    done = subprocess.run(
        [sys.executable, "-c", program, *train_arguments(inputs, output, *more)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=tmp_path,
    )
    assert done.stdout.splitlines() == ["0", "[] True"], done.stderr
    written = {path.name for path in output.iterdir()}
    assert written >= {"adapter", "checkpoint-2", "config.toml", "merged", "metrics.jsonl"}
    assert len(list(output.glob("*.gguf"))) == 1
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "eval_loss" in record] == [2]


def test_an_expected_error_is_one_line_on_stderr_and_exit_code_2(inputs, tmp_path):
    arguments = train_arguments(inputs, tmp_path / "run", "--data", "absent.jsonl")
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("train.py: error: ")
    assert "absent.jsonl" in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--modle", "x"], "unknown argument --modle; did you mean --model"),
        (["--max-steps", "many"], "--max-steps is many; expected a whole number"),
        (["--max-steps", "0"], "--max-steps is 0; expected at least 1, or -1"),
        (["--learning-rate=-1"], "--learning-rate is -1.0; expected at least 0"),
        (["--target-modules", "q_proj,w_proj"], "target module 'w_proj' does not exist"),
        (["--model", "absent/folder/here"], "absent/folder/here"),
        (["--data", "{inputs}/broken.jsonl"], "broken.jsonl:2"),
        (["--data", "{inputs}/unknown.jsonl"], "unknown.jsonl:1"),
        (["--dtype", "int8"], "dtype is 'int8'; expected one of float32, bfloat16, float16"),
        (["--device", "tpu"], "device is 'tpu'; expected cpu, cuda"),
        (["--gguf", "q2"], "gguf names 'q2'; choose from f32, f16, bf16, q8_0"),
        (["--max-length", "200"], "--max-length 200 is more than the --max-seq-length 128"),
        (["--overwrite", "--resume"], "exclude each other"),
        (["--config", "absent.toml"], "absent.toml: not found"),
        (["--output-dir", "{inputs}/data.jsonl"], "data.jsonl is a file"),
        (["--output-dir", "{inputs}/data.jsonl/run"], "data.jsonl is a file"),
        (["--lora-alpha", "nan"], "--lora-alpha is nan; expected a finite number"),
        (["--seed", str(2**70)], "expected at most"),
        (["extra"], "unknown argument extra"),
    ],
)
def test_bad_input_is_named_in_one_line(inputs, tmp_path, capsys, more, message):
    before = (inputs / "data.jsonl").read_bytes()
    more = [text.format(inputs=inputs) for text in more]
    assert train(train_arguments(inputs, tmp_path / "run", *more)) == 2
    out, error = capsys.readouterr()
    assert out == "" and len(error.splitlines()) == 1 and message in error
    assert not (tmp_path / "run").exists()
    assert (inputs / "data.jsonl").read_bytes() == before


def test_a_missing_model_or_dataset_is_named(capsys):
    assert train(["--data", "x.jsonl"]) == 2
    assert "--model is missing" in capsys.readouterr().err
    assert train(["--model", "x"]) == 2
    assert "--data is missing" in capsys.readouterr().err


def test_resume_without_settings_names_the_command_to_type(capsys):
    assert train(["--resume"]) == 2
    assert "train.py --config runs/1/config.toml --resume" in capsys.readouterr().err


def test_only_a_missing_model_is_explained_by_its_built_in_shape(inputs, tmp_path, capsys):
    named = tmp_path / "llama-3-8b"
    named.symlink_to(inputs / "model")
    data = ["--data", str(inputs / "data.jsonl")]
    assert train(["--model", str(named), "--adapter", str(tmp_path / "none"), *data]) == 2
    error = capsys.readouterr().err
    assert "adapter folder" in error and "a plan knows the shape" not in error
    assert train(["--model", str(tmp_path / "no" / "llama-3-8b"), *data]) == 2
    assert "a plan knows the shape" in capsys.readouterr().err


def test_a_run_is_refused_resumed_and_repeated_from_its_own_config(inputs, tmp_path, capsys):
    output, again = tmp_path / "run", tmp_path / "again"
    config = str(output / "config.toml")
    assert train(train_arguments(inputs, output, "--r", "2")) == 0
    adapter = (output / ADAPTER).read_bytes()
    capsys.readouterr()
    assert train(train_arguments(inputs, output, "--r", "2")) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "already holds a run" in error
    assert (output / ADAPTER).read_bytes() == adapter
    assert train(["--config", config, "--resume"]) == 0
    assert "continued from checkpoint-2 (step 2)" in capsys.readouterr().err
    assert train(["--config", config, "--output-dir", str(again)]) == 0
    assert (again / ADAPTER).read_bytes() == adapter


def test_eval_data_of_a_finished_run_evaluates(inputs, tmp_path, capsys):
    output, data = tmp_path / "run", str(inputs / "data.jsonl")
    assert train(train_arguments(inputs, output, "--r", "2")) == 0
    capsys.readouterr()
    config = str(output / "config.toml")
    assert train(["--config", config, "--resume", "--eval-data", data]) == 0
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics if "eval_loss" in record] == [2]
    assert "eval_loss" in capsys.readouterr().err


def test_a_run_started_from_python_is_repeated_from_its_own_config(inputs, tmp_path):
    first, again, other = tmp_path / "first", tmp_path / "again", tmp_path / "other"
    model, tokenizer = FastLanguageModel.from_pretrained(
        inputs / "model", max_seq_length=100, device="cpu"
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=2,
        target_modules=["q_proj", "up_proj"],
        random_state=11,
        use_gradient_checkpointing=False,
    )
    args = SFTConfig(output_dir=first, max_steps=2, learning_rate=1e-3)
    SFTTrainer(model, args, inputs / "data.jsonl", processing_class=tokenizer).train()
    settings = tomllib.loads((first / "config.toml").read_text())
    assert (settings["random_state"], settings["use_gradient_checkpointing"]) == (11, "false")
    command = ["--config", str(first / "config.toml"), "--device", "cpu", "--output-dir"]
    assert train([*command, str(again)]) == 0
    assert (first / ADAPTER).read_bytes() == (again / ADAPTER).read_bytes()
    assert train([*command, str(other), "--random-state", "12"]) == 0
    assert (other / ADAPTER).read_bytes() != (first / ADAPTER).read_bytes()


def test_the_command_printed_on_ctrl_c_continues_the_run(inputs, tmp_path, monkeypatch, capsys):
    output, accumulate = tmp_path / "a run", SFTTrainer.accumulate

    def interrupted(trainer, samples):
        loss = accumulate(trainer, samples)
        signal.raise_signal(signal.SIGINT)
        return loss

    data = str(inputs / "data.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "accumulate", interrupted)
        assert train(train_arguments(inputs, output, "--r", "2", "--eval-data", data)) == 130
    *_, advice, other_advice = capsys.readouterr().err.splitlines()
    assert other_advice.split()[0] == "or"
    typed = command_line("train.py", "train")
    assert advice.strip().startswith(typed)
    flags = shlex.split(advice.strip().removeprefix(typed))
    assert flags == ["--config", str(output / "config.toml"), "--resume"]
    assert train(flags) == 0
    assert "continued from checkpoint-1 (step 1)" in capsys.readouterr().err
    assert (output / "adapter").is_dir() and (output / "checkpoint-2").is_dir()
