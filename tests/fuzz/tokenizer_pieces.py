"""Random parts of tokenizer.json: normalizers, pre-tokenizers, decoders, models and others."""

from collections.abc import Callable
from random import Random
from typing import Any

LENGTHS = (0, 1, 3, 1000, 10_000_000, -1, 2**63, 1.5)
STRINGS = ("", "a", " ", "▁", "x" * 1000, "\u0301", "<|im_end|>", "[UNK]", "日", "\x00", "ab")
PATTERNS = (
    "a", "", "(a+)+$", "(.*)*x", "(a|aa)+$", "[", "(?<=a)", "\\p{L}+", "\\s+(?!\\S)|\\s+",
    "(?i:'s)", ".", "^", "$", "\\b", "(\\w+\\s?)*$", "a{1000}{1000}", "((((a?){30}){30}){30}){30}",
    "(?R)", "\\1", "(?:(?:(?:a*)*)*)*b",
)  # fmt: skip
WEIGHTS = (0.0, -1.0, 1e308, -1e308, 0.5)


def _pattern(rng: Random) -> dict:
    return rng.choice(({"String": rng.choice(STRINGS)}, {"Regex": rng.choice(PATTERNS)}))


def _replace(rng: Random) -> dict:
    content = rng.choice((*STRINGS, "a" * 1000, "aa"))
    return {"type": "Replace", "pattern": _pattern(rng), "content": content}


def _sequence(key: str, part: Callable[[Random, int], Any]) -> Callable[[Random, int], Any]:
    def make(rng: Random, depth: int) -> Any:
        if rng.random() < 0.1:
            return {"type": "Sequence", key: [part(rng, 9)] * rng.choice((4, 60, 3000))}
        return {"type": "Sequence", key: [part(rng, depth + 1) for _ in range(rng.randint(0, 4))]}

    return make


def _nested(part: Callable[[Random, int], Any], key: str, rng: Random) -> Any:
    """Return a sequence in a sequence, and so on."""
    value = part(rng, 9)
    for _ in range(rng.choice((2, 30, 100, 400))):
        value = {"type": "Sequence", key: [value]}
    return value


def normalizer(rng: Random, depth: int = 0) -> Any:
    """Return a random normalizer."""
    if depth == 0 and rng.random() < 0.05:
        return _nested(normalizer, "normalizers", rng)
    kinds = [
        {"type": rng.choice(("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt"))},
        {"type": "Prepend", "prepend": rng.choice((*STRINGS, "x" * 10_000_000))},
        _replace(rng),
        {"type": "Strip", "strip_left": True, "strip_right": rng.random() < 0.5},
        {"type": "ByteLevel"},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
        | {"strip_accents": None, "lowercase": True},
        {"type": "Precompiled", "precompiled_charsmap": rng.choice(("", "AAAA", "////" * 50))},
        None,
    ]
    if depth < 3:
        kinds += [_sequence("normalizers", normalizer)(rng, depth)] * 4
    return rng.choice(kinds)


def pre_tokenizer(rng: Random, depth: int = 0) -> Any:
    """Return a random pre-tokenizer."""
    if depth == 0 and rng.random() < 0.05:
        return _nested(pre_tokenizer, "pretokenizers", rng)
    behaviour = rng.choice(
        ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
    )
    kinds = [
        {
            "type": rng.choice(
                ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts")
            )
        },
        {
            "type": "Split",
            "pattern": _pattern(rng),
            "behavior": behaviour,
            "invert": rng.random() < 0.3,
        },
        {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": rng.random() < 0.5,
        },
        {"type": "Digits", "individual_digits": True},
        {"type": "Punctuation", "behavior": behaviour},
        {
            "type": "Metaspace",
            "replacement": rng.choice(STRINGS),
            "prepend_scheme": "always",
            "split": True,
        },
        {"type": "CharDelimiterSplit", "delimiter": rng.choice(STRINGS)},
        {"type": "FixedLength", "length": rng.choice(LENGTHS)},
        None,
    ]
    if depth < 3:
        kinds += [_sequence("pretokenizers", pre_tokenizer)(rng, depth)] * 3
    return rng.choice(kinds)


def post_processor(rng: Random, depth: int = 0) -> Any:
    """Return a random post-processor."""
    token = rng.choice(("<|im_start|>", "<none>", "a"))
    piece = rng.choice(
        ({"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}})
    )
    ids = rng.choice(([1], [], [999_999], [1] * 1000, [2**32 - 1]))
    special = {token: {"id": token, "ids": ids, "tokens": [token] * rng.choice((len(ids), 1))}}
    kinds = [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {
            "type": "TemplateProcessing",
            "single": [piece] * rng.choice((0, 1, 5000)),
            "pair": [piece],
        }
        | {"special_tokens": rng.choice((special, {}))},
        {"type": "BertProcessing", "sep": [token, 2], "cls": [token, 99_999]},
        {"type": "RobertaProcessing", "sep": ["a", 1], "cls": ["b", 2], "trim_offsets": True}
        | {"add_prefix_space": False},
        None,
    ]
    if depth < 3:
        kinds.append(_sequence("processors", post_processor)(rng, depth))
    return rng.choice(kinds)


def decoder(rng: Random, depth: int = 0) -> Any:
    """Return a random decoder."""
    if depth == 0 and rng.random() < 0.05:
        return _nested(decoder, "decoders", rng)
    kinds = [
        {"type": rng.choice(("ByteLevel", "ByteFallback", "Fuse"))},
        _replace(rng),
        {"type": "Strip", "content": rng.choice(STRINGS), "start": rng.choice(LENGTHS), "stop": 0},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False},
        {"type": "BPEDecoder", "suffix": rng.choice(STRINGS)},
        {"type": "WordPiece", "prefix": rng.choice(STRINGS), "cleanup": True},
        {
            "type": "CTC",
            "pad_token": "a",
            "word_delimiter_token": rng.choice(STRINGS),
            "cleanup": True,
        },
        None,
    ]
    if depth < 3:
        kinds += [_sequence("decoders", decoder)(rng, depth)] * 2
    return rng.choice(kinds)


def model(rng: Random, depth: int = 0) -> Any:
    """Return a random model of a few tokens."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdelmp Ġ", "ab", "▁a", "<0x41>", ""]
    rng.shuffle(words)
    vocabulary: dict[str, Any] = {word: i for i, word in enumerate(words)}
    if rng.random() < 0.3:
        vocabulary[rng.choice(words)] = rng.choice((0, 5, 2**31, 2**32 - 1, -1, 1.5))
    merges = [list(rng.choice((("a", "b"), ("a", "x"), ("", "a"), ("ab", "ab")))) for _ in range(2)]
    unknown = rng.choice((None, "<unk>", "a", ""))
    scores = [[word, rng.choice(WEIGHTS)] for word in words]
    return rng.choice(
        (
            {"type": "BPE", "vocab": vocabulary, "merges": merges, "unk_token": unknown}
            | {"dropout": rng.choice((None, 0.5, -1.0, 2.0)), "byte_fallback": rng.random() < 0.5}
            | {
                "continuing_subword_prefix": rng.choice((None, "##", "é")),
                "end_of_word_suffix": None,
            },
            {
                "type": "WordPiece",
                "vocab": vocabulary,
                "unk_token": "a",
                "continuing_subword_prefix": "##",
            }
            | {"max_input_chars_per_word": rng.choice((0, 100, 2**40))},
            {"type": "WordLevel", "vocab": vocabulary, "unk_token": rng.choice(("a", "<unk>"))},
            {"type": "Unigram", "vocab": scores, "unk_id": rng.choice((0, None, 999, 3))}
            | {"byte_fallback": rng.random() < 0.5},
        )
    )


def added_tokens(rng: Random, depth: int = 0) -> list[dict]:
    """Return random added tokens."""
    return [
        {
            "id": rng.choice((0, 1, i, 400 + i, 2**31, 2**32 - 1)),
            "content": rng.choice((*STRINGS, f"<t{i}>")),
            **{
                name: rng.random() < 0.3
                for name in ("lstrip", "rstrip", "normalized", "single_word")
            },
            "special": rng.random() < 0.5,
        }
        for i in range(rng.choice((0, 1, 3, 5000)))
    ]


PARTS: dict[str, Callable[..., Any]] = {
    "normalizer": normalizer,
    "pre_tokenizer": pre_tokenizer,
    "post_processor": post_processor,
    "decoder": decoder,
    "model": model,
    "added_tokens": added_tokens,
    "truncation": lambda rng: (
        {"max_length": rng.choice(LENGTHS), "strategy": "LongestFirst"}
        | {"stride": rng.choice(LENGTHS), "direction": "Right"}
    ),
    "padding": lambda rng: (
        {"strategy": {"Fixed": rng.choice(LENGTHS)}, "direction": "Right"}
        | {"pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    ),
}


def random_part(name: str, rng: Random) -> Any:
    """Return a random value of a key of tokenizer.json."""
    return PARTS[name](rng)
