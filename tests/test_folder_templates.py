"""Named chat templates, assigned ones, and the token in which answers end."""

import json
import os

import pytest
from tiny import make_tiny_model
from tokenizer_files import CHATML, write_json, write_json_tokenizer

from minitune import FastLanguageModel, SFTConfig, SFTTrainer
from minitune.data.templates.adapter_template import load_template
from minitune.data.tokenization.tokenizer import Tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
CONFIG = "tokenizer_config.json"
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
GIVEN = [{"type": "function", "function": {"name": "tide", "parameters": {}}}]
TURNS = [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "At four."}]


def write_named(folder, place):
    """Write two named templates into the config or as files."""
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": TOOLS}]
    write_json_tokenizer(folder, named if place == "config" else "old", eos_token="<|end|>")
    if place == "files":
        (folder / "chat_template.jinja").write_text(CHATML)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS)
    return folder


@pytest.mark.parametrize("place", ["config", "files"])
def test_tools_are_rendered_by_the_template_for_tools_as_in_transformers(tmp_path, place):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.from_folder(write_named(tmp_path / "a", place))
    tokenizer.save_pretrained(tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for tools in (None, GIVEN):
            expected = theirs.apply_chat_template(TURNS, tools=tools, tokenize=False)
            assert tokenizer.apply_chat_template(TURNS, tools=tools, tokenize=False) == expected
    assert ("tide" in expected) and tokenizer.chat_template == {
        "default": CHATML,
        "tool_use": TOOLS,
    }


NEW = CHATML.replace("<|end|>", "<|stop|>")


def test_an_assigned_template_takes_effect_and_is_saved(tmp_path):
    folder = write_json_tokenizer(tmp_path / "a", eos_token="<|end|>")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.template.render(TURNS).endswith("At four.<|end|>\n")
    tokenizer.chat_template = NEW
    assert tokenizer.apply_chat_template(TURNS, tokenize=False).endswith("At four.<|stop|>\n")
    tokenizer.save_pretrained(tmp_path / "b")
    assert "chat_template" not in json.loads((tmp_path / "b" / CONFIG).read_text())
    assert Tokenizer.from_folder(tmp_path / "b").chat_template == NEW
    tokenizer.chat_template = {"default": NEW, "tool_use": TOOLS}
    tokenizer.save_pretrained(tmp_path / "c")
    assert Tokenizer.from_folder(tmp_path / "c").chat_template == tokenizer.chat_template
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "d")
    assert Tokenizer.from_folder(tmp_path / "d").chat_template is None


WRONG = [
    (3, "chat_template is a int, not a text"),
    ({"rag": "x"}, r"named 'default' among \['rag'\]"),
    ({"default": 3}, "the chat template 'default' is a int, not a text"),
    ({"default": "x", "../x": "y"}, "has the name '../x'"),
    ("{% if %}", "not valid Jinja"),
]


@pytest.mark.parametrize(("value", "message"), WRONG)
def test_an_assigned_value_that_is_no_template_is_refused_and_the_old_one_stays(
    tmp_path, value, message
):
    tokenizer = Tokenizer.from_folder(write_json_tokenizer(tmp_path))
    with pytest.raises(ValueError, match=message):
        tokenizer.chat_template = value
    assert tokenizer.chat_template == CHATML


def test_generation_stops_at_the_token_in_which_the_answers_of_the_template_end(tmp_path):
    folder = write_json_tokenizer(tmp_path, eos_token="<|pad|>")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_token_ids == (0, 2)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|start|>{% endfor %}"
    assert tokenizer.eos_token_ids == (0, 3)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} . {% endfor %}"
    assert tokenizer.eos_token_ids == (0,)
    write_json(folder / "generation_config.json", {"eos_token_id": 3})
    assert Tokenizer.from_folder(folder).eos_token_ids == (0, 3, 2)


def test_training_on_an_assigned_template_labels_and_stops_at_its_end_and_prints_notes(
    tmp_path, capsys
):
    folder = make_tiny_model(tmp_path / "base", layers=1)
    config = json.loads((folder / CONFIG).read_text())
    write_json(folder / CONFIG, config | {"extra_special_tokens": ["<|stop|>"]})
    model, tokenizer = FastLanguageModel.from_pretrained(folder, device="cpu")
    model = FastLanguageModel.get_peft_model(model, r=2)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|stop|>{% endfor %}"
    args = SFTConfig(output_dir=str(tmp_path / "run"), max_steps=1)
    trainer = SFTTrainer(model, args, [{"messages": TURNS}], processing_class=tokenizer)
    stop = tokenizer.encode("<|stop|>", add_special_tokens=False)
    assert trainer.data.train.samples[0].labels[-1:] == stop == [model.eos_token_ids[-1]]
    trainer.train()
    note = f"warning: {folder / CONFIG}: names '<|stop|>', which the vocabulary lacks"
    assert note in capsys.readouterr().err
    new = Tokenizer.from_folder(folder)
    load_template(new, tmp_path / "run" / "adapter")
    assert new.chat_template == tokenizer.chat_template
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert Tokenizer.from_folder(tmp_path / "merged").chat_template == tokenizer.chat_template
