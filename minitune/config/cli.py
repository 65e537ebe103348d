"""Command-line flags and TOML files become the settings of a run; one wrapper runs every command.

Flags win over the TOML file, the file over the defaults. Each field of RunConfig, LoraConfig and
SFTConfig is a flag with dashes (`learning_rate` is --learning-rate) and a flat TOML key under its
own name. `config.toml` in a run folder is such a file: `--config runs/1/config.toml` repeats a run.
"""

import argparse
import difflib
import json
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from minitune.config.architectures import LORA_TARGETS
from minitune.config.fields import ListedErrors
from minitune.config.sft_config import SFTConfig
from minitune.config.training_config import PATHS, LoraConfig, RunConfig
from minitune.config.visible_text import on_one_line

ALL_LINEAR = "all-linear"
# SFTConfig has TRL's learning rate, which suits the training of all weights. The commands train
# adapters only, and these need about ten times that rate.
COMMAND_DEFAULTS = {"learning_rate": 2e-4}
# --help appends these to the text of the field.
COMMAND_HELP = {
    "target_modules": f"; {ALL_LINEAR} means all of them",
    "eval_strategy": "; --eval-data makes it epoch unless another value is given",
}
TRAIN_DESCRIPTION = "Train a LoRA adapter on one GPU or on the CPU. Needs --model and --data."
# Switches of a command that are no settings and no TOML keys.
SWITCHES = {
    "demo": "fetch a small model, train it on a shipped task, and show the result",
    "plan": "print the memory and time of a step, from config.json alone, and exit",
}
# They describe one start of a run, not the run.
NOT_WRITTEN = ("overwrite", "resume", "show", "check_base")
EXPECTED_ERROR, INTERRUPTED = 2, 130  # exit codes


class Settings(NamedTuple):
    """All settings of a command line, and the switches that were given."""

    run: RunConfig
    lora: LoraConfig
    sft: SFTConfig
    demo: bool = False
    plan: bool = False


GROUPS = {"run": RunConfig, "lora": LoraConfig, "sft": SFTConfig}


class KnownSetting(NamedTuple):
    """A field of one of GROUPS.

    types: the types of its value. (tuple,) is a list.
    item: the type of a list's items.
    """

    group: str
    field: Field
    types: tuple[type, ...]
    item: type = str


def _known_settings() -> dict[str, KnownSetting]:
    known = {}
    for group, cls in GROUPS.items():
        hints = get_type_hints(cls)
        for item in fields(cls):
            hint = hints[item.name]
            types = tuple(kind for kind in get_args(hint) or (hint,) if kind is not NoneType)
            if get_origin(hint) is tuple:
                known[item.name] = KnownSetting(group, item, (tuple,), types[0])
            else:
                known[item.name] = KnownSetting(group, item, types)
    return known


# ---- TOML


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return the settings in a TOML file.

    Raises: ValueError that names the file if it cannot be read or holds an unknown key.
    """
    known = _known_settings()
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; --config takes a TOML file") from None
    except ValueError as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{path}: unknown key {name!r}; {suggestion(name, known)}")
        if known[name].types == (tuple,) and isinstance(value, list):
            values[name] = tuple(value)
    return values


def toml_text(values: dict[str, Any]) -> str:
    """Return scalars and lists as TOML lines; None does not exist in TOML and is left out."""
    return "".join(
        f"{name} = {_toml_value(value)}\n" for name, value in values.items() if value is not None
    )


def _toml_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, str):  # JSON's escapes are TOML's too, except that TOML also escapes DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def as_dict(*configs: Any) -> dict[str, Any]:
    """Return the fields of several settings objects as one flat dictionary, as in config.toml."""
    return {
        item.name: getattr(config, item.name)
        for config in configs
        for item in fields(config)
        if item.name not in NOT_WRITTEN
    }


# ---- flags


class CommandParser(argparse.ArgumentParser):
    """An argument parser that raises ValueError for a wrong command line."""

    def error(self, message: str):
        """Raise the message as a ValueError; `run_command` prints it."""
        raise ValueError(message)


def parse(
    argv: Sequence[str] | None = None,
    program: str = "minitune train",
    description: str = TRAIN_DESCRIPTION,
    switches: Sequence[str] = ("plan",),
    demo_defaults: dict[str, Any] | None = None,
) -> Settings:
    """Return the settings of a command line; --help prints the flags and exits.

    argv: the arguments after the program's name; default: those of this process.
    program, description: the command as the user types it and its purpose, for --help.
    switches: the names of SWITCHES that the command has.
    demo_defaults: defaults if the switch --demo is given.

    Raises: ValueError, a single line, if the command line or the TOML file is wrong.
    """
    flags = parse_flags(settings_parser(program, description, switches), argv)
    return settings_from_flags(flags, demo_defaults)


def parse_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return the values of the flags that a command line gives, by their names.

    Raises: ValueError, a single line, if the command line is wrong.
    """
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(_unknown_argument(unknown[0], parser))
    flags = vars(given)
    for name, value in flags.items():
        if isinstance(value, list):
            flags[name] = tuple(_list_items(name, value))
    return flags


def settings_from_flags(
    flags: dict[str, Any], demo_defaults: dict[str, Any] | None = None
) -> Settings:
    """Return the settings that flags, TOML file and defaults give together.

    flags: the values of `parse_flags`.
    demo_defaults: defaults if the switch --demo is given.

    Raises: ValueError if the TOML file or a value is wrong.
    """
    demo, plan = flags.pop("demo", False), flags.pop("plan", False)
    config = flags.pop("config", None)
    values = dict(demo_defaults or {}) if demo else dict(COMMAND_DEFAULTS)
    if config:
        values |= read_toml(config)
    values |= flags
    # Evaluation data on the command line is used, whatever the file says.
    no_strategy = "no" if flags.get("eval_data") else None
    if values.get("eval_data") and values.get("eval_strategy") in (None, no_strategy):
        values["eval_strategy"] = flags.get("eval_strategy", "epoch")
    # A TOML file may hold the word as a string, a flag always gives a list.
    if values.get("target_modules") in (ALL_LINEAR, (ALL_LINEAR,)):
        values["target_modules"] = LORA_TARGETS

    known = _known_settings()
    groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for name, value in values.items():
        groups[known[name].group][name] = value
    configs = {group: cls(**groups[group]) for group, cls in GROUPS.items()}
    return Settings(**configs, demo=demo, plan=plan)


def _list_items(name: str, values: list) -> list:
    """Return the items of a list; `--gguf q8_0 f16` and `--gguf q8_0,f16` are the same."""
    if name in PATHS or not isinstance(values[0], str):
        return values
    return split_items(values)


def split_items(texts: Sequence[str]) -> list[str]:
    """Return the items of texts that may hold several, separated by commas."""
    return [item for text in texts for item in text.split(",") if item]


def settings_parser(
    program: str,
    description: str,
    switches: Iterable[str] = (),
    names: Iterable[str] | None = None,
) -> argparse.ArgumentParser:
    """Return a parser of flags without defaults: --config, the switches and the settings.

    names: the settings that the command has as flags; default: all of them.
    """
    parser = CommandParser(
        prog=program,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for name in switches:
        parser.add_argument(f"--{name}", action="store_true", help=SWITCHES[name])
    parser.add_argument(
        "--config", metavar="FILE", help="a TOML file with the settings below; flags win over it"
    )
    known = _known_settings()
    for name in known if names is None else names:
        parser.add_argument("--" + name.replace("_", "-"), **_flag_options(known[name]))
    return parser


def _flag_options(known: KnownSetting) -> dict[str, Any]:
    """Return the arguments of `add_argument` for one setting."""
    name, metadata = known.field.name, known.field.metadata
    default = COMMAND_DEFAULTS.get(name, known.field.default)
    shown = " ".join(default) if isinstance(default, tuple) else default
    text = metadata["help"] + COMMAND_HELP.get(name, "")
    if shown not in (None, ""):
        text += f" (default: {shown})"
    options: dict[str, Any] = {"help": text.replace("%", "%%")}
    if known.types == (bool,):
        options["action"] = argparse.BooleanOptionalAction
    elif known.types == (tuple,):
        options |= {"nargs": "+", "type": known.item}
    else:
        options["type"] = known.types[0]
        options["metavar"] = known.types[0].__name__.upper()
    if metadata["choices"]:
        options["metavar"] = "|".join(metadata["choices"])
    return options


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return a hint for an error message: the known names that are most like a wrong one."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}"


def _unknown_argument(argument: str, parser: argparse.ArgumentParser) -> str:
    wrong = argument.split("=")[0]
    if not wrong.startswith("-"):
        return f"unknown argument {wrong}; values follow a flag"
    flags = [flag for action in parser._actions for flag in action.option_strings]
    hint = suggestion(wrong, flags)
    if hint.startswith("known are"):  # all flags: too many for one line
        hint = "--help lists the flags"
    return f"unknown argument {wrong}; {hint}"


# ---- running a command


def run_command(program: str, command: Callable[..., int | None], *arguments: Any) -> int:
    """Call `command(*arguments)` and return the exit code of the process.

    program: the command as the user types it; error lines begin with it.

    An expected error (ValueError or OSError) becomes one line on stderr and exit code 2;
    ListedErrors keep their lines. A warning is one line on stderr. Ctrl-C gives 130; the command
    itself has said by then how to continue.
    """
    python_format, warnings.formatwarning = warnings.formatwarning, _format_warning
    try:
        return command(*arguments) or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError) as error:
        lines = str(error).splitlines() if isinstance(error, ListedErrors) else [str(error)]
        text = "\n".join(on_one_line(" ".join(line.split())) for line in lines)
        print(f"{program}: error: {text}", file=sys.stderr)
        return EXPECTED_ERROR
    finally:
        warnings.formatwarning = python_format


def _format_warning(message: Warning | str, *_: Any, **__: Any) -> str:
    """Return the line of a warning, without Python's file name and line of code."""
    return f"warning: {on_one_line(' '.join(str(message).split()))}\n"


def print_notes(notes: Iterable[str]) -> None:
    """Print facts that the user should know, one a line, on stderr."""
    for note in notes:
        print(f"note: {on_one_line(note)}", file=sys.stderr)
