"""Change TOML files, tables, texts and command lines."""

import tomllib
from pathlib import Path
from random import Random
from typing import Any

from fuzz.byte_mutants import damaged, reencoded
from fuzz.json_mutants import NUMBERS, TEXTS, JsonMutator, Raw, Twice, dump
from minitune.commands.data import DATA_SETTINGS
from minitune.commands.export_flags import export_parser
from minitune.commands.plan import PLAN_SETTINGS
from minitune.config.cli.settings import flag_of, known_settings

TOML_LINES = (
    "a = 1\n", "[table]\n", "[[list]]\n", "r = [1\n", "r = 1\nr = 2\n", "model.a = 1\n", '"" = 1\n',
    "date = 2020-01-01\n", "time = 07:32:00\n", "learning_rate = inf\n", "learning_rate = nan\n",
    'model = """\n', "x = '\n", "seed = 0x10\n", "seed = 1_000\n", "seed = +1\n", "\x00", "# é\n",
    "gguf = [[]]\n", "data = {a = 1}\n", "max_steps = 1e3\n", "r = true\n", "a" * 5000 + " = 1\n",
)  # fmt: skip
CELLS = (
    b'"', b'""', b",", b"\t", b"\n", b"\r\n", b"\r", b"\x00", b"\xff", b"\xef\xbb\xbf", b"prompt",
    b'"' * 300, b"x" * 200_000, b"," * 3000, b"\n" * 3000, b"\xed\xa0\x80", b"\x1a",
    b"\xe2\x80\xa8",
)  # fmt: skip
GENERATE_FLAGS = (
    "temperature top-p top-k min-p repetition-penalty num-return-sequences max-new-tokens seed raw "
    "max-seq-length system adapter device compare show-special-tokens stats stop-strings logprobs "
    "resume"
)
WORDS = (
    "--",
    "-",
    "---",
    "--=",
    "-x",
    "x",
    "",
    "@file",
    "--help-me",
    "\ud800",
    "--no-",
    "=1",
    "-1",
)
DATA_WORDS = (".", "..", "/", "nothing.jsonl", "", "/dev/null", "a\x00b", "~", "*", "-")


def toml_text(original: str, mutator: JsonMutator) -> str:
    """Return a TOML file of settings with changes."""
    rng = mutator.rng
    values = tomllib.loads(original)
    kind = rng.randrange(8)
    if kind == 0:
        return original + rng.choice(TOML_LINES)
    if kind == 1:
        lines = original.splitlines(keepends=True)
        lines.insert(rng.randrange(len(lines)), rng.choice(TOML_LINES))
        return "".join(lines)
    if kind == 2:
        depth = rng.choice((60, 900, 30_000))
        left, right = rng.choice((("[", "]"), ("{a = ", "}")))
        return f"r = {left * depth}1{right * depth}\n"
    if kind == 3:
        return original.replace("=", rng.choice(("==", " ", ":", "= =")), rng.randint(1, 3))
    for name in rng.sample(sorted(values), rng.randint(1, 3)):
        values[name] = mutator.value(values[name])
    return "".join(f"{name} = {_toml(value)}\n" for name, value in values.items())


def _toml(value: Any) -> str:
    """Return a value as TOML, as far as TOML has it."""
    if isinstance(value, Raw):
        return {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}.get(value, str(value))
    if isinstance(value, dict | Twice):
        items = ", ".join(f"{dump(str(key))} = {_toml(item)}" for key, item in value.items())
        return "{" + items + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return "''" if value is None else dump(value)


def csv_text(content: bytes, rng: Random) -> bytes:
    """Return a table or a text with hostile cells, or in another encoding."""
    kind = rng.randrange(5)
    if kind == 0:
        return damaged(content, rng)
    if kind == 1:
        return reencoded(content, rng)
    for _ in range(rng.randint(1, 3)):
        place = rng.randint(0, len(content))
        content = content[:place] + rng.choice(CELLS) + content[place:]
    return content


def flags(command: str, rng: Random, root: Path) -> list[str]:
    """Return a random command line."""
    names = {
        "plan": [flag_of(name) for name in PLAN_SETTINGS],
        "data": [flag_of(name) for name in DATA_SETTINGS] + ["--n", "--tokens", "--html"],
        "export": [flag for action in export_parser("")._actions for flag in action.option_strings],
        "generate": [f"--{name}" for name in GENERATE_FLAGS.split()],
    }
    known = names.get(command) or [flag_of(name) for name in known_settings()]
    model, data = root / "models" / "llama", root / "data" / "form-0.jsonl"
    words = ["--model", str(model)]
    if command in ("data", "train"):
        words += ["--data", str(data)]
    if command == "generate":
        words += ["--prompt", "a lamp", "--no-load-in-4bit", "--device", "cpu"]
        words += ["--max-new-tokens", "2"]
    for _ in range(rng.choice((1, 1, 2, 3))):
        flag = rng.choice([flag for flag in known if flag not in ("--help", "-h")])
        words.append(flag)
        if rng.random() < 0.7:
            words += _fitting_words(flag, rng)
        else:
            words += [_word(rng) for _ in range(rng.choice((0, 1, 1, 2)))]
    if rng.random() < 0.1:
        words.insert(rng.randrange(len(words)), rng.choice(WORDS))
    return words


def _fitting_words(flag: str, rng: Random) -> list[str]:
    """Return values of a flag that have the type of its setting."""
    setting = known_settings().get(flag[2:].replace("-", "_"))
    if setting is None:
        return [rng.choice(("1", "0.5", "q8_0", "x", "cpu"))]
    kind = setting.types[0]
    if kind is bool:
        return []
    if setting.field.metadata["choices"]:
        return [str(rng.choice(setting.field.metadata["choices"]))]
    if kind is str:
        return [rng.choice((*TEXTS, *DATA_WORDS))]
    whole = [number for number in NUMBERS if number.lstrip("-").isdigit()]
    return [rng.choice(whole if int in (kind, setting.item) else NUMBERS)]


def _word(rng: Random) -> str:
    """Return a value for a flag."""
    kind = rng.randrange(5)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind == 2:
        return rng.choice(TEXTS)
    if kind == 3:
        return rng.choice(DATA_WORDS)
    return rng.choice(("1", "2", "64", "cpu", "true", "1e-3", "q8_0", "8GiB", "nanGiB", "1e400GiB"))
