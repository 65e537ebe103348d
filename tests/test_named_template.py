"""A chat template is set by the names that notebooks use, and kept if the folder's is the same."""

from pathlib import Path

import pytest
from tokenizer_files import write_chat_tokenizer, write_json

from minitune import Tokenizer, get_chat_template
from minitune.data.templates.builtin_templates import ALIASES, BUILTIN_TEMPLATES

trl = pytest.importorskip("trl")
PUBLISHED = Path(trl.__file__).parent / "chat_templates"
TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>"),
)
TURNS = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Four."}]


def tokenizer_with(folder, template=None):
    """Return a tokenizer whose vocabulary holds the tokens of several families."""
    write_chat_tokenizer(folder, template)
    write_json(folder / "added_tokens.json", {token: 295 + i for i, token in enumerate(TOKENS)})
    return Tokenizer.from_folder(folder)


def published(name):
    return (PUBLISHED / f"{name}.jinja").read_text(encoding="utf-8")


def test_every_alias_names_a_template_and_sets_its_text(tmp_path):
    assert set(ALIASES.values()) <= set(BUILTIN_TEMPLATES)
    for alias in ("llama-3.2", "qwen25", "gemma-3", "llama3", "phi4"):
        tokenizer = get_chat_template(tokenizer_with(tmp_path), chat_template=alias)
        assert tokenizer.chat_template == BUILTIN_TEMPLATES[ALIASES[alias]].source


@pytest.mark.parametrize(
    ("name", "source"),
    [("llama-3.1", "llama3_1"), ("llama-3.2", "llama3_2"), ("qwen-2.5", "qwen2_5")],
)
def test_the_folders_own_template_stays_if_it_writes_the_same_text(tmp_path, name, source):
    tokenizer = tokenizer_with(tmp_path, published(source))
    get_chat_template(tokenizer, name)
    assert tokenizer.chat_template == published(source)
    assert not tokenizer.template_was_assigned
    get_chat_template(tokenizer, "chatml")
    assert tokenizer.template_was_assigned


@pytest.mark.parametrize(
    ("name", "source"),
    [("qwen3", "qwen3"), ("qwen-3", "qwen3"), ("qwen3-instruct", "qwen3_instruct_2507")],
)
def test_a_family_without_a_text_here_keeps_the_folders_own(tmp_path, name, source):
    tokenizer = get_chat_template(tokenizer_with(tmp_path, published(source)), name)
    assert tokenizer.chat_template == published(source)
    for other in (None, published("qwen2_5"), published("llama3_1")):
        with pytest.raises(ValueError, match="is that of the model's own folder"):
            get_chat_template(tokenizer_with(tmp_path, other), name)


CUSTOM = "{% for m in messages %}{{ m.content }}{{ END }}{% endfor %}"


def test_a_text_of_the_users_own_comes_with_the_token_that_ends_an_answer(tmp_path):
    tokenizer = tokenizer_with(tmp_path)
    source = CUSTOM.replace("END", "'<|eot_id|>'")
    get_chat_template(tokenizer, (source, "<|eot_id|>"))
    assert tokenizer.chat_template == source
    assert tokenizer.token_to_id("<|eot_id|>") in tokenizer.eos_token_ids
    with pytest.raises(ValueError, match=r"'<\|im_end\|>' is no token behind an answer"):
        get_chat_template(tokenizer, (CUSTOM.replace("END", "eos_token"), "<|im_end|>"))
    assert tokenizer.chat_template == source
    get_chat_template(tokenizer, (CUSTOM.replace("END", "eos_token"), "eos_token"))
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == "How many?<|end|>Four.<|end|>"


def test_the_usual_mappings_are_taken_and_others_are_refused(tmp_path):
    tokenizer = tokenizer_with(tmp_path)
    mapping = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    get_chat_template(tokenizer, "chatml", mapping=mapping, map_eos_token=True)
    told = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Four."}]
    assert tokenizer.apply_chat_template(told) == tokenizer.apply_chat_template(TURNS)
    with pytest.raises(ValueError, match="mapping 'user' -> 'Mensch' is not known"):
        get_chat_template(tokenizer, "chatml", mapping={"role": "from", "user": "Mensch"})
