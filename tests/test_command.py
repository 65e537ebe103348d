"""scripts/train.py: what it imports, its settings from TOML and flags, and how it fails."""

import errno
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tiny import make_tiny_model

from minitune import FastLanguageModel, SFTConfig, SFTTrainer
from minitune.config.architectures import LORA_TARGETS
from minitune.config.cli import as_dict, parse, read_toml, toml_text

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
FORBIDDEN = {
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "huggingface_hub",
}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model and a dataset, as a command finds them."""
    folder = tmp_path_factory.mktemp("files")
    make_tiny_model(folder / "model")
    records = [
        {
            "messages": [
                {"role": "user", "content": f"number {i}"},
                {"role": "assistant", "content": f"it is {i}"},
            ]
        }
        for i in range(12)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "broken.jsonl").write_text(json.dumps(records[0]) + "\n{not JSON\n")
    (folder / "unknown.jsonl").write_text('{"question": "?"}\n')
    return folder


@pytest.fixture
def train(monkeypatch):
    """The command's main function."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from demonstration import demo

    from minitune.commands.train import Demonstration, main

    demonstration = Demonstration(demo.DEFAULTS, demo.run)
    return functools.partial(main, program="train.py", demonstration=demonstration)


def arguments(files, output, *more):
    fixed = (
        "--model",
        "model",
        "--data",
        "data.jsonl",
        "--max-seq-length",
        "128",
        "--device",
        "cpu",
        "--max-steps",
        "2",
    )
    return [str(files / a) if a in ("model", "data.jsonl") else a for a in fixed] + [
        "--output-dir",
        str(output),
        *more,
    ]


def test_training_from_the_command_line_imports_no_hugging_face_trainer_stack(files, tmp_path):
    program = (
        "import runpy, sys\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    print(end.code)\n"
        f"print(sorted({FORBIDDEN!r} & set(sys.modules)), 'torch' in sys.modules)\n"
    )
    start = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); sys.argv[0] = {str(SCRIPTS / 'train.py')!r}\n"
    command = arguments(
        files,
        tmp_path / "run",
        "--merge",
        "--gguf",
        "f16",
        "--eval-data",
        str(files / "data.jsonl"),
    )
    done = subprocess.run(
        [sys.executable, "-c", start + program, *command],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=tmp_path,
    )
    assert done.stdout.splitlines() == ["0", "[] True"], done.stderr
    written = {p.name for p in (tmp_path / "run").iterdir()}
    assert written >= {"adapter", "checkpoint-2", "config.toml", "merged", "metrics.jsonl"}
    assert len(list((tmp_path / "run").glob("*.gguf"))) == 1
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in records if "eval_loss" in r] == [2]


def test_expected_error_is_one_line_on_stderr_and_exit_code_2(files, tmp_path):
    command = [
        sys.executable,
        SCRIPTS / "train.py",
        *arguments(files, tmp_path / "run", "--data", "absent.jsonl"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("train.py: error: ")
    assert "absent.jsonl" in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--modle", "x"], "unknown argument --modle; did you mean --model"),
        (["--max-steps", "many"], "--max-steps: invalid int value: 'many'"),
        (["--max-steps", "0"], "max_steps is 0; expected at least 1, or -1"),
        (["--learning-rate=-1"], "learning_rate is -1.0; expected at least 0"),
        (["--target-modules", "q_proj,w_proj"], "target module 'w_proj' does not exist"),
        (["--model", "absent/folder/here"], "absent/folder/here"),
        (["--data", "{files}/broken.jsonl"], "broken.jsonl:2"),
        (["--data", "{files}/unknown.jsonl"], "unknown.jsonl:1"),
        (["--dtype", "int8"], "dtype is 'int8'; expected one of float32, bfloat16, float16"),
        (["--device", "tpu"], "device is 'tpu'; expected cpu, cuda"),
        (["--gguf", "q2"], "gguf names 'q2'; choose from q8_0, f16, bf16, f32"),
        (["--max-length", "200"], "max_length 200 is more than the max_seq_length 128"),
        (["--overwrite", "--resume"], "exclude each other"),
        (["--config", "absent.toml"], "absent.toml: No such file"),
        (["--output-dir", "{files}/data.jsonl"], "data.jsonl is a file"),
        (["--output-dir", "{files}/data.jsonl/run"], "data.jsonl is a file"),
        (["--lora-alpha", "nan"], "lora_alpha is nan; expected a finite number"),
        (["--seed", str(2**70)], "expected at most"),
        (["extra"], "unknown argument extra"),
    ],
)
def test_bad_input_is_named_in_one_line(train, files, tmp_path, capsys, more, message):
    before = (files / "data.jsonl").read_bytes()
    assert train(arguments(files, tmp_path / "run", *(m.format(files=files) for m in more))) == 2
    out, error = capsys.readouterr()
    assert out == "" and len(error.splitlines()) == 1 and message in error
    assert not (tmp_path / "run").exists() and (files / "data.jsonl").read_bytes() == before


def test_model_and_data_have_to_be_named(train, capsys):
    assert train(["--data", "x.jsonl"]) == 2
    assert "--model is missing" in capsys.readouterr().err
    assert train(["--model", "x"]) == 2
    assert "--data is missing" in capsys.readouterr().err


def test_run_is_refused_resumed_and_repeated_from_its_own_config(train, files, tmp_path, capsys):
    output, again = tmp_path / "run", tmp_path / "again"
    assert train(arguments(files, output, "--r", "2")) == 0
    adapter = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    capsys.readouterr()
    assert train(arguments(files, output, "--r", "2")) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "already holds a run" in error
    assert (output / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert train(["--config", str(output / "config.toml"), "--resume"]) == 0
    assert "continued from checkpoint-2 (step 2)" in capsys.readouterr().err
    assert train(["--config", str(output / "config.toml"), "--output-dir", str(again)]) == 0
    assert (again / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_run_started_from_python_is_repeated_from_its_own_config(train, files, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(
        files / "model", max_seq_length=100, device="cpu"
    )
    options = {"r": 2, "random_state": 11, "use_gradient_checkpointing": False}
    model = FastLanguageModel.get_peft_model(model, target_modules=["q_proj", "up_proj"], **options)
    args = SFTConfig(output_dir=tmp_path / "first", max_steps=2, learning_rate=1e-3)
    SFTTrainer(model, args, files / "data.jsonl", processing_class=tokenizer).train()
    settings = tomllib.loads((tmp_path / "first" / "config.toml").read_text())
    assert (settings["random_state"], settings["use_gradient_checkpointing"]) == (11, "false")
    command = [
        "--config",
        str(tmp_path / "first" / "config.toml"),
        "--output-dir",
        str(tmp_path / "again"),
    ]
    assert train([*command, "--device", "cpu"]) == 0
    adapters = [
        tmp_path / run / "adapter" / "adapter_model.safetensors" for run in ("first", "again")
    ]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    command[-1] = str(tmp_path / "other")
    assert train([*command, "--device", "cpu", "--random-state", "12"]) == 0
    assert (tmp_path / "other" / "adapter" / "adapter_model.safetensors").read_bytes() != adapters[
        0
    ].read_bytes()


def test_only_the_models_of_the_same_name_are_replaced(train, files, tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    (output / "mine-F16.gguf").write_bytes(b"mine")
    (output / "model-minitune-F16.gguf").write_bytes(b"old")
    command = arguments(files, output, "--gguf", "f16", "--merge")
    assert train(command) == 2
    error = capsys.readouterr().err
    assert (
        len(error.splitlines()) == 1 and "model-minitune-F16.gguf exists; pass --overwrite" in error
    )
    assert (output / "model-minitune-F16.gguf").read_bytes() == b"old"
    for more in ("--overwrite", "--resume"):
        assert train([*command, more]) == 0
        assert (output / "model-minitune-F16.gguf").read_bytes()[:4] == b"GGUF"
        assert (output / "merged" / "model.safetensors").is_file()
    assert (output / "mine-F16.gguf").read_bytes() == b"mine"
    assert not list(output.glob(".*"))


def test_overwritten_run_takes_its_own_gguf_files_along_and_no_others(
    train, files, tmp_path, capsys
):
    output = tmp_path / "run"
    assert train(arguments(files, output, "--gguf", "f16", "q8_0")) == 0
    for name in ("mine-F16.gguf", "model-minitune-BF16.gguf"):  # the run was not asked for BF16
        (output / name).write_bytes(b"mine")
    assert {p.name for p in output.glob("model-*")} == {
        f"model-minitune-{t}.gguf" for t in ("F16", "Q8_0", "BF16")
    }
    assert train(arguments(files, output, "--overwrite")) == 0
    assert {p.name for p in output.glob("*.gguf")} == {"mine-F16.gguf", "model-minitune-BF16.gguf"}


def test_command_that_ctrl_c_advises_goes_on_with_the_run(
    train, files, tmp_path, monkeypatch, capsys
):
    output, accumulate = tmp_path / "a run", SFTTrainer.accumulate

    def interrupted(trainer, samples):
        loss = accumulate(trainer, samples)
        signal.raise_signal(signal.SIGINT)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "accumulate", interrupted)
        assert (
            train(arguments(files, output, "--r", "2", "--eval-data", str(files / "data.jsonl")))
            == 130
        )
    advice = (
        capsys.readouterr()
        .err.splitlines()[-1]
        .split("continue with ")[1]
        .split(", or SFTConfig")[0]
    )
    program, *flags = shlex.split(advice)
    assert program == "train.py" and flags == ["--config", str(output / "config.toml"), "--resume"]
    assert train(flags) == 0
    assert "continued from checkpoint-1 (step 1)" in capsys.readouterr().err
    assert (output / "adapter").is_dir() and (output / "checkpoint-2").is_dir()


def test_models_of_an_earlier_run_stay_until_new_ones_are_whole(
    train, files, tmp_path, monkeypatch, capsys
):
    command = arguments(files, tmp_path, "--gguf", "f16", "--merge")
    assert train(command) == 0
    paths = [tmp_path / "merged" / "model.safetensors", tmp_path / "model-minitune-F16.gguf"]
    before = [path.read_bytes() for path in paths]

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module, written in (
        ("checkpoints.safetensors_writer", "write_safetensors"),
        ("gguf.export", "write_gguf"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"minitune.{module}.{written}", full)
            assert train([*command, "--resume"]) == 2
        assert "No space left" in capsys.readouterr().err
        assert [path.read_bytes() for path in paths] == before and not list(tmp_path.glob(".*"))


def test_overwrite_does_not_remove_the_model_that_is_trained_on(train, files, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(arguments(files, output, "--merge")) == 0
    before = sorted(output.rglob("*"))
    capsys.readouterr()
    for option in ("--overwrite", "--resume"):
        assert train(arguments(files, output, option, "--model", str(output / "merged"))) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and "is needed, but lies in" in error
    assert sorted(output.rglob("*")) == before


def test_demonstration_keeps_the_files_of_others_in_its_folder(train, files, tmp_path, capsys):
    (tmp_path / "mine.gguf").write_bytes(b"mine")
    command = [
        "--demo",
        "--model",
        str(files / "model"),
        "--max-steps",
        "1",
        "--max-seq-length",
        "256",
    ]
    command += ["--device", "cpu", "--no-merge", "--output-dir", str(tmp_path)]
    assert train(command) == 0
    assert (tmp_path / "mine.gguf").read_bytes() == b"mine" and (
        tmp_path / "model-minitune-Q8_0.gguf"
    ).is_file()
    assert train(command) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_flags_win_over_toml_and_toml_over_defaults(tmp_path):
    (tmp_path / "run.toml").write_text(
        'learning_rate = 1e-3\nseed = 7\ntarget_modules = ["q_proj", "v_proj"]\n'
    )
    settings = parse(
        ["--config", str(tmp_path / "run.toml"), "--seed", "8", "--no-load-in-4bit", "--packing"]
    )
    assert (settings.sft.learning_rate, settings.sft.seed, settings.sft.packing) == (1e-3, 8, True)
    assert settings.lora.target_modules == ("q_proj", "v_proj") and not settings.run.load_in_4bit
    assert settings.sft.logging_steps == 10
    assert (
        parse([]).sft.learning_rate == 2e-4
    )  # the command's own default, where the dataclass keeps TRL's


def test_all_linear_means_every_linear_on_the_command_line_and_in_toml(tmp_path):
    (tmp_path / "run.toml").write_text('target_modules = "all-linear"\n')
    assert parse(["--target-modules", "all-linear"]).lora.target_modules == LORA_TARGETS
    assert parse(["--config", str(tmp_path / "run.toml")]).lora.target_modules == LORA_TARGETS


def test_help_shows_lists_as_they_are_typed_and_what_eval_data_turns_on(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"(default: {' '.join(LORA_TARGETS)})" in text and "('" not in text
    assert "--eval-data makes it epoch" in text


def test_toml_errors_name_file_key_and_the_nearest_names(tmp_path):
    path = tmp_path / "run.toml"
    for text, message in [
        ("lerning_rate = 1", "unknown key 'lerning_rate'; did you mean learning_rate"),
        ("learning_rate = ", "not TOML"),
        ("[training]\nseed = 1", "unknown key 'training'"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError) as error:
            read_toml(path)
        assert str(path) in str(error.value) and message in str(error.value)
    path.write_text('learning_rate = "high"')
    with pytest.raises(ValueError, match="learning_rate is 'high'; expected a number"):
        parse(["--config", str(path)])


def test_settings_written_as_toml_read_back_as_they_were(tmp_path):
    odd = 'a "quoted"\\path\n\tü \x7f 🦙'
    settings = parse(
        [
            "--model",
            odd,
            "--gguf",
            "q8_0",
            "f16",
            "--learning-rate",
            "1e-7",
            "--completion-only-loss",
        ]
    )
    text = toml_text(as_dict(settings.run, settings.lora, settings.sft))
    assert tomllib.loads(text)["model"] == odd
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    assert parse(["--config", str(tmp_path / "config.toml")]) == settings


def test_demonstration_asks_trains_asks_again_and_may_be_repeated(
    train, files, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command = [
        "--demo",
        "--model",
        str(files / "model"),
        "--max-steps",
        "2",
        "--max-seq-length",
        "256",
        "--device",
        "cpu",
    ]
    for _ in range(2):  # the second replaces the first's folder
        assert train(command) == 0
        out, error = capsys.readouterr()
        assert out.count("of 48 held-out answers exactly right") == 2 and "step 2/2" in error
    written = {p.name for p in (tmp_path / "runs" / "demo").iterdir()}
    assert written == {
        "adapter",
        "config.toml",
        "merged",
        "metrics.jsonl",
        "model-minitune-Q8_0.gguf",
        "outputs.json",
    }


def test_answers_are_counted_as_right_only_when_they_are_the_expected_ones(train):
    from demonstration import demo

    records = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": c}]}
        for c in "abcd"
    ]
    text = demo.table(records, ["", "b ", "C", "x"], ["a", "b", "c", "x"])
    assert (
        "before    0 of 4" in text
        and "after     3 of 4 held-out answers exactly right (75%)" in text
    )


def test_a_plan_is_printed_without_weights_or_a_gpu(train, tmp_path, capsys, files):
    folder = tmp_path / "8b"
    folder.mkdir()
    shape = {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
    }
    shape |= {
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    }
    (folder / "config.json").write_text(
        json.dumps(shape | {"model_type": "llama", "rms_norm_eps": 1e-5})
    )
    assert (
        train(
            [
                "--plan",
                "--model",
                str(folder),
                "--memory-budget",
                "24GiB",
                "--max-seq-length",
                "4096",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "8,192 tokens a forward/backward, in samples of up to 4,096, on 24.00 GiB" in said
    for label in (
        "weights",
        "adapter and its gradient",
        "optimizer",
        "saved activations",
        "workspace",
        "peak",
        "time",
    ):
        assert f"\n{label} " in said
    assert train(["--plan", "--model", str(folder), "--memory-budget", "6GiB"]) == 0
    assert (
        "1,024 tokens" not in (said := capsys.readouterr().out)
        and "more than the 6.00 GiB there are" in said
    )
    for wrong, message in (
        (["--plan"], "--model is missing: train.py --plan"),
        (
            ["--plan", "--model", str(files / "model"), "--memory-budget", "24"],
            "'24' is not a size",
        ),
        (["--plan", "--model", "nowhere", "--memory-budget", "24GiB"], "nowhere"),
    ):
        assert train(wrong) == 2
        assert message in capsys.readouterr().err
