"""Chat templates: the Jinja text of a model folder, and the spans that the assistant wrote.

A template is a foreign program, so it runs in Jinja's immutable sandbox. It finds the few names
that templates expect: `raise_exception`, `strftime_now`, `tojson` without HTML escaping, loop
controls, `{% generation %}` blocks.

The spans come from the structure of the conversation, in one of two ways:

- The template marks them with `{% generation %}...{% endgeneration %}`.
- Otherwise the conversation is rendered twice for each answer, up to the generation prompt and up
  to the end of the answer:

      render(messages[:i], add_generation_prompt)   "<|user|>Hi<|assistant|>"
      render(messages[:i + 1])                      "<|user|>Hi<|assistant|>Hello.<|end|>\\n"
                                                     the span:         ^^^^^^^^^^^^

  The whole rendering must begin with both; a template that rewrites earlier turns is refused.
  White space after the stop token belongs to nobody and is not trained on.
"""

import json
from dataclasses import replace
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minitune.data.messages import normal_message
from minitune.data.samples import Conversation, RenderedConversation, Span

# Unicode reserves these two noncharacters for use inside a program: no exchanged text holds them.
BEGIN, END = "\ufdd0", "\ufdd1"

# The errors of a template: its own refusals, and Python's errors if a message lacks a field.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class _Generation(Extension):
    """`{% generation %}`: renders its body, between two marks if the caller asks for them."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        """Parse a block into its body between two outputs of the marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin = nodes.Output([nodes.Name("_span_begin", "load")])
        end = nodes.Output([nodes.Name("_span_end", "load")])
        return [node.set_lineno(line) for node in (begin, nodes.Scope(body), end)]


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
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


class ChatTemplate:
    """A compiled template.

    source: the Jinja text.
    special: the variables of special tokens, such as bos_token.
    stops: the texts that end a turn.
    """

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
        except (RecursionError, SyntaxError) as error:  # from the Python that Jinja compiles
            raise ValueError(f"the chat template is nested too deeply: {error}") from None
        self._special = special
        self._stops = tuple(stop for stop in stops if stop)

    def render(
        self,
        messages: list[dict],
        add_generation_prompt: bool = False,
        tools: list | None = None,
        **template_kwargs: Any,
    ) -> str:
        """Return a conversation as one text.

        template_kwargs: further variables for the template, such as enable_thinking.

        Raises: ValueError if the template refuses the conversation.
        """
        normal = [normal_message(message, i) for i, message in enumerate(messages, 1)]
        conversation = Conversation(normal, tools, template_kwargs)
        return self._render(conversation, add_generation_prompt=add_generation_prompt)

    def _render(
        self,
        conversation: Conversation,
        length: int | None = None,
        add_generation_prompt: bool = False,
        marks: tuple[str, str] = ("", ""),
    ) -> str:
        """Return the first `length` messages as text."""
        variables = {
            **conversation.template_kwargs,
            "messages": conversation.messages[:length],
            "add_generation_prompt": add_generation_prompt,
            "tools": conversation.tools,
            "documents": None,
            "_span_begin": marks[0],
            "_span_end": marks[1],
        }
        try:
            return self._template.render(**self._special, **variables)
        except TEMPLATE_ERRORS as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from None

    def render_with_answers(self, conversation: Conversation) -> RenderedConversation:
        """Return a conversation as one text, and the spans of its trained messages.

        A span begins after the generation prompt and ends with the stop token.

        Raises: ValueError if the template refuses the conversation, or an answer is not found.
        """
        text = self._render(conversation)
        if self.marks_answers and any(conversation.trained):
            return RenderedConversation(text, self._marked_spans(text, conversation))
        answers = [i for i, trained in enumerate(conversation.trained) if trained]
        spans = [self._turn_span(text, conversation, i, i + 1) for i in answers]
        return RenderedConversation(text, spans)

    def render_with_completion(
        self, conversation: Conversation, first: int
    ) -> RenderedConversation:
        """Return a conversation as one text, and the span from message `first` to the end."""
        text = self._render(conversation)
        length = len(conversation.messages)
        return RenderedConversation(text, [self._turn_span(text, conversation, first, length)])

    def split_turns(self, conversation: Conversation) -> list[RenderedConversation]:
        """Return a text for each trained message, which ends with that message and its span."""
        return [
            self.render_with_answers(_until(conversation, i))
            for i, trained in enumerate(conversation.trained)
            if trained
        ]

    def drops_history(self, conversation: Conversation) -> bool:
        """Return True if the template leaves the reasoning of this conversation out of history."""
        return False

    def _marked_spans(self, text: str, conversation: Conversation) -> list[Span]:
        """Return the spans of `text` that `{% generation %}` blocks mark."""
        if BEGIN in text or END in text:
            raise ValueError(
                "a message holds U+FDD0 or U+FDD1, which are not characters; remove them"
            )
        marked = self._render(conversation, marks=(BEGIN, END))
        spans = []
        length = begin = 0  # without the marks
        for piece in marked.split(BEGIN):
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

    def _turn_span(self, text: str, conversation: Conversation, first: int, last: int) -> Span:
        """Return the span of messages[first:last] in `text`, after the generation prompt."""
        before = self._render(conversation, first, add_generation_prompt=True)
        whole = last == len(conversation.messages)
        after = text if whole else self._render(conversation, last)
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(
                f"the chat template renders the conversation up to message {first + 1} differently "
                "from the whole, so the answer cannot be located; put {% generation %} ... "
                "{% endgeneration %} around the assistant's text in chat_template.jinja, or train "
                "on every token with assistant_only_loss=False"
            )
        trimmed = after.rstrip()
        return len(before), len(trimmed) if trimmed.endswith(self._stops) else len(after)


def _until(conversation: Conversation, last: int) -> Conversation:
    """Return the conversation up to message `last`, which alone is trained on."""
    trained = (*(False for _ in range(last)), True)
    return replace(conversation, messages=conversation.messages[: last + 1], trained=trained)


def dropped_text_notes(dropped: tuple[str, ...], policy: str) -> tuple[str, ...]:
    """Return notes on the texts that a template leaves out.

    policy: LabelOptions.dropped_text; "error" refuses them, "warn" makes notes.

    Raises: ValueError that names the texts if the policy is "error".
    """
    if dropped and policy == "error":
        raise ValueError(
            f"the chat template leaves out {', '.join(dropped)}; use a template that writes it, "
            'remove it from the record, or train without it: dropped_text="warn"'
        )
    return tuple(f"the chat template leaves out {name}" for name in dropped)
