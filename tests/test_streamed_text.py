"""An answer appears as it is decoded, in whole characters, with every kind of tokenizer."""

import argparse
from random import Random

import pytest
from random_tokenizers import random_json_folder, random_model_folder

from minitune.commands.generate import answer
from minitune.data.tokenization.tokenizer import Tokenizer

SETTINGS = argparse.Namespace(
    raw=True, system=None, max_new_tokens=9, temperature=0.0, top_p=1.0, top_k=0, seed=0
)
TEXTS = ("Grüße 🦙🦙 ok", " leading", "🏳️‍🌈 flag", "Mölln đêm 日本", "the quick\n\n")


class FixedModel:
    """A model whose answer is given."""

    def __init__(self, ids):
        self.ids = ids

    def generate(self, prompts, on_token, **settings):
        """Report each token of the answer."""
        for token in self.ids:
            on_token(0, token)
        return [self.ids]


def folders(tmp_path):
    """Yield a byte-level tokenizer, a sentencepiece model, and one with byte fallback."""
    yield random_json_folder(Random(1), tmp_path / "byte-level")[0]
    model, as_json, _ = random_model_folder(Random(2), tmp_path / "fallback")
    yield from (model, as_json)


def answers(rng, tokenizer):
    """Return ids of texts that end inside of characters, and random ids."""
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    cut = [ids[: rng.randrange(1, len(ids) + 1)] for ids in encoded for _ in range(4)]
    random = [[rng.randrange(tokenizer.vocab_size) for _ in range(12)] for _ in range(20)]
    return cut + random


@pytest.mark.parametrize("kind", range(3))
def test_the_shown_text_is_the_decoded_answer_in_whole_characters(tmp_path, capsys, kind):
    tokenizer = Tokenizer.from_folder(list(folders(tmp_path))[kind])
    for ids in answers(Random(3), tokenizer):
        answer(FixedModel(ids), tokenizer, "x", SETTINGS)
        assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"


def test_a_character_of_several_tokens_appears_when_it_is_whole(tmp_path, monkeypatch):
    tokenizer = Tokenizer.from_folder(next(folders(tmp_path)))
    shown = []
    monkeypatch.setattr("builtins.print", lambda text, **settings: shown.append(text))
    answer(FixedModel(tokenizer.encode("a🦙b", add_special_tokens=False)), tokenizer, "", SETTINGS)
    assert [text for text in shown if text] == ["a", "🦙", "b"]
