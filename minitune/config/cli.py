"""Command-line flags and TOML files into the dataclasses of config.py: a TOML file, then flags, over the defaults.

Every field is a flag under its own name with dashes (`learning_rate` is --learning-rate) and a TOML key under its own
name; the keys are flat, and which dataclass one belongs to follows from its name. `config.toml` in a run folder is such
a file, so `--config runs/1/config.toml` repeats that run.
"""

import argparse
import difflib
import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import Field, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from minitune.config.architectures import LORA_TARGETS
from minitune.config.fields import check_settings, setting
from minitune.config.training_config import GGUF_METHODS, LoraConfig, SFTConfig

DTYPES = ("float32", "bfloat16", "float16")
CHECKPOINTING = ("unsloth", "auto", "true", "false")
# Where the command differs from the dataclass: SFTConfig keeps TRL's rate, which suits training all weights; only
# adapters are trained here, and they want about ten times that.
COMMAND_DEFAULTS = {"learning_rate": 2e-4}
ALL_LINEAR = "all-linear"
COMMAND_HELP = {  # what --help adds to a field's own text
    "target_modules": f"; {ALL_LINEAR} means every one there is",
    "eval_strategy": "; --eval-data makes it epoch where nothing else is given",
}
NOT_WRITTEN = ("overwrite", "resume")  # about one start of a run, not about the run


@dataclass(frozen=True)
class RunConfig:
    """What the command needs besides SFTConfig and LoraConfig: the model, the data, and what is written at the end."""

    model: str | None = setting(
        None, "model folder, or an org/name id in the local Hugging Face cache"
    )
    data: str | None = setting(None, "training data, a JSONL file")
    eval_data: str | None = setting(None, "evaluation data, a JSONL file")
    max_seq_length: int | None = setting(
        None,
        "tokens of the longest sample; default 2048, or all that the model knows where that is less",
        least=2,
    )
    load_in_4bit: bool = setting(
        True, "keep the frozen linears in NF4 (QLoRA) rather than in 16 bit"
    )
    dtype: str | None = setting(None, "compute dtype; default by device", choices=DTYPES)
    offload_embedding: bool = setting(
        False, "keep the embedding in host memory, from where a GPU reads its rows"
    )
    use_gradient_checkpointing: str = setting(
        "unsloth", "what is recomputed in backward", choices=CHECKPOINTING
    )
    random_state: int | None = setting(
        None,
        "the adapter's first values are drawn from this; default: seed",
        least=-(2**63),
        most=2**64 - 1,
    )
    device: str | None = setting(None, "cpu, cuda, cuda:1, ...; default: a GPU where there is one")
    merge: bool = setting(False, "write the merged 16-bit model to OUTPUT_DIR/merged at the end")
    merge_base: str = setting(
        "auto", "weights that the adapter is merged onto", choices=("auto", "original", "nf4")
    )
    gguf: tuple[str, ...] = setting(
        (), "write GGUF files at the end, of these types", choices=GGUF_METHODS
    )

    def __post_init__(self):
        check_settings(self)
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(
                f"device is {self.device!r}; expected cpu, cuda, or a numbered GPU such as cuda:1"
            )


class Settings(NamedTuple):
    """Everything that a command was told, and whether it is the demonstration (with defaults of its own) or a plan."""

    run: RunConfig
    lora: LoraConfig
    sft: SFTConfig
    demo: bool = False
    plan: bool = False


GROUPS = {"run": RunConfig, "lora": LoraConfig, "sft": SFTConfig}


def _known() -> dict[str, tuple[str, Field, tuple[type, ...]]]:
    """Name -> (group, field, the types its value may have; (tuple,) for a list of names)."""
    known = {}
    for group, cls in GROUPS.items():
        hints = get_type_hints(cls)
        for item in fields(cls):
            hint = hints[item.name]
            kinds = (
                (tuple,)
                if get_origin(hint) is tuple
                else tuple(k for k in get_args(hint) or (hint,) if k is not NoneType)
            )
            known[item.name] = (group, item, kinds)
    return known


def nearest(name: str, known: Sequence[str]) -> str:
    """The known names most like a wrong one, for an error message."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}"


def read_toml(path: str | Path) -> dict[str, Any]:
    """Settings from a TOML file. ValueError names the file where it cannot be read, or holds an unknown key."""
    known = _known()
    try:
        values = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; --config takes a TOML file") from None
    except ValueError as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{path}: unknown key {name!r}; {nearest(name, list(known))}")
        if known[name][2] == (tuple,) and isinstance(value, list):
            values[name] = tuple(value)
    return values


def toml_text(values: dict[str, Any]) -> str:
    """Scalars and lists as TOML lines that tomllib reads back as they were; None has no TOML and is left out."""

    def text(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(text, value))}]"
        if isinstance(value, str):  # JSON's escapes are TOML's too; DEL alone needs one more
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        return str(value).lower() if isinstance(value, bool) else repr(value)

    return "".join(
        f"{name} = {text(value)}\n" for name, value in values.items() if value is not None
    )


def as_dict(*configs) -> dict[str, Any]:
    """The fields of several settings dataclasses as one flat dictionary, as config.toml holds it."""
    return {
        f.name: getattr(c, f.name) for c in configs for f in fields(c) if f.name not in NOT_WRITTEN
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def _parser(defaults: dict[str, Any]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train.py",
        description="Train a LoRA adapter on one GPU or on the CPU: train.py --model DIR --data FILE --output-dir DIR",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--demo",
        action="store_true",
        help="fetch a small model, train it on a shipped task, and show it",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print what a step takes of memory and time, from config.json alone, and exit",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="a TOML file with the settings below; flags win over it"
    )
    for name, (_, item, kinds) in _known().items():
        default = defaults.get(name, item.default)
        words = " ".join(default) if isinstance(default, tuple) else default
        shown = "" if default is None or default == () else f" (default: {words})"
        text = item.metadata["help"] + COMMAND_HELP.get(name, "") + shown
        options: dict[str, Any] = {"help": text.replace("%", "%%")}
        if kinds == (bool,):
            options["action"] = argparse.BooleanOptionalAction
        elif kinds == (tuple,):
            options |= {"nargs": "+"}
        else:
            options |= {"type": kinds[0], "metavar": kinds[0].__name__.upper()}
        if choices := item.metadata["choices"]:
            options["metavar"] = "|".join(choices)
        parser.add_argument("--" + name.replace("_", "-"), **options)
    return parser


def parse(
    argv: Sequence[str] | None = None, demo_defaults: dict[str, Any] | None = None
) -> Settings:
    """The settings of one command line. ValueError, one line, for anything that is not right; --help exits.

    `demo_defaults` stand where the user set nothing and --demo was given.
    """
    parser = _parser(COMMAND_DEFAULTS)
    given, extra = parser.parse_known_args(argv)
    if extra:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        wrong = extra[0].split("=")[0]
        hint = nearest(wrong, flags) if wrong.startswith("-") else "values follow a flag"
        raise ValueError(
            f"unknown argument {wrong}; {hint if 'known are' not in hint else '--help lists the flags'}"
        )
    flags = vars(given)
    demo, plan, config = (
        flags.pop("demo", False),
        flags.pop("plan", False),
        flags.pop("config", None),
    )
    for name, value in flags.items():
        if isinstance(value, list):  # `--gguf q8_0 f16` and `--gguf q8_0,f16` are the same
            flags[name] = tuple(part for text in value for part in text.split(",") if part)
    values = dict(demo_defaults or {}) if demo else dict(COMMAND_DEFAULTS)
    values |= (read_toml(config) if config else {}) | flags
    if values.get("eval_data") and "eval_strategy" not in values:
        values["eval_strategy"] = "epoch"
    if values.get("target_modules") in (
        ALL_LINEAR,
        (ALL_LINEAR,),
    ):  # a TOML file may have it as a string
        values["target_modules"] = LORA_TARGETS
    known = _known()
    groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for name, value in values.items():
        groups[known[name][0]][name] = value
    return Settings(
        **{group: cls(**groups[group]) for group, cls in GROUPS.items()}, demo=demo, plan=plan
    )
