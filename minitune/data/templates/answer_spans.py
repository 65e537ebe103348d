"""The spans that the assistant wrote in a rendered conversation, and the texts that are left out.

The conversation is rendered plainly and with private marks (text_marks.py). An answer lies between
two places:

- It begins after the generation prompt. The messages before the answer are rendered with the
  generation prompt. If the whole text begins so, the answer begins there. Otherwise the template
  rewrites history or drops a part of the prompt, such as "<think>". The text after the last mark
  then shows how much of the prompt is there:

      render(messages[:i], add_generation_prompt)   "... 7?#<|end|><|assistant|><think>"
      render(messages)                              "... 7?#<|end|><|assistant|>#It is 42.#<|end|>"
                                                                                 ^ here

- It ends with its stop token: the first one after its last mark and before the next message's first
  mark, or else the first special token there. Some templates write it with the next message.

Templates that put {% generation %} blocks around answers name the spans themselves.
"""

import re
from bisect import bisect_left
from collections import Counter
from functools import cached_property
from typing import Any

from minitune.data.samples import Conversation, Span
from minitune.data.templates.jinja_template import NO_BLOCKS, JinjaTemplate
from minitune.data.templates.template_budget import ConversationRefusedError
from minitune.data.templates.text_marks import (
    SPAN_BEGIN,
    SPAN_END,
    MarkedConversation,
    MarkedText,
    Rendering,
)

# A tag that is cut: two different tags may begin with the same letters.
TAG_BEGIN = re.compile(r"[<\[]")
CUT_TAG = re.compile(r"[<\[][^<>\[\]\s]*$")

# A prompt that so many answers showed, after messages of the same kind, is not rendered again.
# Rendering the beginning of a conversation for each answer takes time in the square of its length.
ENOUGH_PROMPTS = 4


class AnswerSpans:
    """A rendered conversation, which knows the places of its answers and the texts that it lacks.

    variables: further names for the template, such as bos_token.
    stops: finds the tokens at which generation stops.
    ends: finds all special tokens that may end an answer.

    Raises: ValueError if the template refuses the conversation, or its texts cannot be marked.
    """

    def __init__(
        self,
        template: JinjaTemplate,
        conversation: Conversation,
        variables: dict[str, Any],
        stops: re.Pattern | None,
        ends: re.Pattern | None,
    ):
        self._template, self._conversation, self._variables = template, conversation, variables
        self._stops, self._ends = stops, ends
        self._length = len(conversation.messages)
        self.text = self._render(conversation, self._length)
        self._marked, self._rendering = self._mark()
        self._marks = self._marked.places(self._rendering)
        self._of_message: dict[int, list[int]] = {}  # index of a message -> indices of its marks
        self.is_interrupted = False
        self._prompts: dict[tuple, set[tuple[str, int]]] = {}  # generation prompts, begins
        self._prompt_counts: Counter[tuple] = Counter()
        for k, (_, number) in enumerate(self._marks):
            message = self._marked.texts[number].message
            self._of_message.setdefault(message, []).append(k)

    def _render(
        self,
        conversation: Conversation,
        length: int,
        add_generation_prompt: bool = False,
        blocks: tuple[str, str] = NO_BLOCKS,
    ) -> str:
        return self._template.render(
            conversation, length, add_generation_prompt, self._variables, blocks
        )

    def _mark(self) -> tuple[MarkedConversation, Rendering]:
        """Return the marked conversation and its rendering, whose text is the plain one."""
        tags = self._template.tags
        for beside_tags, only_contents in ((True, False), (False, False), (False, True)):
            marked = MarkedConversation(self._conversation, tags, beside_tags, only_contents)
            blocks = (marked.mark(SPAN_BEGIN), marked.mark(SPAN_END))
            try:
                text = self._render(marked.conversation, self._length, blocks=blocks)
            except ConversationRefusedError:  # the template compares names, or measures a text
                continue
            rendering = marked.parse(text)
            if rendering.text == self.text:
                return marked, rendering
        raise ValueError(
            "the chat template renders the conversation differently each time, or depends on the "
            "length of its texts, so the answers cannot be located; change chat_template.jinja"
        )

    # ---- lost texts

    def lost(self) -> list[MarkedText]:
        """Return the texts that the template leaves out."""
        return self._marked.missing(self._rendering)

    def lost_names(self) -> tuple[str, ...]:
        """Return a name for each lost text, and one name if all tools are lost."""
        names = tuple(dict.fromkeys(text.name for text in self.lost()))
        tools = [name for name in names if name.startswith("the name of tool ")]
        if tools and len(tools) == len(self._conversation.tools):
            names = ("the tools", *(name for name in names if " of tool " not in name))
        return names

    def has_texts(self, i: int) -> bool:
        """Return True if message `i` holds texts."""
        return any(text.message == i for text in self._marked.texts)

    def is_lost(self, i: int) -> bool:
        """Return True if message `i` holds texts and the template leaves all of them out."""
        return i not in self._of_message and self.has_texts(i)

    # ---- places of answers

    def generation_blocks(self) -> list[tuple[Span, set[int]]]:
        """Return the spans of {% generation %} blocks, and the messages whose texts are inside."""
        blocks: list[tuple[Span, set[int]]] = []
        begin, messages = 0, set()
        for position, number in self._rendering.marks:
            if number == SPAN_BEGIN:
                begin, messages = position, set()
            elif number == SPAN_END:
                blocks.append(((begin, position), messages))
                messages = set()
            else:
                messages.add(self._marked.texts[number].message)
        return blocks

    def begin(self, i: int) -> int:
        """Return the place in the text at which generation of message `i` begins.

        Raises: ValueError if the text shows no generation prompt before the message.
        """
        limit, place = self._first_mark(i), self._last_mark(i - 1)
        kind = self._kind(i - 1)
        shown = self._prompts.setdefault(kind, set())
        if place is not None and self._prompt_counts[kind] >= ENOUGH_PROMPTS and len(shown) == 1:
            prompt, length = next(iter(shown))
            if _prompt_end(prompt, self.text[place:limit]) == length:
                return place + length
        begin, prompt = self._begin_by_rendering(i, limit)
        if place is not None and prompt is not None:
            shown.add((prompt, begin - place))
            self._prompt_counts[kind] += 1
        return begin

    def _begin_by_rendering(self, i: int, limit: int) -> tuple[int, str | None]:
        """Return the begin of message `i`, and the generation prompt before it if it is known."""
        before = self._before(i)
        if before is None:
            return self._begin_without_prefix(i, limit), None
        marks = self._marked.places(before)
        last, number = marks[-1] if marks else (0, SPAN_BEGIN)
        prompt = before.text[last:]
        follows_answer = i > 0 and self._conversation.messages[i - 1]["role"] == "assistant"
        if follows_answer and not prompt.strip():  # the prompt is written between two answers only
            return self._begin_without_prefix(i, limit), None
        if self.text.startswith(before.text):
            return len(before.text), prompt
        same = [at for at, mark in self._marks if mark == number and at <= limit]
        if not same:
            return self._begin_without_prefix(i, limit), None
        return same[-1] + _prompt_end(prompt, self.text[same[-1] : limit]), prompt

    def _kind(self, i: int) -> tuple:
        """Return all that a template can tell about message `i` besides its place."""
        if i < 0:
            return ()
        message = self._conversation.messages[i]
        content = str(message.get("content"))
        tags = tuple(tag for tag in self._template.tags if tag in content)
        return (message["role"], tuple(message), tags)

    def _last_mark(self, i: int) -> int | None:
        """Return the place of the last mark of message `i`, None if it has none."""
        return self._marks[self._of_message[i][-1]][0] if i in self._of_message and i >= 0 else None

    def _before(self, i: int) -> Rendering | None:
        """Return the messages before message `i` with the generation prompt, None if refused."""
        try:
            return self._marked.parse(self._render(self._marked.conversation, i, True))
        except ConversationRefusedError:
            return None

    def _first_mark(self, i: int) -> int:
        """Return the place of the first mark of message `i`, or of a later one if it has none."""
        for message in range(i, self._length):
            if message in self._of_message:
                return self._marks[self._of_message[message][0]][0]
        return len(self.text)

    def _begin_without_prefix(self, i: int, limit: int) -> int:
        """Return the end of the generation prompt that the template writes elsewhere.

        The messages before message `i` do not show the prompt, as before the first message.
        """
        texts = self._marked.texts
        earlier = [at for at, number in self._marks if texts[number].message < i and at <= limit]
        start = max(earlier, default=0)
        prompt = self._generation_prompt
        if prompt == "":
            return limit
        length = _find_prompt(prompt or "", self.text[start:limit])
        if not length:
            raise ValueError(
                f"the chat template shows no generation prompt before message {i + 1}, so the "
                "answer cannot be located; put {% generation %} ... {% endgeneration %} around the "
                "assistant's text in chat_template.jinja"
            )
        return start + length

    @cached_property
    def _generation_prompt(self) -> str | None:
        """Return the generation prompt after a message that is not an answer, None if unknown."""
        for i, message in enumerate(self._conversation.messages, 1):
            if message["role"] != "assistant":
                with_prompt = self._before(i)
                try:
                    without = self._render(self._conversation, i)
                except ConversationRefusedError:
                    continue
                if with_prompt is not None and with_prompt.text.startswith(without):
                    return with_prompt.text[len(without) :]
        return None

    def end(self, i: int, begin: int) -> tuple[int, str]:
        """Return the end of the answer of message `i`, and its stop token or "" if it has none.

        A template may write the result of a call before the end of the message that calls. The
        answer then ends before the result, and `is_interrupted` becomes True.
        """
        own = self._of_message.get(i, [])
        run = [k for offset, k in enumerate(own) if k == own[0] + offset]
        self.is_interrupted |= len(run) < len(own)
        if run:
            start, following = max(begin, self._marks[run[-1]][0]), self._marks[run[-1] + 1 :][:1]
        else:
            start, following = begin, [mark for mark in self._marks if mark[0] > begin]
        limit = following[0][0] if following else len(self.text)
        found = self._stops and self._stops.search(self.text, start, limit)
        if not found and self._ends:
            opening = self._generation_prompt or ""
            others = self._ends.finditer(self.text, start, limit)
            found = next((other for other in others if other[0] not in opening), None)
        if found:
            return found.end(), found[0]
        return self._end_without_stop(i, start), ""

    def _end_without_stop(self, i: int, last: int) -> int:
        """Return the end of the messages up to `i` if the text begins so, else their last mark."""
        if i + 1 == self._length:
            return len(self.text)
        try:
            after = self._render(self._conversation, i + 1)
        except ConversationRefusedError:
            return last
        return max(last, len(after)) if self.text.startswith(after) else last


def any_of(tokens: tuple[str, ...]) -> re.Pattern | None:
    """Return a pattern that finds the first of some tokens, the longest of those that match."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _find_prompt(prompt: str, text: str) -> int:
    """Return the end of the longest beginning of the generation prompt in `text`, 0 if none.

    If a beginning is not there, no longer one is, so bisection finds the longest.
    """
    lengths = range(1, len(prompt) + 1)
    length = bisect_left(lengths, True, key=lambda length: prompt[:length] not in text)
    found = CUT_TAG.sub("", prompt[:length])
    return text.rfind(prompt[:length]) + len(found) if found else 0


def _prompt_end(prompt: str, text: str) -> int:
    """Return the length of the part of `text` that is the generation prompt, or a part of it.

    text: the text between the message before the answer and the answer's own text.
    """
    pairs = zip(prompt, text, strict=False)
    common = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(text)))
    if common == len(prompt):
        return common
    # The end of the prompt, after another beginning: the longest end that begins with a tag.
    tags = [tag.start() for tag in TAG_BEGIN.finditer(prompt)]
    first = bisect_left(tags, True, key=lambda start: prompt[start:] in text)
    if first < len(tags):
        return text.find(prompt[tags[first] :]) + len(prompt) - tags[first]
    return len(CUT_TAG.sub("", text[:common]))
