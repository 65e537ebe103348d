"""Modelfiles for Ollama: the text that is written, executed, and the chat templates refused."""

import re
from pathlib import Path

import pytest
from ollama_chats import BOS, CONVERSATIONS, EOS, TokenizerOfTemplate, refuses, with_default
from tiny import CHATML, make_tiny_model

from minitune import FastLanguageModel
from minitune.commands import export
from minitune.gguf.ollama.go_template import render_go_template
from minitune.gguf.ollama.modelfile import modelfile
from minitune.gguf.ollama.ollama_template import OllamaTemplate, ollama_template

TURN = "{% for m in messages %}%s{% endfor %}"
CHATML_TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CHATML_END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HEADER = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
LLAMA3_TURN = HEADER + "{{ m.content | trim }}<|eot_id|>"
LLAMA3_END = (
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SPLIT_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '%s' %}{% endif %}"
)


def turns(turn: str) -> str:
    return TURN.replace("%s", turn)


def chatml_with_default(default: str) -> str:
    block = f"<|im_start|>system\n{default}<|im_end|>\n"
    condition = "{% if messages[0].role != 'system' %}" + block + "{% endif %}"
    return condition + turns(CHATML_TURN) + CHATML_END


def llama3_with_preamble(preamble: str) -> str:
    block = "<|start_header_id|>system<|end_header_id|>\n\n" + preamble + "{{ system }}<|eot_id|>"
    split = SPLIT_SYSTEM.replace("%s", "")
    return "{{ bos_token }}" + split + block + turns(LLAMA3_TURN) + LLAMA3_END


def mistral(question: str, answer: str, split: bool = True) -> str:
    """Return a template of Mistral's form; the texts may use m, loop and system."""
    turn = f"{{% if m.role == 'user' %}}{question}{{% elif m.role == 'assistant' %}}{answer}"
    refusal = "{% else %}{{ raise_exception('no other roles') }}{% endif %}"
    system = SPLIT_SYSTEM.replace("%s", "") if split else ""
    return "{{ bos_token }}" + system + turns(turn + refusal)


ANSWER = "{{ m.content }}{{ eos_token }}"
IN_FIRST = "[INST] {% if loop.first and system %}{{ system }}\n\n{% endif %}{{ m.content }} [/INST]"
IN_LAST = "[INST]{% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
SYSTEM_BLOCK = "{% if system %}[SYSTEM_PROMPT]{{ system }}[/SYSTEM_PROMPT]{% endif %}"
# name -> (template, form, SYSTEM)
ACCEPTED = {
    "chatml": (CHATML, "ChatML", ""),
    "chatml with a default": (chatml_with_default("You are tiny."), "ChatML", "You are tiny."),
    "chatml behind a BOS": ("{{ bos_token }}" + turns(CHATML_TURN) + CHATML_END, "ChatML", ""),
    "llama 3": ("{{ bos_token }}" + turns(LLAMA3_TURN) + LLAMA3_END, "Llama 3", ""),
    "llama 3 with a preamble": (llama3_with_preamble("Cutoff: 2023\n\n"), "Llama 3", ""),
    "mistral, system in the first question": (mistral(IN_FIRST, " " + ANSWER), "Mistral", ""),
    "mistral, system in the last question": (mistral(IN_LAST, ANSWER), "Mistral", ""),
    "mistral without a system": (
        mistral("[INST] {{ m.content }}[/INST]", " " + ANSWER, split=False),
        "Mistral",
        "",
    ),
    "mistral with a system block": (
        mistral("[INST]{{ m.content }}[/INST]", ANSWER)
        .replace("{% for", SYSTEM_BLOCK + "{% for")
        .replace("system = ''", "system = 'You are a small model.'"),
        "Mistral",
        "You are a small model.",
    ),
}
every_accepted = pytest.mark.parametrize("name", ACCEPTED)


def commands(text: str) -> dict[str, list[str]]:
    """Return the values of each command of a Modelfile."""
    found = {}
    values = re.compile(r'^([A-Z]+(?: stop)?) (?:"""(.*?)"""|"(.*?)"|(.*?))$', re.DOTALL | re.M)
    for match in values.finditer(text):
        found.setdefault(match[1], []).append(next(v for v in match.groups()[1:] if v is not None))
    assert values.sub("", text).strip() == ""
    return found


@pytest.mark.parametrize("adds_bos", [False, True])
@every_accepted
def test_the_written_template_gives_the_texts_of_the_chat_template(name, adds_bos):
    source, form, system = ACCEPTED[name]
    tokenizer = TokenizerOfTemplate(source)
    found = ollama_template(tokenizer, adds_bos)
    assert (found.form, found.system) == (form, system)
    written = commands(modelfile("./tiny-Q8_0.gguf", found))
    assert written["FROM"] == ["./tiny-Q8_0.gguf"]
    assert written.get("SYSTEM", []) == ([system] if system else [])
    assert EOS in written["PARAMETER stop"]
    compared = 0
    for messages in CONVERSATIONS:
        if refuses(tokenizer, messages):
            continue
        expected = tokenizer.template.render(messages, add_generation_prompt=True)
        if adds_bos:
            expected = expected.removeprefix(BOS)
        given = with_default(messages, *written.get("SYSTEM", [""]))
        fields = [{"Role": m["role"], "Content": m["content"]} for m in given]
        texts = [m["content"] for m in given if m["role"] == "system"]
        values = {"Messages": fields, "System": "\n\n".join(texts)}
        assert render_go_template(written["TEMPLATE"][0], values) == expected
        compared += 1
    assert compared == (4 if name == "mistral without a system" else 8)


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("chatml", ["<|im_start|>", "<|im_end|>", EOS]),
        ("llama 3", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", EOS]),
        ("mistral without a system", ["[INST]", "[/INST]", EOS]),
    ],
)
def test_answers_stop_at_the_marks_of_the_form_and_at_every_end_token(name, stops):
    found = ollama_template(TokenizerOfTemplate(ACCEPTED[name][0]), adds_bos=True)
    assert commands(modelfile("./x.gguf", found))["PARAMETER stop"] == stops


@pytest.mark.parametrize(
    ("name", "adds_bos", "note"),
    [
        ("chatml", True, "Ollama puts <s> before the prompt, and the chat template does not"),
        ("mistral without a system", True, "the chat template takes no system message"),
    ],
)
def test_a_difference_that_no_template_can_mend_is_noted(name, adds_bos, note):
    found = ollama_template(TokenizerOfTemplate(ACCEPTED[name][0]), adds_bos)
    assert len(found.notes) == 1 and note in found.notes[0]


def test_a_day_in_the_template_is_noted():
    source = chatml_with_default("Today is {{ strftime_now('%d %b %Y') }}.")
    found = ollama_template(TokenizerOfTemplate(source), adds_bos=False)
    assert found.system.startswith("Today is ")
    assert found.notes == ("the chat template writes the day; the Modelfile has today's for good",)


def test_reasoning_that_the_chat_template_leaves_out_is_noted():
    turn = CHATML_TURN.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1].strip() }}")
    found = ollama_template(TokenizerOfTemplate(turns(turn) + CHATML_END), adds_bos=False)
    assert found.notes == (
        "the chat template leaves the reasoning of earlier answers out; Ollama repeats it",
    )


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ messages[0].content }}", "none of the forms ChatML, Llama 3 and Mistral"),
        (
            turns("<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n"),
            "it writes a question as '<start_of_turn>user",
        ),
        (
            turns(CHATML_TURN) + CHATML_END.replace("assistant\n", "assistant\n<think>\n"),
            r"writes '<\|im_end\|>\\n<\|im_start\|>assistant\\n<think>\\n', but the form ChatML",
        ),
        ("Hello. " + CHATML, "writes 'Hello. ' before the first message"),
        (CHATML.replace("content'] }}", "content'] | upper }}"), "none of the forms"),
        (
            CHATML.replace("message['content'] }}", "message['content'].replace('\\n', ' ') }}"),
            "in a conversation of 3 messages, but its form ChatML has",
        ),
        (
            mistral("[INST]{{ m.content }}[/INST]", "{{ m.content }}"),
            r"but the form Mistral has .*\[INST\]",
        ),
        (
            "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}"
            "<|im_start|>system\nAlways the same.<|im_end|>\n{% endif %}" + CHATML,
            "writes a system message as",
        ),
    ],
)
def test_other_templates_are_refused_with_the_reason(source, reason):
    with pytest.raises(ValueError, match=reason):
        ollama_template(TokenizerOfTemplate(source), adds_bos=True)


@pytest.mark.parametrize(
    ("system", "reason"),
    [
        ('Say """.', "SYSTEM in a Modelfile cannot hold triple quotes"),
        ("A\u00a0space", r"cannot hold the character '\\xa0' of SYSTEM"),
    ],
)
def test_a_text_that_ollama_would_read_differently_is_refused(system, reason):
    with pytest.raises(ValueError, match=reason):
        modelfile("./x.gguf", OllamaTemplate("ChatML", "{{ .System }}", system, ()))


# ---- the template language


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ .System }}", "S"),
        ("{{ range .Messages }}<{{ .Role }}:{{ $.System }}>{{ end }}", "<user:S><assistant:S>"),
        ('{{ range .Messages }}{{ if eq .Role "user" }}u{{ else }}o{{ end }}{{ end }}', "uo"),
        (
            '{{ range .Messages }}{{ if eq .Role "x" }}x{{ else if ne .Role "user" }}n{{ else }}u'
            "{{ end }}{{ end }}",
            "un",
        ),
        (
            "{{ range $i, $_ := .Messages }}{{ $i }}{{ len (slice $.Messages $i) }} {{ end }}",
            "02 11 ",
        ),
        ('{{ $x := .System }}{{ range .Messages }}{{ $x }}{{ $x = "" }}.{{ end }}', "S.."),
        ('{{ if and .System (eq (len .Messages) 2) }}yes{{ end }}{{ if "" }}no{{ end }}', "yes"),
        ("a\n {{ .System }} \n", "a\n S \n"),
    ],
)
def test_the_template_language_is_that_of_go(template, expected):
    messages = [{"Role": "user"}, {"Role": "assistant"}]
    assert render_go_template(template, {"System": "S", "Messages": messages}) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ end }}",
        "{{ if .System }}x",
        "{{ printf .System }}",
        "{{ if (eq 1 1 }}x{{ end }}",
        '{{ " }}',
    ],
)
def test_templates_beyond_the_language_are_refused(template):
    with pytest.raises(ValueError, match="Go template"):
        render_go_template(template, {"System": "S", "Messages": []})


# ---- beside GGUF files


def test_the_command_writes_a_modelfile_beside_the_file_and_prints_both(tmp_path, capsys):
    base, output = make_tiny_model(tmp_path / "base"), tmp_path / "gguf"
    arguments = ["--model", base, "--output", output, "--ollama"]
    assert export.main(list(map(str, arguments))) == 0
    paths = [output / "base-Q8_0.gguf", output / "Modelfile"]
    assert capsys.readouterr().out.split() == list(map(str, paths))
    written = commands(paths[1].read_text(encoding="utf-8"))
    assert written["FROM"] == ["./base-Q8_0.gguf"]
    assert written["PARAMETER stop"] == ["<|im_start|>", "<|im_end|>"]
    assert list(tmp_path.glob("gguf/.*")) == []


def test_several_files_have_a_modelfile_each(tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(
        make_tiny_model(tmp_path / "base"), device="cpu", load_in_4bit=False
    )
    output = tmp_path / "gguf"
    paths = model.save_pretrained_gguf(output, tokenizer, ["q8_0", "f16"], ollama=True)
    for path in map(Path, paths):
        written = commands(path.with_suffix(".Modelfile").read_text(encoding="utf-8"))
        assert written["FROM"] == [f"./{path.name}"]
    assert len(list(output.iterdir())) == 4


@pytest.mark.parametrize("reason", ["exists", "none of the forms"])
def test_nothing_is_written_if_a_modelfile_cannot_be(tmp_path, reason):
    model, tokenizer = FastLanguageModel.from_pretrained(
        make_tiny_model(tmp_path / "base"), device="cpu", load_in_4bit=False
    )
    if reason == "exists":
        (tmp_path / "Modelfile").touch()
    else:
        tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match=reason):
        model.save_pretrained_gguf(tmp_path, tokenizer, ollama=True)
    assert not list(tmp_path.glob("*.gguf"))
