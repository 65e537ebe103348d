"""tokenizer.model, read by sentencepiece, with the special tokens and the character offsets that it does not do.

sentencepiece knows no special tokens in a text: "<s>" would become "<", "s", ">". So a text is cut at the texts of
the special tokens, and each stretch between them is encoded on its own. A stretch begins with the model's dummy space,
as llama.cpp and the models' authors have it, unless tokenizer_config.json says `"legacy": false`: then only the text's
beginning does. Offsets come from the library's own record of an encoding, a protobuf message that is read here by
hand (bytes, turned into characters).
"""

import re
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

# A model file is a protobuf message, and of a field that comes twice the later value counts. These four bytes, behind
# the file's own, are field 3 (normalizer_spec) holding field 3 (add_dummy_prefix) = false.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceBackend:
    """The same interface as tokenizer.JsonBackend, over a sentencepiece model."""

    def __init__(self, path: Path, config: dict, added: dict[str, int]):
        model = path.read_bytes()
        try:
            self._begin = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._inside = sentencepiece.SentencePieceProcessor(model_proto=model + NO_DUMMY_PREFIX)
        except RuntimeError as error:
            raise ValueError(f"{path}: not a sentencepiece model: {error}") from None
        self._strip = " " if self._begin.encode("a") != self._inside.encode("a") else ""
        if config.get("legacy") is not False:
            self._inside = self._begin
        size = self._begin.get_piece_size()
        pieces = [self._begin.id_to_piece(i) for i in range(size)]
        self._bytes = {
            i: bytes([int(pieces[i][3:5], 16)]) for i in range(size) if self._begin.is_byte(i)
        }
        controls = {
            pieces[i]: i
            for i in range(size)
            if self._begin.is_control(i) or self._begin.is_unknown(i)
        }
        self._special: dict[str, int] = dict(controls)  # cut out of a text
        self._hidden: set[int] = set(controls.values())  # left out by skip_special_tokens
        self._add(path.parent, added, config.get("added_tokens_decoder", {}))
        self._pieces = dict(enumerate(pieces)) | {i: token for token, i in self._special.items()}
        self._ids = {piece: i for i, piece in self._pieces.items()}
        self.vocab_size = max(self._pieces) + 1
        self._pattern = re.compile(
            "|".join(map(re.escape, sorted(self._special, key=len, reverse=True)))
        )
        ids = {name: getattr(self._begin, f"{name}_id")() for name in ("bos", "eos", "pad", "unk")}
        self.named = {name: index for name, index in ids.items() if index >= 0}
        self.prefix = (
            [ids["bos"]] if config.get("add_bos_token", True) and "bos" in self.named else []
        )
        self.suffix = (
            [ids["eos"]] if config.get("add_eos_token", False) and "eos" in self.named else []
        )

    def _add(self, folder: Path, added: dict[str, int], decoder: dict[str, dict]) -> None:
        """Take in added_tokens.json (text -> id) and tokenizer_config.json's added_tokens_decoder (id -> token)."""
        for text, index in added.items():
            if type(index) is not int or index < 0:
                raise ValueError(
                    f"{folder / 'added_tokens.json'}: {text!r} has the id {index!r}, expected a number"
                )
            self._special[text] = index
        form = f'{folder / "tokenizer_config.json"}: added_tokens_decoder is not {{"id": {{"content": text}}, ...}}'
        if not isinstance(decoder, dict):
            raise ValueError(form)
        for index, token in decoder.items():
            text = token.get("content") if isinstance(token, dict) else None
            if not index.isdecimal() or not isinstance(text, str):
                raise ValueError(f"{form}: {index!r} is {token!r:.100}")
            self._special[text] = int(index)
            if token.get("special"):
                self._hidden.add(int(index))

    def encode_batch(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids, offsets, at = [], [], 0
        for match in [*self._pattern.finditer(text), None]:
            end = match.start() if match else len(text)
            if stretch := text[at:end]:
                model = self._begin if at == 0 else self._inside
                # Characters of the stretch that begin before each byte of it; one more entry for its end.
                widths = [len(c.encode()) for c in stretch]
                characters = [i for i, width in enumerate(widths) for _ in range(width)] + [
                    len(stretch)
                ]
                for index, first, last in _pieces(
                    model.encode(stretch, out_type="serialized_proto")
                ):
                    ids.append(index)
                    offsets.append((at + characters[first], at + characters[last]))
            if match:
                ids.append(self._special[match.group()])
                offsets.append(match.span())
                at = match.end()
        return ids, offsets

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        parts = []
        for i in ids:
            if i in self._hidden:
                parts.append(b"" if skip_special_tokens else self._pieces[i].encode())
            else:
                parts.append(
                    self._bytes.get(i) or self._pieces.get(i, "").replace("\u2581", " ").encode()
                )
        return b"".join(parts).decode(errors="replace").removeprefix(self._strip)

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def id_to_token(self, index: int) -> str | None:
        return self._pieces.get(index)


def _pieces(message: bytes) -> Iterator[tuple[int, int, int]]:
    """(id, first byte, end byte) of the pieces in a serialized SentencePieceText: its field 2, repeated.

    In a piece, field 2 is the id, 4 and 5 are begin and end; a number that is 0 may be left out.
    """
    for field, piece in _fields(message):
        if field == 2:
            values = dict(_fields(piece))
            yield values.get(2, 0), values.get(4, 0), values.get(5, 0)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the fields of a protobuf message, of the three wire types that occur here."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
        elif tag & 7 == 2:
            size = varint()
            yield tag >> 3, message[at : at + size]
            at += size
        else:
            assert tag & 7 == 5, f"wire type {tag & 7} in a SentencePieceText"
            yield tag >> 3, message[at : at + 4]
            at += 4
