"""Chat templates render as in transformers; wrong and hostile ones are refused."""

import pytest
from tokenizer_files import CHATML, write_json_tokenizer

from minitune.data.tokenization.tokenizer import Tokenizer

CONVERSATION = [
    {"role": "system", "content": "Be brief. <b>&</b>"},
    {"role": "user", "content": "naïve café?\n\n  2 + 2"},
    {"role": "assistant", "content": "4"},
]
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
    "namespace": "{% set n = namespace(k=0) %}"
    "{% for m in messages %}{% set n.k = n.k + 1 %}{{ n.k }}{% endfor %}",
    "missing": "{{ unk_token }}|{{ pad_token }}|{{ eos_token }}|"
    "{{ documents }}|{{ tools is none }}",
    "date": "{{ strftime_now('%Y') }}",
    "generation": "{% for m in messages %}<|start|>{% if m.role == 'assistant' %}\n"
    "  {%- generation -%}\n"
    "  {% set text = m.content %}{{ text }}<|end|>\n"
    "  {%- endgeneration %}\n"
    "{% else %}{{ m.content }}{% endif %}{{ text }}{% endfor %}",
}


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_and_ids_equal_transformers(tmp_path, name, prompt):
    transformers = pytest.importorskip("transformers")
    folder = write_json_tokenizer(tmp_path, TEMPLATES[name])
    referee = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
    )
    referee.chat_template = TEMPLATES[name]
    ours = Tokenizer.from_folder(folder)
    for tools in (None, [{"name": "é<"}]):
        expected = referee.apply_chat_template(
            CONVERSATION, tools=tools, add_generation_prompt=prompt, tokenize=False
        )
        text = ours.apply_chat_template(
            CONVERSATION, tools, add_generation_prompt=prompt, tokenize=False
        )
        assert text == expected
    ids = referee.apply_chat_template(CONVERSATION, add_generation_prompt=prompt, return_dict=False)
    assert ours.apply_chat_template(CONVERSATION, add_generation_prompt=prompt) == ids


def test_a_rendered_conversation_has_exactly_one_bos(tmp_path):
    tokenizer = Tokenizer.from_folder(write_json_tokenizer(tmp_path))
    ids = tokenizer.apply_chat_template(CONVERSATION)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.encode(tokenizer.apply_chat_template(CONVERSATION, tokenize=False)) == ids


def test_the_template_file_wins_over_the_config_and_default_wins_among_named_ones(tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    folder = write_json_tokenizer(tmp_path, named)
    assert Tokenizer.from_folder(folder).chat_template["default"] == "yes"
    (folder / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert Tokenizer.from_folder(folder).chat_template == "file"


def test_a_template_that_reads_wrapped_tools_names_the_form_of_bare_ones(tmp_path):
    folder = write_json_tokenizer(tmp_path, "{% for t in tools %}{{ t.function.name }}{% endfor %}")
    tokenizer, bare = Tokenizer.from_folder(folder), {"name": "add"}
    wrapped = {"type": "function", "function": bare}
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, tools=[wrapped])
    assert text == "add"
    with pytest.raises(ValueError, match=r"no attribute 'function'; write each tool as"):
        tokenizer.apply_chat_template(CONVERSATION, tokenize=False, tools=[bare])


REFUSED = [
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
        "refuses the conversation: its macros or values are nested too deeply",
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
]


@pytest.mark.parametrize(("template", "message"), REFUSED)
def test_a_template_that_is_missing_wrong_or_hostile_is_a_value_error(tmp_path, template, message):
    tokenizer = Tokenizer.from_folder(write_json_tokenizer(tmp_path, template))
    with pytest.raises(ValueError, match=message):
        tokenizer.apply_chat_template(CONVERSATION)
