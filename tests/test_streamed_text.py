"""A text appears as it is decoded, in whole characters, with every kind of tokenizer."""

import threading
from queue import Empty
from random import Random

import pytest
import torch
from random_tokenizers import random_json_folder, random_model_folder
from tiny import make_tiny_model

from minitune import FastLanguageModel, TextIteratorStreamer, TextStreamer, Tokenizer
from minitune.commands.answering import WITH_ADAPTER, Answerer
from minitune.commands.generate import answer
from minitune.commands.generate_flags import parse_arguments
from minitune.incremental_text import WINDOW, IncrementalText

TEXTS = ("Grüße 🦙🦙 ok", " leading", "🏳️‍🌈 flag", "Mölln đêm 日本", "the quick\n\n")


def folders(tmp_path):
    """Yield a byte-level tokenizer, a sentencepiece model, and one with byte fallback."""
    yield random_json_folder(Random(1), tmp_path / "byte-level")[0]
    model, as_json, _ = random_model_folder(Random(2), tmp_path / "fallback")
    yield from (model, as_json)


def answers(rng, tokenizer):
    """Return ids of texts that end inside of characters, and random ids."""
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    cut = [ids[: rng.randrange(1, len(ids) + 1)] for ids in encoded for _ in range(4)]
    random = [[rng.randrange(tokenizer.id_count) for _ in range(12)] for _ in range(20)]
    return cut + random


def feed(streamer, prompt, ids):
    streamer.put(torch.tensor([prompt]))
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()


@pytest.mark.parametrize("kind", range(3))
def test_the_shown_text_is_the_decoded_answer_in_whole_characters(tmp_path, capsys, kind):
    tokenizer = Tokenizer.from_folder(list(folders(tmp_path))[kind])
    answer_only = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    everything = TextStreamer(tokenizer)
    for ids in answers(Random(3), tokenizer):
        feed(answer_only, [1, 2, 3], ids)
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        assert capsys.readouterr().out == expected + "\n"
        feed(everything, [1, 5], ids)
        assert capsys.readouterr().out == tokenizer.decode([1, 5, *ids]) + "\n"


@pytest.mark.parametrize("kind", range(3))
def test_a_long_text_is_that_of_all_tokens_and_takes_linear_time(tmp_path, kind):
    tokenizer = Tokenizer.from_folder(list(folders(tmp_path))[kind])
    rng, decoded = Random(4), 0

    def decode(ids):
        nonlocal decoded
        decoded += len(ids)
        return tokenizer.decode(ids, skip_special_tokens=rng_skips)

    for trial in range(8):
        rng_skips = trial % 2 == 0
        ids = [token for _ in range(10) for token in rng.choice(answers(rng, tokenizer))]
        text, shown = IncrementalText(decode), ""
        for i, token in enumerate(ids):
            shown += text.add([token])
            assert tokenizer.decode(ids[: i + 1], skip_special_tokens=rng_skips).startswith(shown)
        whole = tokenizer.decode(ids, skip_special_tokens=rng_skips)
        assert shown + text.unfinished == shown + text.rest() == whole
    text, decoded = IncrementalText(decode), 0
    ids = 50 * tokenizer.encode(TEXTS[3], add_special_tokens=False)
    assert "".join(text.add([token]) for token in ids) == tokenizer.decode(ids)
    assert decoded < 60 * len(ids) + WINDOW


def test_a_character_of_several_tokens_appears_when_it_is_whole(tmp_path):
    tokenizer = Tokenizer.from_folder(next(folders(tmp_path)))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=5)
    feed(streamer, [1], tokenizer.encode("a🦙b", add_special_tokens=False))
    assert [text for text in streamer if text] == ["a", "🦙", "b"]


def test_an_iterator_yields_the_text_while_another_thread_generates(tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(make_tiny_model(tmp_path), device="cpu")
    inputs = tokenizer("The order of", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    settings = {**inputs, "streamer": streamer, "max_new_tokens": 6}
    thread = threading.Thread(target=model.generate, kwargs=settings)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(model.generate(**inputs, max_new_tokens=6)[0])
    with pytest.raises(Empty):
        next(iter(TextIteratorStreamer(tokenizer, timeout=0.01)))


def test_the_command_prints_the_answer_without_the_prompt(tmp_path, capsys):
    model, tokenizer = FastLanguageModel.from_pretrained(make_tiny_model(tmp_path), device="cpu")
    words = ["--model", "tiny", "--raw", "--max-new-tokens", "5"]
    arguments = parse_arguments(words, "minitune generate")
    answer(Answerer(model, tokenizer, arguments), (WITH_ADAPTER,), "Lisbon", arguments)
    (expected,) = model.generate([tokenizer.encode("Lisbon")], max_new_tokens=5)
    assert capsys.readouterr().out == tokenizer.decode(expected, skip_special_tokens=True) + "\n"


def test_two_prompts_are_refused(tmp_path):
    tokenizer = Tokenizer.from_folder(next(folders(tmp_path)))
    with pytest.raises(ValueError, match="shows one answer, but it got 2 prompts"):
        TextStreamer(tokenizer).put(torch.tensor([[1], [2]]))
