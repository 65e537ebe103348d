"""The chat template of a tokenizer: it turns a conversation into one text with trained spans.

jinja_template.py renders, answer_spans.py locates the answers, text_marks.py finds lost texts.

The stop token behind an answer is trained with it. A text that ends without one gets the token
that the template writes before a further message, otherwise the EOS token; a note says so.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from minitune.data.samples import Conversation, RenderedConversation, Span
from minitune.data.templates.answer_spans import AnswerSpans, any_of
from minitune.data.templates.jinja_template import JinjaTemplate
from minitune.data.templates.messages import REASONING_KEYS, normal_message, with_reasoning_key
from minitune.data.templates.template_budget import ConversationRefusedError
from minitune.data.templates.text_marks import REASONING_ENDS, reasoning_name

EARLIER_REASONING = "the chat template leaves out the reasoning of earlier turns"  # a note
DEFAULT, TOOL_USE = "default", "tool_use"


class ChatTemplate:
    """The chat template of a tokenizer.

    source: the Jinja text, or named texts: "default", and "tool_use" for conversations with tools.
    special: the variables of special tokens, such as bos_token.
    stops: the tokens at which generation stops, the EOS token first.
    special_tokens: the texts of all special tokens.

    Raises: ValueError if a text is not valid Jinja, or none is named "default".
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        special: dict[str, str],
        stops: tuple[str, ...] = (),
        special_tokens: tuple[str, ...] = (),
    ):
        named = {DEFAULT: source} if isinstance(source, str) else source
        if DEFAULT not in named:
            names = ", ".join(map(repr, named)) or "none"
            raise ValueError(f"no chat template is named {DEFAULT!r}; the names are {names}")
        self._templates = {
            name: JinjaTemplate(named[name]) for name in (DEFAULT, TOOL_USE) if name in named
        }
        self._variables = special
        self._stops = tuple(dict.fromkeys(filter(None, stops)))
        bos = special.get("bos_token")
        self._ends = tuple(text for text in (*special.values(), *special_tokens) if text != bos)
        self._find_stop, self._find_end = any_of(self._stops), any_of(self._ends)

    def on(self, day: str | None) -> "ChatTemplate":
        """Return this template with a fixed day for strftime_now.

        day: an ISO date such as 2026-11-25; None is the clock's.

        Raises: ValueError if `day` is no ISO date.
        """
        if day is None:
            return self
        moment = datetime.fromisoformat(day)
        fixed = copy.copy(self)
        fixed._variables = {**self._variables, "strftime_now": moment.strftime}
        return fixed

    def _template(self, conversation: Conversation) -> JinjaTemplate:
        """Return the template for a conversation: the one for tools if there are tools."""
        name = DEFAULT if conversation.tools is None else TOOL_USE
        return self._templates.get(name, self._templates[DEFAULT])

    def render(
        self,
        messages: list[dict],
        add_generation_prompt: bool = False,
        tools: list | None = None,
        **template_kwargs: Any,
    ) -> str:
        """Return a conversation as one text.

        template_kwargs: further variables for the template, such as enable_thinking.

        Raises: ValueError if a message has a wrong form, or the template refuses the conversation;
            TypeError if the template reads no variable of that name.
        """
        normal = [normal_message(message, i) for i, message in enumerate(messages, 1)]
        conversation = self._readable(Conversation(normal, tools, template_kwargs))
        template = self._template(conversation)
        for name in template_kwargs:
            if name not in template.variables:
                raise TypeError(f"the chat template reads no variable {name!r}; leave it out")
        return template.render(conversation, len(normal), add_generation_prompt, self._variables)

    def render_prompt(self, conversation: Conversation) -> str:
        """Return the conversation of a record as one text, with the beginning of an answer.

        Its messages are in normal form already. A second time would change them: null stays in
        arguments that were JSON text.

        Raises: ValueError if the template refuses the conversation.
        """
        conversation = self._readable(conversation)
        template, length = self._template(conversation), len(conversation.messages)
        return template.render(conversation, length, True, self._variables)

    def marks_answers(self, tools: list | None = None) -> bool:
        """Return True if the template puts {% generation %} blocks around answers."""
        return self._template(Conversation([], tools)).marks_answers

    def reads_thinking(self, tools: list | None = None) -> bool:
        """Return True if the template reads parts of type "thinking" in a content."""
        return self._template(Conversation([], tools)).reads_thinking

    def _readable(self, conversation: Conversation) -> Conversation:
        """Return a conversation with its reasoning in a form that the template reads."""
        in_parts = any(isinstance(item.get("content"), list) for item in conversation.messages)
        if not in_parts or self._template(conversation).reads_thinking:
            return conversation
        messages = [with_reasoning_key(message) for message in conversation.messages]
        return replace(conversation, messages=messages)

    def _answers(self, conversation: Conversation) -> AnswerSpans:
        template = self._template(conversation)
        conversation = self._readable(conversation)
        return AnswerSpans(template, conversation, self._variables, self._find_stop, self._find_end)

    def render_with_answers(self, conversation: Conversation) -> RenderedConversation:
        """Return a conversation as one text, and the spans of its trained messages.

        A span begins after the generation prompt and ends with the stop token. The span of an
        answer that the template leaves out is empty.

        Raises: ValueError if the template refuses the conversation, or an answer is not found.
        """
        answers = self._answers(conversation)
        trained = [i for i, is_trained in enumerate(conversation.trained) if is_trained]
        if trained and self._template(conversation).marks_answers:
            spans, notes = _block_spans(answers, conversation, self._stops + self._ends)
            return RenderedConversation(answers.text, spans, answers.lost_names(), notes)
        spans, tokens = [], []
        for i in trained:
            if answers.is_lost(i):
                begin = spans[-1][1] if spans else 0
                end, token = begin, self._stops[0] if self._stops else ""
            else:
                begin = answers.begin(i)
                end, token = answers.end(i, begin)
            spans.append((begin, end))
            tokens.append(token)
        return self._stopped(answers, conversation, spans, tokens)

    def render_with_completion(
        self, conversation: Conversation, first: int
    ) -> RenderedConversation:
        """Return a conversation as one text, and the span from message `first` to the end.

        Raises: ValueError if the template refuses the conversation, or the answer is not found.
        """
        answers = self._answers(conversation)
        begin = answers.begin(first) if first else 0
        end, token = answers.end(len(conversation.messages) - 1, begin)
        if answers.text[end:].strip():  # the template writes more behind the stop token
            end = len(answers.text)
        rendered = self._stopped(answers, conversation, [(begin, end)], [token])
        return without_reasoning(rendered, before=first)

    def split_turns(self, conversation: Conversation) -> list[RenderedConversation]:
        """Return a rendering for each trained message, as inference sees it.

        Each rendering ends with a trained message, and has its span alone. The reasoning of earlier
        messages may be left out: inference does not see it either.

        Raises: ValueError if the template refuses the conversation, or an answer is not found.
        """
        rendered = []
        for i, is_trained in enumerate(conversation.trained):
            if is_trained:
                messages = conversation.messages[: i + 1]
                trained = (*(False for _ in range(i)), True)
                turn = replace(conversation, messages=messages, trained=trained)
                rendered.append(without_reasoning(self.render_with_answers(turn), before=i))
        return rendered

    def drops_history(self, conversation: Conversation) -> bool:
        """Return True if earlier turns lose their reasoning, which they show as the last turn."""
        if not any(_holds_reasoning(message) for message in conversation.messages):
            return False
        lost = [text.message for text in self._answers(conversation).lost() if text.is_reasoning]
        if not lost:
            return False
        turn = replace(conversation, messages=conversation.messages[: lost[0] + 1])
        still_lost = [text.message for text in self._answers(turn).lost() if text.is_reasoning]
        return lost[0] not in still_lost

    def _stopped(
        self,
        answers: AnswerSpans,
        conversation: Conversation,
        spans: list[Span],
        tokens: list[str],
    ) -> RenderedConversation:
        """Return a rendering whose last answer has a stop token, and notes on the stop tokens.

        tokens: for each span the stop token at its end; "" stands for a missing one.
        """
        text, notes = answers.text, []
        if tokens and not tokens[-1] and spans[-1][1] == len(text):
            stop = self._missing_stop(text, conversation)
            if stop:
                spans = [*spans[:-1], (spans[-1][0], len(text) + len(stop))]
                text += stop
                tokens = [*tokens[:-1], stop.strip()]
                notes.append(f"the chat template ends without a stop token; {tokens[-1]} is added")
        if not all(tokens):
            notes.append("the chat template writes no stop token behind an answer")
        if answers.is_interrupted:
            notes.append("the chat template writes an answer on behind a result; not trained there")
        others = set(filter(None, tokens)).difference(self._stops)
        if others and others.issuperset(filter(None, tokens)):
            notes.append(f"answers end in {others.pop()}, at which generation does not stop")
        return RenderedConversation(text, spans, answers.lost_names(), tuple(notes))

    def _missing_stop(self, text: str, conversation: Conversation) -> str:
        """Return the stop token that a text lacks: the one before a further message, or the EOS."""
        messages = [*conversation.messages, {"role": "user", "content": "?"}]
        longer = self._readable(replace(conversation, messages=messages))
        try:
            whole = self._template(longer).render(longer, len(messages), False, self._variables)
        except ConversationRefusedError:
            whole = ""
        following = whole[len(text) :] if whole.startswith(text) else ""
        for stop in self._stops:
            if following.lstrip().startswith(stop):
                return following[: following.index(stop) + len(stop)]
        return self._stops[0] if self._stops else ""


def _holds_reasoning(message: dict) -> bool:
    """Return True if a message holds reasoning in one of its forms."""
    content = message.get("content")
    if isinstance(content, str):
        return REASONING_KEYS[0] in message or any(end in content for end in REASONING_ENDS)
    return REASONING_KEYS[0] in message or isinstance(content, list)


def without_reasoning(rendered: RenderedConversation, before: int) -> RenderedConversation:
    """Return a rendering that may lack the reasoning of the messages before message `before`.

    Inference does not see the reasoning of earlier turns either, so a note is enough.
    """
    expected = {reasoning_name(i) for i in range(before)}
    dropped = tuple(name for name in rendered.dropped if name not in expected)
    if dropped == rendered.dropped:
        return rendered
    return replace(rendered, dropped=dropped, notes=(*rendered.notes, EARLIER_REASONING))


def _block_spans(
    answers: AnswerSpans, conversation: Conversation, ends: tuple[str, ...]
) -> tuple[list[Span], tuple[str, ...]]:
    """Return the {% generation %} blocks of the trained messages, and notes on them.

    ends: the tokens that may end an answer.
    """
    trained = {i for i, is_trained in enumerate(conversation.trained) if is_trained}
    roles = [message["role"] for message in conversation.messages]
    all_trained = all(i in trained for i, role in enumerate(roles) if role == "assistant")
    spans, inside_a_block = [], set()
    for span, messages in answers.generation_blocks():
        inside_a_block |= messages
        if messages & trained or (all_trained and not messages):
            spans.append(span)
    notes = []
    if any(answers.has_texts(i) for i in trained - inside_a_block):
        notes.append("the chat template writes an answer outside of {% generation %} blocks")
    if any(not answers.text[begin:end].rstrip().endswith(ends) for begin, end in spans):
        notes.append("a {% generation %} block ends before the stop token")
    return spans, tuple(notes)


def dropped_text_notes(dropped: tuple[str, ...], policy: str) -> tuple[str, ...]:
    """Return a note for each kind of text that a template leaves out.

    policy: LabelOptions.dropped_text; "error" refuses such a conversation, "warn" makes notes.

    Raises: ValueError that names the texts if the policy is "error".
    """
    if dropped and policy == "error":
        it = "it" if len(dropped) == 1 else "them"
        raise ValueError(
            f"the chat template leaves out {', '.join(dropped)}; choose a template that writes "
            f"{it}, take {it} out of the record, or train without {it}: "
            'dropped_text="warn"'
        )
    kinds = dict.fromkeys(re.sub(r" of (message|tool) \d+", "", name) for name in dropped)
    return tuple(f"the chat template leaves out {kind}" for kind in kinds)
