"""A Jinja text as the world of chat templates knows it.

A template is a foreign program, so it runs in Jinja's immutable sandbox with a budget of steps
(limited_jinja.py). It finds the few names that templates expect: `raise_exception`, `strftime_now`,
`tojson` without HTML escaping, loop controls, `{% generation %}` blocks. Each of its errors is a
ValueError.
"""

import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols

from minitune.data.samples import Conversation
from minitune.data.templates.limited_jinja import LimitedEnvironment
from minitune.data.templates.limited_tree import limited_tree
from minitune.data.templates.template_budget import (
    BUDGET,
    Budget,
    ConversationRefusedError,
    CostlyTemplateError,
    TemplateLimitError,
)

# Templates test for no other strings in a text than those of three letters with one of these.
TAG_LETTERS, TAG_LENGTH = frozenset("<>[]{}|/"), 3
NO_BLOCKS = ("", "")
MAX_SOURCE = 2**18  # characters; the longest published templates have 17,000
OTHER_TEMPLATE = 'use another chat template, such as get_chat_template(tokenizer, "chatml")'
SHOWN_ERROR = 1000  # characters of a template's own error


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


def _environment() -> LimitedEnvironment:
    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    environment.limit_filters()
    return environment


def _is_tag(text: str) -> bool:
    return len(text) >= TAG_LENGTH and not TAG_LETTERS.isdisjoint(text)


def _shown(error: BaseException) -> str:
    """Return the text of an error, or its kind if it has none."""
    return str(error)[:SHOWN_ERROR] or type(error).__name__


class JinjaTemplate:
    """One compiled Jinja text.

    tags: the strings with brackets, braces, bars or slashes that the text compares or prints.
    variables: the names that the text reads and does not set.
    marks_answers: True if it has {% generation %} blocks.
    reads_thinking: True if it looks for parts of type "thinking" in a content.
    """

    def __init__(self, source: str):
        if len(source) > MAX_SOURCE:
            raise ValueError(
                f"the chat template has {len(source):,} characters, and {MAX_SOURCE:,} are the "
                "most that are read; use the template of the model's family"
            )
        token = BUDGET.set(Budget())  # Jinja computes constants while it compiles
        try:
            self._compile(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"the chat template is not valid Jinja: line {error.lineno}: {_shown(error)}"
            ) from None
        except (RecursionError, MemoryError, SyntaxError) as error:  # of the Python in between
            raise ValueError(f"the chat template is nested too deeply: {_shown(error)}") from None
        except Exception as error:  # such as a number of too many digits
            raise ValueError(f"the chat template is not valid Jinja: {_shown(error)}") from None
        finally:
            BUDGET.reset(token)

    def _compile(self, source: str) -> None:
        """Read the facts about the text, and compile it."""
        environment = _environment()
        tree = environment.parse(source)
        self.marks_answers = any(node.name == "_span_begin" for node in tree.find_all(nodes.Name))
        self.variables = meta.find_undeclared_variables(tree)
        operands = (node.expr for node in tree.find_all(nodes.Operand))
        self.reads_thinking = any(nodes.Const("thinking") == operand for operand in operands)
        strings = (node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))
        self.tags = tuple(dict.fromkeys(filter(_is_tag, map(str.strip, strings))))
        self._template = environment.from_string(limited_tree(tree, environment))
        # Jinja copies the globals for each rendering; its ChainMap takes a fifth of the time.
        self._template.globals = dict(self._template.globals)

    def render(
        self,
        conversation: Conversation,
        length: int,
        add_generation_prompt: bool,
        variables: dict[str, Any],
        blocks: tuple[str, str] = NO_BLOCKS,
    ) -> str:
        """Return the first `length` messages as text.

        variables: further names for the template, such as bos_token.
        blocks: texts to write before and after each {% generation %} block.

        Raises: CostlyTemplateError if the template asks for too much work;
            ConversationRefusedError if it refuses the messages.
        """
        own = {
            "messages": conversation.messages[:length],
            "add_generation_prompt": add_generation_prompt,
            "tools": conversation.tools,
            "_span_begin": blocks[0],
            "_span_end": blocks[1],
        }
        for name in conversation.template_kwargs:
            if name in own:
                raise ValueError(f"chat_template_kwargs cannot set {name!r}; leave it out")
        context = {"documents": None, **variables, **conversation.template_kwargs, **own}
        token = BUDGET.set(Budget(own["messages"], conversation.tools))
        try:
            return self._template.render(context)
        except TemplateLimitError as error:
            raise CostlyTemplateError(
                f"the chat template asks for too much work: {error}; {OTHER_TEMPLATE}"
            ) from None
        except RecursionError:
            raise ConversationRefusedError(
                "the chat template refuses the conversation: its macros or values are nested too "
                f"deeply; {OTHER_TEMPLATE}"
            ) from None
        except Exception as error:  # a template can raise all errors of Python
            reason = f"the chat template refuses the conversation: {_shown(error)}"
            tools = [tool for tool in conversation.tools or [] if isinstance(tool, dict)]
            is_bare = any("function" not in tool for tool in tools)
            if is_bare and "no attribute 'function'" in reason:
                reason += '; write each tool as {"type": "function", "function": {...}}'
            raise ConversationRefusedError(reason) from None
        finally:
            BUDGET.reset(token)
