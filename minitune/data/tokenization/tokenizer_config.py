"""The keys of tokenizer_config.json that speak of tokens and are not obeyed.

Those that would change all tokens are refused. Those that transformers 5 ignores too, if there is a
tokenizer.json, are noted if that file says otherwise.
"""

import json
from pathlib import Path

from minitune.data.tokenization.json_backend import JsonBackend

SWITCHES = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "legacy",
    "split_special_tokens",
)


def check_config(path: Path, config: dict) -> None:
    """Raise ValueError for keys of tokenizer_config.json that would change the tokens."""
    for key in SWITCHES:
        if not isinstance(config.get(key), bool | None):
            raise ValueError(f"{path}: {key} is {config[key]!r:.60}, expected true or false")
    if config.get("split_special_tokens"):
        raise ValueError(
            f"{path}: split_special_tokens cuts the special tokens of a chat template into pieces; "
            "remove it"
        )
    versions = config.get("fast_tokenizer_files", [])
    if versions not in ([], ["tokenizer.json"]):
        raise ValueError(
            f"{path}: fast_tokenizer_files names {versions!r:.100}, but only tokenizer.json is "
            "read; keep the file that belongs to the model as tokenizer.json and remove the key"
        )


def check_prefix_space(path: Path, adds_prefix_space: bool, config: dict) -> None:
    """Raise ValueError if tokenizer.json contradicts add_prefix_space of the config.

    Some classes of transformers follow the file and others the key.
    """
    says = config.get("add_prefix_space")
    if isinstance(says, bool) and says != adds_prefix_space:
        puts = "puts a space" if adds_prefix_space else "puts no space"
        raise ValueError(
            f"{path}: {puts} before a text, but tokenizer_config.json says add_prefix_space "
            f"{json.dumps(says)}; correct one, or use the tokenizer.json that belongs to the model"
        )


def ignored_keys(path: Path, config: dict, backend: JsonBackend) -> list[str]:
    """Return a note for each key that tokenizer.json contradicts.

    path: the tokenizer.json.
    """
    notes = []
    for key, added in (("add_bos_token", backend.prefix), ("add_eos_token", backend.suffix)):
        says = config.get(key)
        if isinstance(says, bool) and says != bool(added):
            texts = [backend.id_to_token(index) for index in added]
            puts = f"puts {texts}" if added else "puts no token"
            notes.append(
                f"{path}: {puts} around a plain text and counts, as in transformers; "
                f"tokenizer_config.json says {key} {json.dumps(says)}"
            )
    if config.get("legacy") is False and backend.prefixes_each_stretch:
        notes.append(
            f"{path}: puts a space behind special tokens too and counts, as in llama.cpp; "
            "tokenizer_config.json says legacy false"
        )
    return notes
