"""A wrong flag names the right one, and a wrong value says what is expected."""

import pytest

from minitune.commands.__main__ import COMMANDS, main
from minitune.config.cli import in_flags
from minitune.config.cli.wrong_flags import FLAG, REMEDIES, wrong_flag_hint

TRAIN = {
    "--lr": "use --learning-rate",
    "--epochs": "use --num-train-epochs",
    "--batch-size": "use --per-device-train-batch-size",
    "--bs": "use --per-device-train-batch-size",
    "--grad-accum": "use --gradient-accumulation-steps",
    "--rank": "use --r",
    "--alpha": "use --lora-alpha",
    "--dropout": "LoRA dropout is not supported",
    "--context-length": "use --max-seq-length",
    "--seq-len": "use --max-seq-length",
    "--dataset": "use --data",
    "--train-file": "use --data",
    "--val-data": "use --eval-data",
    "--base-model": "use --model",
    "--out": "use --output-dir",
    "--output": "use --output-dir",
    "--quant": "--gguf q4_k_m writes a quantised file",
    "--gpu": "use --device cuda",
    "--cpu": "use --device cpu",
    "--fp16": "use --dtype float16",
    "--bf16": "use --dtype bfloat16",
    "--loss-scale": "float16 finds its loss scale by itself",
    "--4bit": "use --load-in-4bit, which is the default",
    "--8bit": "there is no 8-bit base",
    "--wandb": "`minitune report` draws them",
    "--plot": "use --report",
    "--tensorboard": "use --report-to tensorboard",
    "--patience": "EarlyStoppingCallback",
    "--evaluate": "use --eval-only",
    "--learning_rate": "write --learning-rate",
    "--learnin-rate": "did you mean --learning-rate?",
    "--modle": "did you mean --model?",
    "--prompt": "--prompt is a flag of `minitune generate`",
    "--zebra": "--help lists the flags",
}
OTHERS = {
    "generate": {
        "--max-tokens": "use --max-new-tokens",
        "--temp": "use --temperature",
        "--lora": "use --adapter",
        "--gguf-file": "use --model",
        "--predict": "use --max-new-tokens",
        "--ngl": "the whole model is on one device, which --device names",
        "--system-prompt": "use --system",
        "--lr": "--learning-rate is a flag of `minitune train`",
        "--4bit": "4 bit is the default",
    },
    "export": {
        "--out": "use --output",
        "--quant": "use --quantization-method",
        "--quantization": "use --quantization-method",
        "--outtype": "use --quantization-method",
        "--modelfile": "use --ollama",
        "--base": "use --model",
        "--lora-out": "use --gguf-adapter",
        "--save-method": "use --merged for a 16-bit folder",
        "--epochs": "--num-train-epochs is a flag of `minitune train`",
    },
    "data": {"--dataset": "use --data", "--out": "use --html", "--samples": "use --n"},
    "plan": {
        "--vram": "use --memory-budget",
        "--rank": "use --r",
        "--ctx": "use --max-seq-length",
        "--prompt": "`minitune generate`",
    },
}
CASES = [("train", flag, hint) for flag, hint in TRAIN.items()] + [
    (command, flag, hint) for command, hints in OTHERS.items() for flag, hint in hints.items()
]


def error_of(capsys, *arguments: str) -> str:
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert out == "" and len(error.splitlines()) == 1
    return error


@pytest.mark.parametrize(("command", "flag", "hint"), CASES)
def test_a_flag_of_another_program_is_answered_with_the_right_one(command, flag, hint, capsys):
    for words in ([flag, "1"], ["--model", "x", f"{flag}=1"]):
        error = error_of(capsys, command, *words)
        assert error.startswith(f"minitune {command}: error: unknown argument {flag}; ")
        assert hint in error


def flags_of_all_commands(capsys) -> dict[str, set[str]]:
    flags = {}
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        flags[command] = set(FLAG.findall(capsys.readouterr().out))
    return flags


def test_a_suggested_flag_exists_in_the_command_or_names_its_command(capsys):
    flags = flags_of_all_commands(capsys)
    for command, own in flags.items():
        for name in set(REMEDIES) - {flag[2:] for flag in own}:
            hint = wrong_flag_hint(f"--{name}", own)
            if "is a flag of" in hint:
                other = hint.partition("`minitune ")[2].split("`")[0].split()[0]
                assert other != command and FLAG.findall(hint)[0] in flags[other]
            elif hint != "--help lists the flags":
                assert set(FLAG.findall(hint)) <= own, (name, hint)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --data", "--data needs a value: minitune train --data FILE"),
        ("train --max-steps many", "--max-steps is many; expected a whole number"),
        ("train --learning-rate fast", "--learning-rate is fast; expected a number"),
        ("train --packing true", "--packing takes no value, but true follows it; --no-packing"),
        ("train --packing=true", "--packing takes no value, but true follows it; --no-packing"),
        ("generate", "--model is missing: minitune generate --model"),
        (
            "generate --model x --dtype half",
            "--dtype is half; choose from float32, bfloat16, float16",
        ),
        ("generate --model", "--model needs a value: minitune generate --model"),
        ("generate --model x --top-k many", "--top-k is many; expected a whole number"),
        ("export --model x --merge-base y", "--merge-base is y; choose from auto, original, nf4"),
        ("export --model x --imatrix a --imatrix-from b", "exclude each other"),
        ("--model x", "--model stands before the command"),
    ],
)
def test_a_missing_or_wrong_value_is_answered_in_plain_words(arguments, message, capsys):
    assert message in error_of(capsys, *arguments.split())


def test_flags_are_not_abbreviated(capsys):
    assert "unknown argument --quantization" in error_of(
        capsys, "export", "--model", "x", "--quantization", "q8_0"
    )


def test_help_and_version_answer(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in ([], ["help"], ["--help"]):
        assert main(arguments) == 0
        text = capsys.readouterr().out
        assert "First steps:" in text and max(map(len, text.splitlines())) <= 80
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("minitune ")
    with pytest.raises(SystemExit):
        main(["help", "export"])
    assert "usage: minitune export" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("python", "terminal"),
    [
        ("pass overwrite=True to replace it", "pass --overwrite to replace it"),
        ("load_in_4bit=False holds 16 bit", "--no-load-in-4bit holds 16 bit"),
        ("another output_dir, or", "another --output-dir, or"),
        ('train with dropped_text="warn" instead', "train with --dropped-text warn instead"),
        ("lower max_length (2048), or", "lower --max-length (2048), or"),
        ("leave the check out with verify=False", "leave the check out with --no-verify"),
        ("max_steps is 0", "--max-steps is 0"),
        # Calls, quotes, paths, plain words and keys of files stay as they are.
        ("SFTConfig(output_dir='a', resume=True)", None),
        ("nothing reads 'max_steps' of the record", None),
        ("runs/max_steps/1 and max_steps.jsonl", None),
        ("the data of the model, on another device", None),
        ("a/config.json: max_steps is 0", None),
        ("run.toml: learning_rate is 'high'; expected a number", None),
    ],
)
def test_settings_in_python_words_become_flags_and_nothing_else_does(python, terminal):
    assert in_flags(python) == (terminal or python)
