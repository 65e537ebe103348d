"""Calls of a tokenizer mean the same as in transformers."""

import copy
import json
import os
from random import Random

import numpy as np
import pytest
import torch
from random_tokenizers import random_model_folder
from tiny import make_tiny_model
from tokenizer_files import write_chat_tokenizer, write_json, write_json_tokenizer

from minitune.data.tokenization.tokenizer import Tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
TEXTS = ["the quick brown fox", "a", "twelve lamps for Lisbon"]
CALLS = [
    {},
    {"add_special_tokens": False},
    {"padding": True},
    {"padding": True, "padding_side": "left"},
    {"padding": "max_length", "max_length": 30},
    {"padding": "max_length"},
    {"truncation": True, "max_length": 4},
    {"max_length": 4},
    {"truncation": True, "padding": True},
    {"truncation": "longest_first", "max_length": 5, "padding": "max_length"},
    {"return_attention_mask": False, "padding": "longest"},
]
TENSORS = {"padding": True, "return_tensors": "pt"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
FOLDERS = {
    "a model_max_length": {"model_max_length": 6},
    "sides": {"padding_side": "left", "truncation_side": "left", "model_max_length": 9},
}


@pytest.fixture(params=["tiny", *FOLDERS])
def pair(tmp_path, request):
    """Return a tokenizer and transformers' one of the same folder."""
    if request.param == "tiny":
        make_tiny_model(tmp_path)
    else:
        write_json_tokenizer(tmp_path, **FAST, **FOLDERS[request.param])
    return Tokenizer.from_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)


def test_ids_and_masks_equal_those_of_transformers(pair):
    ours, theirs = pair
    for call in CALLS:
        for text in (TEXTS, TEXTS[0], ""):
            assert dict(ours(text, **call)) == {
                key: value for key, value in theirs(text, **call).items() if key != "token_type_ids"
            }, call


def test_tensors_equal_those_of_transformers(pair):
    ours, theirs = pair
    for text in (TEXTS, TEXTS[0]):
        ids, expected = ours(text, **TENSORS), theirs(text, **TENSORS)
        for key in ("input_ids", "attention_mask"):
            assert ids[key].dtype == expected[key].dtype
            assert torch.equal(ids[key], expected[key])
    assert torch.equal(
        ours.encode(TEXTS[0], return_tensors="pt"), theirs.encode(TEXTS[0], return_tensors="pt")
    )
    assert ours.encode(TEXTS[0], max_length=3) == theirs.encode(
        TEXTS[0], max_length=3, truncation=True
    )


def test_decoding_takes_what_transformers_takes(pair):
    ours, theirs = pair
    ids = theirs(TEXTS)["input_ids"]
    forms = [ids, ids[0], ids[0][0], torch.tensor(ids[0]), np.array(ids[2]), torch.tensor(3), []]
    padded = theirs(TEXTS, padding=True, return_tensors="pt")["input_ids"]
    for form in [*forms, padded, padded[0], tuple(ids[0])]:
        for skip in (False, True):
            assert ours.decode(form, skip) == theirs.decode(form, skip)
    for form in (ids, padded, list(padded), ids[0], []):
        assert ours.batch_decode(form) == theirs.batch_decode(form)
        assert ours.batch_decode(form, skip_special_tokens=True) == theirs.batch_decode(
            form, skip_special_tokens=True
        )


def test_names_of_a_tokenizer_hold_transformers_values(pair):
    ours, theirs = pair
    for name in (
        *("bos_token", "eos_token", "pad_token", "unk_token", "bos_token_id", "eos_token_id"),
        *("pad_token_id", "unk_token_id", "special_tokens_map", "all_special_tokens"),
        *("all_special_ids", "model_max_length", "padding_side", "truncation_side"),
        "name_or_path",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (len(ours), ours.vocab_size) == (len(theirs), theirs.vocab_size)
    assert ours.get_vocab() == theirs.get_vocab()
    for tokens in ("<|end|>", ["a", "no such token"], "no such token"):
        assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    for skip in (False, True):
        expected = theirs.convert_ids_to_tokens([0, 1, 9], skip)
        assert ours.convert_ids_to_tokens(torch.tensor([0, 1, 9]), skip) == expected
    assert ours.tokenize(TEXTS[0]) == theirs.tokenize(TEXTS[0])
    assert ours.convert_ids_to_tokens(7) == theirs.convert_ids_to_tokens(7)


def test_sizes_and_the_padding_side_of_a_sentencepiece_model_equal_transformers(tmp_path):
    model, sentencepiece, _ = random_model_folder(Random(1), tmp_path)
    byte_level = write_json_tokenizer(tmp_path / "bytes", **FAST)
    theirs = transformers.AutoTokenizer.from_pretrained(sentencepiece)
    ours = Tokenizer.from_folder(model)
    assert (len(ours), ours.vocab_size) == (len(theirs), theirs.vocab_size)
    for folder, side in ((sentencepiece, "left"), (byte_level, "right")):
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["tokenizer_class"] = "LlamaTokenizerFast"
        write_json(folder / "tokenizer_config.json", config)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert Tokenizer.from_folder(folder).padding_side == theirs.padding_side == side


def test_an_encoding_is_a_mapping_with_attributes_and_stands_for_its_ids(tmp_path):
    tokenizer = Tokenizer.from_folder(make_tiny_model(tmp_path))
    encoding = tokenizer(TEXTS, **TENSORS)
    assert encoding.to("cpu") is encoding
    assert [*encoding] == [*encoding.keys()] == ["input_ids", "attention_mask"]
    assert encoding.input_ids is encoding["input_ids"] is {**encoding}["input_ids"]
    assert encoding.shape == encoding.input_ids.shape
    assert torch.equal(encoding[0], encoding.input_ids[0])
    for copied in (copy.copy(encoding), copy.deepcopy(encoding)):
        assert torch.equal(copied.input_ids, encoding.input_ids)
    with pytest.raises(AttributeError, match="no 'labels'; it holds input_ids, attention_mask"):
        _ = encoding.labels
    assert encoding.to("meta").input_ids.device.type == "meta"


CONVERSATION = [
    {"role": "user", "content": "How many? "},
    {"role": "assistant", "content": "Four "},
]
CHAT_CALLS = [
    {},
    {"add_generation_prompt": True},
    {"tokenize": False},
    {"continue_final_message": True},
    {"tokenize": False, "continue_final_message": True},
    {"padding": "max_length", "max_length": 40},
    {"truncation": True, "max_length": 5},
]
TRIMMED = "{% for m in messages %}<|start|>{{ m.content | trim }}<|end|>\n{% endfor %}"


@pytest.mark.parametrize("template", [None, TRIMMED])
def test_chat_calls_equal_those_of_transformers(tmp_path, template):
    folder = write_chat_tokenizer(tmp_path, *([template] if template else []))
    ours = Tokenizer.from_folder(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for call in CHAT_CALLS:
        for conversation in (CONVERSATION, [CONVERSATION, CONVERSATION[1:]]):
            expected = theirs.apply_chat_template(conversation, **call, return_dict=False)
            assert ours.apply_chat_template(conversation, **call) == expected, call
    batch = [CONVERSATION, CONVERSATION[1:]]
    for call in ({"return_dict": True, "padding": True}, TENSORS):
        encoding = ours.apply_chat_template(batch, **call)
        expected = theirs.apply_chat_template(batch, **call)
        for key in ("input_ids", "attention_mask"):
            assert torch.equal(torch.as_tensor(encoding[key]), torch.as_tensor(expected[key]))
    ids = ours.apply_chat_template(CONVERSATION, return_tensors="pt", return_dict=False)
    assert torch.equal(ids, torch.tensor([ours.apply_chat_template(CONVERSATION)]))


def test_messages_in_sharegpts_words_are_rendered_too(tmp_path):
    tokenizer = Tokenizer.from_folder(write_chat_tokenizer(tmp_path))
    told = [
        {"from": "human", "value": "How many? "},
        {"from": "gpt", "value": "Four "},
    ]
    assert tokenizer.apply_chat_template(told) == tokenizer.apply_chat_template(CONVERSATION)


def test_assigned_settings_take_effect_and_are_saved(tmp_path):
    write_json_tokenizer(tmp_path / "from", **FAST)
    write_json(tmp_path / "from" / "special_tokens_map.json", {"pad_token": "<|pad|>"})
    tokenizer = Tokenizer.from_folder(tmp_path / "from")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    assert tokenizer(["a", "a a"], padding=True).input_ids[0][0] == tokenizer.eos_token_id
    tokenizer.save_pretrained(tmp_path / "to")
    for saved in (
        Tokenizer.from_folder(tmp_path / "to"),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "to"),
    ):
        assert (saved.pad_token, saved.padding_side) == ("<|end|>", "left")
    tokenizer.pad_token_id = 0
    assert tokenizer.pad_token == "<|pad|>"
    tokenizer.eos_token = tokenizer.eos_token  # the same value changes nothing
    assert tokenizer.add_special_tokens({"pad_token": "<|start|>"}) == 0
    assert tokenizer.pad_token == "<|start|>"
    assert tokenizer.add_tokens(["<|bos|>"]) == 0


REFUSED = {
    "the texts have 1 to 2 tokens, and a tensor": lambda t: t(["a", "<|end|><|end|>"], **PT),
    "padding is 'left'; choose True": lambda t: t("a", padding="left"),
    "truncation is 'only_second'": lambda t: t("a", truncation="only_second"),
    "max_length 9 needs truncation=True": lambda t: t("a", max_length=9, padding=True),
    "padding_side is 'top'": lambda t: t("a", padding=True, padding_side="top"),
    "return_tensors is 'tf'; choose 'pt'": lambda t: t("a", return_tensors="tf"),
    "takes a text or a list of texts, not 5": lambda t: t(5),
    r"takes a text or a list of texts, not \[None\]": lambda t: t([None]),
    "__call__: text_pair='b' is not supported: pass one": lambda t: t("a", text_pair="b"),
    "stride=3 is not supported": lambda t: t("a", stride=3),
    "clean_up_tokenization_spaces=True": lambda t: t.decode([3], False, True),
    "chat_template='x' is not supported: assign": lambda t: t.apply_chat_template(
        CONVERSATION, chat_template="x"
    ),
    "keep one of them": lambda t: t.apply_chat_template(
        CONVERSATION, add_generation_prompt=True, continue_final_message=True
    ),
    "max_length is 0; expected at least 1": lambda t: t("a", truncation=True, max_length=0),
    "encode takes one text, not": lambda t: t.encode(["a"]),
    "a token id is -100, expected a number": lambda t: t.decode([3, -100]),
    "a token id is 'abc'": lambda t: t.decode("abc"),
    "a conversation is 'hi'; expected a list": lambda t: t.apply_chat_template("hi"),
    "a conversation is {'role'": lambda t: t.apply_chat_template(CONVERSATION[0]),
    "tools are functions; write each as": lambda t: t.apply_chat_template(CONVERSATION, [print]),
    "needs a last message with a text": lambda t: t.apply_chat_template(
        [], continue_final_message=True
    ),
    "the tokens <new> cannot be added": lambda t: t.add_tokens("<new>"),
    "cannot be added, because": lambda t: t.add_special_tokens({"eos_token": "<|end|>"}),
    "the vocabulary lacks the pad token '<new>'": lambda t: setattr(t, "pad_token", "<new>"),
    "the vocabulary has no id 999": lambda t: setattr(t, "pad_token_id", 999),
    "eos_token '<|end|>' is that of the model's": lambda t: setattr(t, "eos_token", "<|bos|>"),
    "add_eos_token=True is not supported: tokenizer.json": lambda t: setattr(
        t, "add_eos_token", True
    ),
    "bos_token_id 0 is that of the model's folder": lambda t: setattr(t, "bos_token_id", 1),
}
PT = {"return_tensors": "pt", "add_special_tokens": False}


@pytest.mark.parametrize("message", REFUSED)
def test_a_wrong_call_is_refused_with_the_remedy(tmp_path, message):
    tokenizer = Tokenizer.from_folder(write_chat_tokenizer(tmp_path))
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        REFUSED[message](tokenizer)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_max_length", "512"),
        ("model_max_length", -1),
        ("model_max_length", [512]),
        ("padding_side", "middle"),
        ("truncation_side", 7),
    ],
)
def test_a_wrong_setting_in_a_tokenizers_file_is_refused_by_its_key(tmp_path, key, value):
    folder = write_json_tokenizer(tmp_path, **{key: value})
    with pytest.raises(ValueError, match=rf"tokenizer_config.json: {key} is .*; expected"):
        Tokenizer.from_folder(folder)


def test_added_special_tokens_are_those_of_transformers(pair):
    ours, theirs = pair
    for name in ("bos", "eos"):
        added = getattr(theirs, f"{name}_token_id") in theirs("lamps").input_ids
        assert getattr(ours, f"add_{name}_token") is added
        setattr(ours, f"add_{name}_token", added)  # asks for nothing


def test_padding_without_a_pad_token_names_the_remedy(tmp_path):
    tokenizer = Tokenizer.from_folder(write_chat_tokenizer(tmp_path))
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="padding needs a pad token, which"):
        tokenizer("a", padding=True)
    with pytest.raises(TypeError, match="has no argument 'paddings'; did you mean padding"):
        tokenizer("a", paddings=True)
    with pytest.raises(TypeError, match="reads no variable 'enable_thinking'; leave it out"):
        tokenizer.apply_chat_template(CONVERSATION, enable_thinking=False)
