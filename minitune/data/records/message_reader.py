"""One message of a record, in OpenAI's words or in ShareGPT's, becomes a message for the template.

    {"role": "user", "content": "..."}       OpenAI's words, also with tool_calls, tool_call_id,
                                             name, reasoning_content, function_call
    {"from": "human", "value": "..."}        ShareGPT's words; function_call holds a call as JSON
    "weight": 0, "train": false              beside either: the loss leaves the message out

A further key is handed on if the chat template names it, and is refused otherwise.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from minitune.data.records.record_fields import HARMLESS, Fields, in_order
from minitune.data.records.tool_calls import calls_of_text, read_calls
from minitune.data.sources.jsonl import kind_of
from minitune.data.templates.messages import REASONING_KEYS

ROLES = ("system", "user", "assistant", "tool", "developer")
SYSTEM_ROLES = ("system", "developer")
CALL, ASSISTANT = "function_call", "assistant"
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bot": ASSISTANT,
    "model": ASSISTANT,
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    CALL: CALL,
    "tool_call": CALL,
    **{role: role for role in ROLES},
}
VALUE_PARTS = ("reasoning", "text", "tool_call")  # LLaMA-Factory's parts {"type", "value"}
CORE_KEYS = frozenset({"role", "content", "from", "value", "tools"})
# 0 or false under one of them: no labels on this message
LOSS_KEYS = ("weight", "loss_weight", "train", "training", "loss")


class Message(NamedTuple):
    """A message as it stands in a record.

    fields: the message for the chat template.
    counts: True or False if the record says so, otherwise None.
    tools: the tool definitions that stand in a system message.
    place: the message's name in error texts.
    """

    fields: dict
    counts: bool | None = None
    tools: Any = None
    place: str = ""


@functools.lru_cache(maxsize=8)
def quoted_names(template: str) -> frozenset[str]:
    """Return the names that stand in quotes in a chat template, such as its roles."""
    return frozenset(re.findall(r"['\"]([A-Za-z_]\w*)['\"]", template))


@functools.lru_cache(maxsize=8)
def variable_names(template: str) -> frozenset[str]:
    """Return every name in a chat template."""
    return frozenset(re.findall(r"[A-Za-z_]\w*", template))


@functools.lru_cache(maxsize=8)
def further_names(template: str) -> frozenset[str]:
    """Return the names under which a template may find further keys of a message."""
    behind_dots = frozenset(re.findall(r"\.\s*([A-Za-z_]\w*)", template))
    return (quoted_names(template) | behind_dots) - CORE_KEYS - HARMLESS


def read_messages(value: Any, key: str, record: Fields) -> list[Message]:
    """Check and return the messages under `key` of a record.

    Raises: ValueError that names the message and the key that is wrong or unknown.
    """
    if hasattr(value, "tolist"):  # a column of a table
        value = value.tolist()
    if not isinstance(value, list | tuple) or not value:
        kind = "an empty list" if isinstance(value, list | tuple) else kind_of(value)
        raise ValueError(
            f'"{key}" is {kind}, expected a list of at least one {{"role", "content"}}'
        )
    return [_read_message(item, key, i, record) for i, item in enumerate(value)]


def _read_message(item: Any, key: str, index: int, record: Fields) -> Message:
    place = f'"{key}"[{index}]'
    if not isinstance(item, Mapping):
        raise _no_message(item, place)
    fields = record.inside(item, place, key)
    message: dict[str, Any] = {}
    speaker = fields.json("from")
    if speaker is None:
        role = fields.json("role")
        if not isinstance(role, str):
            raise _no_message(item, place)
        message["role"], content_key = _known_role(role, fields), "content"
    else:
        message["role"], content_key = _sharegpt_role(speaker, place), "value"
    content = fields.json(content_key)
    if message["role"] == CALL:
        message |= {"role": ASSISTANT, "tool_calls": calls_of_text(content, fields)}
    elif content is not None:
        message |= _content(content, fields)
    for found in (_reasoning(fields), read_calls(fields), _names(fields)):
        if twice := message.keys() & found.keys():
            raise ValueError(f"{place} holds {', '.join(twice)} twice; keep one of them")
        message |= found
    tools = fields.decoded("tools") if message["role"] in SYSTEM_ROLES else None
    counts = _counts(fields, message["role"])
    message |= _further_keys(fields)
    fields.done()
    _check_content(message, place)
    return Message(in_order(message, item), counts, tools, place)


def _no_message(item: Any, place: str) -> ValueError:
    is_object = isinstance(item, Mapping)
    found = f"an object with the keys {', '.join(map(str, item))}" if is_object else kind_of(item)
    return ValueError(
        f'{place} is not a message, but {found}; expected {{"role": "user", "content": "..."}} or '
        '{"from": "human", "value": "..."}'
    )


def _known_role(role: str, fields: Fields) -> str:
    """Return a role of OpenAI's words. A role that the chat template names is known, too."""
    if role == "function":
        fields.reading.note('messages of the role "function" are rendered as tool answers')
        return "tool"
    if role in ROLES:
        return role
    meant = SHAREGPT_ROLES.get(role.lower(), role.lower())
    if meant != ASSISTANT and role in quoted_names(fields.reading.template):
        return role
    remedy = f'; write "{meant}"' if meant in ROLES else ""
    raise ValueError(
        f"the role {role!r:.60} of {fields.place} is unknown; known are {', '.join(ROLES)}{remedy}"
    )


def _sharegpt_role(speaker: Any, place: str) -> str:
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise ValueError(f"{place} is from {speaker!r:.60}; known are {', '.join(SHAREGPT_ROLES)}")
    return SHAREGPT_ROLES[speaker]


def _check_content(message: dict, place: str) -> None:
    """Raise ValueError if a message's content is no text and no parts, or nothing is in it."""
    content = message.get("content")
    if content is None:
        if not any(name in message for name in ("tool_calls", *REASONING_KEYS)):
            raise ValueError(f"{place} has no content")
    elif not isinstance(content, str | list):
        raise ValueError(f"the content of {place} is {kind_of(content)}, expected a text")


# ---- keys of a message


def _content(content: Any, fields: Fields) -> dict:
    """Return {"content": ...}; the keys of its parts of text and reasoning are checked."""
    if not isinstance(content, list):
        return {"content": content}
    if any(isinstance(part, Mapping) and "value" in part for part in content):
        return _content_of_values(content, fields)
    parts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("text", "thinking"):
            inner = fields.inside(part, f"part {i} of {fields.place}", "content")
            found = {key: inner.json(key) for key in ("type", kind, "closed")}
            inner.done()
            part = {key: value for key, value in found.items() if value is not None}
        parts.append(part)
    return {"content": parts}


def _content_of_values(parts: list, fields: Fields) -> dict:
    """Return content, reasoning and calls of parts {"type", "value"}, which stand in this order."""
    reasoning, texts, calls, last = [], [], [], 0
    for i, part in enumerate(parts):
        place = f"part {i} of {fields.place}"
        if not isinstance(part, Mapping) or part.get("type") not in VALUE_PARTS:
            raise ValueError(
                f'{place} is {part!r:.60}, expected {{"type", "value"}} of the types '
                f"{', '.join(VALUE_PARTS)}"
            )
        inner = fields.inside(part, place, "content")
        kind = VALUE_PARTS.index(inner.take("type"))
        if kind < last:
            raise ValueError(f"{place} stands too late; the order is {', '.join(VALUE_PARTS)}")
        last = kind
        value = inner.required_text("value")
        inner.done()
        if kind == 2:
            calls += calls_of_text(value, fields)
        else:
            (reasoning, texts)[kind].append(value)
    found: dict[str, Any] = {"content": "".join(texts)} if texts or not parts else {}
    if reasoning:
        found["reasoning_content"] = "".join(reasoning)
    return found | ({"tool_calls": calls} if calls else {})


def _reasoning(fields: Fields) -> dict:
    return {name: text for name in REASONING_KEYS if (text := fields.text(name)) is not None}


def _names(fields: Fields) -> dict:
    """Return the name of a message's author and the id of the call that it answers."""
    return {name: text for name in ("name", "tool_call_id") if (text := fields.text(name))}


def _counts(fields: Fields, role: str) -> bool | None:
    """Return True or False if a key says whether the loss counts a message, otherwise None."""
    counts = None
    for key in LOSS_KEYS:
        value = fields.json(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise ValueError(
                f"{fields.name_of(key)} is {value!r:.60}; expected 0 or 1, or true or false"
            )
        if value and role != ASSISTANT:
            raise ValueError(
                f"{fields.name_of(key)} is {value!r}, but the loss counts no message of the role "
                f'"{role}"; remove the key'
            )
        if counts not in (None, bool(value)):
            raise ValueError(f"{fields.name_of(key)} contradicts another of {LOSS_KEYS}")
        counts = bool(value)
    return counts


def _further_keys(fields: Fields) -> dict:
    """Return the keys that only this chat template knows; their texts have to be rendered."""
    found = {}
    for key in fields.left():
        if key in further_names(fields.reading.template) and fields.holds(key):
            found[key] = fields.json(key)
            for text in _texts(found[key]):
                fields.reading.expected.append((fields.name_of(key), text))
    return found


def _texts(value: Any) -> list[str]:
    """Return every text inside a value of JSON."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []
