"""llama.cpp's tokenizers, rebuilt from the keys of a GGUF file.

A text becomes tokens in three steps:

1. Control, user-defined and unknown tokens are cut out of the text, the longest first.
2. "gpt2" cuts the text between them into words (llama_cpp_words.py) and writes their bytes as
   letters. "llama" writes U+2581 for a space and knows no words.
3. Neighbouring symbols are merged: those of the first merge first ("gpt2"), or those whose joined
   piece has the best score ("llama"). A symbol without a token becomes bytes.

llama.cpp gives some tokens another type than the file, by their texts (llama_cpp_specials.py).
"""

import heapq
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from minitune.data.tokenization.json_backend import byte_level
from minitune.data.tokenization.sentencepiece_backend import SPACE_MARK
from minitune.gguf.tokenizer.llama_cpp_specials import SpecialTokens
from minitune.gguf.tokenizer.llama_cpp_words import WORD_RULES, WordRule

# The ids of BOS and EOS if the file names none.
DEFAULT_IDS = {"llama": (1, 2), "gpt2": (11, 11)}
REQUIRED_KEYS = {"llama": {"tokens", "scores"}, "gpt2": {"tokens", "merges"}}
SENTENCEPIECE = "llama"

# The rank of two neighbouring symbols, the lowest first; None if they are not merged.
Rank = Callable[[str, str], float | None]


class LlamaCppTokenizer:
    """The tokenizer that llama.cpp makes of a file's keys.

    metadata: the keys `tokenizer.ggml.*` and `general.name`, as they are written or read.

    Raises: ValueError if llama.cpp refuses the vocabulary, or its rules are not known here.
    """

    def __init__(self, metadata: Mapping[str, Any]):
        keys = {
            key.removeprefix("tokenizer.ggml."): value
            for key, value in metadata.items()
            if key.startswith("tokenizer.ggml.")
        }
        self.model = str(keys.get("model"))
        if self.model not in DEFAULT_IDS:
            known = ", ".join(DEFAULT_IDS)
            raise ValueError(f"tokenizer.ggml.model is {self.model!r}; known are {known}")
        if missing := REQUIRED_KEYS[self.model] - keys.keys():
            raise ValueError(f"the key tokenizer.ggml.{min(missing)} is missing")
        self.tokens = [text or f"[EMPTY_{id}]" for id, text in enumerate(keys["tokens"])]
        self._ids = dict(zip(self.tokens, range(len(self.tokens)), strict=True))
        if len(self._ids) < len(self.tokens):
            twice = next(text for id, text in enumerate(self.tokens) if self._ids[text] != id)
            raise ValueError(
                f"tokenizer.ggml.tokens: the token {twice!r} has two ids, and llama.cpp refuses "
                "such a file"
            )
        self._read_flags(keys)
        self.special = SpecialTokens(self._ids, keys, str(metadata.get("general.name", "")))
        self._known_words: dict[str, list[int]] = {}
        self._rank: Rank
        if self.model == SENTENCEPIECE:
            self._scores = np.asarray(keys["scores"], np.float32).tolist()
            self._rank = self._rank_by_score
        else:
            merges = list(keys["merges"])
            # of a merge that stands there twice the first rank counts
            self._merges = dict(zip(reversed(merges), range(len(merges) - 1, -1, -1), strict=True))
            self._rank = self._rank_by_merge

    def _read_flags(self, keys: Mapping[str, Any]) -> None:
        """Read the special ids and the flags, with llama.cpp's defaults."""
        self.pre = str(keys.get("pre") or "default")
        self._rule = WordRule(())
        if self.model != SENTENCEPIECE:
            if self.pre not in WORD_RULES:
                known = ", ".join(WORD_RULES)
                raise ValueError(f"tokenizer.ggml.pre is {self.pre!r}; known are {known}")
            self._rule = WORD_RULES[self.pre]
        bos, eos = DEFAULT_IDS[self.model]
        self.bos_token_id = self._id(keys.get("bos_token_id"), bos)
        self.eos_token_id = self._id(keys.get("eos_token_id"), eos)
        adds_bos = self.model == SENTENCEPIECE or self._rule.adds_bos
        self.adds_bos = bool(keys.get("add_bos_token", adds_bos))
        self.adds_eos = bool(keys.get("add_eos_token", False))
        self._prefixes_space = bool(keys.get("add_space_prefix", True))
        for flag, id, text in (
            (self.adds_bos, self.bos_token_id, "BOS"),
            (self.adds_eos, self.eos_token_id, "EOS"),
        ):
            if flag and id is None:
                raise ValueError(f"the file adds a {text} but names none; llama.cpp aborts")

    def _id(self, id: Any, default: int | None) -> int | None:
        """Return an id, or the default if the id is wrong, as llama.cpp does."""
        if id is not None and int(id) < len(self.tokens):
            return int(id)
        return default if default is not None and default < len(self.tokens) else None

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the ids of a text.

        add_special: add the BOS and EOS that the file asks for.
        parse_special: cut control tokens out of the text.

        Raises: ValueError if a "llama" vocabulary lacks the piece of a byte.
        """
        ids = [self.bos_token_id] if add_special and self.adds_bos else []
        is_begin = True
        for part in self.special.cut(text, parse_special):
            if isinstance(part, int):
                ids.append(part)
            elif self.model == SENTENCEPIECE:
                space = " " if is_begin and self._prefixes_space else ""
                ids += self._encode_pieces((space + part).replace(" ", SPACE_MARK))
            else:
                ids += self._encode_words(part)
            is_begin = isinstance(part, int)
        return [*ids, self.eos_token_id] if add_special and self.adds_eos else ids

    # ---- "llama"

    def _rank_by_score(self, left: str, right: str) -> float | None:
        id = self._ids.get(left + right)
        return None if id is None else -self._scores[id]

    def _encode_pieces(self, text: str) -> Iterator[int]:
        for symbol in merge(list(text), self._rank):
            if symbol in self._ids:
                yield self._ids[symbol]
            else:
                yield from map(self._byte_id, symbol.encode())

    def _byte_id(self, byte: int) -> int:
        id = self._ids.get(f"<0x{byte:02X}>")
        if id is None and byte < 0x80:
            id = self._ids.get(chr(byte))
        if id is None:
            raise ValueError(f"the vocabulary has no piece <0x{byte:02X}>; llama.cpp then fails")
        return id

    # ---- "gpt2"

    def _rank_by_merge(self, left: str, right: str) -> float | None:
        return self._merges.get(f"{left} {right}")

    def _encode_words(self, text: str) -> Iterator[int]:
        for word in self._rule.split(text):
            if word not in self._known_words:
                self._known_words[word] = list(self._encode_word(word))
            yield from self._known_words[word]

    def _encode_word(self, word: str) -> Iterator[int]:
        letters = byte_level(word)
        if self._rule.keeps_tokens and letters in self._ids:
            yield self._ids[letters]
            return
        for symbol in merge(list(letters), self._rank):
            if symbol in self._ids:
                yield self._ids[symbol]
            else:  # llama.cpp leaves out a byte without a token, and the letters of bytes from 127
                names = filter(str.isascii, symbol)
                yield from (self._ids[name] for name in names if name in self._ids)


def merge(symbols: list[str], rank: Rank) -> list[str]:
    """Merge neighbouring symbols in place, the lowest rank first, and return those that remain.

    Of equal ranks the leftmost comes first.
    """
    end = len(symbols)
    before, behind = list(range(-1, end - 1)), list(range(1, end + 1))
    waiting = [
        (value, left, left + 1, symbols[left] + symbols[left + 1])
        for left in range(end - 1)
        if (value := rank(symbols[left], symbols[left + 1])) is not None
    ]
    heapq.heapify(waiting)
    while waiting:
        _, left, right, text = heapq.heappop(waiting)
        if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != text:
            continue  # another merge took one of the two
        symbols[left], symbols[right] = text, ""
        behind[left] = behind[right]
        if behind[left] < end:
            before[behind[left]] = left
        for a, b in ((before[left], left), (left, behind[left])):
            if a >= 0 and b < end and (value := rank(symbols[a], symbols[b])) is not None:
                heapq.heappush(waiting, (value, a, b, symbols[a] + symbols[b]))
    return [symbol for symbol in symbols if symbol]
