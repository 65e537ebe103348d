"""Render the part of Go's text/template language that our templates for Ollama use.

    {{ range .Messages }} ... {{ end }}          {{ range $i, $_ := .Messages }} ... {{ end }}
    {{ if COMMAND }} ... {{ else if COMMAND }} ... {{ else }} ... {{ end }}
    {{ $name := COMMAND }}    {{ $name = COMMAND }}    {{ COMMAND }}

A COMMAND is an operand, or a function with its operands: and, eq, len, ne, slice. An operand is
`.Field`, `$.Field`, `$name`, a "text", a number, or a command in parentheses. `.` is the element of
the innermost range, and `$` the root. Trim markers are left out: a template without them says every
character that it writes. An export compares the rendered template with the chat template, so the
text that is checked is the text that Ollama gets.
"""

import operator
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

ACTION = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
WORD = re.compile(r'\s*("[^"\\]*"|[()]|[^\s()"]+)')
LOOP = re.compile(r"range\s+(?:(\$\w+),\s*\$_\s*:=\s*)?(.+)")
ASSIGNMENT = re.compile(r"(\$\w+)\s*:?=\s*(.+)")
FUNCTIONS = {
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "eq": operator.eq,
    "len": len,
    "ne": operator.ne,
    "slice": lambda items, first: items[first:],
}


def render_go_template(template: str, values: dict[str, Any]) -> str:
    """Return the text of a template.

    values: the fields of the root, such as {"System": "", "Messages": [{"Role": "user", ...}]}.

    Raises: ValueError if the template uses more of the language than is known here.
    """
    pieces = enumerate(ACTION.split(template))  # text, action, text, ...
    nodes, ending = _parse(pieces)
    if ending is not None:
        raise ValueError(f"the Go template has {ending!r} outside of a block")
    return "".join(_run(nodes, values, {"$": values}))


# ---- the tree


class _Loop(NamedTuple):
    """{{ range }}: index is the variable of the position, or None."""

    index: str | None
    items: list
    body: list


class _Branch(NamedTuple):
    """{{ if }} with its {{ else }}."""

    condition: list
    body: list
    otherwise: list


class _Assignment(NamedTuple):
    """{{ $name := COMMAND }}, or with =."""

    name: str
    value: list


class _Output(NamedTuple):
    """{{ COMMAND }}."""

    command: list


def _parse(pieces: Iterator[tuple[int, str]]) -> tuple[list, str | None]:
    """Return the nodes up to the end of the block, and the action that ends it.

    pieces: texts at even numbers, actions at odd ones.
    """
    nodes: list = []
    for number, piece in pieces:
        text = piece.strip()
        if number % 2 == 0:
            nodes.append(piece)
        elif text == "end" or text.startswith("else"):
            return nodes, text
        elif match := LOOP.fullmatch(text):
            body, ending = _parse(pieces)
            _check_end(ending)
            nodes.append(_Loop(match[1], _command(match[2]), body))
        elif text.startswith("if "):
            nodes.append(_branch(text[3:], pieces))
        elif match := ASSIGNMENT.fullmatch(text):
            nodes.append(_Assignment(match[1], _command(match[2])))
        else:
            nodes.append(_Output(_command(text)))
    return nodes, None


def _branch(condition: str, pieces: Iterator[tuple[int, str]]) -> _Branch:
    """Return an {{ if }} with everything up to its {{ end }}."""
    body, ending = _parse(pieces)
    otherwise: list = []
    if ending is not None and ending.startswith("else if "):
        otherwise = [_branch(ending.removeprefix("else if "), pieces)]
    elif ending == "else":
        otherwise, ending = _parse(pieces)
        _check_end(ending)
    else:
        _check_end(ending)
    return _Branch(_command(condition), body, otherwise)


def _check_end(ending: str | None) -> None:
    """Raise ValueError if a block does not end with {{ end }}."""
    if ending != "end":
        raise ValueError(f"a block of the Go template ends with {ending!r}, not with 'end'")


def _command(text: str) -> list:
    """Return a command as a list of words; a list among them is a command in parentheses."""
    stack: list[list] = [[]]
    for word in WORD.findall(text):
        if word == "(":
            stack.append([])
        elif word == ")" and len(stack) > 1:
            command = stack.pop()
            stack[-1].append(command)
        else:
            stack[-1].append(word)
    if len(stack) != 1 or not stack[0] or WORD.sub("", text).strip():
        raise ValueError(f"{text!r} of the Go template is not understood")
    return stack[0]


# ---- execution


def _run(nodes: list, dot: Any, variables: dict[str, Any]) -> Iterator[str]:
    """Yield the texts of some nodes."""
    for node in nodes:
        match node:
            case str():
                yield node
            case _Output(command):
                yield str(_value(command, dot, variables))
            case _Assignment(name, value):
                variables[name] = _value(value, dot, variables)
            case _Branch(condition, body, otherwise):
                chosen = body if _value(condition, dot, variables) else otherwise
                yield from _run(chosen, dot, variables)
            case _Loop(index, items, body):
                for i, item in enumerate(_value(items, dot, variables)):
                    if index is not None:
                        variables[index] = i
                    yield from _run(body, item, variables)


def _value(command: list | str, dot: Any, variables: dict[str, Any]) -> Any:
    """Return the value of a command or operand."""
    if isinstance(command, list):
        name, *operands = command
        if isinstance(name, str) and name in FUNCTIONS:
            return FUNCTIONS[name](*(_value(word, dot, variables) for word in operands))
        if operands:
            raise ValueError(f"the function {name!r} of the Go template is not known here")
        return _value(name, dot, variables)
    if command.startswith('"'):
        return command[1:-1]
    if command.isdigit():
        return int(command)
    root, _, field = command.partition(".")
    value = variables[root] if root else dot
    return value[field] if field else value
