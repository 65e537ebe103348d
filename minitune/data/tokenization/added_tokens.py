"""The tokens that the JSON files of a model folder add to a vocabulary.

A vocabulary (tokenizer.json or tokenizer.model) is extended by

- added_tokens_decoder in tokenizer_config.json: id -> text and flags;
- added_tokens.json: text -> id, read only if there is no added_tokens_decoder;
- the special tokens that tokenizer_config.json names: bos_token and its kin, any other
  "..._token", extra_special_tokens and additional_special_tokens;
- special_tokens_map.json: read only if there is no added_tokens_decoder, and then it overrides
  tokenizer_config.json.

The order and the precedence are those of transformers 5. A token whose text the vocabulary holds
keeps the vocabulary's id. Any other token gets the next free id, whatever id a file claims, so a
claim that differs is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from minitune.data.tokenization.json_limits import MAX_TOKEN

CONFIG, TOKENS_MAP, ADDED = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
SPECIAL_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
EXTRA, ADDITIONAL = "extra_special_tokens", "additional_special_tokens"


@dataclass
class DeclaredTokens:
    """The tokens that the files beside the vocabulary name.

    folder: the model folder, for errors.
    has_decoder: True if tokenizer_config.json has an added_tokens_decoder.
    by_id: the tokens of added_tokens_decoder, otherwise of added_tokens.json.
    named: the special tokens by key, such as "bos_token", in the order in which they are added;
        None if a file says that there is no such token.
    extra: further special tokens.
    claims: (file, text, id or None) of every token that a file names.
    notes: facts about the files that the user should know.
    """

    folder: Path
    has_decoder: bool
    by_id: dict[int, AddedToken] = field(default_factory=dict)
    named: dict[str, AddedToken | None] = field(default_factory=dict)
    extra: list[AddedToken] = field(default_factory=list)
    claims: list[tuple[str, str, int | None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_add(self, own: Mapping[int, AddedToken]) -> list[AddedToken]:
        """Return the tokens to add, in the order that gives transformers' ids.

        own: the added tokens of tokenizer.json itself. Those that a file names as a special token
            become special.
        """
        by_id = self.by_id if self.has_decoder else {**self.by_id, **own}
        special = {token.content for token in self.named.values() if token is not None}
        tokens = [token for _, token in sorted(by_id.items(), key=lambda item: item[0])]
        for token in tokens:
            token.special = token.special or token.content in special
        known = {token.content for token in (*own.values(), *tokens)}
        for token in (*self.named.values(), *self.extra):
            if token is not None and token.content not in known:
                known.add(token.content)
                tokens.append(token)
        return tokens

    def check(self, added: Mapping[int, AddedToken], size: int) -> None:
        """Note each token that is new, and refuse each that was not added under its id.

        added: the added tokens of the tokenizer, by id.
        size: number of ids of the vocabulary before tokens were added.

        Raises: ValueError that names the file and the token.
        """
        ids = {token.content: index for index, token in added.items()}
        numbered = {text for _, text, index in self.claims if index is not None}
        for file, text, index in self.claims:
            path = self.folder / file
            if text not in ids:
                raise ValueError(
                    f"{path}: names the token {text!r}, but no other file of the folder has it and "
                    f"transformers ignores it there; add it to tokenizer.json, or remove it"
                )
            if text not in numbered and ids[text] >= size:
                note = f"{path}: names {text!r}, which the vocabulary lacks; it has the new id "
                self.notes.append(note + str(ids[text]))
            if index is not None and index != ids[text]:
                other = added.get(index)
                holder = f", and id {index} is {other.content!r}" if other is not None else ""
                raise ValueError(
                    f"{path}: gives the token {text!r} the id {index}, but the vocabulary gives it "
                    f"the id {ids[text]}{holder}; correct the id in one of the files"
                )


def read_declared_tokens(folder: Path, files: Mapping[str, dict]) -> DeclaredTokens:
    """Return the tokens that the JSON files of a folder name.

    files: the content of each JSON file; {} if the file is missing.

    Raises: ValueError that names the file and the entry that is not a token.
    """
    config, tokens_map = files[CONFIG], files[TOKENS_MAP]
    declared = DeclaredTokens(folder, "added_tokens_decoder" in config)
    named, listed = _special_tokens(declared, CONFIG, config)
    map_named, map_listed = _special_tokens(declared, TOKENS_MAP, tokens_map)
    extra = listed[EXTRA] or listed[ADDITIONAL]
    if declared.has_decoder:
        _read_decoder(declared, config["added_tokens_decoder"])
        _note_differences(declared, named, map_named)
    else:
        named |= map_named
        extra = extra or map_listed[ADDITIONAL]
        extra += [token for token in map_listed[EXTRA] if token.content not in map(str, extra)]
    standard = [f"{name}_token" for name in SPECIAL_NAMES]
    keys = [key for key in standard if key in named] + [key for key in named if key not in standard]
    declared.named = {key: named[key] for key in keys}
    declared.extra = extra
    _read_added(declared, files[ADDED])
    return declared


def _special_tokens(
    declared: DeclaredTokens, file: str, content: Mapping[str, Any]
) -> tuple[dict[str, AddedToken | None], dict[str, list[AddedToken]]]:
    """Return the special tokens of a file: those with a name, and its lists by key."""
    path = declared.folder / file
    named: dict[str, AddedToken | None] = {}
    for key, value in content.items():
        is_standard = key.endswith("_token") and key[:-6] in SPECIAL_NAMES
        if is_standard or (key.endswith("_token") and isinstance(value, str | dict)):
            is_none = value is None or value == ""
            named[key] = None if is_none else _token(path, key, value, special=True)
    listed: dict[str, list[AddedToken]] = {EXTRA: [], ADDITIONAL: []}
    for key in listed:
        value = content.get(key) or []
        if isinstance(value, dict):
            named |= {name: _token(path, name, token, True) for name, token in value.items()}
        elif isinstance(value, list):
            listed[key] = [_token(path, key, token, special=True) for token in value]
        else:
            raise ValueError(f"{path}: {key} is {value!r:.100}, expected a list of tokens")
    texts = [token.content for token in named.values() if token is not None]
    texts += [token.content for tokens in listed.values() for token in tokens]
    declared.claims += [(file, text, None) for text in texts]
    return named, listed


def _note_differences(
    declared: DeclaredTokens,
    named: Mapping[str, AddedToken | None],
    map_named: Mapping[str, AddedToken | None],
) -> None:
    """Note each special token for which the map names another text than the config."""
    for key, token in map_named.items():
        if str(named.get(key)) != str(token):
            declared.notes.append(
                f"{declared.folder}: {CONFIG} says {key} {str(named.get(key))!r} and counts, as in "
                f"transformers; {TOKENS_MAP} says {str(token)!r}"
            )


def _read_decoder(declared: DeclaredTokens, decoder: Any) -> None:
    path = declared.folder / CONFIG
    expected = f'{path}: added_tokens_decoder is not {{"id": {{"content": text}}, ...}}'
    if not isinstance(decoder, dict):
        raise ValueError(expected)
    for index, entry in decoder.items():
        if not index.isdecimal() or not isinstance(entry, dict):
            raise ValueError(f"{expected}: {index!r} is {entry!r:.100}")
        token = _token(path, f"added_tokens_decoder {index}", entry, special=False)
        declared.by_id[int(index)] = token
        declared.claims.append((CONFIG, token.content, int(index)))


def _read_added(declared: DeclaredTokens, added: Mapping[str, Any]) -> None:
    path = declared.folder / ADDED
    special = {token.content for token in declared.extra}
    special |= {token.content for token in declared.named.values() if token is not None}
    for text, index in added.items():
        if type(index) is not int or index < 0:
            raise ValueError(f"{path}: {text!r} has the id {index!r}, expected a number")
        declared.claims.append((ADDED, text, index))
        if not declared.has_decoder:
            declared.by_id[index] = _token(path, f"token {index}", text, special=text in special)


def _token(path: Path, key: str, value: Any, special: bool) -> AddedToken:
    """Return the token of an entry: a text, or an object with its text and flags.

    special: the flag if the entry does not give it.
    """
    content = value.get("content") if isinstance(value, dict) else value
    # JSON may hold half a surrogate pair, which is not text.
    is_text = isinstance(content, str) and content.encode(errors="ignore").decode() == content
    if not is_text or not content:
        raise ValueError(f"{path}: {key} is {value!r:.100}, expected a token's text")
    if len(content) > MAX_TOKEN:
        raise ValueError(
            f"{path}: {key} has {len(content):,} characters, and {MAX_TOKEN:,} are the most of a "
            "token"
        )
    if value is content:
        return AddedToken(content, special=special)
    flags = {name: flag for name, flag in value.items() if name not in ("content", "__type", "id")}
    for name, flag in flags.items():
        if name not in FLAGS or not isinstance(flag, bool):
            raise ValueError(
                f"{path}: {key} has {name} {flag!r:.60}; expected true or false for "
                f"{', '.join(FLAGS)}"
            )
    return AddedToken(content, **{"special": special, **flags})
