"""tokenizer.json against the library that owns the format; special tokens; broken files."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import LINES, sentencepiece_bytes, write_json, write_json_tokenizer
from tokenizers import Tokenizer as Library

from minitune.data.tokenization.tokenizer import Tokenizer, check_vocabulary


@pytest.fixture(scope="session")
def json_folder(tmp_path_factory):
    """Return a folder with tokenizer.json and tokenizer_config.json."""
    return write_json_tokenizer(tmp_path_factory.mktemp("json"))


@settings(max_examples=50)
@given(st.text(max_size=30))
def test_ids_equal_the_library_with_and_without_special_tokens(json_folder, text):
    ours = Tokenizer.from_folder(json_folder)
    library = Library.from_file(str(json_folder / "tokenizer.json"))
    assert ours.encode(text) == library.encode(text).ids
    bare = library.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, add_special_tokens=False) == bare
    assert ours.decode(ours.encode(text), skip_special_tokens=True) == text


def test_offsets_keep_the_white_space_that_the_post_processor_would_trim(json_folder):
    text = "the  quick\n\n brown 12"
    ids, offsets = Tokenizer.from_folder(json_folder).encode_with_offsets(text)
    assert len(ids) == len(offsets)
    assert "".join(text[begin:end] for begin, end in offsets) == text


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path):
    folder = write_json_tokenizer(tmp_path)
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.enable_truncation(3)
    library.enable_padding(length=3)
    library.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode(LINES[0]), skip_special_tokens=True) == LINES[0]
    assert tokenizer.encode("") == [1]


def test_a_text_that_begins_with_the_bos_gets_no_second_one(json_folder):
    tokenizer = Tokenizer.from_folder(json_folder)
    assert tokenizer.encode("<|bos|>hello") == tokenizer.encode("hello")
    assert tokenizer.encode("hello")[0] == tokenizer.bos_token_id


def test_special_tokens_come_from_the_tokenizer_files_then_from_config_json(tmp_path):
    folder = write_json_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.unk_token_id is None
    write_json(folder / "tokenizer_config.json", {"pad_token": None})
    ids = {"bos_token_id": 3, "eos_token_id": [2, 1], "pad_token_id": 0, "unk_token_id": -1}
    write_json(folder / "config.json", ids)
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (3, 2, None)
    assert tokenizer.pad_token_id is None  # a null in tokenizer_config.json means "none"
    write_json(folder / "special_tokens_map.json", {"eos_token": {"content": "<|start|>"}})
    assert Tokenizer.from_folder(folder).eos_token_id == 3


def test_a_token_of_the_template_that_only_config_json_names_is_noted(tmp_path):
    folder = write_json_tokenizer(tmp_path)
    write_json(folder / "config.json", {"bos_token_id": 3, "pad_token_id": 0})
    assert Tokenizer.from_folder(folder).notes == ()
    write_json(folder / "tokenizer_config.json", {"chat_template": "{{ bos_token }}"})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.apply_chat_template([], tokenize=False) == "<|start|>"
    assert ["names the bos_token that" in note for note in tokenizer.notes] == [True]


def test_generation_ends_at_every_eos_of_the_configs(tmp_path):
    folder = write_json_tokenizer(tmp_path)
    write_json(folder / "generation_config.json", {"eos_token_id": [3, 2]})
    write_json(folder / "config.json", {"eos_token_id": 1})
    assert Tokenizer.from_folder(folder).eos_token_ids == (2, 3, 1)


def test_a_tokenizer_larger_than_the_embedding_is_refused_and_a_padded_embedding_is_not(
    json_folder,
):
    tokenizer = Tokenizer.from_folder(json_folder)
    check_vocabulary(tokenizer, tokenizer.id_count)
    check_vocabulary(tokenizer, 512)
    message = "ids up to 329, but the model's embedding has only 329 rows"
    with pytest.raises(ValueError, match=message):
        check_vocabulary(tokenizer, 329)


@pytest.mark.parametrize("kind", ["json", "model"])
def test_saving_copies_the_files_byte_for_byte(tmp_path, kind):
    source, target = tmp_path / "from", tmp_path / "to"
    write_json_tokenizer(source)
    (source / "tokenizer.model").write_bytes(sentencepiece_bytes())
    (source / "chat_template.jinja").write_text("{{ messages }}\n", encoding="utf-8")
    if kind == "model":
        (source / "tokenizer.json").unlink()
        write_json(source / "tokenizer_config.json", {})
    write_json(source / "model.safetensors.index.json", {})
    tokenizer = Tokenizer.from_folder(source)
    tokenizer.save_pretrained(target)
    saved = {path.name: path.read_bytes() for path in target.iterdir()}
    original = {path.name: path.read_bytes() for path in source.iterdir()}
    assert saved == {name: original[name] for name in saved}
    assert len(saved) == (4 if kind == "json" else 3)
    assert Tokenizer.from_folder(target).encode("hello") == tokenizer.encode("hello")


CONFIG = "tokenizer_config.json"
BROKEN_FILES = [
    ({}, "no tokenizer.json and no tokenizer.model"),
    ({"tokenizer.json": "{"}, "tokenizer.json: not JSON"),
    ({"tokenizer.model": "no model"}, "tokenizer.model: not a sentencepiece model"),
    ({CONFIG: "{"}, "tokenizer_config.json: not JSON"),
    ({CONFIG: "[]"}, "tokenizer_config.json: holds a list, not an object"),
    (
        {CONFIG: '{"eos_token": 5}'},
        "tokenizer_config.json: eos_token is 5, expected a token's",
    ),
    (
        {CONFIG: '{"bos_token": ["a"]}'},
        r"tokenizer_config.json: bos_token is \['a'\], expected",
    ),
    ({CONFIG: '{"add_bos_token": "yes"}'}, "add_bos_token is 'yes', expected true or false"),
    ({CONFIG: '{"eos_token": "\\ud800"}'}, "half a surrogate pair"),
    (
        {"vocab.json": "{}", "merges.txt": ""},
        "convert vocab.json and merges.txt to",
    ),
    ({CONFIG: "[" * 100_000}, "tokenizer_config.json: JSON that is nested too deeply"),
    ({CONFIG: '{"chat_template": 3}'}, "chat_template is a int, not a text"),
    ({CONFIG: '{"chat_template": [{"name": "rag"}]}'}, "entry of chat_template is {'name': 'rag'}"),
]


@pytest.mark.parametrize(("files", "message"), BROKEN_FILES)
def test_a_missing_or_broken_file_is_named(tmp_path, json_folder, files, message):
    if CONFIG in files:
        (tmp_path / "tokenizer.json").write_bytes((json_folder / "tokenizer.json").read_bytes())
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(error.value)
