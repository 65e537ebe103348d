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

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gguf import TokenType

from minitune.data.templates.chat_template import DEFAULT, ChatTemplate
from minitune.data.tokenization.sentencepiece_backend import SPACE_MARK
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.tokenizer.llama_cpp_tokenizer import LlamaCppTokenizer
from minitune.gguf.tokenizer.tokenizer_differences import (
    Difference,
    first_difference,
    likely_reason,
    shown,
    shown_ids,
    shown_token,
    unavoidable_reason,
)
from minitune.gguf.tokenizer.tokenizer_keys import TEMPLATE_KEY
from minitune.gguf.tokenizer.tokenizer_texts import (
    BEGINNINGS,
    CONVERSATIONS,
    FIXED_TEXTS,
    text_around,
    text_with,
)
from minitune.progress import warn

SAMPLED_TOKENS = 2048
DAY = "2026-01-01"  # for templates that write the date


def check_tokenizer(
    metadata: Mapping[str, Any],
    tokenizer: Tokenizer,
    name: str | Path = "",
    warns: bool = True,
) -> None:
    """Check that llama.cpp cuts texts into the tokens of training.

    metadata: the keys of the file, as they will be written, or as gguf's reader gives them.
    tokenizer: the tokenizer that trained.
    name: the model's name in errors; the tokenizer's folder if it is empty.
    warns: warn if llama.cpp must cut some texts otherwise, whatever the file says.

    Raises: ValueError that names the first text that differs, the ids and the remedy.
    """
    name = name or tokenizer.folder
    try:
        file = LlamaCppTokenizer(metadata)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    check = _Check(file, metadata, tokenizer, name)
    check.check_vocabulary()
    check.check_texts()
    check.check_beginnings()
    check.check_conversations()
    if warns:
        check.warn_of_unavoidable()


class _Check:
    """One comparison of a file with a tokenizer."""

    def __init__(
        self,
        file: LlamaCppTokenizer,
        metadata: Mapping[str, Any],
        tokenizer: Tokenizer,
        name: str | Path,
    ):
        self.file, self.metadata, self.tokenizer, self.name = file, metadata, tokenizer, name
        self.unavoidable: dict[str, list[Difference]] = {}  # reason -> differences

    # ---- the vocabulary

    def check_vocabulary(self) -> None:
        """Compare the texts of all tokens, the types of special tokens, and BOS and EOS."""
        tokenizer, tokens = self.tokenizer, self.file.tokens
        if len(tokens) < tokenizer.id_count:
            raise self._error(
                f"the file has {len(tokens)} tokens, but the tokenizer has ids up to "
                f"{tokenizer.id_count - 1}"
            )
        for id, text in enumerate(tokens):
            trained = tokenizer.id_to_token(id)
            if trained not in (text, None) and id not in tokenizer.added_tokens:
                raise self._error(f"the token {id} is {text!r} in the file, but was {trained!r}")
        types = self.metadata.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
        for id, token in tokenizer.added_tokens.items():
            kinds = {types[id], self.file.special.types[id]}  # in the file, in llama.cpp
            if token.special and kinds.isdisjoint((TokenType.CONTROL, TokenType.UNKNOWN)):
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
                    f"the {name} token is {shown_token(in_file, tokens)} in the file, but "
                    f"{shown_token(trained, tokens)} in training"
                )

    # ---- texts

    def check_texts(self) -> None:
        """Compare the fixed texts, those around added tokens and a sample of the vocabulary."""
        added = [token.content for token in self.tokenizer.added_tokens.values()]
        added += [text.replace(SPACE_MARK, " ") for text in added if SPACE_MARK in text]
        around = map(text_around, [*added, *self.file.special.unasked])
        step = -(-self.tokenizer.id_count // SAMPLED_TOKENS)
        pieces = [
            self.tokenizer.decode([id], skip_special_tokens=False)
            for id in range(0, self.tokenizer.id_count, step)
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
            begin = first_difference(text, in_file)
            raise self._error(
                f"the chat template writes {shown(in_file[begin:])} in llama.cpp, but "
                f"{shown(text[begin:])} in training, behind {shown(text[:begin], at_end=True)}; "
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
        if reason := unavoidable_reason(difference, self.file, self.tokenizer):
            self.unavoidable.setdefault(reason, []).append(difference)
            return
        text, file, trained = difference
        tokens = self.file.tokens
        raise self._error(
            f"llama.cpp would cut {shown(text)} into other tokens than training: "
            f"{shown_ids(file, trained, tokens)} instead of {shown_ids(trained, file, tokens)}; "
            f"{likely_reason(difference, self.file, self.tokenizer)}"
        )

    def warn_of_unavoidable(self) -> None:
        """Warn of the differences that no file can avoid."""
        for reason, differences in self.unavoidable.items():
            others = f" and {len(differences) - 1} further ones" if len(differences) > 1 else ""
            warn(
                f"{self.name}: llama.cpp {reason}; of the texts that were compared "
                f"{shown(differences[0].text)}{others} become other tokens there than in training",
                stacklevel=3,
            )

    def _error(self, message: str) -> ValueError:
        return ValueError(f"{self.name}: {message}")
