"""llama.cpp splits text into the tokens of the tokenizer that trained."""

import json

import pytest
import sentencepiece
from gguf_files import metadata_of
from referees.llama_cpp import LlamaCpp
from tiny import TEXTS, make_tiny_model, sentencepiece_model

from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.export import convert_folder
from minitune.gguf.tokenizer.tokenizer_metadata import tokenizer_metadata


@pytest.mark.parametrize("kind", ["bpe", "llama3", "spm"])
def test_llama_cpp_cuts_text_into_the_tokens_the_tokenizer_gives(tmp_path, kind):
    folder = make_tiny_model(tmp_path / "base", tokenizer=kind)
    tokenizer = Tokenizer.from_folder(folder)
    llama_cpp = LlamaCpp(convert_folder(folder, tmp_path / "x.gguf"))
    for text in TEXTS:
        assert llama_cpp.tokenize(text) == tokenizer.encode(text), text
    messages = [{"role": "user", "content": "Two lamps?"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False)
    expected = tokenizer.encode(chat, add_special_tokens=False)
    assert llama_cpp.tokenize(chat, add_special=False) == expected


def merges_of(model, vocab):
    """Return every pair of pieces that a SentencePiece model may merge, in the order of ids."""
    return [
        [piece[:cut], piece[cut:]]
        for piece, id in vocab.items()
        if not (model.is_byte(id) or model.is_control(id) or model.is_unknown(id))
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]


def write_byte_fallback_json(folder):
    """Replace the SentencePiece model of `folder` by Llama 2's tokenizer.json, without scores."""
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    vocab = {model.id_to_piece(id): id for id in range(model.get_piece_size())}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = [
        {"id": id, "content": text, "special": True, **flags}
        for id, text in enumerate(["<unk>", "<s>", "</s>"])
    ]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    content = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": merges_of(model, vocab),
            "unk_token": "<unk>",
            "byte_fallback": True,
            "fuse_unk": True,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [first, second],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer.model").unlink()


def test_scores_rebuilt_from_merges_cut_text_as_the_tokenizer_does(tmp_path):
    folder = make_tiny_model(tmp_path / "base", tokenizer="spm")
    write_byte_fallback_json(folder)
    tokenizer = Tokenizer.from_folder(folder)
    llama_cpp = LlamaCpp(convert_folder(folder, tmp_path / "x.gguf"))
    for text in TEXTS:
        assert llama_cpp.tokenize(text) == tokenizer.encode(text), text


def test_added_tokens_keep_their_ids_and_kinds(tmp_path):
    folder = make_tiny_model(tmp_path / "base")
    content = json.loads((folder / "tokenizer.json").read_text())
    added = {**content["added_tokens"][0], "special": False}
    content["added_tokens"] += [
        {**added, "id": 400, "content": "<tool>"},
        {**added, "id": 401, "content": "<|end|>"},
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    path = convert_folder(folder, tmp_path / "x.gguf")
    metadata = metadata_of(path)
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    assert tokens[400:403] == ["<tool>", "<|end|>", "[PAD402]"] and types[400:403] == [4, 3, 5]
    text = "order <tool>lamp<|end|> now"
    assert LlamaCpp(path).tokenize(text) == Tokenizer.from_folder(folder).encode(text)


def edit_config(folder, **changes):
    """Change keys of tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_tokens_that_only_the_config_names_reach_llama_cpp(tmp_path):
    folder = make_tiny_model(tmp_path / "base")
    named = {"400": {"content": "Mölln", "normalized": False}}
    edit_config(folder, added_tokens_decoder=named, extra_special_tokens=["<|tool|>"])
    path = convert_folder(folder, tmp_path / "x.gguf")
    metadata = metadata_of(path)
    assert metadata["tokenizer.ggml.tokens"][400:402] == ["Mölln", "<|tool|>"]
    assert metadata["tokenizer.ggml.token_type"][400:402] == [4, 3]
    tokenizer, text = Tokenizer.from_folder(folder), "from Mölln<|tool|> now"
    ids = tokenizer.encode(text)
    assert {400, 401} < set(ids)
    assert LlamaCpp(path).tokenize(text) == ids


def test_a_renamed_control_piece_reaches_llama_cpp(tmp_path):
    folder = make_tiny_model(tmp_path / "base", tokenizer="spm")
    named = {"2": {"content": "<|im_end|>", "special": True}}
    edit_config(folder, added_tokens_decoder=named, eos_token="<|im_end|>", pad_token=None)
    tokenizer, text = Tokenizer.from_folder(folder), "now<|im_end|>"
    ids = tokenizer.encode(text)
    assert ids[-1] == 2
    assert LlamaCpp(convert_folder(folder, tmp_path / "x.gguf")).tokenize(text) == ids


def test_assigned_and_named_chat_templates_are_exported(tmp_path):
    folder = make_tiny_model(tmp_path / "base")
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_metadata(tokenizer, 512, "name")["tokenizer.chat_template"] == "{{ messages }}"
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    metadata = tokenizer_metadata(tokenizer, 512, "name")
    assert metadata["tokenizer.chat_template"] == "a"
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]
    assert metadata["tokenizer.chat_template.tool_use"] == "b"


def test_of_two_vocabularies_that_differ_the_one_that_trained_is_exported(tmp_path):
    folder = make_tiny_model(tmp_path / "base", tokenizer="spm")
    model = (folder / "tokenizer.model").read_bytes()
    same = metadata_of(convert_folder(folder, tmp_path / "model.gguf"))
    write_byte_fallback_json(folder)
    (folder / "tokenizer.model").write_bytes(model)
    scores = metadata_of(convert_folder(folder, tmp_path / "same.gguf"))["tokenizer.ggml.scores"]
    assert scores[3:] == same["tokenizer.ggml.scores"][3:]
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["<0x41>"], vocab["<0x42>"] = vocab["<0x42>"], vocab["<0x41>"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_folder(folder)
    llama_cpp = LlamaCpp(convert_folder(folder, tmp_path / "x.gguf"))
    for text in ("AB", *TEXTS):
        assert llama_cpp.tokenize(text) == tokenizer.encode(text), text


def test_merges_in_another_order_than_the_scores_are_those_that_count(tmp_path):
    folder = make_tiny_model(tmp_path / "base", tokenizer="spm")
    model = (folder / "tokenizer.model").read_bytes()
    write_byte_fallback_json(folder)
    (folder / "tokenizer.model").write_bytes(model)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"].reverse()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    scores = metadata_of(convert_folder(folder, tmp_path / "x.gguf"))["tokenizer.ggml.scores"]
    vocab, first = content["model"]["vocab"], content["model"]["merges"][0]
    assert scores[vocab["".join(first)]] == 0.0


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_an_added_token_with_a_flag_that_llama_cpp_lacks_is_not_exported(tmp_path, flag):
    folder = make_tiny_model(tmp_path / "base")
    edit_config(folder, added_tokens_decoder={"400": {"content": "<tool>", flag: True}})
    with pytest.raises(ValueError, match=f"'<tool>' has {flag}, which llama.cpp does not apply"):
        convert_folder(folder, tmp_path / "x.gguf")


def test_white_space_behind_phi_3s_tokens_is_cut_in_llama_cpp_as_here(tmp_path):
    folder = make_tiny_model(tmp_path / "base", tokenizer="spm")
    (folder / "tokenizer.json").unlink(missing_ok=True)
    added = {
        "2": {"content": "</s>", "rstrip": True},
        "400": {"content": "<|user|>", "rstrip": True, "special": True},
        "401": {"content": "<|endoftext|>", "special": True},
    }
    edit_config(folder, added_tokens_decoder=added)
    tokenizer = Tokenizer.from_folder(folder)
    llama_cpp = LlamaCpp(convert_folder(folder, tmp_path / "Tiny-Phi-3.gguf", "f32"))
    for text in ("<|user|>\n a lamp", "<|endoftext|>\n a lamp", "a</s>  lamp<|user|> \n"):
        assert llama_cpp.tokenize(text) == tokenizer.encode(text), text
    with pytest.warns(UserWarning, match="general.name is 'x Phi-3', because llama.cpp applies"):
        path = convert_folder(folder, tmp_path / "x.gguf", "f32")
    assert metadata_of(path)["general.name"] == "x Phi-3"
    assert LlamaCpp(path).tokenize("<|user|>\n a lamp") == tokenizer.encode("<|user|>\n a lamp")
    added["400"]["rstrip"] = False
    edit_config(folder, added_tokens_decoder=added)
    with pytest.raises(ValueError, match=r"'</s>' has rstrip, which .* as Phi-3's"):
        convert_folder(folder, tmp_path / "phi3.gguf")


def test_a_file_named_after_phi_3_with_another_vocabulary_loads_in_llama_cpp(tmp_path):
    folder = make_tiny_model(tmp_path / "base")
    with pytest.warns(UserWarning, match="general.name is 'on-phi 3-data', because llama.cpp refu"):
        path = convert_folder(folder, tmp_path / "on-phi3-data.gguf")
    assert metadata_of(path)["general.name"] == "on-phi 3-data"
    tokenizer = Tokenizer.from_folder(folder)
    assert LlamaCpp(path).tokenize("a lamp") == tokenizer.encode("a lamp")
