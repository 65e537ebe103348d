"""tokenizer.model, read by `sentencepiece`, with the special tokens that the library does not know.

To sentencepiece a special token in a text is plain text: "<s>" would become "<", "s", ">". The text
is therefore cut at the added tokens, and each stretch between them is encoded on its own. The cuts
are those of `tokenizers`, so that the flags lstrip, rstrip and single_word count.

A stretch begins with the model's dummy space, as in llama.cpp and in the models' original code. Two
keys of tokenizer_config.json change that:

- `"legacy": false`: only the beginning of the text gets the dummy space;
- `"add_prefix_space": false`: nothing gets it.
"""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models

from minitune.data.tokenization.added_tokens import CONFIG, DeclaredTokens
from minitune.data.tokenization.json_backend import LIBRARY, Encoding
from minitune.data.tokenization.library_errors import library_errors, no_panic_trace
from minitune.data.tokenization.sentencepiece_file import read_sentencepiece, sentencepiece_of

# In a protobuf message the last value of a field counts. These four bytes, appended to a model
# file, set add_dummy_prefix (field 3) of normalizer_spec (field 3) to false.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
SPACE_MARK = "\u2581"  # sentencepiece's sign for a space in a piece
STRETCH = ""  # the token of the splitter that stands for the text between added tokens


class SentencePieceBackend:
    """A sentencepiece model with the interface of JsonBackend."""

    is_byte_level = False

    def __init__(self, path: Path, config: dict[str, Any], declared: DeclaredTokens):
        self._path = path
        proto = read_sentencepiece(path)
        self._begin = sentencepiece_of(path, proto)
        self._inside = sentencepiece_of(path, proto + NO_DUMMY_PREFIX)
        with library_errors(path, "use its pieces", "sentencepiece"):
            self._choose_dummy_space(config)
            pieces = [self._begin.id_to_piece(i) for i in range(self._begin.get_piece_size())]
        # id -> byte, of the pieces such as <0x0A>
        self._bytes = {
            index: bytes([int(piece[3:5], 16)])
            for index, piece in enumerate(pieces)
            if self._begin.is_byte(index)
        }
        self._rename(pieces, declared)
        self.added = self._added_tokens(pieces, declared)
        declared.check(self.added, len(pieces))
        self._skipped = {i for i, token in self.added.items() if token.special}
        self._pieces = dict(enumerate(pieces)) | {i: str(t) for i, t in self.added.items()}
        self._ids = {piece: i for i, piece in self._pieces.items()}
        self.size, self.vocab_size = len(self._pieces), len(pieces)
        self.id_count = max(self._pieces) + 1
        self._splitter = self._new_splitter()

        ids = {name: getattr(self._begin, f"{name}_id")() for name in ("bos", "eos", "pad", "unk")}
        self.named = {name: index for name, index in ids.items() if index >= 0}
        bos, eos = (self._named_id(name, declared) for name in ("bos", "eos"))
        self.prefix = [bos] if config.get("add_bos_token", True) and bos is not None else []
        if self.prefix and "add_bos_token" not in config:
            declared.notes.append(
                f"{path}: a plain text begins with {self._pieces[bos]!r}, as in the model's own "
                f"code; transformers 5 adds it only if {CONFIG} says add_bos_token true"
            )
        self.suffix = [eos] if config.get("add_eos_token", False) and eos is not None else []

    def _choose_dummy_space(self, config: dict[str, Any]) -> None:
        """Choose the model of the first stretch and of the others by the keys of the config."""
        has_dummy_space = self._begin.encode("a") != self._inside.encode("a")
        if config.get("add_prefix_space") is False:
            self._begin, has_dummy_space = self._inside, False
        elif config.get("add_prefix_space") and not has_dummy_space:
            raise ValueError(
                f"{self._path}: puts no space before a text, but {CONFIG} says add_prefix_space "
                "true; remove that key, or use the tokenizer.model that belongs to it"
            )
        self.adds_prefix_space = has_dummy_space
        self._dummy_space = " " if has_dummy_space else ""  # decode removes it
        self.prefixes_each_stretch = has_dummy_space and config.get("legacy") is not False
        if config.get("legacy") is not False:
            self._inside = self._begin

    def _named_id(self, name: str, declared: DeclaredTokens) -> int | None:
        """Return the id of the token that the config names, otherwise of the model's own."""
        if f"{name}_token" in declared.named:
            token = declared.named[f"{name}_token"]
            return None if token is None else self._ids[token.content]
        return self.named.get(name)

    def _rename(self, pieces: list[str], declared: DeclaredTokens) -> None:
        """Give control pieces the texts of added_tokens_decoder.

        Raises: ValueError if it renames a piece that sentencepiece finds in ordinary text.
        """
        by_id = declared.by_id if declared.has_decoder else {}
        for index, token in by_id.items():
            if index >= len(pieces) or token.content == pieces[index]:
                continue
            if not (self._begin.is_control(index) or self._begin.is_unused(index)):
                raise ValueError(
                    f"{declared.folder / CONFIG}: added_tokens_decoder gives the id {index} the "
                    f"text {token.content!r}, but in {self._path.name} it is {pieces[index]!r}, "
                    "which ordinary text uses; rename a control piece, or correct the id"
                )
            if token.content in pieces:
                other = pieces.index(token.content)
                raise ValueError(
                    f"{declared.folder / CONFIG}: added_tokens_decoder gives the id {index} the "
                    f"text {token.content!r}, which has the id {other} in {self._path.name}; "
                    "correct the id"
                )
            pieces[index] = token.content

    def _added_tokens(self, pieces: list[str], declared: DeclaredTokens) -> dict[int, AddedToken]:
        """Return the tokens that are cut out of a text: control pieces and declared tokens.

        The library numbers the tokens that the model lacks.
        """
        own = {
            index: AddedToken(piece, special=True)
            for index, piece in enumerate(pieces)
            if self._begin.is_control(index) or self._begin.is_unknown(index)
        }
        with no_panic_trace(), library_errors(self._path, "add tokens to it", LIBRARY):
            vocabulary = {piece: index for index, piece in enumerate(pieces)}
            library = tokenizers.Tokenizer(models.WordLevel(vocabulary))
            library.add_tokens(list(declared.to_add(own)))
            added = library.get_added_tokens_decoder()
        return own | added

    def _new_splitter(self) -> tokenizers.Tokenizer:
        """Return a tokenizer that cuts a text into added tokens and the stretches between them.

        It has ids of its own, which `_split_ids` maps to those of the vocabulary.

        The added tokens are looked for in the text as it is written, because nothing normalises it
        before sentencepiece does.
        """
        splitter = tokenizers.Tokenizer(models.WordLevel({STRETCH: 0}, unk_token=STRETCH))
        states = [token.__getstate__() | {"normalized": False} for token in self.added.values()]
        splitter.add_tokens([AddedToken(**state) for state in states])
        found = splitter.get_added_tokens_decoder()
        self._split_ids = {i: self._ids[token.content] for i, token in found.items()}
        return splitter

    def encode_batch(self, texts: list[str]) -> list[Encoding]:
        """Return (ids, spans) of many texts, without special tokens; spans count characters."""
        with library_errors(self._path, "cut this text", LIBRARY):
            splits = self._splitter.encode_batch(texts)
        with library_errors(self._path, "encode this text", "sentencepiece"):
            return [self._encode(text, split) for text, split in zip(texts, splits, strict=True)]

    def encode_batch_ids(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of `encode_batch`."""
        return [ids for ids, _ in self.encode_batch(texts)]

    def _encode(self, text: str, split: tokenizers.Encoding) -> Encoding:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for index, (begin, end) in zip(split.ids, split.offsets, strict=True):
            if index in self._split_ids:
                ids.append(self._split_ids[index])
                spans.append((begin, end))
                continue
            model = self._begin if begin == 0 else self._inside
            encoded = model.encode(text[begin:end], return_type="offset_mapping")
            ids += encoded["ids"]
            spans += [(begin + first, begin + last) for first, last in encoded["offsets"]]
        return ids, spans

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD."""
        parts = []
        for index in ids:
            if index in self._skipped:
                parts.append(b"" if skip_special_tokens else self._pieces[index].encode())
            elif index in self._bytes:
                parts.append(self._bytes[index])
            else:
                parts.append(self._pieces.get(index, "").replace(SPACE_MARK, " ").encode())
        return b"".join(parts).decode(errors="replace").removeprefix(self._dummy_space)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token's text, or None if the vocabulary lacks it."""
        return self._ids.get(token)

    def id_to_token(self, index: int) -> str | None:
        """Return the text of a token id, or None if the vocabulary lacks it."""
        return self._pieces.get(index)
