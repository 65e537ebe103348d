r"""llama.cpp's rules that cut a text into words before the merges, by their names in GGUF.

A rule is a list of regexes, and each regex cuts the words of the regex before. A match is a word,
and so is the text between two matches.

llama.cpp matches with C++'s std::regex, which knows no Unicode categories:

- A regex with categories sees one sign for each character beyond ASCII: the sign of its category.
  `\p{L}` becomes the ASCII letters and the sign of letters. Kinds of letters are not told apart.
- Another regex sees the characters themselves.
- Both see a vertical tab for white space beyond ASCII.

Some rules have code of their own in llama.cpp. It gives the words of the regexes here.

The categories are those of Python's `unicodedata`. llama.cpp's table is that of Unicode 15.1, so
the newest characters may have none in an old Python.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

# Unicode category -> (sign of a character beyond ASCII, the category's ASCII characters)
_CATEGORIES = {
    "N": ("\xd1", "0-9"),
    "L": ("\xd2", "A-Za-z"),
    "P": ("\xd3", r"!-#%-*,-/:;?@\[-\]_{}"),
    "M": ("\xd4", ""),
    "S": ("\xd5", r"$+<->\^`|~"),
}
_NO_CATEGORY, _SPACE_SIGN = "\xd0", "\v"
_WHITE_SPACE = "\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


class _Signs(dict):
    """A table for str.translate: the sign of each character's category."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if code >= 0x80:
            category = unicodedata.category(character)[0]
            character = _CATEGORIES.get(category, (_NO_CATEGORY, ""))[0]
        self[code] = character
        return character


_SPACE_SIGNS = dict.fromkeys(map(ord, _WHITE_SPACE), _SPACE_SIGN)
_CATEGORY_SIGNS = _Signs(_SPACE_SIGNS)


@dataclass(frozen=True)
class WordRule:
    """A rule that cuts a text into words.

    expressions: regexes, in which `\\p{L}` stands for a category.
    keeps_tokens: True if a word that is a token is not merged.
    adds_bos: True if a BOS is added unless the file says otherwise.
    """

    expressions: tuple[str, ...]
    keeps_tokens: bool = False
    adds_bos: bool = False

    @cached_property
    def _regexes(self) -> list[tuple[re.Pattern, bool]]:
        """Return each regex, and True if it sees signs of categories."""
        return [(_compiled(text), r"\p{" in text) for text in self.expressions]

    def split(self, text: str) -> list[str]:
        """Return the words of a text."""
        spans = [(0, len(text))]
        for regex, sees_categories in self._regexes:
            seen = text.translate(_CATEGORY_SIGNS if sees_categories else _SPACE_SIGNS)
            spans = [span for begin, end in spans for span in _cut(regex, seen, begin, end)]
        return [text[begin:end] for begin, end in spans]


def _cut(regex: re.Pattern, text: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the matches in text[begin:end] and the stretches between them."""
    for match in regex.finditer(text, begin, end):
        if match.start() > begin:
            yield begin, match.start()
        yield match.span()
        begin = match.end()
    if begin < end:
        yield begin, end


def _compiled(expression: str) -> re.Pattern:
    r"""Return a regex that matches text in signs; `\p{L}` may stand inside of brackets."""
    is_inside = False

    def replaced(match: re.Match) -> str:
        nonlocal is_inside
        if (category := match["category"]) is None:
            is_inside = match[0] == "[" or (is_inside and match[0] != "]")
            return match[0]
        characters = "".join(_CATEGORIES[category[0]])
        return characters if is_inside else f"[{characters}]"

    text = re.sub(r"\\p\{(?P<category>\w+)\}|\\(?!p\{).|\[|\]", replaced, expression)
    return re.compile(text, re.ASCII)


_CONTRACTION = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_OTHERS_AND_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_LINES = r"\s*[\r\n]+"
_SPACES = r"\s+(?!\S)|\s+"
_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"


def _llama3(numbers: str) -> str:
    return f"{_CONTRACTION}|{_WORD}|{numbers}|{_OTHERS}|{_LINES}|{_SPACES}"


# Capitals are told from small letters within A-Z only, and marks are no part of a word.
_NO_SMALL, _NO_CAPITAL = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"


def _cased(ending: str, numbers: str) -> str:
    begin = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{begin}{_NO_SMALL}*{_NO_CAPITAL}+{ending}|{begin}{_NO_SMALL}+{_NO_CAPITAL}*{ending}|"
        f"{numbers}|{_OTHERS_AND_SLASH}|{_LINES}|{_SPACES}"
    )


_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    rf" ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}|{_SPACES}",
)
_DEEPSEEK_CODER = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    "[一-龥ࠀ-一가-퟿]+",
    r"\p{N}",
)
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
    rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}|{_SPACES}"
)
_SEED_CODER = rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}|{_SPACES}"
_BAILING = (
    rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|\p{{N}}|{_OTHERS}|\s*[\r\n]|{_SPACES}"
)
_BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+"
_RUNS_OF_LINES = r"[^\n]+|[\n]+"

# (names, rule)
_RULES = (
    ("default", WordRule((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        WordRule((_llama3(r"\p{N}{1,3}"),), keeps_tokens=True, adds_bos=True),
    ),
    ("dbrx smaug-bpe chatglm-bpe", WordRule((_llama3(r"\p{N}{1,3}"),))),
    ("glm4 glm5", WordRule((_llama3(r"\p{N}{1,3}"),), keeps_tokens=True)),
    ("minicpm5", WordRule((r"\p{N}{1,3}", _llama3(r"\p{N}+")), keeps_tokens=True)),
    (
        "qwen2 deepseek-r1-qwen kormo stablelm2 megrez hunyuan grok-2 solar-open",
        WordRule((_llama3(r"\p{N}"),)),
    ),
    ("ufakzeka", WordRule((_llama3(r"\p{N}").removeprefix(f"{_CONTRACTION}|"),))),
    ("laguna", WordRule((_RUNS_OF_LINES, _llama3(r"\p{N}")))),
    ("qwen35", WordRule((_QWEN35,))),
    ("seed-coder", WordRule((_SEED_CODER,))),
    ("bailingmoe bailingmoe2 llada-moe", WordRule((_BAILING,))),
    ("tekken", WordRule((_cased("", r"\p{N}"),), keeps_tokens=True, adds_bos=True)),
    (
        "gpt-4o llama4 kanana2 talkie minimax-m2",
        WordRule((_cased(f"{_CONTRACTION}?", r"\p{N}{1,3}"),)),
    ),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", WordRule(_DEEPSEEK3)),
    ("deepseek-coder", WordRule(_DEEPSEEK_CODER)),
    ("falcon", WordRule((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    (
        "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
        WordRule((r"\p{N}", _GPT2)),
    ),
    (
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum exaone4",
        WordRule((_GPT2,)),
    ),
    ("poro-chat bloom gpt3-finnish", WordRule((_BLOOM,))),
    ("viking", WordRule((_BLOOM, r"\p{N}"))),
    # The BOS of Gemma 4 is added even if the file says otherwise (llama_cpp_tokenizer.py).
    ("gemma4", WordRule((_RUNS_OF_LINES,), adds_bos=True)),
)
WORD_RULES = {name: rule for names, rule in _RULES for name in names.split()}
