"""Private marks around the texts of a conversation: they show what a chat template does with each.

A mark is an opening that occurs nowhere in the conversation, and the number of its text. The
template renders the marked conversation. The marks give the place of each text, and a text whose
marks are missing was left out.

    "  <think>\nSix sevens.\n</think>\n\nIt is 42."               a text, and its marks 1 and 2
    "  <think>\n~^~1~Six sevens.~^~1~\n</think>\n\n~^~2~It is 42.~^~2~"

A template can look only for the strings that it holds itself, such as `</think>`: its tags. Marks
stand inside white space and between tags, so the template takes the same decisions. The caller
checks this: without its marks the rendering must be the plain one. The marks are printable ASCII,
which JSON, Python's repr and changes of case leave as they are.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from minitune.data.samples import Conversation
from minitune.data.templates.messages import REASONING_KEYS

REASONING_ENDS = ("</think>", "[/THINK]", "<channel|>", "</seed:think>", "</mm:think>")
TOOLS = -1  # stands for the index of a message
SPAN_BEGIN, SPAN_END = 0, 1  # numbers of the marks of {% generation %} blocks


def reasoning_name(message: int) -> str:
    """Return the name of the reasoning of a message."""
    return f"the reasoning of message {message + 1}"


@dataclass(slots=True)
class MarkedText:
    """A text that must reach the rendering.

    name: its name for the user, such as "the content of message 2"; None if it is not judged.
    message: index of its message, or TOOLS.
    is_reasoning: True for the reasoning of a message.
    is_name: True for a name. Some templates write the name of a call before its result, too.
    marks: number of its marks in the conversation.
    searched: the text itself if it has no marks, because the template compares names.
    """

    name: str | None
    message: int
    is_reasoning: bool = False
    is_name: bool = False
    marks: int = 0
    searched: str = ""

    def is_lost(self, seen: int, rendered: str) -> bool:
        """Return True if a rendering with `seen` of the marks lacks the text, or cuts it."""
        if self.name is None:
            return False
        if self.searched:
            forms = (self.searched, json.dumps(self.searched, ensure_ascii=False)[1:-1])
            return not any(form in rendered for form in forms)
        return seen < self.marks


@dataclass(frozen=True)
class Rendering:
    """A rendered text, and its marks in order: (place in the text, number of the marked text)."""

    text: str
    marks: list[tuple[int, int]]


class MarkedConversation:
    """A conversation with marks around its texts.

    tags: the strings that the template may look for.
    beside_tags: True to mark the end of an answer that ends with a tag, too, and a text that is
        nothing but tags. Few templates take another decision then.
    only_contents: True to mark contents and reasoning, but no names, arguments and tools. A
        template that compares names refuses them with marks.
    """

    def __init__(
        self,
        conversation: Conversation,
        tags: Iterable[str],
        beside_tags: bool = True,
        only_contents: bool = False,
    ):
        everything = repr((conversation.messages, conversation.tools))
        openings = (f"~{'^' * length}~" for length in count(1))
        self._opening = next(opening for opening in openings if opening not in everything)
        self._pattern = re.compile(re.escape(self._opening) + "([0-9]+)~")
        self._tags = tuple(tags)
        self._beside_tags, self._only_contents = beside_tags, only_contents
        self.texts = [MarkedText(None, TOOLS), MarkedText(None, TOOLS)]  # SPAN_BEGIN and SPAN_END
        tools = conversation.tools
        if tools is not None:
            tools = [self._tool(tool, number) for number, tool in enumerate(tools, 1)]
        messages = [self._message(message, i) for i, message in enumerate(conversation.messages)]
        self.conversation = replace(conversation, messages=messages, tools=tools)

    def mark(self, number: int) -> str:
        """Return the mark of a text."""
        return f"{self._opening}{number}~"

    def parse(self, marked: str) -> Rendering:
        """Return a rendering of the marked conversation as its text and its marks."""
        pieces = self._pattern.split(marked)
        marks, position = [], 0
        for text, number in zip(pieces[::2], pieces[1::2], strict=False):
            position += len(text)
            marks.append((position, int(number)))
        return Rendering("".join(pieces[::2]), marks)

    def missing(self, rendering: Rendering) -> list[MarkedText]:
        """Return the texts that a rendering lacks or cuts."""
        seen = Counter(number for _, number in rendering.marks)
        return [
            text
            for number, text in enumerate(self.texts)
            if text.is_lost(seen[number], rendering.text)
        ]

    def places(self, rendering: Rendering) -> list[tuple[int, int]]:
        """Return the marks of a rendering that show the places of messages.

        A text counts where it stands first. A name counts if its message holds nothing else.
        """
        with_texts = {text.message for text in self.texts if text.marks and not text.is_name}
        seen: Counter[int] = Counter()
        found = []
        for position, number in rendering.marks:
            text = self.texts[number]
            seen[number] += 1
            if seen[number] <= text.marks and not (text.is_name and text.message in with_texts):
                found.append((position, number))
        return found

    # ---- marks of one text

    def _number(self, text: MarkedText) -> int:
        self.texts.append(text)
        return len(self.texts) - 1

    def _around(self, text: str, number: int) -> str:
        """Return a text with a mark at its first and at its last letter."""
        inner = text.strip()
        if not inner:
            return text
        begin = text.index(inner)
        mark, end = self.mark(number), begin + len(inner)
        self.texts[number].marks += 2
        return text[:begin] + mark + inner + mark + text[end:]

    def _after(self, word: str, number: int) -> str:
        """Return a word with a mark behind it: templates may sort by its beginning."""
        self.texts[number].marks += 1
        return word + self.mark(number)

    def _name(self, word: str, name: str, message: int) -> str:
        """Return a word that is a name, with a mark; as it is if only contents are marked."""
        number = self._number(MarkedText(name, message, is_name=True))
        if self._only_contents:
            self.texts[number].searched = word.strip()
            return word
        return self._after(word, number)

    def _content(self, text: str, message: int, role: str) -> str:
        """Return a content with marks around each stretch between tags.

        An answer gets a mark at its end too, which is not judged. Its stop token is searched after
        its last mark, and an answer may end with a tag.
        """
        is_answer = role == "assistant"
        reasoning_end = max(text.rfind(end) for end in REASONING_ENDS) if is_answer else -1
        name = f"the content of message {message + 1} ({role})"
        marked, position = [], 0
        for piece, is_text in self._between_tags(text):
            is_reasoning = position < reasoning_end
            position += len(piece)
            if is_text and piece.strip():
                title = reasoning_name(message) if is_reasoning else name
                piece = self._around(piece, self._number(MarkedText(title, message, is_reasoning)))
            marked.append(piece)
        whole = "".join(marked)
        if is_answer and len(marked) > 1 and self._beside_tags:
            end = len(whole.rstrip())
            return self._after(whole[:end], self._number(MarkedText(None, message))) + whole[end:]
        return whole

    def _between_tags(self, text: str) -> list[tuple[str, bool]]:
        """Return the pieces of a text, and for each False if it is one of the template's tags."""
        found = sorted((tag for tag in self._tags if tag in text), key=len, reverse=True)
        if not found:
            return [(text, True)]
        pieces = re.split(f"({'|'.join(map(re.escape, found))})", text)
        if self._beside_tags and not any(piece.strip() for piece in pieces[::2]):
            return [(text, True)]  # nothing but tags
        return [(piece, i % 2 == 0) for i, piece in enumerate(pieces) if piece]

    # ---- marks of a message and of a tool

    def _message(self, message: dict, i: int) -> dict:
        """Return message number `i` with marks."""
        marked = dict(message)
        content, role = message.get("content"), str(message.get("role"))
        if isinstance(content, str):
            marked["content"] = self._content(content, i, role)
        elif isinstance(content, list):
            marked["content"] = [self._part(part, i, role) for part in content]
        reasoning = message.get(REASONING_KEYS[0])
        if isinstance(reasoning, str):
            number = self._number(MarkedText(reasoning_name(i), i, True))
            with_marks = self._around(reasoning, number)
            marked |= {key: with_marks for key in REASONING_KEYS if key in message}
        if isinstance(message.get("tool_calls"), list):
            name = f"the tool calls of message {i + 1}"
            marked["tool_calls"] = [self._call(call, name, i) for call in message["tool_calls"]]
        return marked

    def _part(self, part: Any, i: int, role: str) -> Any:
        """Return a part of a content with marks."""
        if not isinstance(part, Mapping):
            return part
        marked = dict(part)
        if isinstance(part.get("text"), str):
            marked["text"] = self._content(part["text"], i, role)
        if isinstance(part.get("thinking"), str):
            number = self._number(MarkedText(reasoning_name(i), i, True))
            marked["thinking"] = self._around(part["thinking"], number)
        return marked

    def _call(self, call: Any, name: str, i: int) -> Any:
        """Return a tool call with marks at its name and in its arguments."""
        if not isinstance(call, Mapping):
            return call
        marked = dict(call)
        if isinstance(call.get("function"), Mapping):
            marked["function"] = self._call(call["function"], name, i)
        if isinstance(call.get("name"), str):
            marked["name"] = self._name(call["name"], name, i)
        if "arguments" in call:
            marked["arguments"] = self._value(call["arguments"], name, i)
        return marked

    def _value(self, value: Any, name: str, i: int) -> Any:
        """Return a value of JSON with a mark at each key and around each text."""
        if isinstance(value, str):
            if self._only_contents:
                return self._name(value, name, i)
            return self._around(value, self._number(MarkedText(name, i)))
        if isinstance(value, Mapping):
            items = value.items()
            return {self._name(str(key), name, i): self._value(v, name, i) for key, v in items}
        if isinstance(value, list):
            return [self._value(item, name, i) for item in value]
        return value

    def _tool(self, tool: Any, number: int) -> Any:
        """Return a tool definition with marks at its name, description and parameters."""
        if not isinstance(tool, Mapping):
            return tool
        marked = dict(tool)
        if isinstance(tool.get("function"), Mapping):
            marked["function"] = self._tool(tool["function"], number)
        for key in ("name", "description"):
            if isinstance(tool.get(key), str):
                marked[key] = self._name(tool[key], f"the {key} of tool {number}", TOOLS)
        if isinstance(tool.get("parameters"), Mapping):
            marked["parameters"] = self._schema(tool["parameters"], number)
        return marked

    def _schema(self, schema: Mapping, number: int) -> dict:
        """Return a JSON schema with marks at the names and descriptions of its properties."""
        marked = dict(schema)
        if isinstance(schema.get("description"), str):
            name = f"the descriptions of the parameters of tool {number}"
            marked["description"] = self._name(schema["description"], name, TOOLS)
        if isinstance(schema.get("properties"), Mapping):
            name = f"the parameters of tool {number}"
            renamed, properties = {}, {}
            for key, item in schema["properties"].items():
                renamed[key] = self._name(str(key), name, TOOLS)
                is_schema = isinstance(item, Mapping)
                properties[renamed[key]] = self._schema(item, number) if is_schema else item
            marked["properties"] = properties
            if isinstance(schema.get("required"), list):  # templates look for properties in it
                marked["required"] = [renamed.get(str(key), key) for key in schema["required"]]
        return marked
