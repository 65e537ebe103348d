"""The settings that a command line and a TOML file may hold, and those of one run."""

from dataclasses import Field, fields
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from minitune.config.sft_config import SFTConfig
from minitune.config.training_config import LoraConfig, RunConfig

GROUPS = {"run": RunConfig, "lora": LoraConfig, "sft": SFTConfig}
# They describe one start of a run, not the run.
NOT_WRITTEN = ("overwrite", "resume", "show", "check_base")


class Settings(NamedTuple):
    """All settings of a command line, and the switches that were given.

    given: names of the settings that a flag or the TOML file gives.
    flags: names of those that a flag gives.
    """

    run: RunConfig
    lora: LoraConfig
    sft: SFTConfig
    demo: bool = False
    plan: bool = False
    list_shapes: bool = False
    eval_only: bool = False
    given: frozenset[str] = frozenset()
    flags: frozenset[str] = frozenset()


class KnownSetting(NamedTuple):
    """A field of one of GROUPS.

    types: the types of its value. (tuple,) is a list.
    item: the type of a list's items.
    """

    group: str
    field: Field
    types: tuple[type, ...]
    item: type = str


def known_settings() -> dict[str, KnownSetting]:
    """Return the settings of all groups by name."""
    known = {}
    for group, cls in GROUPS.items():
        hints = get_type_hints(cls)
        for item in fields(cls):
            if item.metadata.get("python_only"):
                continue
            hint = hints[item.name]
            types = tuple(kind for kind in get_args(hint) or (hint,) if kind is not NoneType)
            if get_origin(hint) is tuple:
                known[item.name] = KnownSetting(group, item, (tuple,), types[0])
            else:
                known[item.name] = KnownSetting(group, item, types)
    return known


def flag_of(name: str) -> str:
    """Return the flag of a setting: `learning_rate` has --learning-rate."""
    return "--" + name.replace("_", "-")


def as_dict(*configs: Any) -> dict[str, Any]:
    """Return the fields of several settings objects as one flat dictionary, as in config.toml."""
    return {
        item.name: getattr(config, item.name)
        for config in configs
        for item in fields(config)
        if item.name not in NOT_WRITTEN and not item.metadata.get("python_only")
    }
