"""tokenizer.json, read by `tokenizers`, exactly as the file says.

The class name in tokenizer_config.json is ignored: code that rebuilds a tokenizer from such a name
can lose parts of it, such as a pre-tokenizer's rule for digits.

Three things differ from the plain library:

- The tokens that only the files beside tokenizer.json name are added (added_tokens.py).
- The post-processor is removed and its effect is kept as `prefix` and `suffix`. It would trim
  spaces off the character offsets, and a token of white space would then have an empty span.
- An added token is decoded as it is written. The library's byte-level decoder takes its letters
  from U+00A1 to U+0143 for bytes.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from minitune.data.samples import Span
from minitune.data.tokenization.added_tokens import DeclaredTokens
from minitune.data.tokenization.json_limits import read_tokenizer_json
from minitune.data.tokenization.library_errors import library_errors, no_panic_trace
from minitune.read_files import parse_json

Encoding = tuple[list[int], list[Span]]  # token ids, and the characters that each stands for

LIBRARY = f"tokenizers {tokenizers.__version__}"
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
REPLACEMENT = "\ufffd"


class JsonBackend:
    """A tokenizer.json and the tokens that the files beside it add."""

    def __init__(self, path: Path, declared: DeclaredTokens):
        self._path = path
        content = read_tokenizer_json(path)
        with no_panic_trace(), library_errors(path, "read it", LIBRARY):
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            own = self._tokenizer.get_added_tokens_decoder()
            size = self._tokenizer.get_vocab_size(with_added_tokens=True)
            self._tokenizer.add_tokens(declared.to_add(own))
        self.added: dict[int, AddedToken] = self._tokenizer.get_added_tokens_decoder()
        # The library keeps a token special that a file beside it calls ordinary.
        self._skipped = {i for added in (own, self.added) for i, t in added.items() if t.special}
        declared.check(self.added, size)
        declared.notes += self._renumbered(content.get("added_tokens", []))
        library = self._tokenizer
        parts = (*_parts(library.normalizer), *_parts(library.pre_tokenizer))
        self.adds_prefix_space = any(map(_prefixes, parts))
        self.prefixes_each_stretch = any(
            part["type"] == "Prepend" or part.get("prepend_scheme") == "always" for part in parts
        )
        self.named: dict[str, int] = {}  # tokenizer.json does not name its special tokens
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.size = len(vocabulary)
        self.vocab_size: int = library.get_vocab_size(with_added_tokens=False)
        self.id_count = max(vocabulary.values(), default=-1) + 1
        with no_panic_trace(), library_errors(path, "use its post-processor", LIBRARY):
            self.prefix, self.suffix = self._special_tokens_around(vocabulary)
            self._tokenizer.post_processor = None
        self._check_around(set(vocabulary.values()))
        decoder = {part.get("type") for part in _parts(library.decoder)}
        self._spellings: dict[int, str] = {}  # of added tokens, as the byte-level decoder reads
        self.is_byte_level = "ByteLevel" in decoder
        if self.is_byte_level:
            # A single letter shares the id of the byte that it stands for.
            self._spellings = {
                index: byte_level(token.content)
                for index, token in self.added.items()
                if token.content not in BYTE_LETTERS
            }
        self._has_byte_pieces = "ByteFallback" in decoder

    def _renumbered(self, added_tokens: list[dict]) -> list[str]:
        """Return a note if the library numbers added tokens otherwise than the file.

        added_tokens: those of the file.

        The library continues the vocabulary without a gap, and so does transformers.
        """
        changed = [
            f"{entry['content']!r} has the id {entry['id']} there and the id {index} here"
            for entry in added_tokens
            if (index := self.token_to_id(entry["content"])) != entry["id"]
        ]
        if not changed:
            return []
        return [
            f"{self._path}: added tokens follow the vocabulary without a gap, as in transformers, "
            f"so {len(changed)} change their ids: {changed[0]}"
        ]

    def _special_tokens_around(self, vocabulary: dict[str, int]) -> tuple[list[int], list[int]]:
        """Return the ids that the post-processor adds before and after a text."""
        for text in ("a", *vocabulary):  # the first text that has a token: almost always "a"
            bare = self._tokenizer.encode(text, add_special_tokens=False).ids
            if bare:
                break
        full = self._tokenizer.encode(text).ids
        begins = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
        if not begins:
            raise ValueError(f"it turns {text!r} from {bare} to {full}, without the text's tokens")
        begin = begins[0]
        return full[:begin], full[begin + len(bare) :]

    def _check_around(self, ids: set[int]) -> None:
        """Raise ValueError if the post-processor adds an id that no token has."""
        for index in (*self.prefix, *self.suffix):
            if index not in ids:
                raise ValueError(
                    f"{self._path}: its post_processor puts the id {index} around a text, but no "
                    f"token has that id (the highest is {self.id_count - 1}); correct the "
                    "post_processor in the file"
                )

    def encode_batch(self, texts: list[str]) -> list[Encoding]:
        """Return the encodings of many texts, without special tokens, on all cores."""
        with library_errors(self._path, "encode this text", LIBRARY):
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def encode_batch_ids(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of `encode_batch`, in half of its time."""
        with library_errors(self._path, "encode this text", LIBRARY):
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def definition(self) -> dict[str, Any]:
        """Return the content of tokenizer.json, as it is used."""
        return parse_json(self._tokenizer.to_str(), str(self._path))

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD."""
        tokens = []
        for index in ids:
            if skip_special_tokens and index in self._skipped:
                continue
            token = self._spellings.get(index) or self.id_to_token(index)
            if token is not None:
                tokens.append(token)
        if self._has_byte_pieces:
            tokens = list(_with_whole_characters(tokens))
        decoder = self._tokenizer.decoder
        if decoder is None:
            return " ".join(tokens)
        with library_errors(self._path, "decode these tokens", LIBRARY):
            return decoder.decode(tokens)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token's text, or None if the vocabulary lacks it."""
        return self._tokenizer.token_to_id(token)

    def id_to_token(self, index: int) -> str | None:
        """Return the text of a token id, or None if the vocabulary lacks it."""
        return self._tokenizer.id_to_token(index)


def _byte_letters() -> list[str]:
    """Return the letter that stands for each byte in a byte-level vocabulary.

    A byte that is a visible Latin-1 character stands for itself; the other 68 bytes are U+0100 and
    the letters behind it, in order.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]


BYTE_LETTERS = _byte_letters()


def byte_level(text: str) -> str:
    """Return a text in the letters that stand for its bytes."""
    return "".join(BYTE_LETTERS[byte] for byte in text.encode())


def _with_whole_characters(tokens: Iterable[str]) -> Iterator[str]:
    """Yield tokens for a decoder that joins byte pieces such as <0xE2>.

    The decoder turns a whole run of byte pieces into U+FFFD if one of them belongs to no character.
    Each stretch that belongs to none is replaced by one U+FFFD here, as Python does, and the
    characters beside it stay.
    """
    run: list[str] = []
    for token in (*tokens, ""):
        if BYTE_PIECE.fullmatch(token):
            run.append(token)
            continue
        yield from _valid_run(run)
        run = []
        if token:
            yield token


def _valid_run(run: list[str]) -> Iterator[str]:
    """Yield the byte pieces of a run that form characters, and U+FFFD for those that do not."""
    data = bytes(int(piece[3:5], 16) for piece in run)
    begin = 0
    while begin < len(run):
        try:
            data[begin:].decode()
        except UnicodeDecodeError as error:
            yield from run[begin : begin + error.start]
            yield REPLACEMENT
            begin += error.end
        else:
            yield from run[begin:]
            begin = len(run)


def _prefixes(part: dict) -> bool:
    """Return True if one normalizer or pre-tokenizer puts a space before a text."""
    kind = part.get("type")
    if kind == "Metaspace" and "prepend_scheme" in part:
        return part["prepend_scheme"] != "never"
    flag = part.get("add_prefix_space", kind == "Metaspace")
    return kind == "Prepend" or (kind in ("Metaspace", "ByteLevel") and flag)


def _parts(library_object: Any) -> Iterator[dict]:
    """Yield the JSON of a decoder, normalizer or pre-tokenizer and of all its parts."""
    waiting = [] if library_object is None else [parse_json(library_object.__getstate__())]
    while waiting:
        part = waiting.pop()
        yield part
        for key in ("decoders", "normalizers", "pretokenizers"):
            waiting += part.get(key) or []
