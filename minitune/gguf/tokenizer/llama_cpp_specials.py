"""The tokens that llama.cpp cuts out of a text before it merges, and their cutting.

They are the control, user-defined and unknown tokens of the file. llama.cpp overrides the types of
some tokens, whose texts it knows. The name of the model decides if white space behind them is cut.
"""

from collections.abc import Collection, Mapping
from typing import Any

from gguf import TokenType

ASCII_SPACE = " \t\n\v\f\r"
# Control tokens, whatever type the file gives them.
END_TOKENS = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> "
    "<|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> "
    "<eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~["
)
# One token of each group becomes a control token, unless the file names the group's token.
FILL_IN_TOKENS = {
    "fim_pre": "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> "
    "<|code_prefix|> <|prefix|>",
    "fim_suf": "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> "
    "<|code_suffix|> <|suffix|>",
    "fim_mid": "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> "
    "<|code_middle|> <|middle|>",
    "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
    "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
    "fim_sep": "<|file_sep|>",
}
OLD_FILL_IN_KEYS = {"fim_pre": "prefix", "fim_suf": "suffix", "fim_mid": "middle"}
SHOWN_TOKENS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")  # user-defined
# If the vocabulary has all tokens of a group, "<|end|>" ends no text.
NO_END_GROUPS = (
    {"<|return|>", "<|call|>"},
    {"<|return|>", "<|calls|>"},
    {"<|call|>", "<|flush|>"},
    {"<|calls|>", "<|flush|>"},
)
# Types of the tokens that some vocabularies have as no end.
NO_END_TYPES = {"<|end|>": TokenType.USER_DEFINED, "</s>": TokenType.NORMAL}
PHI_NAMES = ("phi-3", "phi3")
# Phi-3's tokens that keep the white space behind them, and the tokens that it must have.
PHI_TOKENS_WITHOUT_RSTRIP = ("<unk>", "<s>", "<|endoftext|>")
PHI_TOKENS = (*PHI_TOKENS_WITHOUT_RSTRIP, "</s>")

CUT_TYPES = {TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN}


class SpecialTokens:
    """The tokens that are cut out of a text, the longest first.

    ids: text -> id of the whole vocabulary.
    keys: the keys of the file below `tokenizer.ggml.`.
    name: general.name of the file.

    Raises: ValueError if llama.cpp refuses the vocabulary, or its choice is not known.
    """

    def __init__(self, ids: Mapping[str, int], keys: Mapping[str, Any], name: str):
        types = list(map(int, keys.get("token_type", [TokenType.NORMAL] * len(ids))))
        if len(types) < len(ids):
            raise ValueError(f"the file has {len(ids)} tokens but only {len(types)} token types")
        # tokens that are cut out of a text although the file does not say so
        overridden = _overridden(ids, keys, types)
        self.unasked = [
            text
            for text, type in overridden.items()
            if types[ids[text]] not in CUT_TYPES and type in CUT_TYPES
        ]
        for text, type in overridden.items():
            types[ids[text]] = type
        self.types = types  # those that llama.cpp gives the tokens
        cut = [(id, text) for text, id in ids.items() if types[id] in CUT_TYPES]
        cut.sort(key=lambda token: -len(token[1].encode()))
        self._order = {text: rank for rank, (_, text) in enumerate(cut)}
        self._ids = {text: id for id, text in cut}
        self._parsed = {text for id, text in cut if types[id] != TokenType.USER_DEFINED}
        self._lengths: dict[str, set[int]] = {}  # first character -> lengths of the tokens
        for text in self._order:
            self._lengths.setdefault(text[0], set()).add(len(text))
        self.stripped: set[str] = set()  # tokens that take the white space behind them
        if any(phi in name.lower() for phi in PHI_NAMES):
            for text in PHI_TOKENS:
                if text not in ids:
                    raise ValueError(
                        f"general.name is {name!r}, and llama.cpp refuses such a file without the "
                        f"token {text!r}; choose a name without phi-3"
                    )
            self.stripped = {*self._order, "</s>"}.difference(PHI_TOKENS_WITHOUT_RSTRIP)

    def cut(self, text: str, parse_special: bool = True) -> list[str | int]:
        """Return the ids of the tokens in a text, and the stretches of text between them.

        parse_special: False leaves all but user-defined tokens in the text.
        """
        parts: list[str | int] = [text] if text else []
        for token in self._tokens_in(text):
            if parse_special or token not in self._parsed:
                parts = [
                    new
                    for part in parts
                    for new in ([part] if isinstance(part, int) else self._cut_at(token, part))
                ]
        return parts

    def _tokens_in(self, text: str) -> list[str]:
        """Return the tokens that occur in a text, in the order in which they are cut out."""
        found = {
            token
            for begin, first in enumerate(text)
            if first in self._lengths
            for length in self._lengths[first]
            if (token := text[begin : begin + length]) in self._order
        }
        return sorted(found, key=self._order.__getitem__)

    def _cut_at(self, token: str, text: str) -> list[str | int]:
        """Return the parts of a text around each occurrence of a token."""
        parts: list[str | int] = []
        rest = text
        while True:
            left, found, right = rest.partition(token)
            if left:
                parts.append(left)
            if not found:
                return parts
            parts.append(self._ids[token])
            rest = right.lstrip(ASCII_SPACE) if token in self.stripped else right


def known_ends(tokens: Collection[str]) -> list[str]:
    """Return the tokens of a vocabulary at which llama.cpp ends a text because of their texts."""
    ends = [text for text in END_TOKENS.split() if text in tokens]
    if any(all(text in tokens for text in group) for group in NO_END_GROUPS):
        ends = [text for text in ends if text != "<|end|>"]
    if "<|tool_response>" in tokens:  # Gemma 4
        ends = [text for text in ends if text != "</s>"]
    return ends


def _overridden(
    ids: Mapping[str, int], keys: Mapping[str, Any], types: list[int]
) -> dict[str, int]:
    """Return the types that llama.cpp gives the tokens of the vocabulary whose texts it knows.

    types: the types of the file.
    """
    found: dict[str, int] = {}
    for key, texts in FILL_IN_TOKENS.items():
        old = OLD_FILL_IN_KEYS.get(key)
        if f"{key}_token_id" in keys or (old and f"{old}_token_id" in keys):
            continue
        group = [text for text in texts.split() if text in ids]
        if len(group) == 1:
            found[group[0]] = TokenType.CONTROL
        elif any(types[ids[text]] not in CUT_TYPES for text in group):
            raise ValueError(
                f"llama.cpp makes one of {', '.join(group)} a control token, and which one is not "
                f"known; name it with the key tokenizer.ggml.{key}_token_id"
            )
    ends = known_ends(ids)
    found |= dict.fromkeys(ends, TokenType.CONTROL)
    found |= {text: TokenType.USER_DEFINED for text in SHOWN_TOKENS if text in ids}
    for text, type in NO_END_TYPES.items():
        if text in ids and text not in ends:
            found[text] = type
    return found
