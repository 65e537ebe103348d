"""The flags of the commands, and the settings that flags, TOML file and defaults give together."""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from minitune.config.architectures import LORA_TARGETS
from minitune.config.cli.running import in_flags
from minitune.config.cli.settings import GROUPS, KnownSetting, Settings, flag_of, known_settings
from minitune.config.cli.toml_files import moved_run, read_settings
from minitune.config.cli.wrong_flags import wrong_flag_hint
from minitune.config.numbers import Bounds, shown
from minitune.config.training_config import PATHS
from minitune.progress import print_message, quiet

ALL_LINEAR = "all-linear"
# SFTConfig has TRL's learning rate, which suits the training of all weights. The commands train
# adapters only, and these need about ten times that rate.
COMMAND_DEFAULTS = {"learning_rate": 2e-4}
# --help appends these to the text of the field.
COMMAND_HELP = {
    "target_modules": f"; {ALL_LINEAR} means all of them",
    "eval_strategy": "; --eval-data makes it epoch, with --eval-steps steps, unless it is given",
}
METAVARS = {
    "memory_budget": "SIZE",
    "host_memory": "SIZE",
    "template_date": "DATE",
    "model": "DIR",
    "adapter": "DIR",
    "output_dir": "DIR",
    "data": "FILE",
    "eval_data": "FILE",
    "gguf": "TYPE",
    "score_answer": "FUNCTION",
}
TYPE_METAVARS = {
    "memory_budget": "SIZE",
    "host_memory": "SIZE",
    "template_date": "DATE",
    int: "N",
    float: "NUMBER",
    str: "TEXT",
}
TRAIN_DESCRIPTION = "Train a LoRA adapter on one GPU or on the CPU. Needs --model and --data."
# Switches of a command that are no settings and no TOML keys.
SWITCHES = {
    "demo": "fetch a small model, train it on a shipped task, and show the result",
    "plan": "print the memory and time of a step, without reading weights, and exit",
    "eval_only": "print the loss of --model on --eval-data and exit; a run has its own data",
    "list_shapes": "list the models whose shapes are built in, and exit",
}
MAX_VALUE = 500  # characters of a value in a message
# Messages of argparse -> a sentence. The first group is the argument, with all its flags.
MESSAGES = {
    r"argument (\S+): expected (?:one|at least one|\d+) arguments?": "{0} needs a value",
    r"argument (\S+): invalid int value: (.*)": "{0} is {1}; expected a whole number",
    r"argument (\S+): invalid float value: (.*)": "{0} is {1}; expected a number",
    r"argument (\S+): (is .*; expected .*)": "{0} {1}",
    r"argument (\S+): invalid choice: (.*) \(choose from (.*)\)": "{0} is {1}; choose from {2}",
    r"argument (\S+): ignored explicit argument (.*)": "{0} takes no value, but {1} follows it",
    r"argument (\S+): not allowed with argument (\S+)": "{0} and {1} exclude each other",
    r"the following arguments are required: (.*)": "{0} is missing",
}


class _Quiet(argparse.Action):
    """A flag that quiets the package until the command ends. It is no setting."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any):
        hidden = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
        super().__init__(option_strings, nargs=0, **{**options, **hidden})

    def __call__(self, *_: Any) -> None:
        """Quiet the package."""
        quiet()


class CommandParser(argparse.ArgumentParser):
    """An argument parser that raises ValueError for a wrong command line, in plain words.

    Flags cannot be abbreviated: a new flag would change the meaning of an abbreviation.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **{"allow_abbrev": False, **options})
        text = "print errors only; results go to stdout as without it"
        self.add_argument("--quiet", action=_Quiet, help=text)

    def error(self, message: str):
        """Raise the message as a ValueError; `run_command` prints it."""
        for pattern, sentence in MESSAGES.items():
            if found := re.fullmatch(pattern, message):
                first, *others = (_shortened(group) for group in found.groups())
                flag = first.split("/")[0]
                raise ValueError(sentence.format(flag, *others) + self._end(flag, sentence))
        raise ValueError(message)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None):
        """Parse a command line.

        Raises: ValueError for a flag that does not exist, before anything else is found missing.
        """
        words = list(sys.argv[1:] if args is None else args)
        checked = words[: words.index("--")] if "--" in words else words
        if self._subparsers is not None:  # each of its commands checks its own flags
            checked = []
        for word in checked:
            flag = word.split("=")[0]
            is_flag = re.fullmatch(r"--[A-Za-z0-9][\w-]*|-[A-Za-z][\w-]*", flag)
            if is_flag and flag not in self._option_string_actions:
                raise ValueError(self._unknown_flag(flag))
        namespace, rest = super().parse_known_args(words, namespace)
        if rest:
            raise ValueError(self._unknown_value(words, rest[0]))
        return namespace, rest

    def _unknown_flag(self, flag: str) -> str:
        return f"unknown argument {flag}; {wrong_flag_hint(flag, self._option_string_actions)}"

    def _unknown_value(self, words: Sequence[str], value: str) -> str:
        """Return the error for a value that belongs to no flag."""
        before = words[words.index(value) - 1] if words.index(value) else ""
        action = self._option_string_actions.get(before)
        if action is not None and action.nargs == 0:
            sentence = "{0} takes no value, but {1} follows it"
            return sentence.format(before, value) + self._end(before, sentence)
        return f"unknown argument {value}; values follow a flag, as in --model DIR"

    def _end(self, flag: str, sentence: str) -> str:
        """Return the end of an error on a flag: how the flag is written, or turned off."""
        action = self._option_string_actions.get(flag)
        if action is None:
            return ""
        if action.nargs == 0:
            off = f"--no-{flag[2:]}"
            return f"; {off} turns it off" if off in self._option_string_actions else ""
        if sentence.endswith(("a value", "is missing")):
            return f": {self.prog} {flag} {action.metavar or action.dest.upper()}"
        return ""


def parse(
    argv: Sequence[str] | None = None,
    program: str = "minitune train",
    description: str = TRAIN_DESCRIPTION,
    switches: Sequence[str] = ("plan", "eval_only"),
    demo_defaults: dict[str, Any] | None = None,
    names: Iterable[str] | None = None,
) -> Settings:
    """Return the settings of a command line; --help prints the flags and exits.

    argv: the arguments after the program's name; default: those of this process.
    program, description: the command as the user types it and its purpose, for --help.
    switches: the names of SWITCHES that the command has.
    demo_defaults: defaults if the switch --demo is given.
    names: the settings that the command has as flags; default: all of them.

    Raises: ValueError, a single line, if the command line or the TOML file is wrong.
    """
    flags = parse_flags(settings_parser(program, description, switches, names), argv)
    return settings_from_flags(flags, demo_defaults)


def parse_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return the values of the flags that a command line gives, by their names.

    Raises: ValueError, a single line, if the command line is wrong.
    """
    flags = vars(parser.parse_args(argv))
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
    switches = {name: flags.pop(name, False) for name in SWITCHES}
    config = flags.pop("config", None)
    values = dict(demo_defaults or {}) if switches["demo"] else dict(COMMAND_DEFAULTS)
    given = (read_settings(config) if config else {}) | flags
    if config and given.get("resume") and "output_dir" not in flags:
        _follow_moved_run_(given, config)
    values |= given
    # Evaluation data on the command line is used, whatever the file says.
    no_strategy = "no" if flags.get("eval_data") else None
    if values.get("eval_data") and values.get("eval_strategy") in (None, no_strategy):
        usual = "steps" if "eval_steps" in flags else "epoch"
        values["eval_strategy"] = flags.get("eval_strategy", usual)
    # A TOML file may hold the word as a string, a flag always gives a list.
    if values.get("target_modules") in (ALL_LINEAR, (ALL_LINEAR,)):
        values["target_modules"] = LORA_TARGETS

    known = known_settings()
    groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for name, value in values.items():
        groups[known[name].group][name] = value
    try:
        configs = {group: cls(**groups[group]) for group, cls in GROUPS.items()}
    except ValueError as error:
        if config and str(error).split()[0] in given.keys() - flags.keys():
            raise ValueError(f"{config}: {error}") from None
        raise
    return Settings(**configs, **switches, given=frozenset(given), flags=frozenset(flags))


def _follow_moved_run_(given: dict[str, Any], config: str) -> None:
    """Set output_dir to the folder of config.toml if that run was moved, and print a note."""
    before = given.get("output_dir")
    if (folder := moved_run(config, before)) is not None:
        text = f"{config} names {before} as its folder, but lies beside a run: {folder} is resumed"
        print_message("note", f"{text}; --output-dir names another folder")
        given["output_dir"] = folder


def _shortened(text: str) -> str:
    """Return a part of a message of argparse without quotes, and never long."""
    text = text.replace("'", "")
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 3]}..."


def bounded(bounds: Bounds) -> Callable[[str], float]:
    """Return a `type` of argparse: the number of a text, which lies within the bounds."""

    def read(text: str) -> float:
        try:
            value = bounds.kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text}; expected {bounds}") from None
        if not bounds.hold(value):
            raise argparse.ArgumentTypeError(f"is {shown(value)}; expected {bounds}")
        return value

    return read


def _list_items(name: str, values: list) -> list:
    """Return the items of a list; `--gguf q8_0 f16` and `--gguf q8_0,f16` are the same."""
    if name in (*PATHS, "sample_prompts") or not isinstance(values[0], str):
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
        parser.add_argument(flag_of(name), action="store_true", help=SWITCHES[name])
    parser.add_argument(
        "--config", metavar="FILE", help="a TOML file with the settings below; flags win over it"
    )
    known = known_settings()
    for name in known if names is None else names:
        parser.add_argument(flag_of(name), **_flag_options(known[name]))
    return parser


def _flag_options(known: KnownSetting) -> dict[str, Any]:
    """Return the arguments of `add_argument` for one setting."""
    name, metadata = known.field.name, known.field.metadata
    default = COMMAND_DEFAULTS.get(name, known.field.default)
    shown = " ".join(default) if isinstance(default, tuple) else default
    text = metadata["help"] + COMMAND_HELP.get(name, "")
    if metadata["choices"] and name in METAVARS:  # too many choices to stand behind the flag
        text += f": {', '.join(metadata['choices'])}"
    if shown not in (None, ""):
        text += f" (default: {shown})"
    options: dict[str, Any] = {"help": in_flags(text).replace("%", "%%")}
    if known.types == (bool,):
        options["action"] = argparse.BooleanOptionalAction
    elif known.types == (tuple,):
        options |= {"nargs": "+", "type": known.item, "metavar": TYPE_METAVARS[known.item]}
    else:
        options |= {"type": known.types[0], "metavar": TYPE_METAVARS[known.types[0]]}
    if metadata["choices"]:
        options["metavar"] = "|".join(metadata["choices"])
    if name in METAVARS:
        options["metavar"] = METAVARS[name]
    return options
