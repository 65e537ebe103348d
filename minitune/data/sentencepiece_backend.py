"""tokenizer.model, read by `sentencepiece`, with the special tokens that the library does not know.

To sentencepiece a special token in a text is plain text: "<s>" would become "<", "s", ">". The text
is therefore cut at the special tokens, and each stretch between them is encoded on its own. A
stretch begins with the model's dummy space, as in llama.cpp and in the models' original code. If
tokenizer_config.json has `"legacy": false`, only the beginning of the text gets the dummy space.
"""

import re
from pathlib import Path

import sentencepiece

# In a protobuf message the last value of a field counts. These four bytes, appended to a model
# file, set add_dummy_prefix (field 3) of normalizer_spec (field 3) to false.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
SPACE_MARK = "\u2581"  # sentencepiece's sign for a space in a piece


class SentencePieceBackend:
    """A sentencepiece model with the interface of tokenizer.JsonBackend."""

    def __init__(self, path: Path, config: dict, added: dict[str, int]):
        model = path.read_bytes()
        try:
            self._begin = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._inside = sentencepiece.SentencePieceProcessor(model_proto=model + NO_DUMMY_PREFIX)
        except RuntimeError as error:
            raise ValueError(f"{path}: not a sentencepiece model: {error}") from None
        has_dummy_space = self._begin.encode("a") != self._inside.encode("a")
        self._dummy_space = " " if has_dummy_space else ""  # decode removes it
        if config.get("legacy") is not False:
            self._inside = self._begin

        pieces = [self._begin.id_to_piece(i) for i in range(self._begin.get_piece_size())]
        self._bytes: dict[int, bytes] = {}  # id -> byte, of the pieces such as <0x0A>
        self._special: dict[str, int] = {}  # text -> id of the tokens that are cut out of a text
        for index, piece in enumerate(pieces):
            if self._begin.is_byte(index):
                self._bytes[index] = bytes([int(piece[3:5], 16)])
            if self._begin.is_control(index) or self._begin.is_unknown(index):
                self._special[piece] = index
        self._skipped = set(self._special.values())  # left out by skip_special_tokens
        self._add_tokens(path.parent, added)
        self._add_token_decoder(path.parent, config.get("added_tokens_decoder", {}))
        self._pieces = dict(enumerate(pieces)) | {i: token for token, i in self._special.items()}
        self._ids = {piece: i for i, piece in self._pieces.items()}
        self.vocab_size = max(self._pieces) + 1
        longest_first = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))

        ids = {name: getattr(self._begin, f"{name}_id")() for name in ("bos", "eos", "pad", "unk")}
        self.named = {name: index for name, index in ids.items() if index >= 0}
        adds_bos = config.get("add_bos_token", True) and "bos" in self.named
        adds_eos = config.get("add_eos_token", False) and "eos" in self.named
        self.prefix = [ids["bos"]] if adds_bos else []
        self.suffix = [ids["eos"]] if adds_eos else []

    def _add_tokens(self, folder: Path, added: dict[str, int]) -> None:
        """Add the tokens of added_tokens.json (text -> id)."""
        for text, index in added.items():
            if type(index) is not int or index < 0:
                raise ValueError(
                    f"{folder / 'added_tokens.json'}: {text!r} has the id {index!r}, "
                    "expected a number"
                )
            self._special[text] = index

    def _add_token_decoder(self, folder: Path, decoder: dict[str, dict]) -> None:
        """Add the tokens of tokenizer_config.json's added_tokens_decoder (id -> token)."""
        expected = (
            f"{folder / 'tokenizer_config.json'}: "
            'added_tokens_decoder is not {"id": {"content": text}, ...}'
        )
        if not isinstance(decoder, dict):
            raise ValueError(expected)
        for index, token in decoder.items():
            text = token.get("content") if isinstance(token, dict) else None
            if not index.isdecimal() or not isinstance(text, str):
                raise ValueError(f"{expected}: {index!r} is {token!r:.100}")
            self._special[text] = int(index)
            if token.get("special"):
                self._skipped.add(int(index))

    def encode_batch(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Return (ids, spans) of many texts, without special tokens; spans count characters."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        begin = 0
        for match in [*self._pattern.finditer(text), None]:
            stretch = text[begin : match.start() if match else len(text)]
            if stretch:
                model = self._begin if begin == 0 else self._inside
                encoded = model.encode(stretch, return_type="offset_mapping")
                ids += encoded["ids"]
                spans += [(begin + first, begin + last) for first, last in encoded["offsets"]]
            if match:
                ids.append(self._special[match.group()])
                spans.append(match.span())
                begin = match.end()
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
