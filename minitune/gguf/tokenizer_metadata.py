"""The tokenizer's keys of a GGUF file, from the tokenizer files of a model folder.

llama.cpp has two tokenizers for the supported models:

"gpt2"   byte-level BPE (Llama 3, SmolLM2, Mistral-Nemo): tokens, merges, and `pre`, the name of the
         rule that splits a text into words before the merges (pre_tokenizers.py).
"llama"  SentencePiece BPE (Llama 1 and 2, Mistral-7B): pieces and scores; the pair with the best
         score is merged first. If the folder has only a tokenizer.json, the scores are rebuilt from
         its merges: merge k makes a piece with the score -k.
"""

import re
import warnings
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken

from minitune.atomic_files import read_json
from minitune.data.templates.chat_template import DEFAULT
from minitune.data.templates.folder_templates import Templates
from minitune.data.tokenization.tokenizer import Tokenizer, check_vocabulary
from minitune.gguf.pre_tokenizers import APPROXIMATED, pre_tokenizer_name
from minitune.gguf.writer import MetadataValue

# Token types. Control tokens are never shown; user-defined tokens are matched in any text.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Added tokens of Phi-3 behind which llama.cpp keeps white space.
PHI_TOKENS_WITHOUT_RSTRIP = ("<unk>", "<s>", "<|endoftext|>")
UNUSED_SCORE, ADDED_SCORE = -10000.0, -1000.0


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
            control = token.special or re.fullmatch(r"<\|.*\|>|<pad>|<mask>", token.content)
            self.tokens[id] = token.content
            if self.types[id] != UNKNOWN:
                self.types[id] = CONTROL if control else USER_DEFINED


def tokenizer_metadata(tokenizer: Tokenizer, rows: int, name: str) -> dict[str, MetadataValue]:
    """Return the `tokenizer.*` keys for an embedding of `rows` rows.

    name: general.name, by which llama.cpp knows the white space of Phi-3's added tokens.

    Warns if llama.cpp only approximates the pre-tokenizer.

    Raises: ValueError if the tokenizer has more tokens than rows, has a token twice, has no end
        token, or is of a kind that llama.cpp lacks.
    """
    check_vocabulary(tokenizer, rows)
    _check_flags(tokenizer, name)
    path = tokenizer.folder / "tokenizer.json"
    sentencepiece_path = tokenizer.folder / "tokenizer.model"
    content = read_json(path, default={})
    model = content.get("model", {})
    if content and (model.get("type") != "BPE" or "merges" not in model):
        raise ValueError(f"{path}: is a {model.get('type')} tokenizer; GGUF export knows BPE")
    if content and not model.get("byte_fallback"):
        metadata = _byte_level(path, content, tokenizer.added_tokens, rows)
    elif sentencepiece_path.is_file():
        metadata = _sentencepiece(sentencepiece_path, tokenizer, rows)
    else:
        metadata = _byte_fallback(content, tokenizer, rows)
    _check_unique(metadata["tokenizer.ggml.tokens"], tokenizer.folder)
    if (pre := metadata["tokenizer.ggml.pre"]) in APPROXIMATED:
        warnings.warn(
            f"{tokenizer.folder}: llama.cpp approximates the pre-tokenizer {pre}: words with "
            "combining marks (Hindi, Thai, decomposed accents) or with letters beyond A-Z in mixed "
            "case may become other tokens there than in training",
            stacklevel=2,
        )
    return metadata | _special_tokens(tokenizer)


def _check_flags(tokenizer: Tokenizer, name: str) -> None:
    """Raise ValueError if an added token has a flag that changes ids and that GGUF lacks.

    llama.cpp knows one flag, by the name of the model: with "phi-3" in it, white space behind an
    added token belongs to the token.
    """
    is_phi = any(phi in name.lower() for phi in ("phi-3", "phi3"))
    for token in tokenizer.added_tokens.values():
        cuts = is_phi and token.content not in PHI_TOKENS_WITHOUT_RSTRIP
        if cuts and not token.rstrip:
            raise ValueError(
                f"{tokenizer.folder}: the added token {token.content!r} has no rstrip, but "
                f"llama.cpp gives it one in a file named {name!r}; choose a name without phi-3, "
                "with minitune export --output NAME.gguf"
            )
        found = {"lstrip": token.lstrip, "rstrip": token.rstrip and not cuts}
        found["single_word"] = token.single_word
        if flags := [flag for flag, is_set in found.items() if is_set]:
            raise ValueError(
                f"{tokenizer.folder}: the added token {token.content!r} has {' and '.join(flags)}, "
                "which llama.cpp does not apply, so it would cut other tokens; set it to false in "
                "the tokenizer's files before training (rstrip of Phi-3's tokens is applied if "
                "the file's name contains phi-3)"
            )


def _byte_level(
    path: Path, content: dict, added: dict[int, AddedToken], rows: int
) -> dict[str, MetadataValue]:
    """Return the keys of a byte-level BPE tokenizer."""
    model = content["model"]
    vocabulary = Vocabulary(rows)
    for token, id in model["vocab"].items():
        vocabulary.set(id, token, NORMAL)
    vocabulary.add(added)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer_name(path, content),
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(model)],
    }


def _sentencepiece(path: Path, tokenizer: Tokenizer, rows: int) -> dict[str, MetadataValue]:
    """Return the keys of a SentencePiece tokenizer.model."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    size = model.get_piece_size()
    if size > rows:
        raise ValueError(
            f"{path}: holds {size} pieces, but the model's embedding has only {rows} rows"
        )
    vocabulary = Vocabulary(rows)
    for id in range(size):
        vocabulary.set(id, model.id_to_piece(id), _piece_type(model, id), model.get_score(id))
        trained = tokenizer.id_to_token(id)
        if trained != vocabulary.tokens[id] and id not in tokenizer.added_tokens:
            raise ValueError(
                f"{path}: the id {id} is {vocabulary.tokens[id]!r}, but tokenizer.json, which "
                f"training reads, says {trained!r}; remove the file that is wrong"
            )
    vocabulary.add(tokenizer.added_tokens)
    for id in tokenizer.added_tokens:
        if id >= size or vocabulary.types[id] == USER_DEFINED:
            vocabulary.scores[id] = ADDED_SCORE
    return _llama_metadata(vocabulary, tokenizer.adds_prefix_space)


def _piece_type(model: sentencepiece.SentencePieceProcessor, id: int) -> int:
    """Return the token type of a SentencePiece piece."""
    checks = (
        (model.is_unknown, UNKNOWN),
        (model.is_control, CONTROL),
        (model.is_byte, BYTE),
        (model.is_unused, UNUSED),
    )
    return next((kind for check, kind in checks if check(id)), NORMAL)


def _byte_fallback(content: dict, tokenizer: Tokenizer, rows: int) -> dict[str, MetadataValue]:
    """Return the keys of a SentencePiece vocabulary in a tokenizer.json; merges give the scores."""
    model = content["model"]
    merges = _merges(model)
    rank: dict[str, int] = {}  # of the first merge that makes a piece
    for k, pair in enumerate(merges):
        rank.setdefault("".join(pair), k)
    vocabulary = Vocabulary(rows)
    for token, id in model["vocab"].items():
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            vocabulary.set(id, token, BYTE)
        elif token == model.get("unk_token"):
            vocabulary.set(id, token, UNKNOWN)
        else:
            # single characters result from no merge; they rank below all pieces that do
            vocabulary.set(id, token, NORMAL, -float(rank.get(token, len(merges))))
    vocabulary.add(tokenizer.added_tokens)
    for id in tokenizer.added_tokens:
        user_defined = vocabulary.types[id] == USER_DEFINED
        vocabulary.scores[id] = ADDED_SCORE if user_defined else 0.0
    return _llama_metadata(vocabulary, tokenizer.adds_prefix_space)


def _llama_metadata(vocabulary: Vocabulary, space_prefix: bool) -> dict[str, MetadataValue]:
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.scores": vocabulary.scores,
        "tokenizer.ggml.token_type": vocabulary.types,
        "tokenizer.ggml.add_space_prefix": space_prefix,
    }


def _special_tokens(tokenizer: Tokenizer) -> dict[str, MetadataValue]:
    """Return the ids of special tokens, whether a BOS is added, and the chat template."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{tokenizer.folder}: names no eos_token; without one, generation in llama.cpp never "
            "ends"
        )
    other_ends = [id for id in tokenizer.eos_token_ids if id != tokenizer.eos_token_id]
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "eot": other_ends[0] if other_ends else None,  # ends a text too
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    metadata = {f"tokenizer.ggml.{name}_token_id": id for name, id in ids.items() if id is not None}
    # llama.cpp has to add the same BOS as the tokenizer. It must never add an EOS: the texts that
    # it gets are prompts, even if the tokenizer ends training texts with one.
    metadata["tokenizer.ggml.add_bos_token"] = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    metadata["tokenizer.ggml.add_eos_token"] = False
    return metadata | _chat_templates(tokenizer.chat_template)


def _chat_templates(templates: Templates) -> dict[str, MetadataValue]:
    """Return the keys of the chat templates; llama.cpp takes "tool_use" if there are tools."""
    if templates is None:
        return {}
    named = {DEFAULT: templates} if isinstance(templates, str) else templates
    metadata: dict[str, MetadataValue] = {"tokenizer.chat_template": named[DEFAULT]}
    others = {name: text for name, text in named.items() if name != DEFAULT}
    if others:
        metadata["tokenizer.chat_templates"] = list(others)
        metadata |= {f"tokenizer.chat_template.{name}": text for name, text in others.items()}
    return metadata


def _check_unique(tokens: list[str], folder: Path) -> None:
    """Raise ValueError if two ids have the same token."""
    first_id: dict[str, int] = {}
    for id, token in enumerate(tokens):
        other = first_id.setdefault(token, id)
        if other != id:
            raise ValueError(
                f"{folder}: tokens {other} and {id} are both {token!r}; llama.cpp refuses that"
            )


def _merges(model: dict) -> list[tuple[str, str]]:
    """Return the merges as pairs; a tokenizer.json holds "a b" or ["a", "b"].

    A space within a part becomes the letter that stands for its byte.
    """
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
    return [(a.replace(" ", "Ġ"), b.replace(" ", "Ġ")) for a, b in pairs]
