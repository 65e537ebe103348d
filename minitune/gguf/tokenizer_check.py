"""Check that the tokenizer in a GGUF file is the tokenizer that trained, by running both.

llama.cpp's side is rebuilt from the keys of the file (llama_cpp_tokenizer.py). Both sides get

- the fixed texts of tokenizer_texts.py;
- each added token before and behind words, white space and itself;
- the texts of about `SAMPLED_TOKENS` tokens of the vocabulary;
- plain texts with the BOS;
- conversations, rendered by the template of the file and by the template that trained.

llama.cpp's server drops the BOS that a rendered conversation begins with, if it adds one itself.

A difference is an error, except those that no file can avoid; they are one warning:

- llama.cpp only approximates the word rules of `APPROXIMATED`;
- llama.cpp does not bring text into the normal form NFC;
- llama.cpp puts a space before every stretch of text between special tokens, or before none;
- llama.cpp cuts some tokens out of a text that training does not, because of their texts;
- llama.cpp adds a BOS to conversations whose template writes none.
"""

import unicodedata
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from gguf import TokenType

from minitune.config.visible_text import on_one_line
from minitune.data.templates.chat_template import DEFAULT, ChatTemplate
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.llama_cpp_tokenizer import LlamaCppTokenizer
from minitune.gguf.pre_tokenizers import APPROXIMATED
from minitune.gguf.tokenizer_texts import (
    BEGINNINGS,
    CONVERSATIONS,
    FIXED_TEXTS,
    text_around,
    text_with,
)

SAMPLED_TOKENS = 2048
SHOWN_IDS = 3  # on each side of the first difference
SHOWN_CHARACTERS = 80
TEMPLATE_KEY = "tokenizer.chat_template"
DAY = "2026-01-01"  # for templates that write the date


class Difference(NamedTuple):
    """A text that becomes other tokens in llama.cpp than in training.

    file: the ids from the file. trained: the ids of the tokenizer that trained.
    """

    text: str
    file: list[int]
    trained: list[int]


def check_tokenizer(metadata: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Check that llama.cpp cuts texts into the tokens of training.

    metadata: the keys of the file, as they will be written, or as gguf's reader gives them.
    tokenizer: the tokenizer that trained.

    Warns if llama.cpp must cut some texts otherwise, whatever the file says.

    Raises: ValueError that names the first text that differs, the ids and the remedy.
    """
    try:
        file = LlamaCppTokenizer(metadata)
    except ValueError as error:
        raise ValueError(f"{tokenizer.folder}: {error}") from None
    check = _Check(file, metadata, tokenizer)
    check.check_vocabulary()
    check.check_texts()
    check.check_beginnings()
    check.check_conversations()
    check.warn()


class _Check:
    """One comparison of a file with a tokenizer."""

    def __init__(self, file: LlamaCppTokenizer, metadata: Mapping[str, Any], tokenizer: Tokenizer):
        self.file, self.metadata, self.tokenizer = file, metadata, tokenizer
        self.unavoidable: dict[str, list[Difference]] = {}  # reason -> differences

    # ---- the vocabulary

    def check_vocabulary(self) -> None:
        """Compare the texts of all tokens, the types of special tokens, and BOS and EOS."""
        tokenizer, tokens = self.tokenizer, self.file.tokens
        if len(tokens) < tokenizer.vocab_size:
            raise self._error(
                f"the file has {len(tokens)} tokens, but the tokenizer has ids up to "
                f"{tokenizer.vocab_size - 1}"
            )
        for id, text in enumerate(tokens):
            trained = tokenizer.id_to_token(id)
            if trained not in (text, None) and id not in tokenizer.added_tokens:
                raise self._error(f"the token {id} is {text!r} in the file, but was {trained!r}")
        types = self.metadata.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
        for id, token in tokenizer.added_tokens.items():
            if token.special and types[id] not in (TokenType.CONTROL, TokenType.UNKNOWN):
                raise self._error(
                    f"the special token {token.content!r} has the type {int(types[id])} in the "
                    f"file, expected {int(TokenType.CONTROL)} (control): llama.cpp would show it"
                )
        for name, in_file, trained in (
            ("BOS", self.file.bos_token_id, tokenizer.bos_token_id),
            ("EOS", self.file.eos_token_id, tokenizer.eos_token_id),
        ):
            if trained is not None and in_file != trained:
                raise self._error(
                    f"the {name} token is {self._token(in_file)} in the file, but "
                    f"{self._token(trained)} in training"
                )

    # ---- texts

    def check_texts(self) -> None:
        """Compare the fixed texts, those around added tokens and a sample of the vocabulary."""
        added = [token.content for token in self.tokenizer.added_tokens.values()]
        around = map(text_around, [*added, *self.file.special.unasked])
        step = -(-self.tokenizer.vocab_size // SAMPLED_TOKENS)
        pieces = [
            self.tokenizer.decode([id], skip_special_tokens=False)
            for id in range(0, self.tokenizer.vocab_size, step)
        ]
        sampled = map(text_with, pieces, pieces[1:] + pieces[:1])
        self._compare([*FIXED_TEXTS, *around, *sampled])

    def check_beginnings(self) -> None:
        """Compare the special tokens that are added to a plain text.

        An EOS at the end of training's texts is left out: llama.cpp's texts are prompts.
        """
        for text in BEGINNINGS:
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            prefix, _ = self.tokenizer.special_tokens_around(ids)
            trained, file = [*prefix, *ids], self.file.encode(text)
            if file != trained:
                self._report(Difference(text, file, trained))

    def check_conversations(self) -> None:
        """Compare conversations, as llama.cpp's server renders and encodes them."""
        if self.tokenizer.chat_template is None:
            return
        here = self.tokenizer.template.on(DAY)
        try:
            there = self._file_template().on(DAY)
        except ValueError as error:
            raise self._error(f"the chat template of the file is not valid: {error}") from None
        for messages, add_generation_prompt, tools in CONVERSATIONS:
            try:
                text = here.render(messages, add_generation_prompt, tools)
            except ValueError:
                continue  # the template takes no such conversation
            try:
                in_file = there.render(messages, add_generation_prompt, tools)
            except ValueError as error:
                raise self._error(f"the chat template of the file fails: {error}") from None
            self._check_rendering(text, in_file)

    def _check_rendering(self, text: str, in_file: str) -> None:
        if in_file != text:
            begin = next(
                (
                    i
                    for i, pair in enumerate(zip(text, in_file, strict=False))
                    if len(set(pair)) > 1
                ),
                min(len(text), len(in_file)),
            )
            raise self._error(
                f"the chat template writes {_shown(in_file[begin:])} in llama.cpp, but "
                f"{_shown(text[begin:])} in training, behind {_shown(text[:begin], at_end=True)}; "
                "llama.cpp gives a template the BOS and EOS tokens of the file and no others"
            )
        bos = self.file.bos_token_id
        begins_with_bos = self.file.adds_bos and text.startswith(self.file.tokens[bos])
        file = self.file.encode(
            text.removeprefix(self.file.tokens[bos]) if begins_with_bos else text
        )
        trained = self.tokenizer.encode(text, add_special_tokens=False)
        if self.file.adds_bos and file[1:] == trained:
            reason = (
                f"adds {self.file.tokens[bos]!r} to every conversation, but the chat template "
                "writes none and training saw none (let the template begin with {{ bos_token }})"
            )
            self.unavoidable.setdefault(reason, []).append(Difference(text, file, trained))
        elif file != trained:
            self._report(Difference(text, file, trained))

    def _file_template(self) -> ChatTemplate:
        """Return the template of the file, with the variables that llama.cpp gives it."""
        prefix = f"{TEMPLATE_KEY}."
        named = {
            key.removeprefix(prefix): text
            for key, text in self.metadata.items()
            if key.startswith(prefix)
        }
        if TEMPLATE_KEY in self.metadata:
            named[DEFAULT] = self.metadata[TEMPLATE_KEY]
        ids = {"bos_token": self.file.bos_token_id, "eos_token": self.file.eos_token_id}
        variables = {name: "" if id is None else self.file.tokens[id] for name, id in ids.items()}
        return ChatTemplate(named, variables)

    # ---- differences

    def _compare(self, texts: Iterable[str]) -> None:
        """Compare the ids of texts without special tokens around them."""
        texts = list(dict.fromkeys(texts))
        for text, trained in zip(texts, self.tokenizer.encode_batch(texts), strict=True):
            file = self.file.encode(text, add_special=False)
            if file != trained:
                self._report(Difference(text, file, trained))

    def _report(self, difference: Difference) -> None:
        """Raise the error of a difference, or keep it for the warning if it is unavoidable."""
        if reason := self._unavoidable_reason(difference):
            self.unavoidable.setdefault(reason, []).append(difference)
            return
        text, file, trained = difference
        raise self._error(
            f"llama.cpp would cut {_shown(text)} into other tokens than training: "
            f"{self._around(file, trained)} instead of {self._around(trained, file)}; "
            f"{self._reason(difference)}"
        )

    def _unavoidable_reason(self, difference: Difference) -> str:
        """Return the reason for a difference that no file can avoid, otherwise ""."""
        if approximation := self._approximation(difference.text):
            return approximation
        if unasked := [text for text in self.file.special.unasked if text in difference.text]:
            return f"takes {unasked[0]!r} in a text for a control token, whatever the file says"
        composed = unicodedata.normalize("NFC", difference.text)
        if composed != difference.text and self._makes(composed, difference):
            return "does not compose letters and accents (NFC), as training did"
        is_first = self.tokenizer.adds_prefix_space and not self.tokenizer.prefixes_each_stretch
        if is_first and self._makes(f" {difference.text}", difference):
            return (
                "puts a space before every stretch of text or before none, but training only "
                "before the first (begin each prompt with a special token or a space)"
            )
        return ""

    def _approximation(self, text: str) -> str:
        """Return how llama.cpp approximates the word rule on a text, otherwise ""."""
        pre = self.metadata.get("tokenizer.ggml.pre")
        if pre in APPROXIMATED and any(map(_is_mark_or_cased, text)):
            return (
                f"approximates the pre-tokenizer {pre}: capitals beyond A-Z and combining marks "
                "(Hindi, Thai, decomposed accents) begin and end words otherwise"
            )
        if pre == "superbpe" and any(_is_other_digit(character) for character in text):
            return f"approximates the pre-tokenizer {pre}: it groups no digits but 0 to 9"
        return ""

    def _makes(self, text: str, difference: Difference) -> bool:
        """Return True if the file makes of `text` the ids of training."""
        adds_bos = difference.file != self.file.encode(difference.text, add_special=False)
        return self.file.encode(text, adds_bos) == difference.trained

    def _reason(self, difference: Difference) -> str:
        """Return the likely reason for a difference, and the remedy."""
        text, file, trained = difference
        bos = self.file.bos_token_id
        if file == [bos, *trained]:
            return "the file adds a BOS that training did not; add_bos_token must be false"
        if trained == [bos, *file]:
            return "training began with the BOS, the file adds none; add_bos_token must be true"
        if file[-1:] == [self.file.eos_token_id] and file[:-1] == trained:
            return "the file adds an EOS behind every prompt; add_eos_token must be false"
        for token in self.tokenizer.added_tokens.values():
            flags = [flag for flag in ("lstrip", "rstrip", "single_word") if getattr(token, flag)]
            if flags and text == text_around(token.content):
                return (
                    f"the added token {token.content!r} has {' and '.join(flags)}, which llama.cpp "
                    "does not apply; set it to false in the tokenizer's files before training "
                    "(rstrip of Phi-3's tokens is applied if the file's name contains phi-3)"
                )
        if normalizers := _normalizers(self.tokenizer):
            return (
                f"training normalises text ({', '.join(normalizers)}) and llama.cpp does not; take "
                "the normalizer out of tokenizer.json before training"
            )
        keys = "tokens, scores, add_space_prefix"
        if self.file.model != "llama":
            keys = f"pre ({self.metadata.get('tokenizer.ggml.pre')}), tokens, merges"
        return (
            f"one of the keys {keys}, token_type is not that of the tokenizer in this folder; "
            "export with the tokenizer that trained"
        )

    def warn(self) -> None:
        """Warn of the differences that no file can avoid."""
        for reason, differences in self.unavoidable.items():
            others = f" and {len(differences) - 1} further ones" if len(differences) > 1 else ""
            warnings.warn(
                f"{self.tokenizer.folder}: llama.cpp {reason}; of the texts that were compared "
                f"{_shown(differences[0].text)}{others} become other tokens there than in training",
                stacklevel=3,
            )

    def _error(self, message: str) -> ValueError:
        return ValueError(f"{self.tokenizer.folder}: {message}")

    def _token(self, id: int | None) -> str:
        return "none" if id is None else f"{id} {on_one_line(self.file.tokens[id])!r}"

    def _around(self, ids: list[int], others: list[int]) -> str:
        """Return the ids around the first that differs from `others`, with their texts."""
        pairs = enumerate(zip(ids, others, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), min(len(ids), len(others)))
        begin, end = max(first - SHOWN_IDS, 0), first + SHOWN_IDS + 1
        shown = [self._token(id) for id in ids[begin:end]]
        before, behind = ["..."] * (begin > 0), ["..."] * (end < len(ids))
        return f"[{', '.join([*before, *shown, *behind])}]"


def _is_mark_or_cased(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] == "M" or (not character.isascii() and category in ("Lu", "Ll", "Lt"))


def _is_other_digit(character: str) -> bool:
    return not character.isascii() and unicodedata.category(character) == "Nd"


def _normalizers(tokenizer: Tokenizer) -> list[str]:
    """Return the normalizers of a tokenizer.json that change more than spaces and NFC."""
    normalizer = (tokenizer.definition() or {}).get("normalizer") or {}
    types = [part["type"] for part in normalizer.get("normalizers", [normalizer]) if part]
    return [type for type in types if type not in ("NFC", "Prepend", "Replace")]


def _shown(text: str, at_end: bool = False) -> str:
    """Return a text in visible form, cut to its beginning or its end."""
    line = on_one_line(text)
    if len(line) <= SHOWN_CHARACTERS:
        return f"'{line}'"
    if at_end:
        return f"'...{line[-SHOWN_CHARACTERS:]}'"
    return f"'{line[:SHOWN_CHARACTERS]}...'"
