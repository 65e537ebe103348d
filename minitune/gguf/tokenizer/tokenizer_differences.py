"""The differences between the tokenizer in a GGUF file and the tokenizer that trained, in words.

A difference that no file can avoid has a reason in llama.cpp. Any other is a fault of the file.
"""

import unicodedata
from typing import NamedTuple

from minitune.config.visible_text import on_one_line
from minitune.data.tokenization.sentencepiece_backend import SPACE_MARK
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.tokenizer.llama_cpp_specials import PHI_TOKENS_WITHOUT_RSTRIP
from minitune.gguf.tokenizer.llama_cpp_tokenizer import SENTENCEPIECE, LlamaCppTokenizer
from minitune.gguf.tokenizer.pre_tokenizers import APPROXIMATED
from minitune.gguf.tokenizer.tokenizer_texts import text_around

SHOWN_IDS = 3  # on each side of the first difference
SHOWN_CHARACTERS = 80


class Difference(NamedTuple):
    """A text that becomes other tokens in llama.cpp than in training.

    file: the ids from the file. trained: the ids of the tokenizer that trained.
    """

    text: str
    file: list[int]
    trained: list[int]


def unavoidable_reason(
    difference: Difference, file: LlamaCppTokenizer, tokenizer: Tokenizer
) -> str:
    """Return the reason for a difference that no file can avoid, otherwise ""."""
    text = difference.text
    if approximation := _approximation(file.pre, text):
        return approximation
    if unasked := [token for token in file.special.unasked if token in text]:
        return f"takes {unasked[0]!r} in a text for a control token, whatever the file says"
    if tokenizer.add_eos_token and difference.file == [*difference.trained, file.eos_token_id]:
        return (
            f"adds {file.tokens[file.eos_token_id]!r} behind every prompt, so no conversation goes "
            "on (let tokenizer.ggml.add_eos_token be false in the file)"
        )
    composed = unicodedata.normalize("NFC", text)
    if composed != text and _makes(file, composed, difference):
        return "does not compose letters and accents (NFC), as training did"
    is_first = tokenizer.adds_prefix_space and not tokenizer.prefixes_each_stretch
    if is_first and _makes(file, f" {text}", difference):
        return (
            "puts a space before every stretch of text or before none, but training only before "
            "the first (begin each prompt with a special token or a space)"
        )
    if file.model == SENTENCEPIECE and SPACE_MARK in text:
        return f"takes the letter {SPACE_MARK!r} (U+2581) of a text for a space"
    return ""


def _approximation(pre: str, text: str) -> str:
    """Return how llama.cpp approximates a word rule on a text, otherwise ""."""
    if pre in APPROXIMATED and any(map(_is_mark_or_cased, text)):
        return (
            f"approximates the pre-tokenizer {pre}: capitals beyond A-Z and combining marks "
            "(Hindi, Thai, decomposed accents) begin and end words otherwise"
        )
    if pre == "superbpe" and any(map(_is_other_digit, text)):
        return f"approximates the pre-tokenizer {pre}: it groups no digits but 0 to 9"
    return ""


def _is_mark_or_cased(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] == "M" or (not character.isascii() and category in ("Lu", "Ll", "Lt"))


def _is_other_digit(character: str) -> bool:
    return not character.isascii() and unicodedata.category(character) == "Nd"


def _makes(file: LlamaCppTokenizer, text: str, difference: Difference) -> bool:
    """Return True if the file makes of `text` the ids of training."""
    adds_bos = difference.file != file.encode(difference.text, add_special=False)
    return file.encode(text, adds_bos) == difference.trained


def likely_reason(difference: Difference, file: LlamaCppTokenizer, tokenizer: Tokenizer) -> str:
    """Return the likely fault behind a difference, and the remedy."""
    text, ids, trained = difference
    if ids == [file.bos_token_id, *trained]:
        return "the file adds a BOS that training did not; add_bos_token must be false"
    if trained == [file.bos_token_id, *ids]:
        return "training began with the BOS, the file adds none; add_bos_token must be true"
    if ids == [*trained, file.eos_token_id]:
        return "the file adds an EOS behind every prompt; add_eos_token must be false"
    for token in tokenizer.added_tokens.values():
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if getattr(token, flag)]
        if flags and text == text_around(token.content):
            return (
                f"the added token {token.content!r} has {' and '.join(flags)}, which llama.cpp "
                "does not apply; set it to false in the tokenizer's files before training (rstrip "
                "is applied if all added tokens have it but "
                f"{', '.join(PHI_TOKENS_WITHOUT_RSTRIP)}, as Phi-3's)"
            )
    if normalizers := _normalizers(tokenizer):
        return (
            f"training normalises text ({', '.join(normalizers)}) and llama.cpp does not; take "
            "the normalizer out of tokenizer.json before training"
        )
    keys = f"pre ({file.pre}), tokens, merges"
    if file.model == "llama":
        keys = "tokens, scores, add_space_prefix"
    return (
        f"one of the keys {keys}, token_type is not that of the tokenizer in this folder; export "
        "with the tokenizer that trained"
    )


def _normalizers(tokenizer: Tokenizer) -> list[str]:
    """Return the normalizers of a tokenizer.json that change more than spaces and NFC."""
    normalizer = (tokenizer.definition() or {}).get("normalizer") or {}
    types = [part["type"] for part in normalizer.get("normalizers", [normalizer]) if part]
    return [type for type in types if type not in ("NFC", "Prepend", "Replace")]


# ---- texts and ids in visible form


def shown(text: str, at_end: bool = False) -> str:
    """Return a text in visible form, cut to its beginning or its end."""
    line = on_one_line(text)
    if len(line) <= SHOWN_CHARACTERS:
        return f"'{line}'"
    if at_end:
        return f"'...{line[-SHOWN_CHARACTERS:]}'"
    return f"'{line[:SHOWN_CHARACTERS]}...'"


def shown_token(id: int | None, tokens: list[str]) -> str:
    """Return an id with its text; "none" for None."""
    return "none" if id is None else f"{id} {on_one_line(tokens[id])!r}"


def shown_ids(ids: list[int], others: list[int], tokens: list[str]) -> str:
    """Return the ids around the first that differs from `others`, with their texts."""
    first = first_difference(ids, others)
    begin, end = max(first - SHOWN_IDS, 0), first + SHOWN_IDS + 1
    around = [shown_token(id, tokens) for id in ids[begin:end]]
    before, behind = ["..."] * (begin > 0), ["..."] * (end < len(ids))
    return f"[{', '.join([*before, *around, *behind])}]"


def first_difference(a: list | str, b: list | str) -> int:
    """Return the first place at which two sequences differ."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
