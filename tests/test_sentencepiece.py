"""tokenizer.model against sentencepiece; the special tokens and offsets around the library."""

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import sentencepiece_bytes, write_json

from minitune.data.tokenization.tokenizer import Tokenizer


@pytest.fixture
def library():
    """Return the sentencepiece processor of the model."""
    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_bytes())


@pytest.fixture
def model_folder(tmp_path):
    """Return a folder that holds tokenizer.model alone."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_bytes())
    return tmp_path


@settings(max_examples=50)
@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30))
def test_ids_equal_the_library_and_offsets_cover_every_character(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp() / "sentencepiece"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_bytes())
    library = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_bytes())
    ours = Tokenizer.from_folder(folder)
    ids, offsets = ours.encode_with_offsets(text)
    assert ids == library.encode(text)
    assert "".join(text[begin:end] for begin, end in offsets) == text
    assert ours.encode(text) == [library.bos_id(), *ids]
    assert ours.decode(ids) == text.replace("\u2581", " ")


def test_special_tokens_in_a_text_are_cut_out_before_the_library_sees_it(model_folder, library):
    decoder = {
        "1": {"content": "<s>", "special": True},
        "320": {"content": "<|im|>", "special": True},
        "321": {"content": "<|im_end|>"},
        "322": {"content": "<|im|>!"},
    }
    config = {"added_tokens_decoder": decoder, "bos_token": {"content": "<s>"}}
    write_json(model_folder / "tokenizer_config.json", config)
    tokenizer = Tokenizer.from_folder(model_folder)
    text = "<s>hello</s><|im|> world<|im_end|><|im|>!"
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == [1, *library.encode("hello"), 2, 320, *library.encode(" world"), 321, 322]
    assert "".join(text[begin:end] for begin, end in offsets) == text
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello  world<|im_end|><|im|>!"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.id_count == 323


def test_legacy_false_puts_the_dummy_space_at_the_beginning_of_a_text_only(model_folder, library):
    def ids_of(text, legacy):
        write_json(model_folder / "tokenizer_config.json", {"legacy": legacy})
        return Tokenizer.from_folder(model_folder).encode_with_offsets(text)[0]

    dummy, newline = library.piece_to_id("\u2581"), library.encode("\n")[1:]
    assert ids_of("</s>\n", legacy=True) == [2, dummy, *newline]
    assert ids_of("</s>\n", legacy=False) == [2, *newline]
    assert ids_of("\n", legacy=False) == library.encode("\n")


def test_add_bos_and_add_eos_of_the_config_are_obeyed(model_folder):
    config = {"add_bos_token": False, "add_eos_token": True}
    write_json(model_folder / "tokenizer_config.json", config)
    tokenizer = Tokenizer.from_folder(model_folder)
    assert tokenizer.encode("hello") == [*tokenizer.encode("hello", add_special_tokens=False), 2]
    assert tokenizer.encode("hello</s>") == tokenizer.encode("hello")


CONFIG, ADDED = "tokenizer_config.json", "added_tokens.json"
WRONG_TOKENS = [
    (ADDED, {"<tool>": "321"}, "added_tokens.json: '<tool>' has the id '321', expected a number"),
    (ADDED, {"<tool>": -1}, "added_tokens.json: '<tool>' has the id -1, expected a number"),
    (
        CONFIG,
        {"added_tokens_decoder": [1]},
        r"tokenizer_config.json: added_tokens_decoder is not",
    ),
    (
        CONFIG,
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        "added_tokens_decoder .* 'x' is",
    ),
    (
        CONFIG,
        {"added_tokens_decoder": {"321": "a"}},
        "added_tokens_decoder .* '321' is 'a'",
    ),
]


@pytest.mark.parametrize(("file", "content", "message"), WRONG_TOKENS)
def test_added_tokens_of_the_wrong_form_are_named_with_their_file(
    model_folder, file, content, message
):
    write_json(model_folder / file, content)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_folder(model_folder)
    assert str(model_folder / file) in str(error.value)
