"""Chat templates from a grammar: loops, products, recursion, filters and forbidden names."""

from random import Random

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMES = (
    "messages", "message", "tools", "bos_token", "eos_token", "add_generation_prompt", "x", "ns",
    "loop", "loop.index", "messages[0]", "messages[-1].content", "messages[0]['role']", "undefined",
    "namespace()", "cycler('a')", "joiner()", "lipsum()", "dict(a=1)", "strftime_now('%Y')",
    "raise_exception('no')", "self", "varargs", "kwargs", "caller()", "message.tool_calls",
)  # fmt: skip
CONSTANTS = (
    "0", "1", "-1", "7", "3.5", "none", "true", "'a'", "'ab\\n'", "[]", "{}", "[1, 2]", "10**9",
    "10**8", "9**9**9", "1e308", "1 << 70", "2**100000", "'%s'", "('a', 1)", "{'a': {}}",
)  # fmt: skip
FILTERS = (
    "length", "upper", "trim", "tojson", "tojson(indent=4)", "join", "join(',')", "list", "string",
    "int", "float", "abs", "first", "last", "reverse", "sort", "unique", "sum", "items",
    "default(1)", "replace('a', 'aa')", "replace('', 'aaaaaaaaaaaaaaaaaaaa')", "indent(4)",
    "indent(10**9)", "center(10**9)", "center(100)", "batch(2)", "batch(10**9, 0)",
    "slice(3)", "slice(10**8)",
    "map('upper')", "map(attribute='content')", "selectattr('role', 'equalto', 'user')",
    "wordwrap(1)",
    "truncate(3)", "format(1)", "xmlattr", "urlize", "escape", "safe", "attr('__class__')",
    "random",
    "groupby('role')", "dictsort", "filesizeformat", "pprint", "wordcount", "round(10**9)",
    "nofilter", "max", "min", "title", "striptags", "rejectattr('x')", "map('join')", "forceescape",
)  # fmt: skip
OPERATORS = ("+", "-", "*", "**", "/", "//", "%", "~", "==", "<", "in", "and", "or", "is", "not in")
BOMBS = (
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=2) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}"
    "{{ n.x }}",
    "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
    "{{ 'a' * 10**10 }}",
    "{{ [0] * 10**10 }}",
    "{{ ('a' * 10**6) | replace('a', 'b' * 10**6) }}",
    "{{ 'x' | center(10**10) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000d}'.format(1) }}",
    "{{ '%0*d' % (1000000000, 1) }}",
    "{{ 9**9**9 }}",
    "{{ (10**5000) | string }}",
    "{{ (1 << 10**10) }}",
    "{{ range(10**9) | list }}",
    "{{ range(10**9) | sum }}",
    "{{ range(10**9) | join }}",
    "{{ 'a'.zfill(10**10) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a\\t'.expandtabs(10**10) }}",
    "{{ ('a' * 10**7).split('') }}",
    "{{ messages | batch(10**10, 'x') | list }}",
    "{{ lipsum(n=10**7) }}",
    "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% for i in range(99999) %}{% for m in messages %}{{ m | tojson | tojson | tojson }}"
    "{% endfor %}{% endfor %}",
    "{% include 'x' %}", "{% extends 'x' %}", "{% import 'x' as y %}", "{{ ''.__class__.__mro__ }}",
    "{{ self.__init__.__globals__ }}", "{{ cycler.__init__.__globals__ }}", "{% raw %}", "{#", "{{",
    "{% block a %}{{ self.a() }}{% endblock %}", "{% call x() %}{% endcall %}", "{% do 1 %}",
    "{{ (('(a' * 5000)) }}", "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "{{ " + "-" * 3000 + "1 }}", "{{ " + "[" * 5000 + " }}",
    "{% if 1 %}" * 300 + "{% endif %}" * 300, "{{ 1 " + "+ 1 " * 5000 + "}}",
)  # fmt: skip


def template(rng: Random) -> str:
    """Return a template: a known bomb, a random one, or ChatML with a random part inside."""
    kind = rng.randrange(4)
    if kind == 0:
        part = rng.choice(BOMBS)
    else:
        part = "".join(_statement(rng, 0) for _ in range(rng.randint(1, 4)))
    if kind == 1:
        return part
    cuts = [place for place, sign in enumerate(CHATML) if CHATML[place:].startswith(("{%", "{{"))]
    place = rng.choice([*cuts, len(CHATML)])
    return CHATML[:place] + part + CHATML[place:]


def _statement(rng: Random, depth: int) -> str:
    kind = rng.randrange(9)
    inner = (
        "".join(_statement(rng, depth + 1) for _ in range(rng.randint(0, 2))) if depth < 4 else "x"
    )
    if kind == 0:
        return f"{{% for x in {_expression(rng)} %}}{inner}{{% endfor %}}"
    if kind == 1:
        return f"{{% if {_expression(rng)} %}}{inner}{{% else %}}b{{% endif %}}"
    if kind == 2:
        return f"{{% set x = {_expression(rng)} %}}"
    if kind == 3:
        return f"{{% macro m(x) %}}{inner}{{% endmacro %}}{{{{ m({_expression(rng)}) }}}}"
    if kind == 4:
        loops = rng.choice(
            ("range(10**5)", "range(3)", "range(10**7)", "messages", "[1, 2] * 10**6")
        )
        return f"{{% for i in {loops} %}}{inner}{{% endfor %}}"
    if kind == 5:
        return f"{{% generation %}}{inner}{{% endgeneration %}}"
    if kind == 6:
        return (
            f"{{% set ns = namespace(x={_expression(rng)}) %}}{{% set ns.x = {_expression(rng)} %}}"
        )
    return f"{{{{ {_expression(rng)} }}}}"


def _expression(rng: Random, depth: int = 0) -> str:
    kind = rng.randrange(8) if depth < 4 else rng.randrange(2)
    if kind == 0:
        return rng.choice(NAMES)
    if kind == 1:
        return rng.choice(CONSTANTS)
    left = _expression(rng, depth + 1)
    if kind < 5:
        return f"({left}) | {rng.choice(FILTERS)}"
    if kind == 5:
        return f"({left}) {rng.choice(OPERATORS)} ({_expression(rng, depth + 1)})"
    if kind == 6:
        return f"({left})[{_expression(rng, depth + 1)}]"
    methods = (
        "items()",
        "split('a')",
        "strip()",
        "format(1)",
        "append(1)",
        "__class__",
        "join('ab')",
    )
    return f"({left}).{rng.choice(methods)}"
