"""Text, type and score of each token of a GGUF file, from the vocabulary of a model folder."""

import re
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken

from minitune.data.tokenization.sentencepiece_backend import SPACE_MARK
from minitune.data.tokenization.sentencepiece_file import (
    BPE,
    UNIGRAM,
    model_type,
    open_sentencepiece,
    read_sentencepiece,
)
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.tokenizer.pre_tokenizers import (
    check_normalizer,
    flattened,
    pre_tokenizer_name,
    published_name,
)
from minitune.gguf.writer import MetadataValue
from minitune.read_files import file_exists

# Token types. Control tokens are never shown; user-defined tokens are matched in any text.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNUSED_SCORE, ADDED_SCORE = -10000.0, -1000.0
# Added tokens that are control tokens, though some models do not call them special.
CONTROL_TOKEN = re.compile(
    r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL
)
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
BYTES = 256
# The parts of a tokenizer.json that make SentencePiece's pieces, as llama.cpp does.
MARK_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
SENTENCEPIECE_NORMALIZERS = ({"type": "Prepend", "prepend": SPACE_MARK}, MARK_SPACES)
# Options of a BPE model that llama.cpp lacks.
REFUSED_BPE_OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
# Width, full width, ligature, combining accent, and white space that a normaliser may change.
NORMALIZER_PROBE = "A b  ｆ½ﬁ e\u0301\u3000c\td  "


class Vocabulary:
    """Text, type and score of each row of the embedding; rows without a token are unused."""

    def __init__(self, rows: int):
        self.tokens = [f"[PAD{id}]" for id in range(rows)]
        self.types = [UNUSED] * rows
        self.scores = [UNUSED_SCORE] * rows

    def set(self, id: int, token: str, type: int, score: float = 0.0) -> None:
        """Fill one row."""
        self.tokens[id] = token
        self.types[id] = type
        self.scores[id] = score

    def add(self, added: dict[int, AddedToken]) -> None:
        """Fill the rows of added tokens."""
        for id, token in added.items():
            is_control = token.special or CONTROL_TOKEN.fullmatch(token.content)
            self.set(id, token.content, CONTROL if is_control else USER_DEFINED, ADDED_SCORE)

    def unmark_spaces(self) -> None:
        """Write spaces for the marks in user-defined tokens, such as Gemma's runs of spaces.

        llama.cpp looks for those tokens before it marks spaces, and would merge runs late.
        """
        for id, kind in enumerate(self.types):
            if kind == USER_DEFINED:
                self.tokens[id] = self.tokens[id].replace(SPACE_MARK, " ")

    def metadata(self, model: str, **keys: MetadataValue) -> dict[str, MetadataValue]:
        """Return the keys of the vocabulary.

        model: the kind of llama.cpp's tokenizer. keys: further keys below `tokenizer.ggml`.
        """
        values = {"model": model, "tokens": self.tokens, "token_type": self.types, **keys}
        return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


# ---- the vocabularies


def byte_level_metadata(
    path: Path, content: dict, tokenizer: Tokenizer, rows: int
) -> dict[str, MetadataValue]:
    """Return the keys of a byte-level BPE vocabulary, "gpt2" in llama.cpp.

    path: its tokenizer.json. content: the file's content. rows: number of rows of the embedding.

    Raises: ValueError if llama.cpp lacks the word rule.
    """
    vocabulary = Vocabulary(rows)
    for token, id in content["model"]["vocab"].items():
        vocabulary.set(id, token, NORMAL)
    vocabulary.add(tokenizer.added_tokens)
    pre = published_name(pre_tokenizer_name(path, content), tokenizer)
    return vocabulary.metadata("gpt2", pre=pre, merges=_joined(merges_of(content["model"])))


def sentencepiece_metadata(path: Path, tokenizer: Tokenizer, rows: int) -> dict[str, MetadataValue]:
    """Return the keys of a tokenizer.model, "llama" in llama.cpp.

    Raises: ValueError if llama.cpp lacks the kind of model or its normaliser.
    """
    model = open_sentencepiece(path)
    _check_sentencepiece(path, model)
    vocabulary = _pieces(model, rows)
    declared = {
        id: token
        for id, token in tokenizer.added_tokens.items()
        if id in tokenizer.declared_ids or vocabulary.tokens[id] != token.content
    }
    vocabulary.add(declared)
    vocabulary.unmark_spaces()
    return vocabulary.metadata("llama", pre="default", scores=vocabulary.scores)


def byte_fallback_metadata(
    path: Path, content: dict, tokenizer: Tokenizer, rows: int
) -> dict[str, MetadataValue]:
    """Return the keys of a tokenizer.json with SentencePiece's pieces.

    A tokenizer.model beside tokenizer.json gives the scores, if it has the same pieces and merges
    them in the same order. Otherwise merge k makes a piece with the score -k.

    path: the tokenizer.json. content: its content.

    Raises: ValueError if llama.cpp lacks the normaliser, the pre-tokenizer or the model.
    """
    check_normalizer(path, content, SENTENCEPIECE_NORMALIZERS)
    for part in flattened(content.get("pre_tokenizer") or {}, "pretokenizers"):
        _check_sentencepiece_part(path, part)
    model = content["model"]
    vocabulary = _pieces_of_model(path.with_name("tokenizer.model"), model, rows)
    vocabulary = vocabulary or _pieces_of_merges(model, rows)
    bytes_found = vocabulary.types.count(BYTE)
    if bytes_found != BYTES:
        raise _lacks_bytes(path, bytes_found)
    vocabulary.add(tokenizer.added_tokens)
    vocabulary.unmark_spaces()
    return vocabulary.metadata("llama", pre="default", scores=vocabulary.scores)


def merges_of(model: dict) -> list[tuple[str, str]]:
    """Return the merges as pairs; a tokenizer.json holds "a b" or ["a", "b"].

    A space within a part becomes the letter that stands for its byte.
    """
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
    return [(a.replace(" ", "Ġ"), b.replace(" ", "Ġ")) for a, b in pairs]


def _joined(merges: list[tuple[str, str]]) -> list[str]:
    return [" ".join(pair) for pair in merges]


def check_unique(tokens: list[str], folder: Path) -> None:
    """Raise ValueError if two ids have the same token."""
    first_id: dict[str, int] = {}
    for id, token in enumerate(tokens):
        other = first_id.setdefault(token, id)
        if other != id:
            raise ValueError(
                f"{folder}: tokens {other} and {id} are both {token!r}; llama.cpp refuses that; "
                "rename one of them before training"
            )


def check_model(path: Path, model: dict) -> None:
    """Raise ValueError if the `model` of a tokenizer.json is of a kind that llama.cpp lacks."""
    if model.get("type") != "BPE" or "merges" not in model:
        raise ValueError(
            f"{path}: is a {model.get('type')} tokenizer; GGUF export knows BPE; save the merged "
            "folder instead"
        )
    for option in REFUSED_BPE_OPTIONS:
        if model.get(option):
            raise ValueError(
                f"{path}: the model has {option} {model[option]!r}, which llama.cpp does not "
                "apply; save the merged folder instead"
            )


# ---- parts of the vocabularies


def _pieces(model: sentencepiece.SentencePieceProcessor, rows: int) -> Vocabulary:
    """Return the pieces of a SentencePiece model."""
    vocabulary = Vocabulary(rows)
    for id in range(model.get_piece_size()):
        vocabulary.set(id, model.id_to_piece(id), _piece_type(model, id), model.get_score(id))
    return vocabulary


def _piece_type(model: sentencepiece.SentencePieceProcessor, id: int) -> int:
    """Return the token type of a SentencePiece piece."""
    checks = (
        (model.is_unknown, UNKNOWN),
        (model.is_control, CONTROL),
        (model.is_byte, BYTE),
        (model.is_unused, UNUSED),
    )
    return next((kind for check, kind in checks if check(id)), NORMAL)


def _pieces_of_model(path: Path, model: dict, rows: int) -> Vocabulary | None:
    """Return the pieces of a tokenizer.model that agrees with tokenizer.json, otherwise None.

    path: the tokenizer.model. model: the `model` of the tokenizer.json beside it.
    """
    if not file_exists(path):
        return None
    processor = open_sentencepiece(path)
    vocab, size = model["vocab"], processor.get_piece_size()
    if size > rows:
        return None
    if any(vocab.get(processor.id_to_piece(id), id) != id for id in range(size)):
        return None
    vocabulary = _pieces(processor, rows)
    if any(vocabulary.tokens[id] != token for token, id in vocab.items() if id < size):
        return None
    merged = [vocab["".join(pair)] for pair in merges_of(model)]
    scores = [vocabulary.scores[id] for id in merged]
    return vocabulary if scores == sorted(scores, reverse=True) else None


def _pieces_of_merges(model: dict, rows: int) -> Vocabulary:
    """Return the pieces of a tokenizer.json, with scores from its merges."""
    merges = merges_of(model)
    rank: dict[str, int] = {}  # of the first merge that makes a piece
    for k, pair in enumerate(merges):
        rank.setdefault("".join(pair), k)
    vocabulary = Vocabulary(rows)
    for token, id in model["vocab"].items():
        if BYTE_PIECE.fullmatch(token):
            vocabulary.set(id, token, BYTE)
        elif token == model.get("unk_token"):
            vocabulary.set(id, token, UNKNOWN)
        else:
            # single characters result from no merge; they rank below all pieces that do
            vocabulary.set(id, token, NORMAL, -float(rank.get(token, len(merges))))
    return vocabulary


# ---- what llama.cpp lacks


def _check_sentencepiece(path: Path, model: sentencepiece.SentencePieceProcessor) -> None:
    """Raise ValueError if llama.cpp cuts texts otherwise than a SentencePiece model."""
    kind = model_type(read_sentencepiece(path))
    if kind != BPE:
        name = "unigram" if kind == UNIGRAM else f"type {kind}"
        raise ValueError(
            f"{path}: is a {name} model, but llama.cpp merges pieces as BPE; save the merged "
            "folder instead"
        )
    bytes_found = sum(model.is_byte(id) for id in range(model.get_piece_size()))
    if bytes_found != BYTES:
        raise _lacks_bytes(path, bytes_found)
    normalized = model.normalize(NORMALIZER_PROBE)
    marked = NORMALIZER_PROBE.replace(" ", SPACE_MARK)
    if normalized.removeprefix(SPACE_MARK) != marked:
        raise ValueError(
            f"{path}: normalises {NORMALIZER_PROBE!r} to {normalized!r}, and llama.cpp does not "
            "normalise; save the merged folder instead"
        )


def _check_sentencepiece_part(path: Path, part: dict) -> None:
    """Raise ValueError if llama.cpp lacks a part of the pre-tokenizer of SentencePiece's pieces.

    The spaces are marks already, so a split at spaces finds none.
    """
    kind = part.get("type")
    if kind == "Metaspace" and part.get("replacement") == SPACE_MARK:
        return
    if kind == "Split" and part.get("pattern") == {"String": " "}:
        return
    raise ValueError(
        f"{path}: its pre_tokenizer has a part {str(part)[:200]}, which llama.cpp does not apply "
        "to SentencePiece's pieces; save the merged folder instead"
    )


def _lacks_bytes(path: Path, found: int) -> ValueError:
    return ValueError(
        f"{path}: has {found} of {BYTES} byte pieces such as <0x0A>, without which llama.cpp fails "
        "on characters that the vocabulary lacks; save the merged folder instead"
    )
