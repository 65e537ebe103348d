"""The answers of `minitune generate`: token ids in, texts out, shown as they are decoded.

An answer is computed by a `Side`: the model with its adapter, or the base alone. Answers of several
sides, or several answers of one, come from one call; the first is shown token by token, the others
behind it.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from minitune.commands.generate_flags import sampling_of
from minitune.data.text_streamer import TextStreamer
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.language_model import LanguageModel
from minitune.progress import print_line
from minitune.stop_signals import noted_interrupts
from minitune.streams import printable


class Side(NamedTuple):
    """A way to compute an answer.

    adapter: None computes with the model's adapter, if it has one, False without.
    label: stands before an answer if there are several.
    """

    adapter: bool | None
    label: str


WITH_ADAPTER, BASE = Side(None, "with the adapter"), Side(False, "base")
BOTH = (WITH_ADAPTER, BASE)
SEED_COUNT = 2**64


class Answer(NamedTuple):
    """An answer of a model.

    ids: its tokens, without the end token.
    logprobs: the log-probability of each token, if asked for.
    is_cut: True if the answer ended at a limit, not at an end token or a stop string.
    """

    ids: list[int]
    logprobs: list[float] | None = None
    is_cut: bool = False


class AnswerPrinter(TextStreamer):
    """A streamer whose stdout holds the results, so that a fault of stdout ends the command."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a stretch of text.

        Raises: OSError if stdout cannot be written.
        """
        print(printable(text, sys.stdout), end="\n" if stream_end else "", flush=True)


class Answerer:
    """A model with the settings of a command line.

    show_special: show special tokens.
    adapter_name: the folder that gave the model its adapter; None without one.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, arguments: argparse.Namespace):
        self.model, self.tokenizer = model, tokenizer
        self.show_special: bool = arguments.show_special_tokens
        self._sampling, self._shows_stats = sampling_of(arguments), arguments.stats
        self._stop_strings: list[str] = arguments.stop_strings or []
        has_adapter = model.lora is not None
        self.adapter_name = (arguments.adapter or arguments.model) if has_adapter else None

    @property
    def count(self) -> int:
        """Return the number of answers to each prompt of a side."""
        return self._sampling["num_return_sequences"]

    def check_side(self, sides: Sequence[Side]) -> None:
        """Raise ValueError if a side needs an adapter that the model lacks."""
        if BASE in sides and self.model.lora is None:
            raise ValueError(
                f"{self.model.name} has no adapter, so there is nothing to switch off or to "
                "compare; load one with minitune generate --adapter DIR"
            )

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=not self.show_special)

    def answers(
        self,
        prompts: Sequence[list[int]],
        sides: Sequence[Side],
        seeds: Sequence[int] | None = None,
        logprobs: bool = False,
        **settings: Any,
    ) -> list[list[list[Answer]]]:
        """Return the answers to prompts from one call: [prompt][side][number].

        seeds: the seed of the first answer to each prompt, the next ones follow; None takes that
            of the command line for all.
        settings: further arguments of `model.generate`.
        """
        each, n = len(sides), self.count
        chosen = dict(self._sampling)
        if seeds is not None:
            chosen["seed"] = [
                (seed + i) % SEED_COUNT for seed in seeds for _ in sides for i in range(n)
            ]
        adapters = [side.adapter for _ in prompts for side in sides]
        if any(adapter is not None for adapter in adapters):
            settings["adapter"] = adapters
        if self._stop_strings:
            settings |= {"stop_strings": self._stop_strings, "tokenizer": self.tokenizer}
        found = self.model.generate(
            [prompt for prompt in prompts for _ in sides],
            **chosen,
            return_logprobs=logprobs,
            return_dict_in_generate=True,
            **settings,
        )
        values = found.logprobs or [None] * len(found.sequences)
        flat = [
            Answer(ids, known, reason is None)
            for ids, known, reason in zip(found.sequences, values, found.stop_reasons, strict=True)
        ]
        by_side = [flat[i : i + n] for i in range(0, len(flat), n)]
        return [by_side[i : i + each] for i in range(0, len(by_side), each)]

    def show(self, prompt: list[int], sides: Sequence[Side]) -> tuple[str, bool]:
        """Print the answers to one prompt, and return the text of the first one.

        Ctrl-C ends the answers with the tokens that are there; a second one raises
        KeyboardInterrupt.

        Returns: the text without special tokens, up to a stop string, and True if Ctrl-C ended it.
        """
        labels = [
            f"{side.label if len(sides) > 1 else 'answer'}{f' {i + 1}' if self.count > 1 else ''}"
            for side in sides
            for i in range(self.count)
        ]
        shown = _Shown(self, prompt, labels)
        ends = self.model.eos_token_ids
        with noted_interrupts() as caught:

            def take(row: int, token: int) -> bool:
                shown.take(row, token)
                return bool(caught) or token in ends

            # the end token is shown too, so it must come like the others
            own_ends = {"eos_token_ids": []} if self.show_special else {}
            try:
                (found,) = self.answers([prompt], sides, on_token=take, **own_ends)
            except KeyboardInterrupt:
                print(flush=True)  # ends the line of the answer
                raise
        shown.end()
        text = self.tokenizer.decode(shown.rows[0], skip_special_tokens=True)
        answers = [answer for side in found for answer in side]
        cut = [
            len(row)
            for answer, row in zip(answers, shown.rows, strict=True)
            if answer.is_cut and not {*row[-1:]} & {*ends}
        ]
        if cut and not caught:
            print_line(self._cut(max(cut)))
        if self._shows_stats:
            print_line(shown.stats(self.model.max_seq_length))
        for stop in self._stop_strings:
            text = text.partition(stop)[0]
        return text, bool(caught)

    def _cut(self, length: int) -> str:
        """Return the line behind an answer that a limit has cut.

        length: the tokens of the answer.
        """
        if length >= self._sampling["max_new_tokens"]:
            return f"(cut: an answer has at most the {length:,} tokens of --max-new-tokens)"
        return "(cut: prompt and answer fill the context)"


class _Shown:
    """The answers to one prompt on stdout.

    rows: the tokens of each answer.
    """

    def __init__(self, answerer: Answerer, prompt: list[int], labels: Sequence[str]):
        self._answerer, self._prompt, self._labels = answerer, prompt, labels
        self.rows: list[list[int]] = [[] for _ in labels]
        self._start = time.monotonic()
        self._first = self._start  # time of the first token
        skip = not answerer.show_special
        self._printer = AnswerPrinter(answerer.tokenizer, skip_special_tokens=skip)
        self._print_label(0)

    def _print_label(self, row: int) -> None:
        if len(self._labels) > 1:
            print(f"[{self._labels[row]}]", flush=True)

    def take(self, row: int, token: int) -> None:
        """Take the next token of an answer."""
        if not any(self.rows):
            self._first = time.monotonic()
        self.rows[row].append(token)
        if row == 0:
            self._printer.put(torch.tensor([token]))

    def end(self) -> None:
        """End the first answer, and print the others."""
        self._stop = time.monotonic()
        self._printer.end()
        for row in range(1, len(self.rows)):
            self._print_label(row)
            print(printable(self._answerer.text_of(self.rows[row]), sys.stdout), flush=True)

    def stats(self, context: int) -> str:
        """Return tokens, times and the used part of the context in words."""
        count = sum(map(len, self.rows))
        after = max(self._stop - self._first, 1e-9)
        rate = (count - len(self.rows)) / after
        speed = f", then {rate:,.1f} tokens/s" if rate > 0 else ""
        used = len(self._prompt) + max(map(len, self.rows))
        return (
            f"{len(self._prompt):,} tokens in, {count:,} out; first token after "
            f"{self._first - self._start:.2f} s{speed}; "
            f"{used:,} of {context:,} tokens of context"
        )
