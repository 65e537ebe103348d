"""The word rule of a byte-level tokenizer has llama.cpp's name, and cuts text alike there."""

import json
from pathlib import Path

import pytest
import tokenizers
from referees.llama_cpp import LlamaCpp
from tiny import TEXTS, make_tiny_model
from tokenizers import pre_tokenizers, trainers

from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.export import convert_folder
from minitune.gguf.tokenizer import pre_tokenizers as rules
from minitune.gguf.tokenizer.pre_tokenizers import APPROXIMATED, PRE_TOKENIZERS, pre_tokenizer_name
from minitune.gguf.tokenizer.tokenizer_metadata import tokenizer_metadata

QWEN2 = next(key[0][0] for key, name in PRE_TOKENIZERS.items() if name == "qwen2")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
SPLIT = {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False}
DIGITS = {"type": "Digits", "individual_digits": True}


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


def name_of(pre_tokenizer, normalizer=None):
    """Return the name of a pre-tokenizer."""
    content = {"pre_tokenizer": pre_tokenizer, "normalizer": normalizer, "model": {"type": "BPE"}}
    return pre_tokenizer_name(Path("tokenizer.json"), content)


def retrain(path, rules, ignore_merges):
    """Train the tokenizer.json at `path` anew on words that its rules cut out of TEXTS."""
    splits = [pre_tokenizers.Split(tokenizers.Regex(rule), "isolated") for rule in rules]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.model.ignore_merges = ignore_merges
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(tokenizer.get_added_tokens_decoder().values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    content = json.loads(tokenizer.to_str())
    content["normalizer"] = {"type": "Sequence", "normalizers": []}
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(("key", "name"), PRE_TOKENIZERS.items(), ids=PRE_TOKENIZERS.values())
@pytest.mark.filterwarnings("ignore:.*llama.cpp approximates")
def test_each_named_word_rule_cuts_text_alike_in_llama_cpp(tmp_path, key, name):
    folder = make_tiny_model(tmp_path / "base")
    retrain(folder / "tokenizer.json", *key)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer_metadata(tokenizer, 512, "name")["tokenizer.ggml.pre"] == name
    llama_cpp = LlamaCpp(convert_folder(folder, tmp_path / "x.gguf"))
    for text in (*TEXTS, "1234567日本語テキスト!abc\r\n\n x"):
        if name in APPROXIMATED:
            text = text.replace("ĲSSEL", "IJssel").replace("e\u0301", "é")
        assert llama_cpp.tokenize(text) == tokenizer.encode(text), text


def test_an_approximated_word_rule_is_exported_with_a_warning(tmp_path):
    folder = make_tiny_model(tmp_path / "base")
    key = next(key for key, name in PRE_TOKENIZERS.items() if name == "gpt-4o")
    retrain(folder / "tokenizer.json", *key)
    with pytest.warns(UserWarning, match="llama.cpp approximates the pre-tokenizer gpt-4o"):
        convert_folder(folder, tmp_path / "x.gguf")
    assert LlamaCpp(tmp_path / "x.gguf").tokenize("ĲSSEL") != Tokenizer.from_folder(folder).encode(
        "ĲSSEL"
    )


def test_a_split_that_removes_the_text_between_its_words_keeps_its_name(tmp_path):
    folder = make_tiny_model(tmp_path / "base", tokenizer="llama3")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    split = content["pre_tokenizer"]["pretokenizers"][0]
    split |= {"behavior": "Removed", "invert": True}
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer_metadata(tokenizer, 512, "x")["tokenizer.ggml.pre"] == "llama-bpe"
    llama_cpp = LlamaCpp(convert_folder(folder, tmp_path / "x.gguf"))
    for text in TEXTS:
        assert llama_cpp.tokenize(text) == tokenizer.encode(text), text
    split["pattern"]["Regex"] = split["pattern"]["Regex"].removesuffix(r"|\s+")
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"llama\.cpp has no name for this pre-tokenizer"):
        convert_folder(folder, tmp_path / "y.gguf")


EQUIVALENT = [  # a pre-tokenizer and its name
    (sequence(SPLIT, BYTE_LEVEL), "qwen2"),
    (sequence(sequence(SPLIT), sequence(sequence(BYTE_LEVEL))), "qwen2"),
    (sequence(SPLIT | {"invert": True}, BYTE_LEVEL), "qwen2"),
    (sequence(SPLIT | {"behavior": "Removed", "invert": True}, BYTE_LEVEL), "qwen2"),
    (
        sequence(SPLIT | {"pattern": {"Regex": QWEN2.replace(r"\r\n", "\r\n")}}, BYTE_LEVEL),
        "qwen2",
    ),
    (BYTE_LEVEL | {"use_regex": True}, "gpt-2"),
    (sequence(BYTE_LEVEL | {"use_regex": True}), "gpt-2"),
    (sequence(SPLIT | {"pattern": {"Regex": rules.GPT_2}}, BYTE_LEVEL), "gpt-2"),
    (sequence(DIGITS, BYTE_LEVEL | {"use_regex": True}), "smollm"),
    (
        sequence(SPLIT | {"pattern": {"Regex": r"\p{N}"}}, BYTE_LEVEL | {"use_regex": True}),
        "smollm",
    ),
]
REFUSED = {
    "no byte level": SPLIT,
    "no pre-tokenizer": None,
    "words cut behind the byte level": sequence(BYTE_LEVEL, SPLIT),
    "two byte levels": sequence(SPLIT, BYTE_LEVEL, BYTE_LEVEL),
    "no word rule": BYTE_LEVEL,
    "a space before the text": sequence(SPLIT, BYTE_LEVEL | {"add_prefix_space": True}),
    "numbers as a whole": sequence(DIGITS | {"individual_digits": False}, BYTE_LEVEL),
    "matches that merge": sequence(SPLIT | {"behavior": "MergedWithNext"}, BYTE_LEVEL),
    "a text instead of a regex": sequence(SPLIT | {"pattern": {"String": QWEN2}}, BYTE_LEVEL),
}


@pytest.mark.parametrize(("pre_tokenizer", "name"), EQUIVALENT, ids=str)
def test_equivalent_structures_have_one_name(pre_tokenizer, name):
    for normalizer in (
        None,
        {"type": "NFC"},
        {"type": "Sequence", "normalizers": []},
        {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
    ):
        assert name_of(pre_tokenizer, normalizer) == name


@pytest.mark.parametrize("pre_tokenizer", REFUSED.values(), ids=list(REFUSED))
def test_a_structure_that_llama_cpp_lacks_is_refused(pre_tokenizer):
    with pytest.raises(ValueError, match=r"llama\.cpp has no name for this pre-tokenizer"):
        name_of(pre_tokenizer)


@pytest.mark.parametrize("kind", ["NFKC", "Lowercase", "Strip", "Replace", "Prepend"])
def test_a_normaliser_that_changes_texts_is_refused(kind):
    normalizer = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": kind}]}
    with pytest.raises(ValueError, match=rf'the normalizer .*"{kind}".* does not normalise'):
        name_of(sequence(SPLIT, BYTE_LEVEL), normalizer)


def test_a_published_vocabulary_has_the_name_that_llama_cpp_gives_it(tmp_path, monkeypatch):
    tokenizer = Tokenizer.from_folder(make_tiny_model(tmp_path / "base"))
    assert tokenizer_metadata(tokenizer, 512, "x")["tokenizer.ggml.pre"] == "smollm"
    digest = rules.fingerprint(tokenizer)
    monkeypatch.setitem(rules.PUBLISHED_VOCABULARIES, "smollm", {digest: "starcoder"})
    assert tokenizer_metadata(tokenizer, 512, "x")["tokenizer.ggml.pre"] == "starcoder"
