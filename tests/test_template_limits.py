"""Hostile chat templates: each ends soon, in one ValueError, and takes little memory."""

import json
import os
import re
import resource
import signal
from collections.abc import Callable

import pytest
from tiny import make_tiny_model

from minitune.data.samples import Conversation
from minitune.data.templates.chat_template import ChatTemplate
from minitune.data.templates.jinja_template import MAX_SOURCE, JinjaTemplate
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.data.tokenize_dataset import tokenize_dataset

MESSAGES = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
LOOP = "{% for a in range(99999) %}"
GROW = "{% set n = namespace(x='abcdefgh', y=[1]) %}{% for i in range(60) %}BODY{% endfor %}"
ENDLESS = {
    "loops": LOOP * 3 + "{% endfor %}" * 3,
    "filtered loops": "{% for a in range(99999) if false %}{% endfor %}".join(
        [LOOP, "{% endfor %}"]
    ),
    "work in a loop": LOOP + "{% set a = 1 %}" * 9999 + "{% endfor %}",
    "searches in a loop": LOOP
    + "{% set x = 'a' * 1000000 %}"
    + LOOP
    + "{{ 'b' in x }}" * 99
    + "{% endfor %}{% endfor %}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}"
    "{% endif %}{% endmacro %}{{ m(50) }}",
    "a loop that calls itself": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "a block that calls itself": "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "a lazy filter": LOOP + "{{ range(99999) | select('none') | first }}{% endfor %}",
    "a minimum": LOOP + "{{ range(99999) | select | min }}{% endfor %}",
    "wrapped words": "{{ ('a' * 900000) | wordwrap(1) }}",
}
LARGE = {
    "repeated": "{{ 'a' * 10**10 }}",
    "repeated list": "{{ ([0] * 900000000) | length }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "squares": GROW.replace(
        "BODY", "{% set n.x = (n.x | length) ** 99 %}{% set n.x = n.x * n.x %}"
    ),
    "doubled": GROW.replace("BODY", "{% set n.x = n.x + n.x %}") + "{{ n.x | length }}",
    "joined": GROW.replace("BODY", "{% set n.x = n.x ~ n.x %}"),
    "block": GROW.replace("BODY", "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"),
    "nested lists": GROW.replace("BODY", "{% set n.y = [n.y, n.y] %}") + "{{ n.y }}",
    "nested tuples": GROW.replace("BODY", "{% set n.y = (n.y, n.y) %}") + "{{ {n.y: 1} }}",
    "nested dicts": GROW.replace("BODY", "{% set n.y = dict(a=n.y, b=n.y) %}")
    + "{{ n.y | tojson }}",
    "arguments": "{% macro m() %}{% set n.y = varargs %}{% endmacro %}"
    + GROW.replace("BODY", "{{ m(n.y, n.y) }}"),
    "cyclers": GROW.replace("BODY", "{% set n.y = cycler(n.y, n.y).items %}") + "{{ n.y }}",
    "batches": GROW.replace("BODY", "{% set n.y = [n.y, n.y] | batch(2) | first %}") + "{{ n.y }}",
    "defaults": "{% macro m(x='a' * 9999) %}{% macro k(y=x * 999) %}{{ y * 999 }}{% endmacro %}"
    "{{ k() * 999 }}{% endmacro %}{{ m() }}",
    "long sum": "{% set x = 'a' * 1900000 %}{{ (" + "+".join(["x"] * 3000) + ") | length }}",
    "long ~": "{% set x = 'a' * 1900000 %}{{ (" + "~".join(["x"] * 3000) + ") | length }}",
    "width of %": "{{ '%0*d' % (9000000000, 1) }}",
    "written width": "{{ '%09000000000d' % 1 }}",
    "precision": "{{ '%.900000000f' % 1.5 }}",
    "format": "{{ '{:9000000000}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 9000000000) }}",
    "replace": "{{ ('a' * 50000).replace('a', 'b' * 200000) | length }}",
    "replace filter": "{{ ('a' * 50000) | replace('', 'b' * 200000) | length }}",
    "join": "{{ ('b' * 200000).join(range(50000) | map('string')) | length }}",
    "join filter": "{{ range(50000) | join('b' * 200000) | length }}",
    "translate": "{{ ('a' * 50000).translate({97: 'b' * 200000}) | length }}",
    "center": "{{ 'a' | center(9000000000) }}",
    "ljust": "{{ 'a'.ljust(9000000000) }}",
    "zfill": "{{ 'a'.zfill(9000000000) }}",
    "tabs": "{{ '\\t'.expandtabs(2000000000) }}",
    "indent": "{{ ('a\\n' * 9999) | indent(9999999) }}",
    "tojson": "{{ [1] | tojson(indent=9000000000) }}",
    "batch": "{{ [] | batch(9000000000, 1) | list }}",
    "slice": "{{ [] | slice(9000000000) | list }}",
    "round": "{{ 5 | round(-900000000) }}",
    "bytes": "{{ (1).to_bytes(9000000000, 'big') | length }}",
    "lipsum": "{{ lipsum(n=10000000) }}",
}
REFUSED = {
    "no items": "{{ cycler().next() }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a list in itself": "{% set n = namespace() %}{% set n.x = [n] %}{{ n.x.y.z }}",
    "autoescape": "{% autoescape true %}{{ 1 }}{% endautoescape %}",
    "import": "{% import 'os' as os %}",
    "long error": "{{ raise_exception('a' * 999999) }}",
    "long number": "{{ " + "9" * 9999 + " }}",
    "deep parentheses": "{{ " + "(" * 9999 + ")" * 9999 + " }}",
    "deep lists": "{{ " + "[" * 900 + "]" * 900 + " }}",
    "deep blocks": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "long chain": "{{ " + "+".join(["a"] * 9999) + " }}",
    "long alternatives": "{% if a %}" + "{% elif a %}" * 9999 + "{% endif %}",
    "too long": "a" * (MAX_SOURCE + 1),
}


def outcomes_in_fork(
    actions: dict[str, Callable[[], object]], seconds: int = 60, gigabytes: float = 2
) -> dict[str, str]:
    """Return name -> "value ..." or "Error ..." of actions that run in one forked process.

    An action that hangs or crashes has no outcome, nor have those behind it.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + int(gigabytes * 2**30),) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for name, action in actions.items():
            signal.alarm(seconds)
            try:
                outcome = f"value {action()}"
            except BaseException as error:
                kind = "ValueError" if isinstance(error, ValueError) else type(error).__name__
                outcome = f"{kind} {error}"
            os.write(writer, f"{json.dumps([name, outcome])}\n".encode())
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        outcomes = dict(map(json.loads, file))
    os.waitpid(pid, 0)
    return outcomes


def rendered(source: str) -> str:
    return ChatTemplate(source, {}).render(MESSAGES)[:50]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kinds", [ENDLESS, LARGE, REFUSED], ids=["endless", "large", "refused"])
def test_a_hostile_template_is_refused_in_time_and_memory(kinds):
    actions = {name: lambda source=source: rendered(source) for name, source in kinds.items()}
    outcomes = outcomes_in_fork(actions)
    wrong = {name for name in kinds if not outcomes.get(name, "hang").startswith("ValueError ")}
    assert not {name: outcomes.get(name, "hang") for name in wrong}
    assert max(map(len, outcomes.values())) < 1300


@pytest.mark.parametrize("text", ["{{ 1 }}", "{% if add_generation_prompt %}"])
def test_data_is_prepared_no_further_behind_a_template_of_too_much_work(tmp_path, text):
    tokenizer = Tokenizer.from_folder(make_tiny_model(tmp_path / "m"))
    source = "{% for m in messages %}{{ m.content }}{% endfor %}" + text
    end = "{% endif %}" if "if" in text else ""
    tokenizer.chat_template = source + ENDLESS["loops"] + end
    counted = []
    records = ({"messages": counted.append(i) or MESSAGES} for i in range(99))
    message = rf"dataset\[0\]: .*{re.escape(tokenizer.name_or_path)}.*more steps.*get_chat_template"
    with pytest.raises(ValueError, match=message):
        tokenize_dataset(records, tokenizer, 100, skip_bad=True)
    assert counted == [0]


def test_a_template_that_nests_or_ranges_too_far_names_the_remedy():
    for source, reason in (
        (REFUSED["recursion"], "nested too deeply"),
        ("{% for i in range(999999) %}{% endfor %}", "loops over more than 100,000 numbers"),
    ):
        with pytest.raises(ValueError, match=f"chat template .*{reason}.*; use another chat"):
            rendered(source)


def test_the_limits_grow_with_the_conversation():
    text = "a text of many words, " * 500_000
    loop = "{% for m in messages %}{% for k in messages %}{% if k == m %}{{ k.content | trim }}"
    template = JinjaTemplate(loop + "{% endif %}{% endfor %}{% endfor %}")
    for messages in ([{"role": "user", "content": text}], [{"role": "user", "content": "b"}] * 600):
        assert template.render(Conversation(messages), len(messages), False, {})


def test_many_tools_beside_a_long_message_are_rendered():
    work = "{% if kind.a is defined %}{{ kind.a + kind.b }}{% endif %}" * 25
    macro = "{% macro described(kind) %}" + work + "{{ kind.type }} {% endmacro %}"
    tools = (
        "{% for t in tools %}{% for k in t.values() %}{{ described(k) }}{% endfor %}{% endfor %}"
    )
    template = JinjaTemplate(macro + tools + "{{ messages[0].content }}")
    parameters = {f"p{i}": {"type": "string", "description": "a value of it"} for i in range(20)}
    messages = [{"role": "user", "content": "x" * 100_000}]
    text = template.render(Conversation(messages, [parameters] * 100), 1, False, {})
    assert text.count("string") == 2000 and text.endswith("x")


def test_keys_of_a_message_are_found_behind_its_methods():
    template = JinjaTemplate("{{ messages[0].content }}{{ messages[0].items }}{{ messages[0].x }}")
    text = template.render(Conversation([{"role": "user", "content": "Hi"}]), 1, False, {})
    assert text.startswith("Hi<built-in method items")
