"""A long text that is encoded in pieces has the tokens and spans of the whole text."""

import json
import tracemalloc
from random import Random

import pytest
from random_tokenizers import SPACES, WORDS, random_json_folder
from tiny import TEXTS, write_tokenizer

from minitune.data import long_texts
from minitune.data.long_texts import cut_pattern, encode_to_length
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.data.tokenize_dataset import tokenize_dataset

KINDS = ("bpe", "llama3", "spm")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Return a tokenizer of each of KINDS by name."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in folders.items():
        write_tokenizer(folder, kind)
    return {kind: Tokenizer.from_folder(folder) for kind, folder in folders.items()}


def short_pieces(monkeypatch, piece=30):
    monkeypatch.setattr(long_texts, "PIECE", piece)
    monkeypatch.setattr(long_texts, "SEARCHED", piece // 2)


def long_text(rng, tokens=(), words=400):
    """Return words of many scripts, mostly with one space between two of them."""
    spaces = [*[" "] * 12, *SPACES, ". ", "。\n", ",\n", "\n"]
    names = ["lamp", "Lisbon", "ответ", "don't", "12:45", "<|im_end|>", *WORDS, *TEXTS, *tokens]
    return "".join(rng.choice(names) + rng.choice(spaces) for _ in range(words))


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_tokens_and_spans_of_the_whole_text(tokenizers, kind, monkeypatch):
    tokenizer, rng = tokenizers[kind], Random(0)
    texts = [long_text(rng) for _ in range(12)]
    whole = tokenizer.encode_batch_with_offsets(texts)
    short_pieces(monkeypatch)
    assert (cut_pattern(tokenizer) is None) == (kind == "spm")
    for length in (7, 100, 10**6):
        expected = [(ids[:length], spans[:length]) for ids, spans in whole]
        assert encode_to_length(tokenizer, texts, length) == expected
        bare = [(ids, []) for ids, _ in expected]
        assert encode_to_length(tokenizer, texts, length, with_spans=False) == bare


def test_random_tokenizers_that_allow_cuts_encode_pieces_like_the_whole_text(tmp_path, monkeypatch):
    allowed = 0
    for seed in range(60):
        rng = Random(seed)
        folder, tokens = random_json_folder(rng, tmp_path / str(seed))
        tokenizer = Tokenizer.from_folder(folder)
        texts = [long_text(rng, tokens, words=60) for _ in range(4)]
        whole = tokenizer.encode_batch_with_offsets(texts)
        with monkeypatch.context() as patch:
            short_pieces(patch)
            assert encode_to_length(tokenizer, texts, 10**6) == whole, seed
            allowed += cut_pattern(tokenizer) is not None
    assert 10 < allowed < 50


def _with(section, **values):
    return lambda content: content[section].update(values)


def _add_token(**flags):
    def change(content):
        entry = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        content["added_tokens"].append(entry | {"id": len(content["model"]["vocab"]), **flags})

    return change


def _add_merge(*pair):
    def change(content):
        vocab = content["model"]["vocab"]
        vocab["".join(pair)] = len(vocab) + 3
        content["model"]["merges"].append(list(pair))

    return change


def _split(pattern, behavior="Isolated"):
    part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}
    return lambda content: content["pre_tokenizer"]["pretokenizers"].insert(0, part)


@pytest.mark.parametrize(
    "change",
    [
        _with("model", dropout=0.1),
        _with("model", end_of_word_suffix="</w>"),
        _add_merge("e", "Ġ"),
        _add_merge("Ċ", "t"),
        _add_token(content="two words"),
        _add_token(content="word", rstrip=True),
        _add_token(content="word", lstrip=True),
        _split(r"(?<=\s)x"),
        _split(r"^x"),
        _split(r"\bx"),
        _split("x", "Contiguous"),
        lambda content: content.update(normalizer={"type": "Prepend", "prepend": "▁"}),
        lambda content: content.update(normalizer={"type": "Strip"}),
        lambda content: content["pre_tokenizer"]["pretokenizers"][-1].update(add_prefix_space=True),
    ],
)
def test_a_tokenizer_that_sees_across_a_cut_gets_whole_texts(tmp_path, change):
    write_tokenizer(tmp_path, "bpe")
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    assert cut_pattern(Tokenizer.from_folder(tmp_path))
    change(content)
    if content["normalizer"] == {"type": "Strip"}:
        content["normalizer"] |= {"strip_left": True, "strip_right": True}
    path.write_text(json.dumps(content))
    assert not cut_pattern(Tokenizer.from_folder(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_long_records_are_cut_labelled_and_counted_like_whole_ones(tokenizers, kind, monkeypatch):
    tokenizer, rng = tokenizers[kind], Random(1)
    records = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
        for text in (long_text(rng, words=n) for n in (2, 20, 60, 200))
    ]
    records += [{"text": message["content"]} for r in records for message in r["messages"][:1]]
    for length in (50, 2000, 10**5):
        whole = tokenize_dataset(records, tokenizer, length, skip_bad=True)
        with monkeypatch.context() as patch:
            short_pieces(patch)
            pieces = tokenize_dataset(records, tokenizer, length, skip_bad=True)
        assert list(pieces.samples) == list(whole.samples)
        assert pieces.report == whole.report


def test_a_text_without_a_place_to_cut_is_encoded_whole(tokenizers, monkeypatch):
    text = "日本語12_" * 200
    whole = tokenizers["bpe"].encode_batch_with_offsets([text])
    short_pieces(monkeypatch)
    assert encode_to_length(tokenizers["bpe"], [text], 10**6) == whole


def test_only_the_beginning_of_a_long_text_is_encoded(tokenizers):
    tokenizer, text = tokenizers["bpe"], "blue lamps and " * 200_000
    tracemalloc.start()
    dataset = tokenize_dataset([{"text": text}], tokenizer, 100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert dataset.truncated == 1 and peak < 4 * len(text)


def test_marks_are_places_to_cut_unless_a_token_may_hold_a_letter_before_one(tmp_path):
    write_tokenizer(tmp_path, "bpe")
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    # A token of this vocabulary is the last byte of the euro sign and a full stop.
    assert cut_pattern(Tokenizer.from_folder(tmp_path)) is long_texts.AT_SPACE
    model = content["model"]
    model["merges"] = [pair for pair in model["merges"] if "." not in "".join(pair)[1:]]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if "." not in token[1:]}
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert cut_pattern(tokenizer) is long_texts.AT_SPACE_OR_MARK
    text = long_text(Random(3)) + "明日の朝、駅で会いましょう。" * 40
    whole = tokenizer.encode_batch_with_offsets([text])
    with pytest.MonkeyPatch.context() as patch:
        short_pieces(patch)
        assert encode_to_length(tokenizer, [text], 10**6) == whole
