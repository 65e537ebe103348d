"""The rebuilt tokenizers give llama.cpp's ids for random texts."""

from random import Random

import pytest
import tokenizers
from gguf_files import copy_with_keys, metadata_of
from random_texts import WORDS, random_text
from referees.llama_cpp import LlamaCpp
from test_gguf_tokenizer import edit_config
from tiny import TEXTS, make_tiny_model
from tokenizers import AddedToken, pre_tokenizers, trainers

from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.export import convert_folder
from minitune.gguf.tokenizer.llama_cpp_tokenizer import LlamaCppTokenizer
from minitune.gguf.tokenizer.llama_cpp_words import WORD_RULES
from minitune.gguf.tokenizer.tokenizer_files import tokenizer_files

ROWS = 1024
ONE_NAME_A_RULE = list({rule: name for name, rule in WORD_RULES.items()}.values())


def check_alike(path, rng, texts=60):
    """Compare the rebuilt tokenizer of a file with llama.cpp's on random texts."""
    ours, llama_cpp = LlamaCppTokenizer(metadata_of(path)), LlamaCpp(path)
    types = metadata_of(path)["tokenizer.ggml.token_type"]
    tokens = [text for text, type in zip(ours.tokens, types, strict=True) if type in (2, 3, 4)]
    for _ in range(texts):
        text, add_special = random_text(rng, tokens), rng.random() < 0.5
        assert ours.encode(text, add_special) == llama_cpp.tokenize(text, add_special), repr(text)


@pytest.fixture(scope="module")
def across_words(tmp_path_factory):
    """Return a file with a byte-level vocabulary whose merges cross the borders of words."""
    folder = make_tiny_model(tmp_path_factory.mktemp("words") / "base", vocab=ROWS)
    path = folder / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    rule = tokenizer.pre_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS - 8,
        special_tokens=list(tokenizer.get_added_tokens_decoder().values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS, *WORDS], trainer)
    tokenizer.pre_tokenizer = rule
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("  ")])
    tokenizer.save(str(path))
    return convert_folder(folder, folder / "x.gguf", "f32")


@pytest.mark.parametrize("name", ONE_NAME_A_RULE)
def test_every_word_rule_gives_llama_cpps_ids(tmp_path, across_words, name):
    metadata = metadata_of(across_words) | {"tokenizer.ggml.pre": name}
    path = copy_with_keys(across_words, tmp_path / "x.gguf", metadata)
    check_alike(path, Random(name))


@pytest.mark.parametrize("name", ONE_NAME_A_RULE)
def test_the_tokenizer_made_of_a_file_cuts_words_by_every_rule(tmp_path, across_words, name):
    metadata = metadata_of(across_words) | {"tokenizer.ggml.pre": name}
    tokenizer_files(metadata, tmp_path)
    file, tokenizer = LlamaCppTokenizer(metadata), Tokenizer.from_folder(tmp_path)
    rng = Random(name)
    for _ in range(200):
        text = random_text(rng, ["<tool>", "  ", "<|im_end|>"])
        assert tokenizer.encode_batch([text])[0] == file.encode(text, add_special=False), repr(text)


@pytest.mark.parametrize("space_prefix", [True, False])
@pytest.mark.parametrize("file_name", ["x.gguf", "Tiny-Phi-3.gguf"])
def test_sentencepiece_gives_llama_cpps_ids(tmp_path, file_name, space_prefix):
    folder = make_tiny_model(tmp_path / "base", tokenizer="spm")
    added = {
        "2": {"content": "</s>"},
        "400": {"content": "<|user|>", "special": True},
        "401": {"content": "<tool>"},
        "402": {"content": "<|endoftext|>", "special": True},
    }
    edit_config(folder, added_tokens_decoder=added)
    path = convert_folder(folder, tmp_path / "plain.gguf", "f32")
    changes = {
        "general.name": file_name.removesuffix(".gguf"),
        "tokenizer.ggml.add_space_prefix": space_prefix,
        "tokenizer.ggml.add_eos_token": space_prefix,
    }
    path = copy_with_keys(path, tmp_path / file_name, metadata_of(path) | changes)
    check_alike(path, Random(file_name))


def test_known_end_and_fill_in_tokens_are_control_tokens_whatever_the_file_says(tmp_path):
    folder = make_tiny_model(tmp_path / "base")
    path = convert_folder(folder, tmp_path / "plain.gguf", "f32")
    metadata = metadata_of(path)
    tokens, types = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    for id, text in enumerate(("<|eot_id|>", "<fim_prefix>", "<|file_sep|>", "<plain>"), 400):
        tokens[id], types[id] = text, 1
    path = copy_with_keys(path, tmp_path / "x.gguf", metadata)
    ours, llama_cpp = LlamaCppTokenizer(metadata), LlamaCpp(path)
    for id in range(400, 404):
        text = f"a lamp{tokens[id]} for"
        assert (id in ours.encode(text)) == (id < 403)
        assert ours.encode(text) == llama_cpp.tokenize(text)


def test_unknown_rules_and_ambiguous_vocabularies_are_errors():
    base = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "<PRE>", "<fim_prefix>"],
        "tokenizer.ggml.token_type": [1, 1, 3, 3],
        "tokenizer.ggml.merges": [],
    }
    assert LlamaCppTokenizer(base).encode("ab<PRE>c") == [0, 1, 2]
    for changes, message in (
        ({"pre": "new"}, "pre is 'new'; known are"),
        ({"model": "t5"}, "model is 't5'; known are"),
        ({"tokens": ["a", "b", "a", "c"]}, "token 'a' has two ids"),
        ({"token_type": [1, 1, 1, 1]}, "one of <fim_prefix>, <PRE> a control token"),
        ({"add_bos_token": True}, "adds a BOS but names none"),
        ({"token_type": [1]}, "4 tokens but only 1 token types"),
    ):
        changed = base | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        with pytest.raises(ValueError, match=message):
            LlamaCppTokenizer(changed)
    with pytest.raises(ValueError, match="refuses such a file without the token '<unk>'"):
        LlamaCppTokenizer(base | {"general.name": "My-Phi-3"})


def test_a_vocabulary_without_byte_pieces_cannot_encode_every_text():
    keys = {"model": "llama", "tokens": ["a"], "scores": [0.0], "add_bos_token": False}
    ours = LlamaCppTokenizer({f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    with pytest.raises(ValueError, match="no piece <0xE2>"):
        ours.encode("a")
