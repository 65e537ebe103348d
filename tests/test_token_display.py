"""Tokens as pieces of text: exact for every tokenizer and text, and safe to print."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import TEXTS, write_tokenizer
from tokenizer_files import sentencepiece_bytes, write_chat_tokenizer, write_json_tokenizer

from minitune.config.visible_text import on_one_line, visible
from minitune.data.inspector.token_display import (
    Piece,
    ShownSample,
    coloured_text,
    marked_text,
    sample_text,
    token_pieces,
)
from minitune.data.samples import Sample
from minitune.data.tokenization.tokenizer import Tokenizer

KINDS = ("bpe", "llama3", "spm", "spm of other lines", "json with a BOS")
BEYOND_ASCII = "🦙👩‍🚀 日本語 \ufffd\ufffd é e\u0301 ﷽  two spaces"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Return a tokenizer of each kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS[:3]:
        (folder / kind).mkdir()
        write_tokenizer(folder / kind, kind)
    (folder / KINDS[3]).mkdir()
    (folder / KINDS[3] / "tokenizer.model").write_bytes(sentencepiece_bytes())
    write_json_tokenizer(folder / KINDS[4])
    return {kind: Tokenizer.from_folder(folder / kind) for kind in KINDS}


def check_pieces(ids, tokenizer):
    """Check that the pieces hold every token and the whole decoded text, and return the pieces."""
    pieces = token_pieces(Sample(ids, ids), tokenizer)
    assert [index for piece in pieces for index in piece.ids] == ids
    decoded = tokenizer.decode(ids, skip_special_tokens=False)
    assert "".join(piece.text for piece in pieces) == decoded
    return pieces


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_joined_are_the_decoded_text(kind, tokenizers):
    tokenizer = tokenizers[kind]
    for text in [*TEXTS, BEYOND_ASCII, " a", "  a", "\n"]:
        pieces = check_pieces(tokenizer.encode(text), tokenizer)
        assert all(piece.text for piece in pieces[1:])  # the first one is never trained on


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=30))
def test_pieces_of_random_texts_joined_are_the_decoded_text(kind, tokenizers, text):
    ids = tokenizers[kind].encode(text)
    if ids:
        check_pieces(ids, tokenizers[kind])


@pytest.mark.parametrize("kind", KINDS)
@given(draws=st.lists(st.integers(0, 10**6), min_size=1, max_size=40))
def test_pieces_of_random_tokens_joined_are_the_decoded_text(kind, tokenizers, draws):
    tokenizer = tokenizers[kind]
    check_pieces([index % tokenizer.id_count for index in draws], tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_one_character_make_one_piece(kind, tokenizers):
    tokenizer = tokenizers[kind]
    pieces = check_pieces(tokenizer.encode("a 🦙日\ufffd\ufffd b"), tokenizer)
    wide = [piece.text for piece in pieces if not piece.text.isascii()]
    assert wide == ["🦙", "日", "\ufffd", "\ufffd"]


def test_a_character_that_is_trained_in_part_shows_the_tokens_of_both_parts(tokenizers):
    tokenizer = tokenizers["llama3"]
    ids = tokenizer.encode("a🦙")
    labels = [-100] * (len(ids) - 1) + ids[-1:]
    *_, other, trained = token_pieces(Sample(ids, labels), tokenizer)
    assert (other.trained, other.text, trained.trained, trained.text) == (False, "", True, "🦙")
    assert other.shown == "".join(f"⟨token {index}⟩" for index in other.ids)


def test_the_first_token_counts_as_not_trained(tokenizers):
    ids = np.array(tokenizers["llama3"].encode("one two"), np.int32)
    pieces = token_pieces(Sample(ids, ids), tokenizers["llama3"])
    assert [piece.trained for piece in pieces] == [False] + [True] * (len(pieces) - 1)
    assert [piece.special for piece in pieces] == [True] + [False] * (len(pieces) - 1)


@given(st.text())
def test_a_text_without_its_line_breaks_and_tabs_is_printable(text):
    shown = on_one_line(text)
    assert "\x1b" not in shown and "\n" not in shown and "\r" not in shown
    shown.encode()  # no half surrogate pair is left
    assert visible("abc é 日 🦙 [[ <&>") == "abc é 日 🦙 [[ <&>"


def test_control_characters_get_signs_and_line_breaks_stay():
    assert visible("a\nb\r\n\tc") == "a⏎\nb<U+000D>⏎\n⇥\tc"
    assert visible("\x1b]0;x\x07\x9b2J\x7f") == "<U+001B>]0;x<U+0007><U+009B>2J<U+007F>"
    assert visible("\u202eevil\u2066 \u2028 \ufeff \U000e0041") == (
        "<U+202E>evil<U+2066> <U+2028> <U+FEFF> <U+E0041>"
    )
    assert visible("👩\u200d🚀") == "👩\u200d🚀"


def piece(text, trained=False, special=False):
    return Piece(text, (7,), trained, special)


PIECES = [
    piece("<s>", special=True),
    piece("Hi"),
    piece(" you\n"),
    piece("Yes", trained=True),
    piece(" a\nb", trained=True),
    piece("</s>", trained=True, special=True),
    piece("\n"),
]


def test_marks_stand_around_trained_stretches():
    assert marked_text(PIECES) == "<s>Hi you⏎\n[[Yes a⏎\nb</s>]]⏎\n"
    assert marked_text(PIECES, borders=True) == "<s>│Hi│ you⏎\n[[Yes│ a⏎\nb│</s>]]⏎\n"


def test_marks_are_longer_than_the_brackets_of_the_text():
    assert marked_text([piece("[[x]]]"), piece("y", trained=True)]) == "[[x]]][[[[y]]]]"


def test_colours_show_trained_tokens_special_tokens_and_borders():
    assert coloured_text(PIECES) == (
        "\x1b[36m<s>\x1b[0m"
        "\x1b[2;4mHi\x1b[0m"
        "\x1b[2m you⏎\x1b[0m\n"
        "\x1b[30;48;5;157mYes\x1b[0m"
        "\x1b[30;48;5;114m a⏎\x1b[0m\n\x1b[30;48;5;114mb\x1b[0m"
        "\x1b[1;30;48;5;157m</s>\x1b[0m"
        "\x1b[2m⏎\x1b[0m\n"
    )


def test_the_heading_names_the_place_and_the_size_of_a_sample():
    sample = ShownSample(3, "da\x1bta.jsonl:12", "text", PIECES)
    text = "--- sample 3  da<U+001B>ta.jsonl:12  text, 7 tokens, 3 trained on\n"
    assert sample_text(sample, colour=False).startswith(text)
    assert sample_text(sample, colour=True).startswith("\x1b[1msample 3  da<U+001B>ta")


def test_the_work_grows_with_the_length_of_a_sample_and_not_with_its_square(tmp_path, monkeypatch):
    tokenizer = Tokenizer.from_folder(write_chat_tokenizer(tmp_path / "chat"))
    ids = tokenizer.encode(" ".join(TEXTS * 3))
    decode, decoded = tokenizer.decode, []

    def counted(part, **options):
        decoded.append(len(part))
        return decode(part, **options)

    monkeypatch.setattr(tokenizer, "decode", counted)
    check_pieces(ids, tokenizer)
    assert sum(decoded) < 8 * len(ids)
