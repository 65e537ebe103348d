"""Chat templates: the Jinja text that a checkpoint brings, and which characters of its rendering the assistant wrote.

A template is somebody else's program, so it runs in Jinja's immutable sandbox, with the few names that templates expect
(`raise_exception`, `strftime_now`, `tojson` without HTML escaping, loop controls, `{% generation %}` blocks).

Labels come from the structure, in one of two ways:
- the template marks the assistant's text with `{% generation %}...{% endgeneration %}`: those are the spans;
- otherwise the conversation is rendered up to each answer twice, with the generation prompt in its place and with it:

      render(messages[:i], add_generation_prompt)   "<|user|>Hi<|assistant|>"
      render(messages[:i + 1])                      "<|user|>Hi<|assistant|>Hello.<|end|>\\n"
                                                     the span:         ^^^^^^^^^^^^

  Both must be beginnings of the whole rendering; a template that rewrites earlier turns later on is refused.
  The white space that a template puts behind the stop token belongs to no one and is not trained on.
"""

import json
from collections.abc import Mapping
from datetime import datetime

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

Span = tuple[int, int]  # characters [begin, end)

# Two noncharacters of Unicode, reserved for use inside a program: no text that is exchanged holds them.
BEGIN, END = "\ufdd0", "\ufdd1"

# What a template can raise: its own refusals, and Python's errors where a message lacks what the template expects.
TEMPLATE_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip


class _Generation(Extension):
    """`{% generation %}`: renders its body, between two marks when the caller asks for them."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            nodes.Output([nodes.Name(name, "load")]) for name in ("_span_begin", "_span_end")
        )
        return [node.set_lineno(line) for node in (begin, nodes.Scope(body), end)]


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


def _with_text(message: dict, number: int) -> dict:
    """The message with its content as one text, where it is a list of {"type": "text", "text": ...} parts."""
    parts = message.get("content")
    if not isinstance(parts, list | tuple):
        return message
    for part in parts:
        if not (
            isinstance(part, Mapping)
            and part.get("type") == "text"
            and isinstance(part.get("text"), str)
        ):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise ValueError(
                f'the content of message {number} has a part {kind!r:.60}; parts are {{"type": "text", "text": "..."}}'
            )
    return {**message, "content": "".join(part["text"] for part in parts)}


class ChatTemplate:
    """A compiled template. `special` are its variables (bos_token, ...), `stops` the texts that end a turn."""

    def __init__(self, source: str, special: dict[str, str], stops: tuple[str, ...] = ()):
        environment = _environment()
        try:
            names = environment.parse(source).find_all(nodes.Name)
            self.marks_answers = any(node.name == "_span_begin" for node in names)
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"the chat template is not valid Jinja: line {error.lineno}: {error.message}"
            ) from None
        except (
            RecursionError,
            SyntaxError,
        ) as error:  # Python's own, of the program that the template becomes
            raise ValueError(f"the chat template is nested too deeply: {error}") from None
        self._special, self._stops = special, tuple(stop for stop in stops if stop)

    def render(
        self, messages: list[dict], add_generation_prompt: bool = False, tools: list | None = None
    ) -> str:
        """The conversation as one text. ValueError when the template refuses it."""
        return self._render(messages, add_generation_prompt, tools, "", "")

    def _render(self, messages, add_generation_prompt, tools, begin: str, end: str) -> str:
        variables = {
            "messages": [_with_text(message, i) for i, message in enumerate(messages, 1)],
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
            "documents": None,
        }
        try:
            return self._template.render(
                **self._special, **variables, _span_begin=begin, _span_end=end
            )
        except TEMPLATE_ERRORS as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from None

    def render_with_answers(
        self, messages: list[dict], tools: list | None = None
    ) -> tuple[str, list[Span]]:
        """The whole rendering, and the spans of it that the assistant wrote, with the stop token of each."""
        text = self.render(messages, tools=tools)
        if self.marks_answers:
            return text, self._marked_spans(text, messages, tools)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return text, [self._turn_span(text, messages, i, i + 1, tools) for i in answers]

    def render_with_completion(
        self, prompt: list[dict], completion: list[dict], tools: list | None = None
    ) -> tuple[str, Span]:
        """The rendering of prompt + completion, and the span of it that follows the prompt."""
        messages = [*prompt, *completion]
        text = self.render(messages, tools=tools)
        return text, self._turn_span(text, messages, len(prompt), len(messages), tools)

    def _marked_spans(self, text: str, messages: list[dict], tools: list | None) -> list[Span]:
        if BEGIN in text or END in text:
            raise ValueError(
                "a message holds U+FDD0 or U+FDD1, which are not characters; remove them"
            )
        spans, length, begin = [], 0, 0
        for piece in self._render(messages, False, tools, BEGIN, END).split(BEGIN):
            answer, closed, rest = piece.partition(END)
            if closed:
                spans.append((begin, begin + len(answer)))
            length += len(answer) + len(rest)
            begin = length
        if length != len(text):
            raise ValueError(
                "the chat template renders differently each time, so its answers cannot be located"
            )
        return spans

    def _turn_span(
        self, text: str, messages: list[dict], first: int, last: int, tools: list | None
    ) -> Span:
        """The span of `text` that messages[first:last] take, behind the generation prompt."""
        before = self.render(messages[:first], add_generation_prompt=True, tools=tools)
        after = text if last == len(messages) else self.render(messages[:last], tools=tools)
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(
                f"the chat template renders the conversation up to message {first + 1} differently from the whole, so "
                "the answer cannot be located; put {% generation %} ... {% endgeneration %} around the assistant's "
                "text in chat_template.jinja, or train on every token with assistant_only_loss=False"
            )
        trimmed = after.rstrip()
        return len(before), len(trimmed) if trimmed.endswith(self._stops) else len(after)
