"""The tokenizer's part of a GGUF file's metadata, from the files of a checkpoint folder.

llama.cpp runs two tokenizers that matter here, and needs to be told which:

"gpt2"   byte-level BPE (Llama 3, SmolLM2, Mistral-Nemo): tokens, merges, and `pre`, the name of the rule that cuts a
         text into words before the merges. The name is found from the structure of tokenizer.json (the regex, the
         digit rule), which a retrained or extended vocabulary keeps. A wrong name would change tokens without a word
         from anyone, so a structure without a name is refused.
"llama"  SentencePiece BPE (Llama 1 and 2, Mistral-7B): pieces and scores; the best score is merged first. Where there
         is only a tokenizer.json, the scores are rebuilt from its merges: merge k makes a piece of score -k.

Token types: 1 normal, 2 unknown, 3 control (never shown, stops the text from being tokenised), 4 user-defined (matched
as a whole in any text), 5 unused (rows of the embedding without a token), 6 byte.
"""

import json
import re
from pathlib import Path

import sentencepiece
import tokenizers

from minitune.data.tokenizer import Tokenizer, check_vocabulary
from minitune.gguf.writer import MetadataValue

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNUSED_SCORE, ADDED_SCORE = -10000.0, -1000.0

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
)
# (rules before the byte level, whether a word that is a token skips the merges) -> llama.cpp's name
PRE_TOKENIZERS = {
    ((_WORDS + r"\p{N}{1,3}" + _REST,), True): "llama-bpe",
    ((_WORDS + r"\p{N}{1,3}" + _REST,), False): "smaug-bpe",
    ((_WORDS + r"\p{N}" + _REST,), False): "qwen2",
    ((_CASED + r"\p{N}" + _REST.replace(r"[\r\n]*", r"[\r\n/]*"),), True): "tekken",
    (("digits", "gpt-2"), False): "smollm",
    (("gpt-2",), False): "gpt-2",
}


def vocab_metadata(tokenizer: Tokenizer, rows: int) -> dict[str, MetadataValue]:
    """The `tokenizer.*` keys for an embedding of `rows` rows.

    Raises ValueError for a tokenizer with more tokens than rows, with the same token twice, without an end token, or
    of a kind that llama.cpp does not have.
    """
    check_vocabulary(tokenizer, rows)
    path = tokenizer.folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    model = content["model"] if content else {}
    if content and (model.get("type") != "BPE" or "merges" not in model):
        raise ValueError(f"{path}: is a {model.get('type')} tokenizer; GGUF export knows BPE")
    if content and not model.get("byte_fallback"):
        metadata = _byte_level(path, content, rows)
    elif (tokenizer.folder / "tokenizer.model").is_file():
        metadata = _sentencepiece(tokenizer.folder / "tokenizer.model", rows)
    else:
        metadata = _byte_fallback(path, content, rows)
    tokens = metadata["tokenizer.ggml.tokens"]
    if len(set(tokens)) != len(tokens):
        seen: dict[str, int] = {}
        id, token = next(
            (id, token) for id, token in enumerate(tokens) if seen.setdefault(token, id) != id
        )
        raise ValueError(
            f"{tokenizer.folder}: tokens {seen[token]} and {id} are both {token!r}; llama.cpp refuses that"
        )
    return metadata | _special_ids(tokenizer)


def _special_ids(tokenizer: Tokenizer) -> dict[str, MetadataValue]:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{tokenizer.folder}: names no eos_token; without one, generation in llama.cpp never ends"
        )
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "eot": next(
            (id for id in tokenizer.eos_token_ids if id != tokenizer.eos_token_id), None
        ),  # also ends a text
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    metadata = {f"tokenizer.ggml.{name}_token_id": id for name, id in ids.items() if id is not None}
    # What the tokenizer puts before a text is what llama.cpp has to put there. An end token after a prompt is never
    # wanted, whatever the tokenizer does for training texts.
    metadata["tokenizer.ggml.add_bos_token"] = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    metadata["tokenizer.ggml.add_eos_token"] = False
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def _byte_level(path: Path, content: dict, rows: int) -> dict[str, MetadataValue]:
    model = content["model"]
    tokens, types = _padding(rows)
    for token, id in model["vocab"].items():
        tokens[id], types[id] = token, NORMAL
    _add_tokens(tokens, types, _added_tokens(path.parent))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer_name(path, content),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(model)],
    }


def pre_tokenizer_name(path: Path, content: dict) -> str:
    """llama.cpp's name for the word rule of a byte-level tokenizer.json. ValueError where it has none."""
    pre = content.get("pre_tokenizer") or {}
    rules = []
    for part in pre.get("pretokenizers", [pre]):
        kind = part.get("type")
        if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            rules.append(part["pattern"].get("Regex"))
        elif kind == "Digits" and part.get("individual_digits"):
            rules.append("digits")
        elif kind == "ByteLevel" and not part.get("add_prefix_space"):
            rules += ["gpt-2"] if part.get("use_regex", True) else []
        else:
            rules.append(json.dumps(part))
    # llama.cpp normalises nothing; NFC is let through, because text is almost always in that form already
    normalizer = (content.get("normalizer") or {}).get("type", "NFC")
    name = PRE_TOKENIZERS.get((tuple(rules), bool(content["model"].get("ignore_merges"))))
    if name is None or normalizer != "NFC":
        known = ", ".join(PRE_TOKENIZERS.values())
        raise ValueError(
            f"{path}: llama.cpp has no name for this pre-tokenizer, and a wrong one would change tokens silently; "
            f"known are those of {known}. It is: {json.dumps(pre)[:300]}, normalizer {normalizer}"
        )
    return name


def _sentencepiece(path: Path, rows: int) -> dict[str, MetadataValue]:
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    size = model.get_piece_size()
    if size > rows:
        raise ValueError(
            f"{path}: holds {size} pieces, but the model's embedding has only {rows} rows"
        )
    tokens, types = _padding(rows)
    scores = [UNUSED_SCORE] * rows
    for id in range(size):
        tokens[id], scores[id] = model.id_to_piece(id), model.get_score(id)
        checks = ((model.is_unknown, UNKNOWN), (model.is_control, CONTROL), (model.is_byte, BYTE))
        types[id] = next(
            (kind for check, kind in checks if check(id)), UNUSED if model.is_unused(id) else NORMAL
        )
    for id in _add_tokens(tokens, types, _added_tokens(path.parent), first=size):
        scores[id] = ADDED_SCORE
    prefix = model.encode("a", out_type=str)[0].startswith("\u2581")
    return _spm_metadata(tokens, types, scores, prefix)


def _byte_fallback(path: Path, content: dict, rows: int) -> dict[str, MetadataValue]:
    model = content["model"]
    tokens, types = _padding(rows)
    scores = [UNUSED_SCORE] * rows
    merges = _merges(model)
    rank = {}
    for k, pair in enumerate(merges):
        rank.setdefault("".join(pair), k)
    for token, id in model["vocab"].items():
        byte = re.fullmatch(r"<0x[0-9A-F]{2}>", token)
        tokens[id] = token
        types[id] = BYTE if byte else UNKNOWN if token == model.get("unk_token") else NORMAL
        # single characters come out of no merge; they rank below all that do
        scores[id] = 0.0 if types[id] != NORMAL else -float(rank.get(token, len(merges)))
    for id in _add_tokens(tokens, types, _added_tokens(path.parent)):
        scores[id] = ADDED_SCORE if types[id] == USER_DEFINED else 0.0
    text = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    prefix = '"Prepend"' in text or (
        '"Metaspace"' in text and '"prepend_scheme": "never"' not in text
    )
    return _spm_metadata(tokens, types, scores, prefix)


def _spm_metadata(
    tokens: list[str], types: list[int], scores: list[float], prefix: bool
) -> dict[str, MetadataValue]:
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _padding(rows: int) -> tuple[list[str], list[int]]:
    """A token and its type for every row: placeholders, until the vocabulary is filled in."""
    return [f"[PAD{id}]" for id in range(rows)], [UNUSED] * rows


def _add_tokens(
    tokens: list[str], types: list[int], added: dict[int, tuple[str, bool]], first: int = 0
) -> list[int]:
    """Fill in added tokens in place; those below id `first` keep their text and type. The ids filled in."""
    filled = [id for id in added if id >= first]
    for id in filled:
        text, special = added[id]
        control = special or re.fullmatch(r"<\|.*\|>|<pad>|<mask>", text)
        types[id] = types[id] if types[id] == UNKNOWN else CONTROL if control else USER_DEFINED
        tokens[id] = text
    return filled


def _added_tokens(folder: Path) -> dict[int, tuple[str, bool]]:
    """Added tokens by id: text, and whether they are special. From tokenizer.json as `tokenizers` understands it (it
    renumbers tokens after a gap), else from the files beside a tokenizer.model."""
    if (path := folder / "tokenizer.json").is_file():
        added = tokenizers.Tokenizer.from_file(str(path)).get_added_tokens_decoder()
        return {id: (token.content, token.special) for id, token in added.items()}
    result = {}
    if (path := folder / "added_tokens.json").is_file():
        result = {
            id: (text, False) for text, id in json.loads(path.read_text(encoding="utf-8")).items()
        }
    if (path := folder / "tokenizer_config.json").is_file():
        decoder = json.loads(path.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
        result |= {
            int(id): (token["content"], bool(token.get("special"))) for id, token in decoder.items()
        }
    return result


def _merges(model: dict) -> list[tuple[str, str]]:
    """The merges as pairs; a file holds "a b" or ["a", "b"]. A space inside a part is written as its byte's letter."""
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
    return [(a.replace(" ", "Ġ"), b.replace(" ", "Ġ")) for a, b in pairs]
