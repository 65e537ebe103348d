"""Limits of a tokenizer.json, which are checked before the library `tokenizers` reads the file.

The library runs the parts of a file without limits: a normalizer that multiplies a text fills the
memory and aborts the process. So each part must be of a known type, with parameters that a text can
bear:

- Replacements, in normalizers and decoders, lengthen a text by `MAX_FACTOR` at most, all together.
- Regular expressions repeat no group that holds a repetition or alternatives, such as `(a+)+`,
  because Oniguruma would try all divisions of a text. At most `MAX_REPEATS` open repetitions stand
  in one alternative.
- A list of parts has `MAX_PARTS` parts, and the byte level stands in it twice at most: each time it
  writes two letters for one beyond ASCII.
- A post-processor puts at most `MAX_AROUND` tokens around one text, which occurs once.

The limits are far beyond published tokenizers.
"""

import base64
import binascii
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitune.read_files import read_json

MAX_BYTES = 128 << 20  # of the file; that of 262,000 tokens has 33 MB
MAX_FACTOR = 16
MAX_PARTS = 64
MAX_BYTE_LEVELS = 2
MAX_TEXT = 64  # characters of a parameter, such as a prefix
MAX_TOKEN = 10_000  # characters of a token
MAX_AROUND = 64
MAX_COUNT = 1000  # characters that a part cuts off, or the length of its pieces
MAX_WORD = 10_000  # characters of a word that a WordPiece model looks up
MAX_REGEX = 20_000  # characters
MAX_REPEATS = 4
MAX_REPEAT_COUNT = 1000
MAX_GROUPS = 50  # that stand inside of each other

NORMALIZERS = (
    "BertNormalizer ByteLevel Lowercase NFC NFD NFKC NFKD Nmt Precompiled Prepend Replace Sequence "
    "Strip StripAccents"
)
PRE_TOKENIZERS = (
    "BertPreTokenizer ByteLevel CharDelimiterSplit Delimiter Digits FixedLength Metaspace "
    "Punctuation Sequence Split UnicodeScripts Whitespace WhitespaceSplit"
)
POST_PROCESSORS = "BertProcessing ByteLevel RobertaProcessing Sequence TemplateProcessing"
DECODERS = "BPEDecoder ByteFallback ByteLevel CTC Fuse Metaspace Replace Sequence Strip WordPiece"
MODELS = "BPE Unigram WordLevel WordPiece"
# Key of tokenizer.json -> the types of its parts, and the key of a sequence's parts.
PARTS = {
    "normalizer": (NORMALIZERS, "normalizers"),
    "pre_tokenizer": (PRE_TOKENIZERS, "pretokenizers"),
    "post_processor": (POST_PROCESSORS, "processors"),
    "decoder": (DECODERS, "decoders"),
}
# Parameters that are texts, and would be written once for each word or letter.
SHORT_TEXTS = (
    "prepend prefix suffix replacement str_rep content pad_token word_delimiter_token delimiter "
    "continuing_subword_prefix end_of_word_suffix"
)
REMEDY = "use the tokenizer.json of the model's publisher"
# An escape, a class of characters, a group's begin or end, an alternative, or a repetition.
REGEX_PART = re.compile(
    r"\\(?:[pPx]\{[^{}]*+\}|.)|\[(?:\\.|\[:?[^\[\]]*+\]|[^\[\]\\])*+\]"
    r"|\((?:\?(?:<?[=!>]|[imx-]*+:?|:|<\w++>))?|\)|\||[*+?]|\{\d*+,?\d*+\}|.",
    re.DOTALL,
)


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    """Return the content of a tokenizer.json whose parts are within the limits.

    Raises: ValueError that names the file, the part and the limit.
    """
    content = read_json(path, max_bytes=MAX_BYTES)
    try:
        for key, (types, inner) in PARTS.items():
            _check_parts(key, content.get(key), types, inner)
        _check_model(content.get("model"))
        _check_added(content.get("added_tokens", []))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {REMEDY}") from None
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{path}: a part has another form than `tokenizers` reads ({error!r:.100}); {REMEDY}"
        ) from None
    return content


def _check_parts(key: str, whole: Any, types: str, inner: str) -> None:
    """Check all parts of a normalizer, pre-tokenizer, post-processor or decoder."""
    parts = list(_flattened(key, whole, inner))
    factor, byte_levels = 1.0, 0
    for part in parts:
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in types.split():
            raise ValueError(f"its {key} has the unknown type {kind!r:.60}")
        byte_levels += kind == "ByteLevel"
        factor *= _growth(key, part)
        _check_parameters(key, part)
        if kind == "TemplateProcessing":
            _check_template(part)
        if kind == "Precompiled":
            _check_character_map(part)
    if factor > MAX_FACTOR:
        raise ValueError(
            f"the replacements of its {key} can make a text {factor:,.0f} times as long, and "
            f"{MAX_FACTOR} times is the most that is run"
        )
    if byte_levels > MAX_BYTE_LEVELS:
        raise ValueError(f"its {key} applies the byte level {byte_levels} times, expected once")


def _flattened(key: str, whole: Any, inner: str) -> Iterator[dict]:
    """Yield all parts, sequences included."""
    waiting, count = ([] if whole is None else [whole]), 0
    while waiting:
        part = waiting.pop()
        count += 1
        if not isinstance(part, dict):
            raise ValueError(f"a part of its {key} is {part!r:.60}, expected an object")
        if count + len(waiting) > MAX_PARTS:
            raise ValueError(f"its {key} has over {MAX_PARTS} parts")
        yield part
        if part.get("type") == "Sequence":
            waiting += part.get(inner) or []


def _growth(key: str, part: dict) -> float:
    """Return the factor by which a replacement can lengthen a text."""
    if part.get("type") != "Replace":
        return 1
    content = part.get("content")
    if not isinstance(content, str):
        raise ValueError(f"its {key} replaces by {content!r:.60}, expected a text")
    text = part["pattern"].get("String")
    if text:
        return max(1, len(content) / len(text))
    return max(1, len(content)) + (text == "")


def _check_parameters(key: str, part: dict) -> None:
    """Check the texts, numbers and patterns of a part."""
    for name in SHORT_TEXTS.split():
        value = part.get(name)
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise ValueError(
                f"its {key} has a {name} of {len(value):,} characters, and {MAX_TEXT} are the most"
            )
    for name in ("start", "stop", "length"):
        value = part.get(name, 1)
        if type(value) is not int or not 0 <= value <= MAX_COUNT:
            raise ValueError(f"its {key} has {name} {value!r:.60}, expected 0 to {MAX_COUNT}")
    if part.get("type") == "FixedLength" and part.get("length") == 0:
        raise ValueError(f"its {key} cuts a text into pieces of no length")
    if part.get("type") == "Prepend" and part.get("prepend") == "":  # the library panics
        raise ValueError(f"its {key} prepends an empty text")
    pattern = part.get("pattern")
    if pattern is None:
        return
    if not isinstance(pattern, dict) or len(pattern) != 1:
        raise ValueError(f"its {key} has the pattern {pattern!r:.60}")
    if "Regex" in pattern:
        check_regex(pattern["Regex"])


def _check_template(part: dict) -> None:
    """Check a TemplateProcessing, which puts tokens around one text, or around two."""
    tokens = part.get("special_tokens", {})
    tokens = tokens if isinstance(tokens, list) else list(tokens.values())
    longest = max((len(token["ids"]) for token in tokens), default=0)
    for name, most in (("single", 1), ("pair", 2)):
        pieces = part[name]
        texts = sum("Sequence" in piece for piece in pieces)
        if len(pieces) * max(longest, 1) > MAX_AROUND or texts > most:
            raise ValueError(
                f"its post_processor has {len(pieces)} pieces of up to {longest} tokens in {name}, "
                f"among them {texts} texts; {MAX_AROUND} tokens and {most} are the most"
            )


def _check_character_map(part: dict) -> None:
    """Check that a compiled map of characters replaces one by a short text only.

    The map is the length of a trie (4 bytes, little endian), the trie, and texts that end in 0.
    """
    try:
        data = base64.b64decode(part.get("precompiled_charsmap") or "", validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("its precompiled_charsmap is not base64") from None
    check_character_map(data)


def check_character_map(data: bytes) -> None:
    """Raise ValueError if a map of characters is damaged, or replaces one by a long text."""
    if not data:
        return
    size = int.from_bytes(data[:4], "little")
    if len(data) < 4 + size or size % 4:
        raise ValueError("its map of characters is shorter than it says")
    if max(map(len, data[4 + size :].split(b"\0"))) > MAX_TEXT:
        raise ValueError(f"its map of characters writes over {MAX_TEXT} bytes for one character")


def _check_model(model: Any) -> None:
    """Check the type of the model, its parameters and the lengths of its tokens."""
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if kind not in MODELS.split():
        raise ValueError(f"its model has the type {kind!r:.60}; known are {MODELS}")
    _check_parameters("model", {key: model.get(key) for key in SHORT_TEXTS.split()})
    if not 0 <= model.get("max_input_chars_per_word", 0) <= MAX_WORD:
        raise ValueError(f"its model looks up words of over {MAX_WORD:,} characters")
    vocabulary = model.get("vocab", {})
    tokens = vocabulary
    if isinstance(vocabulary, list):
        tokens = [entry[0] for entry in vocabulary]
    if max(map(len, tokens), default=0) > MAX_TOKEN:
        raise ValueError(f"its vocabulary has a token of over {MAX_TOKEN:,} characters")


def _check_added(tokens: Any) -> None:
    """Check the form and the lengths of added tokens."""
    for token in tokens:
        content, index = token["content"], token["id"]
        if not isinstance(content, str) or type(index) is not int:
            raise ValueError(f"its added_tokens have the entry {token!r:.60}")
        if len(content) > MAX_TOKEN:
            raise ValueError(
                f"its added token {index} has {len(content):,} characters, and {MAX_TOKEN:,} are "
                "the most"
            )


# ---- regular expressions


def check_regex(regex: Any) -> None:
    """Raise ValueError if a search for a regular expression may take too long.

    regex: in the syntax of Oniguruma. Only its groups and repetitions are understood.
    """
    shown = f"its regular expression {regex!r:.80}"
    if not isinstance(regex, str) or len(regex) > MAX_REGEX:
        raise ValueError(f"{shown} is no text of at most {MAX_REGEX:,} characters")
    # of each open group: open repetitions in this alternative, in an earlier one, any repetition,
    # alternatives
    groups = [[0, 0, 0, 0]]
    last = [0, 0, 0, 0]  # of the group that ended just now
    for match in REGEX_PART.finditer(regex):
        part = match[0]
        if part.startswith("("):
            groups.append([0, 0, 0, 0])
        elif part == ")" and len(groups) > 1:
            last = groups.pop()
            last[1] = max(last[0], last[1])
            groups[-1][0] += last[1]
            groups[-1][2] += last[2]
            continue
        elif part == "|":
            groups[-1][1] = max(groups[-1][:2])
            groups[-1][0] = 0
            groups[-1][3] += 1
        elif part in ("*", "+") or re.fullmatch(r"\{\d*,\}", part):
            _check_repeated(shown, last)
            groups[-1][0] += 1
            groups[-1][2] += 1
        elif part.startswith("{") and part != "{":
            _check_counts(shown, part, last)
            groups[-1][2] += 1
        elif re.fullmatch(r"\\[1-9kg]", part):
            raise ValueError(f"{shown} refers back to a group, which may take too long")
        last = [0, 0, 0, 0]
        if len(groups) > MAX_GROUPS:
            raise ValueError(f"{shown} nests over {MAX_GROUPS} groups")
        if groups[-1][0] > MAX_REPEATS:
            raise ValueError(f"{shown} has over {MAX_REPEATS} open repetitions in one alternative")


def _check_repeated(shown: str, group: list[int]) -> None:
    """Raise ValueError if a group that repeats holds an open repetition or alternatives."""
    if group[1] or group[3]:
        raise ValueError(
            f"{shown} repeats a group that holds a repetition or alternatives, which may take too "
            "long"
        )


def _check_counts(shown: str, part: str, group: list[int]) -> None:
    """Raise ValueError if a repetition such as {2,5} is too long, or repeats a repetition."""
    counts = [int(count) for count in re.findall(r"\d+", part[:20])]
    if (
        len(part) > 20
        or max(counts, default=0) > MAX_REPEAT_COUNT
        or (group[2] and max(counts) > 8)
    ):
        raise ValueError(f"{shown} repeats a part too often")
