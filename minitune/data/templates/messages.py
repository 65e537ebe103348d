"""Messages in the one form that chat templates read.

- A key that is null is a key that is missing: tables and OpenAI's format write null for "nothing".
- The reasoning of a message has three names; a template finds it under each of them.
- Arguments of a call that are JSON text become an object: templates write them as JSON themselves.
- A message of calls or reasoning has the content "" if it has none: some templates need one, and
  all others render it as a missing one.
- Content in parts of text becomes one text. Parts of type "thinking" stay for a template that
  reads them; for another one they become the reasoning.
"""

from collections.abc import Mapping
from typing import Any

from minitune.read_files import parse_json

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # first the one that counts


def drop_nulls(value: Any) -> Any:
    """Return a value of JSON without the keys whose value is null, at every depth."""
    if isinstance(value, Mapping):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [drop_nulls(item) for item in value]
    return value


def normal_message(message: Mapping, number: int) -> dict:
    """Return a message in the form that chat templates read. The message itself stays as it is.

    number: the message's place in the conversation, from 1, for the error text.

    Raises: ValueError that names the message if a part, its reasoning or a call has a wrong form.
    """
    try:
        message = drop_nulls(message)
    except RecursionError:
        raise ValueError(f"message {number} is nested too deeply") from None
    if isinstance(message.get("content"), list):
        message["content"] = _content_of_parts(message["content"], number)
    found = [message[key] for key in REASONING_KEYS if key in message]
    if found:
        if any(reasoning != found[0] for reasoning in found):
            raise ValueError(
                f"message {number} holds different texts as {', '.join(REASONING_KEYS)}; "
                "these are names of one thing, so keep one of them"
            )
        message = {"thinking": found[0], **message, "reasoning_content": found[0]}
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_normal_call(call, number) for call in message["tool_calls"]]
    if "content" not in message and (found or "tool_calls" in message):
        message["content"] = ""
    return message


def _content_of_parts(parts: list, number: int) -> str | list:
    """Return the parts of a content: one text, or the parts if one of them is reasoning."""
    normal = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get(kind) if kind in ("text", "thinking") else None
        if isinstance(text, list):  # Mistral's reasoning in parts of its own
            text = _content_of_parts(text, number)
        if not isinstance(text, str):
            raise ValueError(
                f"the content of message {number} has a part {part if kind is None else kind!r:.60}"
                '; parts are {"type": "text", "text": "..."}'
            )
        normal.append({**part, kind: text})
    if any(part["type"] == "thinking" for part in normal):
        return normal
    return "".join(part["text"] for part in normal)


def with_reasoning_key(message: dict) -> dict:
    """Return a message whose parts of type "thinking" are its reasoning, and its text one text."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    reasoning = "".join(part["thinking"] for part in parts if part["type"] == "thinking")
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    return {**message, "content": text, "thinking": reasoning, "reasoning_content": reasoning}


def _normal_call(call: Any, number: int) -> Any:
    """Return a tool call whose arguments are an object."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _normal_call(call["function"], number)}
    if not isinstance(call.get("arguments"), str):
        return call
    try:
        arguments = parse_json(call["arguments"])
    except ValueError as error:
        raise ValueError(f"the arguments of a call of message {number} are {error}") from None
    return {**call, "arguments": arguments}
