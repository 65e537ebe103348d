"""Check the keys `tokenizer.*` of a GGUF file before a tokenizer is made of them.

llama.cpp aborts at some faults, and takes a default at others. Each of them is an error here,
because a wrong vocabulary would change the tokens that are trained.
"""

import math
from collections.abc import Mapping
from typing import Any

from gguf import TokenType

PREFIX = "tokenizer.ggml."
TEMPLATE_KEY, TEMPLATE_NAMES = "tokenizer.chat_template", "tokenizer.chat_templates"
REMEDY = "the file is damaged; convert or download it again"
# Kinds of llama.cpp's tokenizers from which no tokenizer is made here.
OTHER_MODELS = {
    "bert": "WordPiece",
    "t5": "a unigram model",
    "rwkv": "a trie of bytes",
    "gemma4": "BPE over marked spaces",
    "plamo2": "PLaMo's own",
    "hybriddna": "BPE with k-mers",
    "whitespace": "BPE of whole words",
    "none": "no vocabulary",
    "no_vocab": "no vocabulary",
}
REQUIRED_LISTS = {"gpt2": ("tokens", "merges"), "llama": ("tokens", "scores", "token_type")}
LIST_TYPES: dict[str, tuple[type, ...]] = {
    "tokens": (str,),
    "merges": (str,),
    "token_type": (int,),
    "scores": (int, float),
}
FLAGS = ("add_bos_token", "add_eos_token", "add_space_prefix")
UNDEFINED = 0  # a token type that llama.cpp takes for an ordinary one
TOKEN_TYPES = (UNDEFINED, *map(int, TokenType))


def check_tokenizer_keys(metadata: Mapping[str, Any]) -> None:
    """Check kinds, lengths and ranges of the values.

    Raises: ValueError that names the key, the value and the remedy.
    """
    check_vocabulary_kind(metadata)
    _check_lengths(metadata)
    for key, value in metadata.items():
        if key.startswith(PREFIX) and key.endswith("_token_id"):
            checked_id(metadata, key)
        if key.removeprefix(PREFIX) in FLAGS and not isinstance(value, bool):
            raise ValueError(f"the key {key} is {value!r:.60}, expected true or false; {REMEDY}")
    _check_types_and_scores(metadata)
    if metadata[f"{PREFIX}model"] == "gpt2":
        _check_merges(metadata)


def check_vocabulary_kind(metadata: Mapping[str, Any]) -> None:
    """Raise ValueError if no tokenizer can be made of the kind of vocabulary, or a list is none."""
    model = metadata.get(f"{PREFIX}model")
    if model is None:
        raise ValueError(f"the key {PREFIX}model is missing, so the file has no tokenizer")
    if not isinstance(model, str) or model not in REQUIRED_LISTS:
        kind = f" ({OTHER_MODELS[model]})" if str(model) in OTHER_MODELS else ""
        raise ValueError(
            f"{PREFIX}model is {model!r:.60}{kind}; a tokenizer is made of "
            f"{' and '.join(map(repr, REQUIRED_LISTS))}; train on the folder of the original "
            "model, with its tokenizer.json or tokenizer.model, instead"
        )
    for name, types in LIST_TYPES.items():
        if name in REQUIRED_LISTS[model] or f"{PREFIX}{name}" in metadata:
            check_list(metadata, f"{PREFIX}{name}", types)
    if not metadata[f"{PREFIX}tokens"]:
        raise ValueError(f"the key {PREFIX}tokens is an empty list; {REMEDY}")


def checked_id(metadata: Mapping[str, Any], key: str) -> int | None:
    """Return the id of a special token, or None if the file does not name it.

    Raises: ValueError if it is no id of the vocabulary.
    """
    if key not in metadata:
        return None
    index, count = metadata[key], len(metadata[f"{PREFIX}tokens"])
    if type(index) is not int or not 0 <= index < count:
        raise ValueError(
            f"the key {key} is {index!r:.60}, expected an id below {count}, the number of tokens; "
            f"{REMEDY}"
        )
    return index


def check_list(metadata: Mapping[str, Any], key: str, types: tuple[type, ...]) -> None:
    """Raise ValueError if a key is missing, or no list whose entries have one of the types."""
    if key not in metadata:
        raise ValueError(f"the key {key} is missing; {REMEDY}")
    values, expected = metadata[key], " or ".join(type.__name__ for type in types)
    if not isinstance(values, list):
        raise ValueError(
            f"the key {key} is {values!r:.60}, expected a list of {expected}; {REMEDY}"
        )
    if set(map(type, values)) <= set(types):
        return
    index, value = next(pair for pair in enumerate(values) if type(pair[1]) not in types)
    raise ValueError(
        f"the key {key} has the entry {index} {value!r:.60}, expected {expected}; {REMEDY}"
    )


def _check_lengths(metadata: Mapping[str, Any]) -> None:
    """Raise ValueError if a token lacks its type or score."""
    count = len(metadata[f"{PREFIX}tokens"])
    for name in ("token_type", "scores"):
        values = metadata.get(f"{PREFIX}{name}")
        if values is not None and len(values) < count:
            raise ValueError(
                f"the key {PREFIX}{name} has {len(values)} entries, expected {count}, one for each "
                f"token; {REMEDY}"
            )


def _check_types_and_scores(metadata: Mapping[str, Any]) -> None:
    types = metadata.get(f"{PREFIX}token_type", [])
    if unknown := set(types).difference(TOKEN_TYPES):
        kind = min(unknown)
        raise ValueError(
            f"the key {PREFIX}token_type has the entry {types.index(kind)} {kind}, expected 0 to "
            f"{max(TOKEN_TYPES)}; {REMEDY}"
        )
    scores = metadata.get(f"{PREFIX}scores", [])
    if any(map(math.isnan, scores)):
        index = next(index for index, score in enumerate(scores) if math.isnan(score))
        raise ValueError(f"the key {PREFIX}scores has the entry {index} NaN; {REMEDY}")


def _check_merges(metadata: Mapping[str, Any]) -> None:
    """Raise ValueError if a merge does not make a token of two tokens."""
    tokens = set(metadata[f"{PREFIX}tokens"])
    for index, merge in enumerate(metadata[f"{PREFIX}merges"]):
        left, _, right = merge.partition(" ")
        if left in tokens and right in tokens and left + right in tokens:
            continue
        text = next(text for text in (left, right, left + right) if text not in tokens)
        raise ValueError(
            f"the key {PREFIX}merges has the entry {index} {merge!r:.60}, but {text!r:.60} is no "
            f"token; {REMEDY}"
        )
