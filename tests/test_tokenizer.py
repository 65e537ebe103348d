"""The tokenizer against the libraries that own the formats, and transformers as the referee for chat templates."""

import io
import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from minitune.data.tokenizer import Tokenizer, check_vocabulary

LINES = [
    "the quick brown fox jumps over the lazy dog",
    "hello world, how are you today?",
    "{'role': 'user'} what is two plus two? it is 4",
    "naïve café costs 12 euros",
] * 5
SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|start|>"]
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be brief. <b>&</b>"},
    {"role": "user", "content": "naïve café?\n\n  2 + 2"},
    {"role": "assistant", "content": "4"},
]


def build_json(folder, template=CHATML, **config):
    """A byte-level BPE tokenizer with a BOS, as Llama 3's files are put together."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    library.train_from_iterator(LINES, trainer)
    template_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 1)]
    )
    library.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), template_processor]
    )
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<|bos|>", "eos_token": {"content": "<|end|>"}, "pad_token": "<|pad|>"}
    write(folder / "tokenizer_config.json", {"chat_template": template, **named, **config})
    return folder


def write(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture(scope="session")
def json_folder(tmp_path_factory):
    return build_json(tmp_path_factory.mktemp("json"))


@pytest.fixture(scope="session")
def model_bytes():
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=file,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return file.getvalue()


@pytest.fixture
def model_folder(tmp_path, model_bytes):
    (tmp_path / "tokenizer.model").write_bytes(model_bytes)
    return tmp_path


# tokenizer.json


@settings(max_examples=50)
@given(st.text(max_size=30))
def test_ids_are_those_of_the_library_with_and_without_special_tokens(json_folder, text):
    ours, library = (
        Tokenizer.from_folder(json_folder),
        Library.from_file(str(json_folder / "tokenizer.json")),
    )
    assert ours.encode(text) == library.encode(text).ids
    assert (
        ours.encode(text, add_special_tokens=False)
        == library.encode(text, add_special_tokens=False).ids
    )
    assert ours.decode(ours.encode(text)) == text


def test_offsets_keep_the_white_space_that_the_file_would_trim(json_folder):
    text = "the  quick\n\n brown 12"
    ids, offsets = Tokenizer.from_folder(json_folder).encode_with_offsets(text)
    assert len(ids) == len(offsets)
    assert "".join(text[begin:end] for begin, end in offsets) == text


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path):
    folder = build_json(tmp_path)
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.enable_truncation(3)
    library.enable_padding(length=3)
    library.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode(LINES[0])) == LINES[0]
    assert tokenizer.encode("") == [1]


def test_a_text_that_brings_its_bos_gets_no_second_one(json_folder):
    tokenizer = Tokenizer.from_folder(json_folder)
    assert tokenizer.encode("<|bos|>hello") == tokenizer.encode("hello")
    assert tokenizer.encode("hello")[0] == tokenizer.bos_token_id


def test_special_tokens_come_from_the_tokenizer_files_then_from_config_json(tmp_path):
    folder = build_json(tmp_path)
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.unk_token_id is None
    write(folder / "tokenizer_config.json", {"pad_token": None})
    write(
        folder / "config.json",
        {"bos_token_id": 3, "eos_token_id": [2, 1], "pad_token_id": 0, "unk_token_id": -1},
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (3, 2, None)
    assert tokenizer.pad_token_id is None  # null in tokenizer_config.json says that there is none
    write(folder / "special_tokens_map.json", {"eos_token": {"content": "<|start|>"}})
    assert Tokenizer.from_folder(folder).eos_token_id == 3


def test_generation_ends_at_every_eos_of_the_configs(tmp_path):
    folder = build_json(tmp_path)
    write(folder / "generation_config.json", {"eos_token_id": [3, 2]})
    write(folder / "config.json", {"eos_token_id": 1})
    assert Tokenizer.from_folder(folder).eos_token_ids == (2, 3, 1)


def test_a_tokenizer_larger_than_the_embedding_is_refused_and_a_padded_embedding_is_not(
    json_folder,
):
    tokenizer = Tokenizer.from_folder(json_folder)
    check_vocabulary(tokenizer, tokenizer.vocab_size)
    check_vocabulary(tokenizer, 512)
    with pytest.raises(
        ValueError, match="ids up to 329, but the model's embedding has only 329 rows"
    ):
        check_vocabulary(tokenizer, 329)


# chat templates

TEMPLATES = {
    "chatml": CHATML,
    "blocks on their own lines": """
{%- for m in messages %}
    {%- if m.role == 'system' %}
        {%- continue %}
    {%- endif %}
  {% if loop.first %}first{% endif %}

  {% set text = m.content | trim %}
  {{ m.role | upper }}: {{ text }}
{% endfor %}
""",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ tools | tojson }}",
    "namespace": "{% set n = namespace(k=0) %}{% for m in messages %}{% set n.k = n.k + 1 %}{{ n.k }}{% endfor %}",
    "missing": "{{ unk_token }}|{{ pad_token }}|{{ eos_token }}|{{ documents }}|{{ tools is none }}",
    "date": "{{ strftime_now('%Y') }}",
    "generation": "{% for m in messages %}<|start|>{% if m.role == 'assistant' %}\n  {%- generation -%}\n  "
    "{% set text = m.content %}{{ text }}<|end|>\n  {%- endgeneration %}\n{% else %}{{ m.content }}{% endif %}"
    "{{ text }}{% endfor %}",
}


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_and_ids_are_those_of_transformers(tmp_path, name, prompt):
    transformers = pytest.importorskip("transformers")
    folder = build_json(tmp_path, TEMPLATES[name])
    named = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    referee = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), **named
    )
    referee.chat_template = TEMPLATES[name]
    ours = Tokenizer.from_folder(folder)
    for tools in (None, [{"name": "é<"}]):
        expected = referee.apply_chat_template(
            CONVERSATION, tools=tools, add_generation_prompt=prompt, tokenize=False
        )
        assert (
            ours.apply_chat_template(CONVERSATION, prompt, tokenize=False, tools=tools) == expected
        )
    ids = referee.apply_chat_template(CONVERSATION, add_generation_prompt=prompt, return_dict=False)
    assert ours.apply_chat_template(CONVERSATION, prompt) == ids


def test_a_rendered_conversation_has_exactly_one_bos(json_folder):
    tokenizer = Tokenizer.from_folder(json_folder)
    assert tokenizer.apply_chat_template(CONVERSATION).count(tokenizer.bos_token_id) == 1
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert tokenizer.encode(text) == tokenizer.apply_chat_template(CONVERSATION)


def test_the_template_file_comes_before_the_config_and_default_is_chosen_among_named_ones(tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    folder = build_json(tmp_path, named)
    assert Tokenizer.from_folder(folder).chat_template == "yes"
    (folder / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert Tokenizer.from_folder(folder).chat_template == "file"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "this tokenizer has no chat template"),
        ("{% if %}", "the chat template is not valid Jinja: line 1"),
        (
            "{{ raise_exception('system is not supported') }}",
            "refuses the conversation: system is not supported",
        ),
        ("{{ messages[0].content + none }}", "the chat template refuses the conversation"),
        ("{{ ''.__class__.__mro__ }}", "the chat template refuses the conversation: .*unsafe"),
        (
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
            "refuses the conversation: maximum recursion depth",
        ),
        (
            "{% for m in messages %}" * 25 + "{% endfor %}" * 25,
            "nested too deeply: too many statically nested blocks",
        ),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "nested too deeply: maximum recursion depth"),
        (
            "{{ messages.append(1) }}",
            "the chat template refuses the conversation: .*'append' of 'list' .* unsafe",
        ),
    ],
)
def test_a_template_that_is_missing_wrong_or_hostile_is_a_value_error(tmp_path, template, message):
    tokenizer = Tokenizer.from_folder(build_json(tmp_path, template))
    with pytest.raises(ValueError, match=message):
        tokenizer.apply_chat_template(CONVERSATION)


# tokenizer.model


@settings(max_examples=50)
@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30))
def test_sentencepiece_ids_are_the_library_s_and_offsets_find_every_character(
    model_bytes, tmp_path_factory, text
):
    folder = tmp_path_factory.getbasetemp() / "sentences"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model_bytes)
    ours, library = (
        Tokenizer.from_folder(folder),
        sentencepiece.SentencePieceProcessor(model_proto=model_bytes),
    )
    ids, offsets = ours.encode_with_offsets(text)
    assert ids == library.encode(text)
    assert "".join(text[begin:end] for begin, end in offsets) == text
    assert ours.encode(text) == [library.bos_id(), *ids]
    assert ours.decode(ids) == text.replace("\u2581", " ")


def test_special_tokens_in_a_text_are_cut_out_before_sentencepiece_sees_it(
    model_folder, model_bytes
):
    library = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    write(model_folder / "added_tokens.json", {"<|im_end|>": 321, "<|im|>!": 322})
    decoder = {
        "1": {"content": "<s>", "special": True},
        "320": {"content": "<|im|>", "special": True},
    }
    write(
        model_folder / "tokenizer_config.json",
        {"added_tokens_decoder": decoder, "bos_token": {"content": "<s>"}},
    )
    tokenizer = Tokenizer.from_folder(model_folder)
    text = "<s>hello</s><|im|> world<|im_end|><|im|>!"
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == [1, *library.encode("hello"), 2, 320, *library.encode(" world"), 321, 322]
    assert "".join(text[begin:end] for begin, end in offsets) == text
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == "hello  world<|im_end|><|im|>!"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.vocab_size == 323


def test_legacy_false_puts_the_dummy_space_only_at_the_beginning_of_a_text(
    model_folder, model_bytes
):
    library = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    dummy = library.piece_to_id("\u2581")
    write(model_folder / "tokenizer_config.json", {"legacy": True})
    assert Tokenizer.from_folder(model_folder).encode_with_offsets("</s>\n")[0] == [
        2,
        dummy,
        *library.encode("\n")[1:],
    ]
    write(model_folder / "tokenizer_config.json", {"legacy": False})
    assert Tokenizer.from_folder(model_folder).encode_with_offsets("</s>\n")[0] == [
        2,
        *library.encode("\n")[1:],
    ]
    assert Tokenizer.from_folder(model_folder).encode_with_offsets("\n")[0] == library.encode("\n")


def test_add_bos_and_add_eos_of_the_config_are_obeyed(model_folder):
    write(model_folder / "tokenizer_config.json", {"add_bos_token": False, "add_eos_token": True})
    tokenizer = Tokenizer.from_folder(model_folder)
    assert tokenizer.encode("hello") == [*tokenizer.encode("hello", add_special_tokens=False), 2]
    assert tokenizer.encode("hello</s>") == tokenizer.encode("hello")


# files


@pytest.mark.parametrize("kind", ["json", "model"])
def test_saving_copies_the_files_byte_for_byte(tmp_path, model_bytes, kind):
    folder = tmp_path / "from"
    build_json(folder)
    (folder / "tokenizer.model").write_bytes(model_bytes)
    (folder / "chat_template.jinja").write_text("{{ messages }}\n", encoding="utf-8")
    if kind == "model":
        (folder / "tokenizer.json").unlink()
        write(folder / "tokenizer_config.json", {})
    write(folder / "model.safetensors.index.json", {})
    Tokenizer.from_folder(folder).save_pretrained(tmp_path / "to")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "to").iterdir()}
    assert saved == {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name in saved
    }
    assert len(saved) == (4 if kind == "json" else 3)
    assert Tokenizer.from_folder(tmp_path / "to").encode("hello") == Tokenizer.from_folder(
        folder
    ).encode("hello")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer.json and no tokenizer.model"),
        ({"tokenizer.json": "{"}, "tokenizer.json: tokenizers .* cannot read it"),
        ({"tokenizer.model": "no model"}, "tokenizer.model: not a sentencepiece model"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json: not JSON"),
        ({"tokenizer_config.json": "[]"}, "tokenizer_config.json: holds a list, not an object"),
        (
            {"tokenizer_config.json": '{"eos_token": "</x>"}'},
            "eos_token is '</x>', which is not in the tokenizer's",
        ),
        (
            {"tokenizer_config.json": '{"eos_token": 5}'},
            "tokenizer_config.json: eos_token is 5, expected a token's",
        ),
        (
            {"tokenizer_config.json": '{"bos_token": ["a"]}'},
            r"tokenizer_config.json: bos_token is \['a'\], expected",
        ),
        (
            {"tokenizer_config.json": "[" * 100_000},
            "tokenizer_config.json: not JSON that can be read",
        ),
        ({"tokenizer_config.json": '{"chat_template": 3}'}, "chat_template is a int, not a text"),
        (
            {"tokenizer_config.json": '{"chat_template": [{"name": "rag"}]}'},
            r"named 'default' among \['rag'\]",
        ),
    ],
)
def test_a_missing_or_broken_file_is_named(tmp_path, json_folder, files, message):
    if "tokenizer_config.json" in files:
        (tmp_path / "tokenizer.json").write_bytes((json_folder / "tokenizer.json").read_bytes())
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "added_tokens.json",
            {"<tool>": "321"},
            "added_tokens.json: '<tool>' has the id '321', expected a number",
        ),
        (
            "added_tokens.json",
            {"<tool>": -1},
            "added_tokens.json: '<tool>' has the id -1, expected a number",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": [1]},
            r"tokenizer_config.json: added_tokens_decoder is not",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": {"content": "a"}}},
            "added_tokens_decoder .* 'x' is",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"321": "a"}},
            "added_tokens_decoder .* '321' is 'a'",
        ),
    ],
)
def test_added_tokens_of_the_wrong_form_are_named_with_their_file(
    model_folder, file, content, message
):
    write(model_folder / file, content)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_folder(model_folder)
    assert str(model_folder / file) in str(error.value)
