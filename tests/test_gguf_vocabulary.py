"""A vocabulary in a GGUF file has llama.cpp's kind, types and switches, or is refused by name."""

import json

import pytest
from gguf_files import metadata_of
from referees.llama_cpp import LlamaCpp
from test_gguf_tokenizer import edit_config, write_byte_fallback_json
from tiny import TEXTS, make_tiny_model, sentencepiece_model

from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.export import convert_folder
from minitune.gguf.tokenizer.tokenizer_metadata import tokenizer_metadata

CONTROL, USER_DEFINED = 3, 4
SPACE_KEY = "tokenizer.ggml.add_space_prefix"
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "split": False}
MARK_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}


def metadata_for(folder):
    return tokenizer_metadata(Tokenizer.from_folder(folder), 512, "name")


def edit_json(folder, **changes):
    """Change keys of tokenizer.json."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def sentencepiece_folder(tmp_path):
    """Return a folder with a tokenizer.model, and a chat template that begins with the BOS."""
    folder = make_tiny_model(tmp_path / "base", tokenizer="spm")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    edit_config(folder, chat_template="{{ bos_token }}" + config["chat_template"])
    return folder


def json_folder(tmp_path):
    folder = sentencepiece_folder(tmp_path)
    write_byte_fallback_json(folder)
    return folder


# ---- the space before a text


def first_only_in_json(tmp_path):
    folder = json_folder(tmp_path)
    pre_tokenizer = METASPACE | {"prepend_scheme": "first"}
    edit_json(folder, normalizer=None, pre_tokenizer=pre_tokenizer)
    return folder


def not_legacy(tmp_path):
    folder = sentencepiece_folder(tmp_path)
    edit_config(folder, legacy=False)
    return folder


@pytest.mark.parametrize("make", [first_only_in_json, not_legacy], ids=lambda make: make.__name__)
def test_a_space_before_the_first_text_only_reaches_llama_cpp_as_no_space(tmp_path, make):
    folder = make(tmp_path)
    with pytest.warns(UserWarning, match="begin each prompt with a special token or a space"):
        path = convert_folder(folder, tmp_path / "x.gguf")
    assert metadata_of(path)[SPACE_KEY] is False
    tokenizer, llama_cpp = Tokenizer.from_folder(folder), LlamaCpp(path)
    for text in TEXTS:
        text = f"<s>{text}</s>{text}"
        assert llama_cpp.tokenize(text, False) == tokenizer.encode(text), text


def test_the_key_of_the_space_is_that_of_llama_cpps_converter(tmp_path):
    folder = sentencepiece_folder(tmp_path)
    assert SPACE_KEY not in metadata_for(folder)  # llama.cpp puts a space by default
    edit_config(folder, add_prefix_space=True)
    assert metadata_for(folder)[SPACE_KEY] is True
    edit_config(folder, add_prefix_space=False)
    assert metadata_for(folder)[SPACE_KEY] is False
    byte_level = make_tiny_model(tmp_path / "bytes")
    assert SPACE_KEY not in metadata_for(byte_level)
    edit_config(byte_level, add_prefix_space=False)
    assert metadata_for(byte_level)[SPACE_KEY] is False


# ---- vocabularies of SentencePiece's pieces


def test_gemmas_form_is_exported_without_a_space_before_a_text(tmp_path):
    folder = json_folder(tmp_path)
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    edit_json(folder, normalizer=MARK_SPACES, pre_tokenizer=split | {"invert": False})
    path = convert_folder(folder, tmp_path / "x.gguf")
    metadata = metadata_of(path)
    assert metadata["tokenizer.ggml.model"] == "llama" and metadata[SPACE_KEY] is False
    tokenizer, llama_cpp = Tokenizer.from_folder(folder), LlamaCpp(path)
    for text in (*TEXTS, "a\u2581\u2581b  c"):
        assert llama_cpp.tokenize(text) == tokenizer.encode(text), text


def test_an_added_token_that_training_sees_in_marks_and_llama_cpp_in_spaces_is_refused(tmp_path):
    folder = json_folder(tmp_path)
    edit_json(folder, normalizer=MARK_SPACES, pre_tokenizer=None)
    edit_config(folder, added_tokens_decoder={"400": {"content": "\u2581#", "normalized": False}})
    with pytest.raises(
        ValueError, match=r"would cut .* 400 ' #', .* instead of .* 313 '\u2581', 353 '#'"
    ):
        convert_folder(folder, tmp_path / "x.gguf")


@pytest.mark.parametrize("kind", ["NFKC", "Lowercase", "Strip"])
def test_a_normaliser_of_pieces_that_changes_texts_is_refused(tmp_path, kind):
    folder = json_folder(tmp_path)
    normalizer = {"type": kind} | (
        {"strip_left": True, "strip_right": True} if kind == "Strip" else {}
    )
    edit_json(folder, normalizer={"type": "Sequence", "normalizers": [normalizer, MARK_SPACES]})
    with pytest.raises(ValueError, match=rf'the normalizer .*"{kind}".* does not normalise'):
        metadata_for(folder)


def test_nfc_before_the_pieces_is_accepted(tmp_path):
    folder = json_folder(tmp_path)
    edit_json(
        folder, normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, MARK_SPACES]}
    )
    assert metadata_for(folder)["tokenizer.ggml.model"] == "llama"


def test_a_pre_tokenizer_of_pieces_that_llama_cpp_lacks_is_refused(tmp_path):
    folder = json_folder(tmp_path)
    edit_json(folder, pre_tokenizer={"type": "Digits", "individual_digits": True})
    with pytest.raises(ValueError, match=r"its pre_tokenizer has a part .*Digits"):
        metadata_for(folder)


UNFIT_MODELS = {  # settings of SentencePiece's trainer -> the error
    ("normalization_rule_name", "nmt_nfkc"): "normalises .* and llama.cpp does not normalise",
    ("remove_extra_whitespaces", True): "normalises .* and llama.cpp does not normalise",
    ("model_type", "unigram"): "is a unigram model, but llama.cpp merges pieces as BPE",
    ("byte_fallback", False): "has 0 of 256 byte pieces",
}


@pytest.mark.parametrize(("setting", "message"), UNFIT_MODELS.items(), ids=str)
def test_a_sentencepiece_model_that_llama_cpp_would_misread_is_refused(tmp_path, setting, message):
    folder = sentencepiece_folder(tmp_path)
    model = sentencepiece_model(**dict([setting]), hard_vocab_limit=False)
    (folder / "tokenizer.model").write_bytes(model)
    with pytest.raises(ValueError, match=rf"tokenizer\.model: {message}"):
        metadata_for(folder)


def test_a_vocabulary_of_pieces_without_all_bytes_is_refused(tmp_path):
    folder = json_folder(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["byte"] = vocab.pop("<0x41>")
    edit_json(folder, model=content["model"])
    with pytest.raises(ValueError, match="has 255 of 256 byte pieces"):
        metadata_for(folder)


@pytest.mark.parametrize(
    "option",
    [{"dropout": 0.1}, {"continuing_subword_prefix": "##"}, {"end_of_word_suffix": "</w>"}],
    ids=str,
)
def test_an_option_of_bpe_that_llama_cpp_lacks_is_refused(tmp_path, option):
    folder = make_tiny_model(tmp_path / "base")
    tokenizer = Tokenizer.from_folder(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    edit_json(folder, model=content["model"] | option)
    (name,) = option
    with pytest.raises(ValueError, match=f"the model has {name} .*, which llama.cpp does not appl"):
        tokenizer_metadata(tokenizer, 512, "name")


# ---- added tokens and the ends of a text


@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_added_tokens_have_the_types_of_llama_cpps_converter(tmp_path, kind):
    folder = make_tiny_model(tmp_path / "base", tokenizer=kind)
    texts = ["<｜User｜>", "<unused7>", "<|tool|>", "[@BOS@]", "<tool>", "a\u2581tool", "<|half>"]
    decoder = {str(400 + i): {"content": text} for i, text in enumerate(texts)}
    if kind == "spm":
        decoder |= {"0": {"content": "<unk>", "special": True}}
    edit_config(folder, added_tokens_decoder=decoder)
    metadata = metadata_for(folder)
    types = metadata["tokenizer.ggml.token_type"]
    assert types[400:407] == [CONTROL] * 4 + [USER_DEFINED] * 3
    tokens = metadata["tokenizer.ggml.tokens"]
    if kind == "spm":  # llama.cpp looks for the text before it marks spaces
        texts = [text.replace("\u2581", " ") for text in texts]
    assert tokens[400:407] == texts
    if kind == "spm":
        assert types[0] == CONTROL and metadata["tokenizer.ggml.scores"][400] == -1000.0


def test_three_tokens_may_end_a_text_beside_those_that_llama_cpp_knows(tmp_path):
    folder = make_tiny_model(tmp_path / "base")  # llama.cpp knows <|endoftext|>, the id 0
    for ids, named in (([2, 0, 7], [2, 0, 7]), ([2, 0, 7, 8], [2, 7, 8])):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        metadata = metadata_for(folder)
        ends = [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")]
        assert ends == named
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0, 7, 8, 9]}))
    with pytest.raises(
        ValueError, match=r"5 tokens end a generation \('<\|im_end\|>', .*names thre"
    ):
        metadata_for(folder)


def test_the_letters_of_a_named_template_are_those_that_llama_cpp_takes(tmp_path):
    tokenizer = Tokenizer.from_folder(make_tiny_model(tmp_path / "base"))
    tokenizer.chat_template = {"default": "a", "tool_use": "b", "rag-2": "c"}
    metadata = tokenizer_metadata(tokenizer, 512, "name")
    assert metadata["tokenizer.chat_templates"] == ["tool_use", "rag_2"]
    assert metadata["tokenizer.chat_template.rag_2"] == "c"
