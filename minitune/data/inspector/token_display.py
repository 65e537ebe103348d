"""Tokens as pieces of text that a person can read, in a terminal.

Piece by piece the text of a sample equals the tokenizer's decoding of the whole sample. A character
whose bytes lie in several tokens makes one piece of these tokens.

The texts come from a stranger's file, so they are printed as config/visible_text.py shows them.

    colours    trained tokens on green in two shades, others plain and underlined by turns
    marks      [[trained text]], and with borders to│ken│s
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from minitune.config.visible_text import on_one_line, visible
from minitune.data.flat_samples import FlatSamples
from minitune.data.samples import Sample
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.kernels.cross_entropy import IGNORE_INDEX

BORDER = "│"
UNFINISHED = "\ufffd"  # the decoding of a part of a character's bytes
MAX_CHARACTER_BYTES = 4  # in UTF-8

# ANSI styles of two tokens side by side, so that their border is visible.
TRAINED_STYLES = ("30;48;5;114", "30;48;5;157")
OTHER_STYLES = ("2", "2;4")
TRAINED_SPECIAL_STYLES = ("1;30;48;5;114", "1;30;48;5;157")
OTHER_SPECIAL_STYLES = ("36", "36;4")
HEADING_STYLE = "1"


@dataclass(frozen=True)
class Piece:
    """Tokens that stand for a text together.

    text: "" for a token whose text belongs to a neighbour, such as a byte inside a character.
    ids: the token ids, almost always one.
    trained: True if the loss counts the tokens.
    special: True if the text is a special token such as the BOS.
    """

    text: str
    ids: tuple[int, ...]
    trained: bool
    special: bool

    @property
    def shown(self) -> str:
        """Return the text with visible signs for everything that a reader would not see."""
        if not self.text:
            return "".join(f"⟨token {index}⟩" for index in self.ids)
        return visible(self.text)


@dataclass(frozen=True)
class ShownSample:
    """A sample with everything that a person sees of it.

    number: its place among the samples, from 1.
    origin, shape: the place and the shape of its record, such as "data.jsonl:12" and "messages".
    """

    number: int
    origin: str
    shape: str
    pieces: list[Piece]

    @property
    def tokens(self) -> int:
        """Return the number of tokens."""
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def trained(self) -> int:
        """Return the number of tokens that the loss counts."""
        return sum(len(piece.ids) for piece in self.pieces if piece.trained)

    @property
    def facts(self) -> str:
        """Return the shape and both numbers as a text."""
        return f"{self.shape}, {self.tokens:,} tokens, {self.trained:,} trained on"


def first_samples(samples: FlatSamples, tokenizer: Tokenizer, count: int) -> list[ShownSample]:
    """Return the first `count` samples for display."""
    return [
        ShownSample(i + 1, samples.origin(i), samples.shape(i), token_pieces(samples[i], tokenizer))
        for i in range(min(count, len(samples)))
    ]


def token_pieces(sample: Sample, tokenizer: Tokenizer) -> list[Piece]:
    """Return the tokens of a sample as pieces. Their texts joined are the decoded sample."""
    ids = [int(index) for index in sample.input_ids]
    trained = [int(label) != IGNORE_INDEX for label in sample.labels]
    trained[0] = False  # no token precedes the first one, so nothing predicts it
    special = {index: _is_special(index, tokenizer) for index in set(ids)}
    pieces = []
    begin = 0
    for end, text in _groups(ids, tokenizer):
        runs = [(flag, len(list(run))) for flag, run in groupby(trained[begin:end])]
        for i, (flag, size) in enumerate(runs):
            own = tuple(ids[begin : begin + size])
            shared = text if i == len(runs) - 1 else ""
            pieces.append(Piece(shared, own, flag, any(special[index] for index in own)))
            begin += size
    return pieces


def _is_special(index: int, tokenizer: Tokenizer) -> bool:
    hidden = tokenizer.decode([index], skip_special_tokens=True)
    return not hidden and tokenizer.decode([index], skip_special_tokens=False) != ""


def _groups(ids: list[int], tokenizer: Tokenizer) -> Iterator[tuple[int, str]]:
    """Yield (end, text) of each shortest run of tokens that has a text of its own.

    A token is decoded behind the run before it, because decoders drop a leading space. A run ends
    when its text continues the whole decoded text. An unfinished character decodes to U+FFFD and
    does not continue it, unless U+FFFD itself follows.
    """

    texts: dict[tuple[int, ...], str] = {}

    def decode(begin: int, end: int) -> str:
        key = tuple(ids[begin:end])
        if key not in texts:
            texts[key] = tokenizer.decode(list(key), skip_special_tokens=False)
        return texts[key]

    whole = decode(0, len(ids))
    shown = before = begin = end = 0  # characters that are yielded; beginnings of the last two runs
    known = ""
    while (end := end + 1) < len(ids):
        decoded = decode(before, end)
        text = decoded[len(known) :]
        if not decoded.startswith(known) or not whole.startswith(text, shown):
            continue
        if text.endswith(UNFINISHED):
            later = range(end, min(end + MAX_CHARACTER_BYTES, len(ids)))
            end = max(i for i in later if decode(before, i) == decoded)
        yield end, text
        shown += len(text)
        before, begin = begin, end
        known = decode(before, begin)
    if begin < len(ids):
        yield len(ids), whole[shown:]


# ---- terminal


def coloured_text(pieces: Sequence[Piece]) -> str:
    """Return pieces with ANSI colours that tell trained tokens and borders."""
    parts = []
    for i, piece in enumerate(pieces):
        if piece.trained:
            styles = TRAINED_SPECIAL_STYLES if piece.special else TRAINED_STYLES
        else:
            styles = OTHER_SPECIAL_STYLES if piece.special else OTHER_STYLES
        # A colour ends before each line break: a terminal may fill the line with it otherwise.
        lines = [styled(line, styles[i % 2]) for line in piece.shown.split("\n")]
        parts.append("\n".join(lines))
    return "".join(parts)


def styled(text: str, style: str) -> str:
    """Return a text in an ANSI style, and an empty text as it is."""
    return f"\x1b[{style}m{text}\x1b[0m" if text else ""


def marked_text(pieces: Sequence[Piece], borders: bool = False) -> str:
    """Return pieces with brackets around the trained ones.

    borders: put a line between two tokens.

    There are two brackets, or more if the text itself holds two in a row.
    """
    runs = re.findall(r"\[{2,}|\]{2,}", "".join(piece.shown for piece in pieces))
    width = max([1, *map(len, runs)]) + 1
    text = ""
    for trained, run in groupby(pieces, key=lambda piece: piece.trained):
        part = (BORDER if borders else "").join(piece.shown for piece in run)
        if trained:
            part = "[" * width + part + "]" * width
        elif borders and text:
            part = BORDER + part if not text.endswith("]" * width) else part
        text += part
    return text


def sample_text(sample: ShownSample, colour: bool, borders: bool = False) -> str:
    """Return a sample for the terminal: a heading, then the tokens.

    colour: tell trained tokens by ANSI colours, otherwise by brackets.
    borders: put a line between two tokens. Colours show the borders anyway.
    """
    heading = f"sample {sample.number:,}  {on_one_line(sample.origin)}  {sample.facts}"
    if colour:
        text = f"{styled(heading, HEADING_STYLE)}\n{coloured_text(sample.pieces)}"
    else:
        text = f"--- {heading}\n{marked_text(sample.pieces, borders)}"
    return text.removesuffix("\n")
