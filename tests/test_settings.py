"""Settings from flags, TOML files and defaults; wrong ones are named."""

import re
import signal
import tomllib
from dataclasses import dataclass

import pytest

from minitune.config.architectures import LORA_TARGETS
from minitune.config.cli import as_dict, parse, read_settings, run_command, toml_text
from minitune.config.fields import check_settings, setting
from minitune.config.sft_config import SFTConfig
from minitune.stop_signals import Stopped


def test_flags_win_over_toml_and_toml_over_defaults(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('learning_rate = 1e-3\nseed = 7\ntarget_modules = ["q_proj", "v_proj"]\n')
    settings = parse(["--config", str(path), "--seed", "8", "--no-load-in-4bit", "--packing"])
    assert (settings.sft.learning_rate, settings.sft.seed, settings.sft.packing) == (1e-3, 8, True)
    assert settings.lora.target_modules == ("q_proj", "v_proj") and not settings.run.load_in_4bit
    assert settings.sft.logging_steps == 10
    # The command has its own default; the dataclass has TRL's.
    assert parse([]).sft.learning_rate == 2e-4


def test_all_linear_means_every_linear_on_the_command_line_and_in_toml(tmp_path):
    (tmp_path / "run.toml").write_text('target_modules = "all-linear"\n')
    assert parse(["--target-modules", "all-linear"]).lora.target_modules == LORA_TARGETS
    assert parse(["--config", str(tmp_path / "run.toml")]).lora.target_modules == LORA_TARGETS


def test_help_shows_lists_as_they_are_typed_and_the_effect_of_eval_data(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"(default: {' '.join(LORA_TARGETS)})" in text and "('" not in text
    assert "--eval-data makes it epoch" in text


def test_toml_errors_name_the_file_the_key_and_the_nearest_names(tmp_path):
    path = tmp_path / "run.toml"
    for text, message in [
        ("lerning_rate = 1", "unknown key 'lerning_rate'; did you mean learning_rate"),
        ("learning_rate = ", "not TOML"),
        ("[training]\nseed = 1", "unknown key 'training'"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError) as error:
            read_settings(path)
        assert str(path) in str(error.value) and message in str(error.value)
    path.write_text('learning_rate = "high"')
    with pytest.raises(ValueError, match="learning_rate is 'high'; expected a number"):
        parse(["--config", str(path)])


@pytest.mark.parametrize("name", ["output_dir", "logging_dir"])
def test_an_empty_folder_is_refused_by_name_everywhere(tmp_path, name):
    empty = f"{name} is ''; name a folder, such as '.' for the current one, or leave {name} out"
    with pytest.raises(ValueError, match=re.escape(empty)):
        SFTConfig(**{name: ""}, save_strategy="no")
    with pytest.raises(ValueError, match=re.escape(empty)):
        parse([f"--{name.replace('_', '-')}", ""])
    path = tmp_path / "run.toml"
    path.write_text(f'{name} = ""\n')
    with pytest.raises(ValueError, match=re.escape(f"{path}: {empty}")):
        parse(["--config", str(path)])
    assert getattr(SFTConfig(**{name: "."}), name) == "."


def test_settings_written_as_toml_read_back_unchanged(tmp_path):
    odd = 'a "quoted"\\path\n\tü \x7f 🦙'
    flags = ["--gguf", "q8_0", "f16", "--learning-rate", "1e-7", "--completion-only-loss"]
    settings = parse(["--model", odd, *flags])
    text = toml_text(as_dict(settings.run, settings.lora, settings.sft))
    assert tomllib.loads(text)["model"] == odd
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    read = parse(["--config", str(tmp_path / "config.toml")])
    assert (read.run, read.lora, read.sft) == (settings.run, settings.lora, settings.sft)


@dataclass(frozen=True)
class Example:
    """One field of each kind."""

    count: int = setting(1, "", minimum=1, maximum=9)
    share: float | None = setting(None, "", greater_than=0, less_than=1)
    flag: bool = setting(False, "")
    names: tuple[str, ...] = setting((), "", choices=("a", "b"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count is 0; expected at least 1"),
        ({"count": 10}, "count is 10; expected at most 9"),
        ({"count": True}, "count is True; expected a whole number"),
        ({"count": None}, "count is None; expected a whole number"),
        ({"share": 0}, "share is 0; expected more than 0"),
        ({"share": 1.0}, "share is 1.0; expected less than 1"),
        ({"share": float("inf")}, "share is inf; expected a finite number"),
        ({"flag": 1}, "flag is 1; expected true or false"),
        ({"names": ["a"]}, r"names is \['a'\]; expected a list of names"),
        ({"names": ("a", "c")}, "names names 'c'; choose from a, b"),
    ],
)
def test_a_value_outside_its_type_choices_or_limits_is_named(values, message):
    check_settings(Example())
    check_settings(Example(count=9, share=0.5, flag=True, names=("b", "a")))
    with pytest.raises(ValueError, match=message):
        check_settings(Example(**values))


def test_a_command_turns_expected_errors_and_ctrl_c_into_exit_codes(capsys):
    def command(error):
        if error is not None:
            raise error

    assert run_command("tool", command, None) == 0
    assert capsys.readouterr() == ("", "")
    for error, code, name in (
        (KeyboardInterrupt(), 130, "Ctrl-C"),
        (Stopped(signal.SIGTERM), 143, "SIGTERM"),
        (Stopped(signal.SIGHUP), 129, "SIGHUP"),
    ):
        assert run_command("tool", command, error) == code
        assert capsys.readouterr() == ("", f"tool: stopped by {name}\n")
        error.add_note("interrupted after step 3")  # the run has said it
        assert run_command("tool", command, error) == code
        assert capsys.readouterr() == ("", "")
    assert run_command("tool", command, ValueError("two\nlines")) == 2
    assert run_command("tool", command, FileNotFoundError("gone")) == 2
    assert capsys.readouterr() == ("", "tool: error: two lines\ntool: error: gone\n")
    with pytest.raises(TypeError):  # an unexpected error keeps its traceback
        run_command("tool", command, TypeError())


def test_paths_may_hold_commas_and_a_single_path_in_toml_is_a_list_of_one(tmp_path):
    settings = parse(["--data", "a,b.jsonl", "c.parquet", "--data-weights", "2", "0.5"])
    assert settings.run.data == ("a,b.jsonl", "c.parquet")
    assert settings.sft.data_weights == (2.0, 0.5)
    (tmp_path / "run.toml").write_text('data = "a,b.jsonl"\ndata_weights = [1]\n')
    settings = parse(["--config", str(tmp_path / "run.toml")])
    assert settings.run.data == (str(tmp_path / "a,b.jsonl"),)
    assert settings.sft.data_weights == (1,)
    (tmp_path / "again.toml").write_text(toml_text(as_dict(settings.run, settings.sft)))
    assert parse(["--config", str(tmp_path / "again.toml")]).run == settings.run
    with pytest.raises(ValueError, match=r"data_weights is 0.0; expected more than 0"):
        parse(["--data-weights", "1", "0"])
    with pytest.raises(ValueError, match=r"data_weights is 2; expected a list of numbers"):
        parse(["--config", str(_toml(tmp_path, "data_weights = 2"))])


def _toml(folder, text):
    path = folder / "wrong.toml"
    path.write_text(text + "\n")
    return path


def test_evaluation_data_on_the_command_line_is_used_unless_the_flag_says_no(tmp_path):
    config = ["--config", str(_toml(tmp_path, 'eval_strategy = "no"'))]
    assert parse(config).sft.eval_strategy == "no"
    assert parse([*config, "--eval-data", "a.jsonl"]).sft.eval_strategy == "epoch"
    never = ["--eval-data", "a.jsonl", "--eval-strategy", "no"]
    assert parse([*config, *never]).sft.eval_strategy == "no"
    every_7 = ["--eval-data", "a.jsonl", "--eval-steps", "7"]
    assert parse([*config, *every_7]).sft.eval_strategy == "steps"
    assert parse([*every_7, "--eval-strategy", "epoch"]).sft.eval_strategy == "epoch"
    steps = ["--config", str(_toml(tmp_path, 'eval_strategy = "steps"'))]
    assert parse([*steps, "--eval-data", "a.jsonl"]).sft.eval_strategy == "steps"
