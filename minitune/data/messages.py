"""Messages in the one form that chat templates read.

- A key that is null is a key that is missing: tables and OpenAI's format write null for "nothing".
- The reasoning of a message has three names; a template finds it under each of them.
- Arguments of a call that are JSON text become an object: templates write them as JSON themselves.
- Content in parts of text becomes one text. Parts of type "thinking" stay, and become the
  reasoning for a template that does not read such parts.
"""

import json
from collections.abc import Mapping
from typing import Any

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
    message = drop_nulls(message)
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
    return message


def _content_of_parts(parts: list, number: int) -> str | list:
    """Return the parts of a content: one text, or the parts if one of them is reasoning."""
    kinds = set()
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "thinking") or kind not in part:
            raise ValueError(
                f"the content of message {number} has a part {kind or part!r:.60}; "
                'parts are {"type": "text", "text": "..."}'
            )
        if kind == "text" and not isinstance(part["text"], str):
            raise ValueError(f"a part of message {number} holds no text: {part!r:.60}")
        kinds.add(kind)
    return parts if "thinking" in kinds else "".join(part["text"] for part in parts)


def _normal_call(call: Any, number: int) -> Any:
    """Return a tool call whose arguments are an object."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _normal_call(call["function"], number)}
    if not isinstance(call.get("arguments"), str):
        return call
    try:
        arguments = json.loads(call["arguments"])
    except ValueError as error:
        raise ValueError(
            f"the arguments of a call of message {number} are not JSON: {error}"
        ) from None
    return {**call, "arguments": arguments}
