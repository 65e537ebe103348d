"""A tokenizer in a file that is not the tokenizer that trained is refused by name."""

import json
import warnings

import pytest
from gguf_files import metadata_of
from tiny import make_tiny_model

from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.export import check_gguf, convert_folder
from minitune.gguf.tokenizer.tokenizer_check import check_tokenizer
from minitune.gguf.tokenizer.tokenizer_metadata import tokenizer_metadata

ROWS = 512
G = "tokenizer.ggml."


def edit_json(path, **changes):
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_bos_template(folder):
    """Let the chat template begin with the BOS, as llama.cpp expects of a model that adds one."""
    path = folder / "tokenizer_config.json"
    template = json.loads(path.read_text())["chat_template"]
    edit_json(path, chat_template="{{ bos_token }}" + template)
    return folder


@pytest.fixture
def folder_of(tmp_path):
    """Return a function that makes a tiny model of one kind of tokenizer."""

    def make(kind):
        folder = make_tiny_model(tmp_path / kind, tokenizer=kind, vocab=ROWS)
        return folder if kind == "bpe" else with_bos_template(folder)

    return make


def metadata_and_tokenizer(folder):
    """Return the keys of a folder's tokenizer, and the tokenizer."""
    tokenizer = Tokenizer.from_folder(folder)
    keys = tokenizer_metadata(tokenizer, ROWS, "x")
    return {"general.name": "x", **keys}, tokenizer


def swapped(values, a, b):
    """Return a list with two entries swapped."""
    values = list(values)
    values[a], values[b] = values[b], values[a]
    return values


def replaced(values, index, value):
    """Return a list with another entry."""
    return [*values[:index], value, *values[index + 1 :]]


@pytest.mark.parametrize("kind", ["bpe", "llama3", "spm"])
def test_the_tokenizer_that_trained_passes_from_memory_and_from_the_file(folder_of, kind):
    folder = folder_of(kind)
    metadata, tokenizer = metadata_and_tokenizer(folder)
    path = convert_folder(folder, folder / "x.gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_tokenizer(metadata, tokenizer)
        check_tokenizer(metadata_of(path), tokenizer)


DEFECTS = {
    "another word rule": ("bpe", lambda m: {G + "pre": "qwen2"}, r"would cut .* pre \(qwen2\)"),
    "no word rule": ("llama3", lambda m: {G + "pre": "default"}, r"would cut .* pre \(default\)"),
    "a renamed token": (
        "bpe",
        lambda m: {G + "tokens": replaced(m[G + "tokens"], 300, "xyz")},
        "the token 300 is 'xyz' in the file, but was",
    ),
    "swapped merges": (
        "bpe",
        lambda m: {G + "merges": swapped(m[G + "merges"], 0, -1)},
        "would cut .*merges",
    ),
    "a missing merge": (
        "llama3",
        lambda m: {G + "merges": m[G + "merges"][1:]},
        "would cut .*merges",
    ),
    "changed scores": (
        "spm",
        lambda m: {G + "scores": [-score for score in m[G + "scores"]]},
        "would cut .*scores",
    ),
    "a control token of another type": (
        "bpe",
        lambda m: {G + "token_type": replaced(m[G + "token_type"], 1, 4)},
        r"'<\|im_start\|>' has the type 4 in the file, expected 3 \(control\)",
    ),
    "a control token of ordinary type": (
        "spm",
        lambda m: {G + "token_type": replaced(m[G + "token_type"], 1, 1)},
        "'<s>' has the type 1",
    ),
    "a space before texts": (
        "spm",
        lambda m: {G + "add_space_prefix": False},
        "would cut '.*add_space_prefix",
    ),
    "no BOS": ("llama3", lambda m: {G + "add_bos_token": False}, "add_bos_token must be true"),
    "a BOS": ("bpe", lambda m: {G + "add_bos_token": True}, "add_bos_token must be false"),
    "an EOS": ("bpe", lambda m: {G + "add_eos_token": True}, "add_eos_token must be false"),
    "a short vocabulary": (
        "bpe",
        lambda m: {G + "tokens": m[G + "tokens"][:300]},
        "the file has 300 tokens, but the tokenizer has ids up to",
    ),
    "another BOS": (
        "llama3",
        lambda m: {G + "bos_token_id": 2},
        r"the BOS token is 2 '<\|im_end\|>' in the file, but 1 .* in training",
    ),
    "another EOS": ("bpe", lambda m: {G + "eos_token_id": 0}, "the EOS token is 0 .* in the file"),
    "another chat template": (
        "bpe",
        lambda m: {"tokenizer.chat_template": m["tokenizer.chat_template"].replace("\n", " ")},
        "the chat template writes ' You answer.*' in llama.cpp, but '⏎You",
    ),
    "a token that stands there twice": (
        "bpe",
        lambda m: {G + "tokens": replaced(m[G + "tokens"], 500, "a")},
        "the token 'a' has two ids",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_of_the_vocabulary_is_refused_by_name(folder_of, name):
    kind, defect, message = DEFECTS[name]
    metadata, tokenizer = metadata_and_tokenizer(folder_of(kind))
    with pytest.raises(ValueError, match=message):
        check_tokenizer(metadata | defect(metadata), tokenizer)


def test_a_missing_chat_template_is_refused(folder_of):
    metadata, tokenizer = metadata_and_tokenizer(folder_of("bpe"))
    del metadata["tokenizer.chat_template"]
    with pytest.raises(
        ValueError, match="the chat template of the file is not valid: no chat template is named"
    ):
        check_tokenizer(metadata, tokenizer)


@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_a_user_defined_token_that_the_file_lacks_is_refused(folder_of, kind):
    folder = folder_of(kind)
    added = {"400": {"content": "<tool>", "normalized": False}}
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=added)
    metadata, tokenizer = metadata_and_tokenizer(folder)
    check_tokenizer(metadata, tokenizer)
    types = replaced(metadata[G + "token_type"], 400, 1)
    with pytest.raises(ValueError, match="would cut '<tool>a lamp<tool>b"):
        check_tokenizer(metadata | {G + "token_type": types}, tokenizer)


def test_a_control_piece_that_keeps_its_old_text_is_refused(folder_of):
    folder = folder_of("spm")
    named = {"2": {"content": "<|im_end|>", "special": True}}
    config = {"added_tokens_decoder": named, "eos_token": "<|im_end|>", "pad_token": None}
    edit_json(folder / "tokenizer_config.json", **config)
    metadata, tokenizer = metadata_and_tokenizer(folder)
    check_tokenizer(metadata, tokenizer)
    old = metadata | {G + "tokens": replaced(metadata[G + "tokens"], 2, "</s>")}
    with pytest.raises(ValueError, match=r"would cut '<\|im_end\|>a lamp|writes '</s>"):
        check_tokenizer(old, tokenizer)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_a_flag_that_changes_ids_is_refused_before_training(folder_of, flag):
    folder = folder_of("bpe")
    added = {"400": {"content": "<tool>", flag: True}}
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=added)
    with pytest.raises(ValueError, match=f"'<tool>' has {flag}, which llama.cpp does not apply"):
        check_gguf("x/y", folder, ["f16"])


def test_flags_that_llama_cpp_applies_by_the_models_name_are_accepted(folder_of):
    folder = folder_of("spm")
    added = {
        "2": {"content": "</s>", "rstrip": True},
        "400": {"content": "<|user|>", "rstrip": True, "special": True},
        "401": {"content": "<|endoftext|>", "special": True},
    }
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=added)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    tokenizer = Tokenizer.from_folder(folder)
    metadata = {"general.name": "Phi-3"} | tokenizer_metadata(tokenizer, ROWS, "Phi-3")
    check_tokenizer(metadata, tokenizer)
    with pytest.raises(ValueError, match=r"has rstrip, which llama\.cpp does not apply"):
        check_tokenizer(metadata | {"general.name": "Phi 4"}, tokenizer)


def normalized(folder, *normalizers):
    """Give a tokenizer.json normalizers, and return the keys as if it had none, and itself."""
    metadata, _ = metadata_and_tokenizer(folder)
    normalizer = {"type": "Sequence", "normalizers": list(normalizers)}
    edit_json(folder / "tokenizer.json", normalizer=normalizer)
    return metadata, Tokenizer.from_folder(folder)


def test_a_normalizer_that_changes_texts_is_refused(folder_of):
    metadata, tokenizer = normalized(folder_of("bpe"), {"type": "Lowercase"})
    with pytest.raises(ValueError, match=r"training normalises text \(Lowercase\)"):
        check_tokenizer(metadata, tokenizer)


def test_a_normal_form_that_llama_cpp_lacks_is_a_warning_that_names_a_text(folder_of):
    metadata, tokenizer = normalized(folder_of("bpe"), {"type": "NFC"})
    with pytest.warns(UserWarning, match=r"does not compose letters and accents .*'cafe\u0301"):
        check_tokenizer(metadata, tokenizer)


def test_a_bos_that_the_chat_template_does_not_write_is_a_warning(tmp_path):
    folder = make_tiny_model(tmp_path / "base", tokenizer="spm", vocab=ROWS)
    metadata, tokenizer = metadata_and_tokenizer(folder)
    with pytest.warns(UserWarning, match="to every conversation, but the chat template writes non"):
        check_tokenizer(metadata, tokenizer)


def test_a_space_before_the_first_stretch_alone_is_a_warning(folder_of):
    folder = folder_of("spm")
    edit_json(folder / "tokenizer_config.json", legacy=False)
    metadata, tokenizer = metadata_and_tokenizer(folder)
    with pytest.warns(UserWarning, match="before every stretch of text or before none, .*' '"):
        check_tokenizer(metadata, tokenizer)
    with pytest.raises(ValueError, match="add_space_prefix"):
        check_tokenizer(metadata | {G + "add_space_prefix": True}, tokenizer)


def test_ordinary_text_that_llama_cpp_takes_for_a_control_token_is_a_warning(folder_of):
    folder = folder_of("bpe")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["</s>"] = len(content["model"]["vocab"])
    edit_json(folder / "tokenizer.json", **content)
    metadata, tokenizer = metadata_and_tokenizer(folder)
    with pytest.warns(UserWarning, match="takes '</s>' in a text for a control token"):
        check_tokenizer(metadata, tokenizer)


def test_a_template_without_a_system_message_is_compared_in_the_conversations_it_takes(folder_of):
    folder = folder_of("bpe")
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    metadata, tokenizer = metadata_and_tokenizer(folder)
    check_tokenizer(metadata, tokenizer)
    other = {"tokenizer.chat_template": template.replace("<|im_end|>", "")}
    with pytest.raises(ValueError, match="the chat template writes"):
        check_tokenizer(metadata | other, tokenizer)
