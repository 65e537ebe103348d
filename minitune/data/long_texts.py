"""Encode texts up to a number of tokens; long texts piece by piece.

Encoding takes about 285 bytes of memory a byte of text. A long text is therefore cut into pieces,
and pieces are encoded until there are enough tokens. The ids equal those of the whole text,
because a cut lies at a place that no token crosses:

    ... of twelve| blue lamps ...      between a letter and a white space that a letter follows
    ... the invoice|. The next ...     between a letter and a mark of punctuation
    ... the invoice.\\n|The next ...    between a line break and a letter

`cut_pattern` allows these cuts, or only those at white space, if

- the model is BPE, and no token of the vocabulary crosses such a place. The merges on the two
  sides are then independent;
- no part of the pipeline adds a prefix to a text, and no pattern looks behind a place.

If a tokenizer does not qualify or a text has no such place, the text is encoded whole.
"""

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

from minitune.data.tokenization.json_backend import BYTE_LETTERS
from minitune.data.tokenization.tokenizer import Encoding, Tokenizer

PIECE = 1 << 14  # characters that are encoded at once
SEARCHED = 1 << 10  # characters at the end of a piece in which the last cut is looked for
LETTER = r"[^\W\d_\u00b2\u00b3\u00b9\u2070-\u209c]"  # no superscript numbers
MARK = "[,.;:!?。，、；：！？]"
# A cut lies before the group that matches.
AT_SPACE = re.compile(rf"{LETTER}([ \n]){LETTER}|\S\n({LETTER})")
AT_SPACE_OR_MARK = re.compile(rf"{AT_SPACE.pattern}|{LETTER}({MARK})")
# A part of a letter in a token of bytes is U+FFFD.
CROSSES_SPACE = re.compile(rf"(?:{LETTER}|\ufffd)[ \n]|\n(?:{LETTER}|\ufffd)")
CROSSES_MARK = re.compile(rf"(?:{LETTER}|\ufffd){MARK}")
LOOKS_BEHIND = re.compile(r"\(\?<[=!]|(?<![\[\\])\^|\\[AbBGzZ]|(?<!\\)\$")
PROBE = ("Four words|, one line.\nOr two|", "\nThree!\n|", "Then four| more")
SPACE_MARK = "\u2581"  # stands for a space in the vocabularies that come from sentencepiece


def encode_to_length(
    tokenizer: Tokenizer, texts: list[str], max_tokens: int, with_spans: bool = True
) -> list[Encoding]:
    """Return the first `max_tokens` ids and spans of each text, without special tokens.

    with_spans: False leaves the spans empty, which takes half of the time.
    """
    results: list[Encoding] = [([], [])] * len(texts)
    pending = [(i, 0) for i in range(len(texts))]  # texts, and the character to go on from
    while pending:
        ends = [_end_of_piece(tokenizer, texts[i], begin) for i, begin in pending]
        pieces = [texts[i][begin:end] for (i, begin), end in zip(pending, ends, strict=True)]
        if with_spans:
            encodings = tokenizer.encode_batch_with_offsets(pieces)
        else:
            encodings = [(ids, []) for ids in tokenizer.encode_batch(pieces)]
        following = []
        for (i, begin), end, encoding in zip(pending, ends, encodings, strict=True):
            if begin:
                encoding = _extended_(results[i], encoding, begin)
            if len(encoding[0]) > max_tokens:
                encoding = (encoding[0][:max_tokens], encoding[1][:max_tokens])
            elif end < len(texts[i]) and len(encoding[0]) < max_tokens:
                following.append((i, end))
            results[i] = encoding
        pending = following
    return results


def _extended_(before: Encoding, piece: Encoding, begin: int) -> Encoding:
    """Append the encoding of the piece that starts at character `begin`, and return the whole."""
    before[0].extend(piece[0])
    before[1].extend((begin + first, begin + last) for first, last in piece[1])
    return before


def _end_of_piece(tokenizer: Tokenizer, text: str, begin: int) -> int:
    """Return the place of a cut, about PIECE characters after `begin`, or the end of the text."""
    limit = begin + PIECE
    cut = cut_pattern(tokenizer) if limit < len(text) else None
    if cut is None:
        return len(text)
    before = [_place(match) for match in cut.finditer(text, limit - SEARCHED, limit)]
    if before:
        return before[-1]
    after = cut.search(text, limit)
    return _place(after) if after else len(text)


def _place(match: re.Match) -> int:
    return match.start(match.lastindex)


@lru_cache(maxsize=8)
def cut_pattern(tokenizer: Tokenizer) -> re.Pattern | None:
    """Return the pattern of the places to cut a text without a change of its tokens, or None."""
    definition = tokenizer.definition()
    if definition is None or not _sees_pieces_like_texts(definition):
        return None
    tokens = list(_token_texts(definition))
    if any(map(CROSSES_SPACE.search, tokens)) or not _probe_agrees(tokenizer):
        return None
    return AT_SPACE if any(map(CROSSES_MARK.search, tokens)) else AT_SPACE_OR_MARK


def _sees_pieces_like_texts(definition: dict) -> bool:
    """Return True if every part of a tokenizer.json does the same to a text and to its pieces."""
    model = definition["model"]
    plain_bpe = model["type"] == "BPE" and not (
        model.get("dropout")
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
    )
    parts = [*_parts(definition["normalizer"]), *_parts(definition["pre_tokenizer"])]
    strips = any(map(_strips_at_a_letter, definition["added_tokens"]))
    return plain_bpe and all(map(_is_local, parts)) and not strips


def _token_texts(definition: dict) -> Iterator[str]:
    """Yield the texts of all tokens."""
    vocabulary = definition["model"]["vocab"]
    if any(part["type"] == "ByteLevel" for part in _parts(definition["pre_tokenizer"])):
        vocabulary = _byte_level_texts(vocabulary)
    for token in (*vocabulary, *(token["content"] for token in definition["added_tokens"])):
        yield token.replace(SPACE_MARK, " ")


def _parts(component: dict | None) -> Iterator[dict]:
    """Yield the parts of a normalizer or pre-tokenizer, which may be a sequence."""
    if component is None:
        return
    if component["type"] != "Sequence":
        yield component
        return
    for part in component.get("normalizers") or component.get("pretokenizers") or ():
        yield from _parts(part)


def _is_local(part: dict) -> bool:
    """Return True if a part does the same to a text and to its pieces."""
    kind, pattern = part["type"], part.get("pattern")
    if kind == "Replace":  # " " -> SPACE_MARK
        return pattern == {"String": " "} and part.get("content") == SPACE_MARK
    if kind == "Split":
        behaves = part.get("behavior") in ("Isolated", "Removed", "MergedWithPrevious")
        return behaves and not LOOKS_BEHIND.search(pattern.get("Regex", ""))
    if kind == "ByteLevel":
        return not part.get("add_prefix_space")
    return kind in ("NFC", "NFD", "NFKC", "NFKD", "Digits")


def _byte_level_texts(vocabulary: Iterable[str]) -> Iterator[str]:
    """Yield the texts of byte-level tokens; a part of a character becomes U+FFFD."""
    bytes_of = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}
    for token in vocabulary:
        if all(character in bytes_of for character in token):
            yield bytes(map(bytes_of.__getitem__, token)).decode(errors="replace")
        else:  # a special token
            yield token


def _strips_at_a_letter(token: dict) -> bool:
    """Return True if an added token takes white space across a cut."""
    ends = token["content"][-1:].isalpha() and token.get("rstrip")
    return bool(ends or (token["content"][:1].isalpha() and token.get("lstrip")))


def _probe_agrees(tokenizer: Tokenizer) -> bool:
    """Return True if the pieces of a short text have the tokens of the whole text."""
    pieces = "".join(PROBE).split("|")
    whole, *parts = tokenizer.encode_batch_with_offsets(["".join(pieces), *pieces])
    return whole[0] == [index for ids, _ in parts for index in ids]
