r"""The word rules of pre_tokenizers.py as llama.cpp applies them.

Most rules are those of tokenizer.json; llama.cpp approximates the others (`LLAMA_CPP_REGEXES`).
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

from minitune.gguf.tokenizer.pre_tokenizers import (
    LLAMA_CPP_REGEXES,
    PRE_TOKENIZERS,
    names_of_rule,
)

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
        if match.end() > match.start():
            yield match.span()
        begin = match.end()
    if begin < end:
        yield begin, end


def _compiled(expression: str) -> re.Pattern:
    r"""Return a regex that matches text in signs; `\p{L}` may stand inside of brackets."""
    is_inside = False

    def replaced(match: re.Match) -> str:
        nonlocal is_inside
        if match[0] == "$" and not is_inside:
            return r"\Z"  # in Python "$" also matches before a line end
        if (category := match["category"]) is None:
            is_inside = match[0] == "[" or (is_inside and match[0] != "]")
            return match[0]
        characters = "".join(_CATEGORIES[category[0]])
        return characters if is_inside else f"[{characters}]"

    text = re.sub(r"\\p\{(?P<category>\w+)\}|\\(?!p\{).|[][$]", replaced, expression)
    return re.compile(text, re.ASCII)


BOS_RULES = ("llama-bpe", "tekken")  # rules with a BOS unless the file says otherwise
NO_BOS_NAMES = ("glm4", "glm5")  # names of these rules without one


def _word_rules() -> Iterator[tuple[str, WordRule]]:
    """Yield the rule of each name that is known here."""
    for (regexes, keeps_tokens), name in PRE_TOKENIZERS.items():
        regexes = LLAMA_CPP_REGEXES.get(name, regexes)
        for alias in names_of_rule(name):
            adds_bos = name in BOS_RULES and alias not in NO_BOS_NAMES
            yield alias, WordRule(regexes, keeps_tokens, adds_bos)


WORD_RULES = dict(_word_rules())
