"""The vocabulary of a GGUF file: special ids, and the tokens that llama.cpp cuts out of texts."""

from collections.abc import Iterator, Mapping
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken

from minitune.gguf.tokenizer.llama_cpp_specials import CUT_TYPES, known_ends
from minitune.gguf.tokenizer.llama_cpp_tokenizer import (
    DEFAULT_IDS,
    SENTENCEPIECE,
    LlamaCppTokenizer,
)
from minitune.gguf.tokenizer.tokenizer_keys import (
    PREFIX,
    REMEDY,
    check_tokenizer_keys,
    check_vocabulary_kind,
    checked_id,
)
from minitune.gguf.tokenizer.tokenizer_metadata import OTHER_ENDS, SPECIAL_TOKEN_NAMES, UNKNOWN_ID

SPECIAL_TYPES = {TokenType.CONTROL, TokenType.UNKNOWN}


class FileVocabulary:
    """The keys `tokenizer.ggml.*` of a file, checked, as llama.cpp understands them.

    metadata: all keys of the file.

    Raises: ValueError that names the key if a value is damaged, or of a kind that is not known.
    """

    def __init__(self, metadata: Mapping[str, Any]):
        check_tokenizer_keys(metadata)
        self.metadata = metadata
        self.file = LlamaCppTokenizer(metadata)
        self.tokens = self.file.tokens
        self.ids = special_token_ids(metadata)
        self.added = self._added_tokens()
        for name, is_added in (("bos", self.file.adds_bos), ("eos", self.file.adds_eos)):
            if is_added and name not in self.ids:
                raise ValueError(
                    f"the file adds the {name.upper()} to each text, but the key "
                    f"{PREFIX}{name}_token_id is missing; {REMEDY}"
                )

    def _added_tokens(self) -> dict[int, AddedToken]:
        """Return the tokens that llama.cpp cuts out of a text, by id.

        A control token of the file is special, also if llama.cpp shows it.
        """
        special = self.file.special
        stored = self.metadata.get(f"{PREFIX}token_type", special.types)
        return {
            index: AddedToken(
                text,
                special=not SPECIAL_TYPES.isdisjoint((special.types[index], stored[index])),
                normalized=False,
                rstrip=text in special.stripped,
            )
            for index, text in enumerate(self.tokens)
            if special.types[index] in CUT_TYPES
        }

    def is_placeholder(self, index: int) -> bool:
        """Return True for a row of the embedding that has no token."""
        kind = self.file.special.types[index]
        return kind == TokenType.UNUSED and self.tokens[index] == f"[PAD{index}]"

    def ordinary_ids(self) -> Iterator[tuple[str, int]]:
        """Yield text and id of each row that has a token."""
        for index, text in enumerate(self.tokens):
            if not self.is_placeholder(index):
                yield text, index


def special_token_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of the special tokens by name, such as "bos".

    A file with SentencePiece's pieces may leave out BOS, EOS and the unknown token.

    Raises: ValueError that names the key if an id is none of the vocabulary.
    """
    check_vocabulary_kind(metadata)
    ids: dict[str, int] = {}
    if metadata[f"{PREFIX}model"] == SENTENCEPIECE:
        bos, eos = DEFAULT_IDS[SENTENCEPIECE]
        ids = {"bos": bos, "eos": eos, "unk": UNKNOWN_ID}
    for name, key in SPECIAL_TOKEN_NAMES.items():
        index = checked_id(metadata, f"{PREFIX}{key}_token_id")
        if index is not None:
            ids[name] = index
    return ids


def end_token_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Return the ids of the tokens that end a generation: the EOS first, then those of turns.

    llama.cpp also ends a text at some tokens whose texts it knows. They count if the file calls
    them control tokens.

    Raises: ValueError that names the key if an id is none of the vocabulary.
    """
    ends = [special_token_ids(metadata).get("eos")]
    ends += [checked_id(metadata, f"{PREFIX}{name}_token_id") for name in OTHER_ENDS]
    types = metadata.get(f"{PREFIX}token_type", [])
    ids = {text: index for index, text in enumerate(metadata[f"{PREFIX}tokens"])}
    known = map(ids.get, known_ends(ids))
    ends += [index for index in known if types[index : index + 1] == [TokenType.CONTROL]]
    return list(dict.fromkeys(index for index in ends if index is not None))
