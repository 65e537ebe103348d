"""The word rules of byte-level tokenizers, by which a text is cut into words before the merges.

GGUF names a rule (`tokenizer.ggml.pre`). The name follows from the structure of tokenizer.json (the
regex, the digit rule), which a retrained or extended vocabulary keeps. A wrong name would change
tokens silently, so an unknown structure is refused.
"""

import json
from pathlib import Path

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*")
_SMALL = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_CAPITAL = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|"
    "\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
# (rules before the byte level, True if a word that is a token skips the merges) -> llama.cpp's name
PRE_TOKENIZERS = {
    ((_WORDS + r"\p{N}{1,3}" + _REST,), True): "llama-bpe",
    ((_WORDS + r"\p{N}{1,3}" + _REST,), False): "smaug-bpe",
    ((_WORDS + r"\p{N}" + _REST,), False): "qwen2",
    ((f"{_SMALL}|{_CAPITAL}|" + r"\p{N}" + _REST_WITH_SLASH,), True): "tekken",
    (
        (f"{_SMALL}{_ENDING}|{_CAPITAL}{_ENDING}|" + r"\p{N}{1,3}" + _REST_WITH_SLASH,),
        False,
    ): "gpt-4o",
    (("digits", "gpt-2"), False): "smollm",
    (("gpt-2",), False): "gpt-2",
    (_DEEPSEEK, False): "deepseek-v3",
}
# llama.cpp tells capitals from small letters within A-Z only here, and knows no combining marks.
APPROXIMATED = ("tekken", "gpt-4o")


def pre_tokenizer_name(path: Path, content: dict) -> str:
    """Return llama.cpp's name for the word rule of a byte-level tokenizer.json.

    path: the file that the error names. content: the file's content.

    Raises: ValueError if llama.cpp has no such rule.
    """
    pre = content.get("pre_tokenizer") or {}
    rules = [rule for part in pre.get("pretokenizers", [pre]) for rule in _word_rules(part)]
    # llama.cpp does not normalise. NFC is accepted, because nearly all text already has that form.
    normalizer = content.get("normalizer") or {}
    normalizers = [part.get("type", "NFC") for part in normalizer.get("normalizers", [normalizer])]
    ignore_merges = bool(content["model"].get("ignore_merges"))
    name = PRE_TOKENIZERS.get((tuple(rules), ignore_merges))
    if name is None or set(normalizers) - {"NFC"}:
        known = ", ".join(PRE_TOKENIZERS.values())
        raise ValueError(
            f"{path}: llama.cpp has no name for this pre-tokenizer, and a wrong one would change "
            f"tokens silently; known are those of {known}. "
            f"It is: {json.dumps(pre)[:300]}, "
            f"normalizer {', '.join(normalizers)}"
        )
    return name


def _word_rules(part: dict) -> list[str]:
    """Return the rules of one part of a pre-tokenizer: a regex, "digits" or "gpt-2".

    A part without a rule gives none, and an unknown part its JSON, which no table entry equals.
    """
    kind = part.get("type")
    if kind == "Split" and _keeps_each_match(part):
        return [part["pattern"].get("Regex")]
    if kind == "Digits" and part.get("individual_digits"):
        return ["digits"]
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return ["gpt-2"] if part.get("use_regex", True) else []
    return [json.dumps(part)]


def _keeps_each_match(split: dict) -> bool:
    """Return True if a Split makes a word of each match of its regex and loses no character.

    The inverted form removes all text between the matches. None remains if the regex matches every
    character, as those do that end in "any other white space".
    """
    form = split.get("behavior"), bool(split.get("invert"))
    regex = split["pattern"].get("Regex") or ""
    covers_all = regex.endswith((_REST, _REST_WITH_SLASH))
    return form == ("Isolated", False) or (form == ("Removed", True) and covers_all)
