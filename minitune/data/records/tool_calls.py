"""The tool calls of a message, in the forms that records have.

    "tool_calls": [{"function": {"name", "arguments"}}]   OpenAI's; also flat, also as JSON text
    "function_call": {"name", "arguments"}                OpenAI's older form
    "from": "function_call", "value": JSON text           ShareGPT's: a call or a list of calls

The arguments are an object, or its JSON text.
"""

from collections.abc import Mapping
from typing import Any

from minitune.data.records.record_fields import Fields, in_order
from minitune.data.sources.jsonl import kind_of
from minitune.read_files import parse_json

OLD_KEY = "function_call"


def read_calls(fields: Fields) -> dict:
    """Return {"tool_calls": [...]}, also from OpenAI's older function_call."""
    calls, old = fields.decoded("tool_calls"), fields.decoded(OLD_KEY)
    if old is not None:
        if calls:
            raise ValueError(f"{fields.place} holds tool_calls and function_call; keep one of them")
        fields.reading.note("function_call is rendered as tool_calls")
        calls = [{"type": "function", "function": old}]
    if not calls:
        return {}
    if not isinstance(calls, list):
        raise ValueError(f"{fields.name_of('tool_calls')} is {kind_of(calls)}, expected a list")
    return {"tool_calls": [_call(call, fields) for call in calls]}


def calls_of_text(content: Any, fields: Fields) -> list[dict]:
    """Return the calls in a text of JSON: {"name", "arguments"} or a list of them.

    Raises: ValueError if the text is not JSON, or a call has a wrong form.
    """
    calls = content
    if isinstance(content, str):
        try:
            calls = parse_json(content)
        except ValueError as error:
            raise ValueError(
                f"{fields.place} is a function_call that is {error}; expected "
                '{"name": ..., "arguments": {...}}'
            ) from None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise ValueError(f"{fields.place} is a function_call without a call")
    return [_with_function(_call(call, fields)) for call in calls]


def _with_function(call: dict) -> dict:
    """Return a flat call {"name", "arguments"} in OpenAI's form."""
    if "function" in call:
        return call
    function = {name: call.pop(name) for name in ("name", "arguments") if name in call}
    return {"type": "function", **call, "function": function}


def _call(value: Any, message: Fields) -> dict:
    """Check a tool call and return it without the keys that are ignored."""
    place = f"a tool call of {message.place}"
    if not isinstance(value, Mapping):
        raise ValueError(f'{place} is {kind_of(value)}, expected {{"name", "arguments"}}')
    call = message.inside(value, place, "tool_calls")
    found: dict[str, Any] = {name: call.json(name) for name in ("id", "type", "index")}
    function = call.json("function")
    if isinstance(function, Mapping):
        inner = call.inside(function, f"the function of {place}", "function")
        found["function"] = _function(inner)
        inner.done()
    else:
        found |= _function(call)
    call.done()
    kept = {name: item for name, item in found.items() if item is not None}
    return in_order(kept, value)


def _function(fields: Fields) -> dict:
    name, arguments = fields.text("name"), fields.json("arguments")
    if not name:
        raise ValueError(f'{fields.place} has no "name" of a function')
    if arguments is None:
        return {"name": name}
    decoded = arguments
    if isinstance(arguments, str):
        try:
            decoded = parse_json(arguments)
        except ValueError as error:
            raise ValueError(f"the arguments of {fields.place} are {error}") from None
    elif _has_null(arguments):
        fields.reading.note("null arguments of a call are left out; arguments in JSON text stay")
    if not isinstance(decoded, Mapping):
        raise ValueError(
            f"the arguments of {fields.place} are {kind_of(decoded)}, expected an object "
            'such as {"city": "Paris"}, or its JSON text'
        )
    return {"name": name, "arguments": arguments}


def _has_null(value: Any) -> bool:
    """Return True if a key at any depth is null."""
    if isinstance(value, Mapping):
        return any(item is None or _has_null(item) for item in value.values())
    return isinstance(value, list) and any(map(_has_null, value))
