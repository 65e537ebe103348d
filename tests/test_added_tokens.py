"""Files beside the vocabulary: the tokens that they add, and folders that say two things."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import sentencepiece_bytes, write_json, write_json_tokenizer
from tokenizers import decoders, normalizers

from minitune.data.tokenization.tokenizer import Tokenizer, check_vocabulary

CONFIG, ADDED, TOKENS_MAP = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"


def edit_json(path, **changes):
    """Change keys of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, content | changes)
    return content


def add_tokens(folder, *texts, **flags):
    """Add tokens to tokenizer.json behind its vocabulary of 330 tokens."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    entries = [{"id": 330 + i, "content": text} | plain | flags for i, text in enumerate(texts)]
    edit_json(folder / "tokenizer.json", added_tokens=content["added_tokens"] + entries)


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a byte-level tokenizer.json of 330 tokens."""
    return write_json_tokenizer(tmp_path, eos_token="<|end|>")


@pytest.fixture
def model_folder(tmp_path):
    """Return a folder with a tokenizer.model of 320 pieces."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "tokenizer.model").write_bytes(sentencepiece_bytes())
    return target


CONTRADICTIONS = [
    ({CONFIG: {"added_tokens_decoder": {"340": {"content": "<x>"}}}}, "'<x>' the id 340, .* 330"),
    (
        {CONFIG: {"added_tokens_decoder": {"3": {"content": "<x>"}}}},
        r"'<x>' the id 3, .* 330, and id 3 is '<\|start\|>'",
    ),
    ({ADDED: {"<x>": 331}}, "added_tokens.json: gives the token '<x>' the id 331"),
    ({ADDED: {"<|end|>": 3}}, "added_tokens.json: .* the id 3, .* 2"),
    (
        {ADDED: {"<x>": 330}, CONFIG: {"added_tokens_decoder": {}}},
        "added_tokens.json: names the token '<x>'",
    ),
    (
        {TOKENS_MAP: {"eos_token": "<x>"}, CONFIG: {"added_tokens_decoder": {}}},
        "special_tokens_map.json: names the token '<x>'",
    ),
    (
        {CONFIG: {"extra_special_tokens": ["<x>"], "additional_special_tokens": ["<y>"]}},
        "names the token '<y>'",
    ),
    ({CONFIG: {"split_special_tokens": True}}, "split_special_tokens .*remove it"),
    ({CONFIG: {"fast_tokenizer_files": ["tokenizer.4.0.json"]}}, "fast_tokenizer_files names"),
    ({CONFIG: {"add_prefix_space": True}}, "puts no space before .* add_prefix_space true"),
    ({CONFIG: {"eos_token": {"content": "<x>", "strip": True}}}, "eos_token has strip True"),
    ({CONFIG: {"extra_special_tokens": 3}}, "extra_special_tokens is 3, expected a list"),
]


@pytest.mark.parametrize(("files", "message"), CONTRADICTIONS)
def test_a_folder_that_says_two_things_is_refused_by_name(folder, files, message):
    for name, content in files.items():
        if name == CONFIG:
            edit_json(folder / CONFIG, **content)
        else:
            write_json(folder / name, content)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_folder(folder)
    assert str(folder) in str(error.value)


def test_a_special_token_that_the_vocabulary_lacks_is_new_and_noted(folder):
    edit_json(folder / CONFIG, pad_token="<x>")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("a<x>")[-1] == tokenizer.pad_token_id == 330
    assert "names '<x>', which the vocabulary lacks; it has the new id 330" in tokenizer.notes[0]
    with pytest.raises(ValueError, match=r"only 330 rows; .* last token is '<x>'"):
        check_vocabulary(tokenizer, 330)


def test_the_map_counts_without_a_decoder_and_a_difference_is_noted_with_one(folder):
    write_json(folder / TOKENS_MAP, {"eos_token": "<|start|>"})
    assert Tokenizer.from_folder(folder).eos_token == "<|start|>"  # as in transformers
    edit_json(folder / CONFIG, added_tokens_decoder={})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_token == "<|end|>"
    assert "eos_token '<|end|>' and counts" in tokenizer.notes[0]


def test_keys_that_transformers_ignores_beside_tokenizer_json_are_noted(folder):
    transformers = pytest.importorskip("transformers")
    edit_json(folder / CONFIG, add_bos_token=False, add_eos_token=True, legacy=False)
    prepend = {"type": "Prepend", "prepend": "a"}
    edit_json(folder / "tokenizer.json", normalizer=prepend)
    tokenizer = Tokenizer.from_folder(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert tokenizer.encode("b") == theirs("b")["input_ids"] == [1, 68, 69]
    said = ["add_bos_token false", "add_eos_token true", "legacy false"]
    assert [note.split("says ")[-1] for note in tokenizer.notes] == said


def test_an_added_token_that_the_library_renumbers_is_noted(folder):
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    last = {**content["added_tokens"][0], "id": 335, "content": "<x>"}
    edit_json(folder / "tokenizer.json", added_tokens=[*content["added_tokens"], last])
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("<x>") == [1, 330]  # as in transformers
    assert "'<x>' has the id 335 there and the id 330 here" in tokenizer.notes[0]


def test_ids_of_the_post_processor_beyond_the_vocabulary_are_refused(folder):
    around = {"sep": ["<|end|>", 99999], "cls": ["<|bos|>", 1]}
    processor = {"type": "RobertaProcessing", "trim_offsets": True, "add_prefix_space": False}
    edit_json(folder / "tokenizer.json", post_processor=processor | around)
    with pytest.raises(ValueError, match=r"puts the id 99999 around a text, .* highest is 329"):
        Tokenizer.from_folder(folder)


def test_a_panic_of_the_library_names_the_file(folder):
    piece = {"SpecialToken": {"id": "<x>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    processor = {"type": "TemplateProcessing", "single": [piece, text], "pair": [text, text]}
    edit_json(folder / "tokenizer.json", post_processor=processor | {"special_tokens": {}})
    with pytest.raises(ValueError, match=r"tokenizer.json: tokenizers .* use its post-processor"):
        Tokenizer.from_folder(folder)


LETTERS = [chr(code) for code in range(0xA1, 0x144) if chr(code).isalpha()]


@settings(max_examples=25, deadline=None)
@given(token=st.text(st.sampled_from([*LETTERS, "a", "日", "🦙"]), min_size=2, max_size=5))
def test_an_added_token_of_a_byte_level_tokenizer_is_decoded_as_written(tmp_path_factory, token):
    folder = write_json_tokenizer(tmp_path_factory.getbasetemp() / "letters")
    add_tokens(folder, token)
    tokenizer = Tokenizer.from_folder(folder)
    text = f"in {token}! é{token}"
    ids = tokenizer.encode(text)
    assert 330 in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_byte_letters_of_added_tokens_are_those_of_the_library(folder):
    add_tokens(folder, "Mölln 日")
    letters = normalizers.ByteLevel().normalize_str("Mölln 日")
    assert decoders.ByteLevel().decode([letters]) == "Mölln 日"
    assert Tokenizer.from_folder(folder)._backend._spellings[330] == letters


def test_characters_beside_an_unfinished_one_stay_in_a_byte_fallback_tokenizer(folder):
    edit_json(folder / "tokenizer.json", decoder={"type": "ByteFallback"})
    pieces = [f"<0x{byte:02X}>" for byte in "🦙".encode()]
    add_tokens(folder, *pieces)
    tokenizer = Tokenizer.from_folder(folder)
    ids = [330, 331, 332, 333]
    assert tokenizer.decode([*ids, *ids[:2]]) == "🦙\ufffd"
    assert tokenizer.decode([*ids[1:], *ids]) == "\ufffd\ufffd\ufffd🦙"


def test_add_prefix_space_false_leaves_the_dummy_space_of_a_sentencepiece_model_out(model_folder):
    write_json(model_folder / CONFIG, {"add_prefix_space": False})
    tokenizer = Tokenizer.from_folder(model_folder)
    pieces = [tokenizer.id_to_token(i) for i in tokenizer.encode("hello </s>the")]
    assert pieces == ["<s>", "he", "l", "l", "o", "▁", "</s>", "t", "he"]  # as LlamaTokenizer
    assert tokenizer.decode(tokenizer.encode(" hello"), skip_special_tokens=True) == " hello"
    assert not tokenizer.adds_prefix_space


def test_a_control_piece_takes_the_text_that_the_decoder_gives_it(model_folder):
    named = {"2": {"content": "<|end|>", "special": True}}
    write_json(model_folder / CONFIG, {"added_tokens_decoder": named, "eos_token": "<|end|>"})
    tokenizer = Tokenizer.from_folder(model_folder)
    assert tokenizer.encode("<|end|>") == [1, 2]
    assert tokenizer.decode([2], skip_special_tokens=False) == "<|end|>"
    assert 2 not in tokenizer.encode("</s>")
    assert tokenizer.eos_token_id == 2


WRONG_PIECES = [
    ({"300": {"content": "<x>"}}, "the id 300 the text '<x>', but in tokenizer.model it is"),
    ({"2": {"content": "<s>"}}, "the id 2 the text '<s>', which has the id 1"),
    ({"321": {"content": "<x>"}}, "'<x>' the id 321, but the vocabulary gives it the id 320"),
]


@pytest.mark.parametrize(("decoder", "message"), WRONG_PIECES)
def test_a_decoder_that_contradicts_the_sentencepiece_model_is_refused(
    model_folder, decoder, message
):
    write_json(model_folder / CONFIG, {"added_tokens_decoder": decoder})
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_folder(model_folder)
