"""The word rules of byte-level tokenizers, by which a text is cut into words before the merges.

GGUF names a rule (`tokenizer.ggml.pre`). The name follows from the structure of tokenizer.json (the
regexes, the digit rule), which a retrained or extended vocabulary keeps. A wrong name would change
tokens silently, so an unknown structure is refused.

llama.cpp has several names for some rules, one for each published vocabulary. A fingerprint of the
vocabulary tells those apart, as in llama.cpp's converter; any other vocabulary gets the first name.

pre_tokenizer_name   tokenizer.json -> name, for the export
pre_tokenizer_of     name -> tokenizer.json, for a GGUF file as the base
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from minitune.data.tokenization.tokenizer import Tokenizer

DEFAULT_RULE = "default"  # of files that name none
DIGIT = r"\p{N}"
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_REST_WITH_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
_SMALL = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_CAPITAL = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_MARKED_WORDS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|"
_MARKED_REST = r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES
_SENTENCE_PARTS = r" ?[^(\s|[.,!?…。，、।۔،])]+"
_LLAMA_CPP_SENTENCE_PARTS = r" ?[^(\s|.,!?…。，、।۔،)]+"
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + _SPACES,
)
_EAST_ASIAN = "[一-龥\u0800-一가-\ud7ff]"
_SIGNS = "[!-/:-~！-／：-～‘-‟\u3000-。]"
# Letters of DeepSeek LLM: Latin, Greek, Cyrillic and others that have small and capital forms.
_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ"
    "-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉ"
    "ⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED_LETTERS}]+",
    rf"\s?{_SIGNS}+",
    r"\s+$",
    rf"{_EAST_ASIAN}+",
    DIGIT,
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", rf"{_EAST_ASIAN}+", DIGIT)
# llama.cpp keeps white space beyond ASCII out of the ranges of characters.
_NO_SPACE = r"(?!\s)"
_SEED_CODER = _CONTRACTIONS + _WORDS + r"\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+" + _SPACES


def _spelling(regex: str) -> str:
    r"""Return a regex in the spelling of the table, with line ends as \r and \n."""
    return regex.replace("\r", r"\r").replace("\n", r"\n")


def _approximately_cased(ending: str, numbers: str) -> str:
    """Return llama.cpp's regex of words that begin with capitals and end in small letters."""
    before, no_small = r"[^\r\n\p{L}\p{N}]?", r"(?:(?=\p{L})[^a-z])"
    no_capital = r"(?:(?=\p{L})[^A-Z])"
    words = f"{before}{no_small}*{no_capital}+{ending}|{before}{no_small}+{no_capital}*{ending}"
    return f"{words}|{numbers}{_REST_WITH_SLASH}"


# (rules before the byte level, True if a word that is a token skips the merges) -> llama.cpp's name
PRE_TOKENIZERS = {
    ((_CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST,), True): "llama-bpe",
    ((_CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST,), False): "smaug-bpe",
    ((_CONTRACTIONS + _WORDS + r"\p{N}" + _REST,), False): "qwen2",
    ((_CONTRACTIONS + _MARKED_WORDS + r"\p{N}" + _MARKED_REST,), False): "qwen35",
    ((_WORDS + r"\p{N}" + _REST,), False): "ufakzeka",
    ((r"\p{N}{1,3}", _CONTRACTIONS + _WORDS + r"\p{N}+" + _REST), True): "minicpm5",
    ((_SEED_CODER,), False): "seed-coder",
    ((f"{_SMALL}|{_CAPITAL}|" + r"\p{N}" + _REST_WITH_SLASH,), True): "tekken",
    (
        (f"{_SMALL}{_ENDING}|{_CAPITAL}{_ENDING}|" + r"\p{N}{1,3}" + _REST_WITH_SLASH,),
        False,
    ): "gpt-4o",
    ((DIGIT, GPT_2), False): "smollm",
    ((GPT_2,), False): "gpt-2",
    (_DEEPSEEK_LLM, False): "deepseek-llm",
    (_DEEPSEEK_CODER, False): "deepseek-coder",
    (_DEEPSEEK_V3, False): "deepseek-v3",
    ((_SENTENCE_PARTS,), False): "poro-chat",
    ((_SENTENCE_PARTS, DIGIT), False): "viking",
    ((r"\p{N}+", r"(?=(\d{3})+(?!\d))"), False): "superbpe",
    ((r"[\p{P}\$\+<=>\^~\|]+", GPT_2, r"\p{N}+", "[0-9][0-9][0-9]"), False): DEFAULT_RULE,
}
# Name of a rule -> llama.cpp's regexes of the rule, if they are not those of tokenizer.json.
LLAMA_CPP_REGEXES = {
    "tekken": (_approximately_cased("", r"\p{N}"),),
    "gpt-4o": (_approximately_cased(_ENDING, r"\p{N}{1,3}"),),
    "deepseek-llm": (
        *_DEEPSEEK_LLM[:2],
        rf"\s?(?:{_NO_SPACE}{_SIGNS})+",
        r"\s+$",
        rf"(?:{_NO_SPACE}{_EAST_ASIAN})+",
        r"\p{N}+",
    ),
    "deepseek-coder": (*_DEEPSEEK_CODER[:-2], rf"(?:{_NO_SPACE}{_EAST_ASIAN})+", DIGIT),
    "poro-chat": (_LLAMA_CPP_SENTENCE_PARTS,),
    "viking": (_LLAMA_CPP_SENTENCE_PARTS, DIGIT),
}
# llama.cpp tells capitals from small letters within A-Z only here, and knows no combining marks.
APPROXIMATED = ("tekken", "gpt-4o")
# The text whose ids make the fingerprint, and the length of the fingerprint in hex digits.
FINGERPRINT_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal)"
    " 😶\u200d🌫\ufe0f (multiple emojis concatenated) ✅ 🦙🦙 3 "
    "33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3"
    "...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= не"
    "що на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he"
    "'s there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
FINGERPRINT_DIGITS = 16
# Name of a rule -> fingerprint of a published vocabulary -> llama.cpp's name for that vocabulary.
PUBLISHED_VOCABULARIES = {
    "llama-bpe": {
        "9d032fcbd5501f4a": "falcon3",
        "0e9433cbbb161f89": "pixtral",
        "f6791d196f87ce6b": "midm-2.0",
    },
    "smaug-bpe": {
        "a8594e3edff7c29c": "dbrx",
    },
    "qwen2": {
        "b3f499bb4255f8ca": "deepseek-r1-qwen",
        "d4c8f286ea6b520b": "megrez",
        "862f827721df9560": "f2llmv2",
    },
    "smollm": {
        "35d91631860c815f": "starcoder",
        "6221ad2852e85ce9": "refact",
        "9c2227e4dd922002": "command-r",
        "1431a23e583c9743": "minerva-7b",
    },
    "gpt-2": {
        "b6dc8df998e1cfbd": "mpt",
        "1994ffd01900cfb3": "trillion",
        "b0a6b1c0bd5998eb": "a.x-4.0",
        "a1e163ecab2e718a": "mellum",
        "53e325976a6e1423": "granite-docling",
    },
}


# Name of a rule -> llama.cpp's further names for it, which a file may hold. No file written here
# holds them.
FURTHER_NAMES = {
    "llama-bpe": "llama3 llama-v3 falcon-h1 lfm2 jina-v5-nano glm4 glm5",
    "smaug-bpe": "chatglm-bpe",
    "qwen2": "kormo stablelm2 hunyuan solar-open grok-2",
    "gpt-4o": "llama4 kanana2 talkie minimax-m2",
    "smollm": "codeshell exaone mellum2",
    "gpt-2": "phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de modern-bert exaone4 olmo jais",
    "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
    "poro-chat": "bloom gpt3-finnish",
}


def names_of_rule(rule: str) -> list[str]:
    """Return all names that llama.cpp has for a rule of PRE_TOKENIZERS."""
    published = PUBLISHED_VOCABULARIES.get(rule, {}).values()
    return [rule, *published, *FURTHER_NAMES.get(rule, "").split()]


def pre_tokenizer_of(name: str) -> tuple[PreTokenizer, bool]:
    """Return the pre-tokenizer and `ignore_merges` of a word rule, from llama.cpp's name.

    The regexes are those of the models' tokenizer.json, unless llama.cpp has other ones.

    Raises: ValueError that lists the known names if the name is none of them.
    """
    for (rules, ignore_merges), rule in PRE_TOKENIZERS.items():
        if name in names_of_rule(rule):
            rules = LLAMA_CPP_REGEXES.get(rule, rules)
            has_byte_rule = rules[-1] == GPT_2
            parts = list(map(_split_part, rules[:-1] if has_byte_rule else rules))
            byte_level = ByteLevel(add_prefix_space=False, use_regex=has_byte_rule)
            return Sequence([*parts, byte_level]), ignore_merges
    known = ", ".join(known for rule in PRE_TOKENIZERS.values() for known in names_of_rule(rule))
    raise ValueError(
        f"tokenizer.ggml.pre is {name!r}, and its word rule is not known here; known are {known}; "
        "train on the folder of the original model instead"
    )


def _split_part(rule: str) -> PreTokenizer:
    """Return the part of a pre-tokenizer that makes a word of each match of a rule."""
    if rule == DIGIT:
        return Digits(individual_digits=True)
    return Split(Regex(rule), behavior="isolated")


def pre_tokenizer_name(path: Path, content: dict) -> str:
    """Return llama.cpp's name for the word rule of a byte-level tokenizer.json.

    path: the file that the error names. content: the file's content.

    Raises: ValueError if llama.cpp has no such rule, or if a normaliser changes the text.
    """
    check_normalizer(path, content)
    pre = content.get("pre_tokenizer") or {}
    *splits, last = list(flattened(pre, "pretokenizers")) or [{}]
    rules = [rule for part in splits for rule in _word_rules(part)] + _word_rules(last, True)
    ignore_merges = bool(content["model"].get("ignore_merges"))
    name = _name_of((tuple(rules), ignore_merges))
    if name is None or last.get("type") != "ByteLevel":
        known = ", ".join(PRE_TOKENIZERS.values())
        raise ValueError(
            f"{path}: llama.cpp has no name for this pre-tokenizer, and a wrong one would change "
            f"tokens silently; known are those of {known}. It is: {json.dumps(pre)[:300]}, "
            f"ignore_merges {json.dumps(ignore_merges)}; save the merged folder instead"
        )
    return name


def _name_of(key: tuple[tuple[str, ...], bool]) -> str | None:
    """Return the name of a key of PRE_TOKENIZERS, or of the key with llama.cpp's own regexes."""
    for (rules, ignore_merges), name in PRE_TOKENIZERS.items():
        if key in ((rules, ignore_merges), (LLAMA_CPP_REGEXES.get(name), ignore_merges)):
            return name
    return None


def published_name(rule: str, tokenizer: Tokenizer) -> str:
    """Return llama.cpp's name for a published vocabulary with this rule, otherwise the rule's."""
    return PUBLISHED_VOCABULARIES.get(rule, {}).get(fingerprint(tokenizer), rule)


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return the beginning of the SHA-256 of a text's ids, as in llama.cpp's converter."""
    ids = tokenizer.encode(FINGERPRINT_TEXT)
    return hashlib.sha256(str(ids).encode()).hexdigest()[:FINGERPRINT_DIGITS]


def check_normalizer(path: Path, content: dict, allowed: tuple[dict, ...] = ()) -> None:
    """Raise ValueError if a normaliser changes texts, because llama.cpp does not normalise.

    NFC is accepted, because nearly all text already has that form.

    allowed: further normalisers that llama.cpp's tokenizer has built in.
    """
    normalizer = content.get("normalizer") or {}
    for part in flattened(normalizer, "normalizers"):
        if part and part.get("type") != "NFC" and part not in allowed:
            raise ValueError(
                f"{path}: the normalizer {json.dumps(part)[:200]} changes texts before they are "
                "cut into tokens, and llama.cpp does not normalise; save the merged folder instead"
            )


def flattened(part: dict, key: str) -> Iterator[dict]:
    """Yield the parts of a sequence in order, those of inner sequences too.

    key: the key under which a sequence of this kind has its parts.
    """
    if part.get("type") == "Sequence":
        for inner in part.get(key) or []:
            yield from flattened(inner, key)
    elif part:
        yield part


def _word_rules(part: dict, is_last: bool = False) -> list[str]:
    """Return the rules of one part of a pre-tokenizer, as regexes.

    A part without a rule gives none, and an unknown part its JSON, which no table entry equals.

    is_last: True if no part follows; letters stand for bytes behind the byte level.
    """
    kind = part.get("type")
    if kind == "Split" and _keeps_each_match(part):
        return [_spelling(part["pattern"]["Regex"])]
    if kind == "Digits" and part.get("individual_digits"):
        return [DIGIT]
    if kind == "ByteLevel" and is_last and not part.get("add_prefix_space"):
        return [GPT_2] if part.get("use_regex", True) else []
    return [json.dumps(part)]


def _keeps_each_match(split: dict) -> bool:
    """Return True if a Split makes a word of each match of its regex and loses no character.

    The inverted form removes all text between the matches. None remains if the regex matches every
    character, as those do that end in "any other white space".
    """
    regex = split.get("pattern", {}).get("Regex")
    if regex is None:
        return False
    behavior, invert = split.get("behavior"), bool(split.get("invert"))
    covers_all = _spelling(regex).endswith((_REST, _REST_WITH_SLASH, _MARKED_REST, GPT_2))
    return behavior == "Isolated" or (behavior == "Removed" and invert and covers_all)
