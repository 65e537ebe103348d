"""The tokenizer made of a GGUF file's keys is the tokenizer that the keys were made of."""

import json
from random import Random

import pytest
from gguf_files import copy_with_keys, metadata_of
from random_texts import random_text
from referees.llama_cpp import LlamaCpp
from test_gguf_tokenizer import edit_config
from tiny import CHATML, make_tiny_model
from tokenizer_files import TAGGED

from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.base.model_files import model_files
from minitune.gguf.export import convert_folder
from minitune.gguf.tokenizer.file_vocabulary import end_token_ids
from minitune.gguf.tokenizer.llama_cpp_tokenizer import LlamaCppTokenizer
from minitune.gguf.tokenizer.llama_cpp_words import WORD_RULES
from minitune.gguf.tokenizer.pre_tokenizers import PRE_TOKENIZERS, names_of_rule, pre_tokenizer_name
from minitune.gguf.tokenizer.tokenizer_check import check_tokenizer
from minitune.gguf.tokenizer.tokenizer_files import tokenizer_files
from minitune.gguf.tokenizer.tokenizer_metadata import tokenizer_metadata
from minitune.gguf.tokenizer.tokenizer_texts import CONVERSATIONS, FIXED_TEXTS, text_around

ROWS = 512
G = "tokenizer.ggml."
KINDS = ("bpe", "llama3", "spm")
# The template of the tiny SentencePiece model writes no BOS.
pytestmark = pytest.mark.filterwarnings("ignore:.*to every conversation")


def keys_of(folder):
    """Return the tokenizer of a folder and the keys that an export writes for it."""
    tokenizer = Tokenizer.from_folder(folder)
    keys = tokenizer_metadata(tokenizer, ROWS, "x")
    keys |= {"general.name": "x", "general.architecture": "llama", "llama.context_length": 256}
    return tokenizer, keys


def rebuilt(metadata, folder):
    """Return the tokenizer of the files that are made of the keys."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_files(metadata, folder)
    return Tokenizer.from_folder(folder)


def texts_for(tokenizer, seed, count=100):
    """Return hard texts for a tokenizer, with its added tokens."""
    added = [token.content for token in tokenizer.added_tokens.values()]
    rng = Random(seed)
    drawn = [random_text(rng, added) for _ in range(count)]
    return [*FIXED_TEXTS, *map(text_around, added), *drawn]


def renderings(tokenizer):
    """Return the renderings of conversations; None for those that the template refuses."""
    for messages, add_generation_prompt, tools in CONVERSATIONS:
        try:
            yield tokenizer.template.render(messages, add_generation_prompt, tools)
        except ValueError:
            yield None


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_comes_back_from_the_keys_of_its_export(tmp_path, kind):
    folder = make_tiny_model(tmp_path / "base", tokenizer=kind, vocab=ROWS)
    added = {"400": {"content": "<tool>", "normalized": False}, "401": {"content": "  "}}
    added["402"] = {"content": "<|x|>", "special": True, "normalized": False}
    edit_config(folder, added_tokens_decoder=added)
    original, keys = keys_of(folder)
    tokenizer = rebuilt(keys, tmp_path / "files")
    check_tokenizer(keys, tokenizer)
    texts = texts_for(original, kind)
    encoded = original.encode_batch_with_offsets(texts)
    assert tokenizer.encode_batch_with_offsets(texts) == encoded
    for ids, _ in encoded:
        for skip in (True, False):
            text = original.decode(ids, skip_special_tokens=skip)
            assert tokenizer.decode(ids, skip_special_tokens=skip) == text
    for text in ("", "a", " a"):
        assert tokenizer.encode(text) == original.encode(text)
    assert (tokenizer.special, len(tokenizer)) == (original.special, len(original))
    assert tokenizer.eos_token_ids == original.eos_token_ids == (2,)
    assert end_token_ids(keys) == ([2] if kind == "spm" else [2, 0])  # llama.cpp knows id 0's text
    assert list(renderings(tokenizer)) == list(renderings(original))
    assert tokenizer.model_max_length == 256
    assert tokenizer_metadata(tokenizer, ROWS, "x") | keys == keys


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_of_a_file_give_llama_cpps_ids(tmp_path, kind):
    folder = make_tiny_model(tmp_path / "base", tokenizer=kind, vocab=ROWS)
    path = convert_folder(folder, tmp_path / "x.gguf", "f32")
    tokenizer, llama_cpp = rebuilt(metadata_of(path), tmp_path / "files"), LlamaCpp(path)
    for text in texts_for(tokenizer, kind, count=30):
        assert tokenizer.encode_batch([text])[0] == llama_cpp.tokenize(text, add_special=False)
    for text in ("a", "The lamp"):
        assert tokenizer.encode(text) == llama_cpp.tokenize(text)


@pytest.mark.parametrize(
    ("key", "rule"), PRE_TOKENIZERS.items(), ids=[f"{rule}" for rule in PRE_TOKENIZERS.values()]
)
def test_each_name_of_a_word_rule_becomes_the_pre_tokenizer_of_that_rule(tmp_path, key, rule):
    _, keys = keys_of(make_tiny_model(tmp_path / "base", vocab=ROWS))
    for name in names_of_rule(rule):
        tokenizer = rebuilt(keys | {f"{G}pre": name}, tmp_path / name)
        path = tmp_path / name / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content["model"]["ignore_merges"] == key[1]
        assert pre_tokenizer_name(path, content) == rule
        assert tokenizer.add_bos_token == keys[f"{G}add_bos_token"]


def test_a_bos_is_added_by_the_name_of_the_word_rule_if_no_key_decides(tmp_path):
    _, keys = keys_of(make_tiny_model(tmp_path / "base", vocab=ROWS))
    del keys[f"{G}add_bos_token"]
    for name, rule in WORD_RULES.items():
        tokenizer = rebuilt(keys | {f"{G}pre": name}, tmp_path / name)
        assert tokenizer.encode("a") == LlamaCppTokenizer(keys | {f"{G}pre": name}).encode("a")
        assert tokenizer.add_bos_token == rule.adds_bos


def test_a_file_without_a_name_of_its_word_rule_gets_llama_cpps_default(tmp_path):
    _, keys = keys_of(make_tiny_model(tmp_path / "base", vocab=ROWS))
    del keys[f"{G}pre"]
    with pytest.warns(UserWarning, match="names no word rule"):
        tokenizer = rebuilt(keys, tmp_path / "files")
    file = LlamaCppTokenizer(keys)
    for text in texts_for(tokenizer, 0):
        assert tokenizer.encode_batch([text])[0] == file.encode(text, add_special=False)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("scores", ["real", "equal", "ranks"])
def test_pieces_merge_by_any_scores_as_in_llama_cpp(tmp_path, scores, prefix):
    folder = make_tiny_model(tmp_path / "base", tokenizer="spm", vocab=ROWS)
    path = convert_folder(folder, tmp_path / "plain.gguf", "f32")
    rng, keys = Random(scores), metadata_of(path)
    draw = {
        "real": lambda rank: rng.uniform(-20, 0),
        "equal": lambda rank: float(-rng.randrange(3)),
        "ranks": lambda rank: -float(rank),
    }[scores]
    keys[f"{G}scores"] = [draw(rank) for rank in range(ROWS)]
    keys[f"{G}add_space_prefix"] = prefix
    for index, text, kind in ((400, "<|user|>", 3), (401, "<tool>", 4), (402, "   ", 4)):
        keys[f"{G}tokens"][index], keys[f"{G}token_type"][index] = text, kind
    for index, kind in ((270, 4), (280, 5)):  # merges still make these pieces
        keys[f"{G}token_type"][index] = kind
    path = copy_with_keys(path, tmp_path / "x.gguf", keys)
    tokenizer, llama_cpp = rebuilt(keys, tmp_path / "files"), LlamaCpp(path)
    check_tokenizer(keys, tokenizer)
    file = LlamaCppTokenizer(keys)
    for number, text in enumerate(texts_for(tokenizer, scores)):
        ids = tokenizer.encode_batch([text])[0]
        assert ids == file.encode(text, add_special=False), text
        if number % 4 == 0:
            assert ids == llama_cpp.tokenize(text, add_special=False), text
    assert not tokenizer.added_tokens[401].special
    assert tokenizer.added_tokens[400].special


def test_the_tokens_of_phi_3_take_the_white_space_behind_them(tmp_path):
    folder = make_tiny_model(tmp_path / "base", tokenizer="spm", vocab=ROWS)
    added = {
        "2": {"content": "</s>", "rstrip": True},
        "400": {"content": "<|user|>", "rstrip": True, "special": True},
        "401": {"content": "<|endoftext|>", "special": True},
    }
    edit_config(folder, added_tokens_decoder=added)
    original = Tokenizer.from_folder(folder)
    keys = {"general.name": "Phi-3"} | tokenizer_metadata(original, ROWS, "Phi-3")
    tokenizer = rebuilt(keys, tmp_path / "files")
    texts = texts_for(original, 3)
    assert tokenizer.encode_batch(texts) == original.encode_batch(texts)


def test_templates_by_name_and_further_ends_come_back(tmp_path):
    folder = make_tiny_model(tmp_path / "base", vocab=ROWS)
    templates = {"default": CHATML, "tool_use": TAGGED}
    named = [{"name": name, "template": text} for name, text in templates.items()]
    edit_config(folder, chat_template=named)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 0, 1]}))
    original, keys = keys_of(folder)
    tokenizer = rebuilt(keys, tmp_path / "files")
    assert tokenizer.chat_template == templates
    assert end_token_ids(keys) == list(original.eos_token_ids) == [2, 0, 1]


def test_a_special_token_that_is_an_ordinary_one_is_not_cut_out_of_texts(tmp_path):
    _, keys = keys_of(make_tiny_model(tmp_path / "base", vocab=ROWS))
    keys[f"{G}padding_token_id"] = keys[f"{G}tokens"].index("e")
    tokenizer = rebuilt(keys, tmp_path / "files")
    check_tokenizer(keys, tokenizer)
    assert tokenizer.pad_token_id is None  # config.json has its id
    del keys[f"{G}unknown_token_id"]
    assert rebuilt(keys, tmp_path / "other").unk_token is None


def test_known_end_tokens_are_cut_out_of_texts_whatever_type_they_have(tmp_path):
    _, keys = keys_of(make_tiny_model(tmp_path / "base", vocab=ROWS))
    for index, text in enumerate(("<|eot_id|>", "</s>", "<plain>"), 400):
        keys[f"{G}tokens"][index], keys[f"{G}token_type"][index] = text, 1
    tokenizer = rebuilt(keys, tmp_path / "files")
    check_tokenizer(keys, tokenizer)
    assert tokenizer.encode("a<|eot_id|></s>")[1:] == [400, 401]
    assert 402 not in tokenizer.encode("<plain>")


def test_an_eos_behind_every_prompt_is_kept_and_warned_of(tmp_path):
    _, keys = keys_of(make_tiny_model(tmp_path / "base", tokenizer="llama3", vocab=ROWS))
    keys[f"{G}add_eos_token"] = True
    tokenizer = rebuilt(keys, tmp_path / "files")
    assert tokenizer.special_tokens_around([]) == ([1], [2])
    with pytest.warns(UserWarning, match="adds '<|im_end|>' behind every prompt"):
        check_tokenizer(keys, tokenizer)


def edited(key, index, value):
    """Return a function that gives a list of a file another entry."""

    def edit(keys):
        values = list(keys[f"{G}{key}"])
        values[index] = value
        return {f"{G}{key}": values}

    return edit


def shortened(key, count):
    """Return a function that shortens a list of a file."""
    return lambda keys: {f"{G}{key}": keys[f"{G}{key}"][:count]}


def changed(key, value):
    """Return a function that changes a key of a file."""
    return lambda keys: {key: value}


DAMAGES = {
    "short types": ("bpe", shortened("token_type", 99), "token_type has 99 entries, expected 512"),
    "short scores": ("spm", shortened("scores", 5), "scores has 5 entries, expected 512"),
    "no tokens": ("bpe", shortened("tokens", 0), "tokens is an empty list"),
    "a foreign BOS": ("bpe", changed(f"{G}bos_token_id", 512), "bos_token_id is 512, expected an"),
    "a negative EOS": ("bpe", changed(f"{G}eos_token_id", -1), "eos_token_id is -1, expected"),
    "a text as EOT": ("bpe", changed(f"{G}eot_token_id", "2"), "eot_token_id is '2', expected"),
    "a foreign FIM token": ("bpe", changed(f"{G}fim_pre_token_id", 999), "fim_pre_token_id is 999"),
    "a merge of no token": (
        "bpe",
        edited("merges", 3, "q zzz"),
        "merges has the entry 3 'q zzz', but 'zzz' is no token",
    ),
    "half a merge": ("bpe", edited("merges", 0, "a"), "merges has the entry 0 'a', but '' is no"),
    "a token twice": ("bpe", edited("tokens", 500, "a"), "ggml.tokens: the token 'a' has two ids"),
    "a number as token": ("bpe", edited("tokens", 1, 7), "tokens has the entry 1 7, expected str"),
    "a text as type": ("bpe", edited("token_type", 1, "3"), "token_type has the entry 1 '3'"),
    "a new type": ("bpe", edited("token_type", 1, 9), "token_type has the entry 1 9, expected 0"),
    "a score that is none": ("spm", edited("scores", 7, float("nan")), "scores has the entry 7"),
    "a text as list": ("bpe", changed(f"{G}merges", "a b"), "merges is 'a b', expected a list"),
    "a number as flag": ("bpe", changed(f"{G}add_bos_token", 1), "add_bos_token is 1, expected"),
    "no byte pieces": ("spm", edited("tokens", 9, "<x>"), "tokens has 255 of 256 byte pieces"),
    "an ordinary unknown token": (
        "spm",
        edited("token_type", 0, 1),
        "token_type gives the unknown token 0 '<unk>' the type of an ordinary one",
    ),
    "a template that is no text": (
        "bpe",
        changed("tokenizer.chat_template", 3),
        "tokenizer.chat_template is 3, expected text",
    ),
    "a template that is missing": (
        "bpe",
        changed("tokenizer.chat_templates", ["rag"]),
        "tokenizer.chat_template.rag is missing",
    ),
    "an unknown word rule": ("bpe", changed(f"{G}pre", "new"), "pre is 'new'.* known are .*qwen2"),
    "a kind of its own": ("bpe", changed(f"{G}model", "x"), "model is 'x'; a tokenizer is made of"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_key_is_an_error_that_names_the_key(tmp_path, name):
    kind, damage, message = DAMAGES[name]
    _, keys = keys_of(make_tiny_model(tmp_path / "base", tokenizer=kind, vocab=ROWS))
    with pytest.raises(ValueError, match=message):
        tokenizer_files(keys | damage(keys), tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("unknown_token_id", 3, "the key tokenizer.ggml.token_type gives the unknown token 3"),
        ("eos_token_id", 3, "the EOS token is 3 '<0x00>' in the file, but 2 '</s>' in training"),
    ],
)
def test_a_base_whose_tokenizer_is_damaged_is_refused_by_the_name_of_its_file(
    tmp_path, key, value, message
):
    folder = make_tiny_model(tmp_path / "base", tokenizer="spm", vocab=ROWS)
    path = convert_folder(folder, tmp_path / "whole.gguf", "f32")
    keys = metadata_of(path) | {f"{G}{key}": value}
    path = copy_with_keys(path, tmp_path / "x.gguf", keys)
    with pytest.raises(ValueError, match=rf"^\S*/x\.gguf: {message}"):
        model_files(path)


@pytest.mark.parametrize("key", ["model", "tokens", "merges"])
def test_a_missing_key_is_an_error_that_names_the_key(tmp_path, key):
    _, keys = keys_of(make_tiny_model(tmp_path / "base", vocab=ROWS))
    del keys[f"{G}{key}"]
    with pytest.raises(ValueError, match=f"the key tokenizer.ggml.{key} is missing"):
        tokenizer_files(keys, tmp_path)


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_a_special_token_that_is_added_but_not_named_is_an_error(tmp_path, name):
    _, keys = keys_of(make_tiny_model(tmp_path / "base", vocab=ROWS))
    del keys[f"{G}{name}_token_id"]
    keys[f"{G}add_{name}_token"] = True
    with pytest.raises(ValueError, match=f"the key tokenizer.ggml.{name}_token_id is missing"):
        tokenizer_files(keys, tmp_path)


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", "gemma4", "plamo2"])
def test_other_kinds_of_tokenizers_are_refused_by_name_with_a_remedy(model):
    message = rf"model is '{model}' \(.*\); .* train on the folder of the original model"
    for function in (end_token_ids, lambda keys: tokenizer_files(keys, None)):
        with pytest.raises(ValueError, match=message):
            function({f"{G}model": model})
