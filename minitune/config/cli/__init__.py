"""The command line and TOML files: they become the settings of a run.

Flags win over the TOML file, the file over the defaults. Each field of RunConfig, LoraConfig and
SFTConfig is a flag with dashes (`learning_rate` is --learning-rate) and a flat TOML key under its
own name. `config.toml` in a run folder is such a file: `--config runs/1/config.toml` repeats a run.

    settings.py      the known settings, and the values of one run
    toml_files.py    TOML in and out, with paths that do not depend on the working directory
    flags.py         the parsers of the commands
    wrong_flags.py   the flag that is meant by a wrong one
    running.py       errors and warnings for a person; Python's setting words become flags
"""

from minitune.config.cli.flags import (
    CommandParser,
    bounded,
    parse,
    parse_flags,
    settings_from_flags,
    settings_parser,
    split_items,
)
from minitune.config.cli.running import in_flags, print_notes, run_command
from minitune.config.cli.settings import Settings, as_dict, flag_of
from minitune.config.cli.toml_files import read_settings, toml_text, with_absolute_paths
from minitune.config.cli.wrong_flags import suggestion

__all__ = [
    "CommandParser",
    "Settings",
    "as_dict",
    "bounded",
    "flag_of",
    "in_flags",
    "parse",
    "parse_flags",
    "print_notes",
    "read_settings",
    "run_command",
    "settings_from_flags",
    "settings_parser",
    "split_items",
    "suggestion",
    "toml_text",
    "with_absolute_paths",
]
