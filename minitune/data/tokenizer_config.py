"""Checks of the keys of tokenizer_config.json that would change tokens and are not obeyed."""

import json
from pathlib import Path


def check_config(path: Path, config: dict) -> None:
    """Raise ValueError for keys of tokenizer_config.json that would change the tokens."""
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
