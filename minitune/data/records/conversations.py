"""Records of messages, ShareGPT turns or Alpaca columns become conversations.

messages, conversations      a list of messages (message_reader.py)
prompt, completion           two lists of messages
instruction, input, output   Alpaca: two messages, after those of history
system                       beside any of them: the system message
tools, functions             beside any of them: tool definitions, also as a JSON text
chat_template_kwargs         beside any of them: variables for the chat template
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minitune.data.records.message_reader import (
    ASSISTANT,
    SYSTEM_ROLES,
    Message,
    read_messages,
    variable_names,
)
from minitune.data.records.record_fields import Fields
from minitune.data.samples import EMPTY_ANSWER, Conversation
from minitune.data.sources.jsonl import kind_of
from minitune.data.templates.messages import drop_nulls, normal_message
from minitune.read_files import parse_json

SYSTEM_KEYS = ("system", "system_prompt")
SCHEMA_KEYS = frozenset({"name", "description", "type", "required", "$schema"})
# Variables of a template that the record's messages and the trainer decide.
RESERVED = (
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "tokenize",
)


@dataclass(frozen=True)
class ReadConversation:
    """A conversation, and the labels that the record itself chooses.

    unlabelled: for each message, True if the record excludes it from the loss.
    first_completion: index of the first message that is trained on, in prompt/completion.
    """

    conversation: Conversation
    unlabelled: tuple[bool, ...]
    first_completion: int = 0


def conversation_of_messages(record: Fields, key: str) -> ReadConversation:
    """Return the conversation in the list of messages under `key`."""
    return _conversation(record, read_messages(record.take(key), key, record))


def conversation_of_pair(record: Fields) -> ReadConversation:
    """Return the conversation of a prompt and a completion that are lists of messages.

    Raises: ValueError if the completion holds no message of the assistant.
    """
    prompt = read_messages(record.take("prompt"), "prompt", record)
    completion = read_messages(record.take("completion"), "completion", record)
    for message in prompt:
        if message.counts:
            raise ValueError(
                f"{message.place} asks for labels, but only the completion is trained on; move "
                "the message there, or write the record as messages"
            )
    if all(message.fields["role"] != ASSISTANT for message in completion):
        raise ValueError(
            '"completion" holds no message of the role "assistant", so nothing can be trained on'
        )
    return _conversation(record, [*prompt, *completion], len(completion))


def conversation_of_alpaca(record: Fields) -> ReadConversation:
    """Return the conversation of an instruction and its output, after the turns of `history`."""
    question, output = alpaca_question(record), record.required_text("output")
    turns = [*_history(record), (question, output)]
    messages = []
    for asked, answered in turns:
        messages.append(Message({"role": "user", "content": asked}))
        messages.append(Message({"role": ASSISTANT, "content": answered}))
    return _conversation(record, messages)


def conversation_of_question(record: Fields) -> ReadConversation:
    """Return the conversation of an instruction, after the turns of `history`, without answer."""
    question, messages = alpaca_question(record), []
    for asked, answered in _history(record):
        messages.append(Message({"role": "user", "content": asked}))
        messages.append(Message({"role": ASSISTANT, "content": answered}))
    return _conversation(record, [*messages, Message({"role": "user", "content": question})])


def conversation_of_text(record: Fields, key: str) -> ReadConversation:
    """Return the conversation whose only question is the text under `key`."""
    message = Message({"role": "user", "content": record.required_text(key)})
    return _conversation(record, [message])


def alpaca_question(record: Fields) -> str:
    """Return the instruction, and the input below it if there is one."""
    parts = (record.required_text("instruction"), record.text("input"))
    return "\n\n".join(part for part in parts if part)


def _history(record: Fields) -> list[tuple[str, str]]:
    """Return the earlier turns of an Alpaca record: pairs of a question and an answer."""
    history = record.json("history")
    if not isinstance(history, list | None):
        raise ValueError(f'"history" is {kind_of(history)}, expected a list of pairs')
    for i, pair in enumerate(history or []):
        if not isinstance(pair, list) or list(map(type, pair)) != [str, str]:
            raise ValueError(f'"history"[{i}] is {pair!r:.60}, expected ["question", "answer"]')
    return [(asked, answered) for asked, answered in history or []]


def _conversation(
    record: Fields, messages: list[Message], completions: int | None = None
) -> ReadConversation:
    """Return messages with the columns beside them as a conversation.

    completions: number of messages at the end that are the completion; None for all.
    """
    messages = _with_system(record, messages)
    tools = _tools(record, messages)
    template_kwargs = _template_kwargs(record)
    first = 0 if completions is None else len(messages) - completions
    normal = [normal_message(message.fields, i) for i, message in enumerate(messages, 1)]
    unlabelled = tuple(message.counts is False for message in messages)
    trained = tuple(
        i >= first and message["role"] == ASSISTANT and not unlabelled[i]
        for i, message in enumerate(normal)
    )
    _expect_names(record, normal)
    if any(map(_is_empty_answer, normal, trained)):
        record.reading.note(EMPTY_ANSWER)
    if not any(trained):
        record.reading.note("no answer to train on")
    return ReadConversation(
        Conversation(normal, tools, template_kwargs, trained), unlabelled, first
    )


def _is_empty_answer(message: dict, trained: bool) -> bool:
    """Return True if a trained message holds no text and no call."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content)
    return trained and not content.strip() and not message.get("tool_calls")


def _expect_names(record: Fields, messages: list[dict]) -> None:
    """Expect the name of each message in the rendering, unless a call holds the same name."""
    called = {
        call.get("function", call).get("name")
        for message in messages
        for call in message.get("tool_calls", [])
    }
    for i, message in enumerate(messages, 1):
        if "name" in message and message["name"] not in called:
            record.reading.expected.append((f"the name of message {i}", message["name"]))


# ---- columns beside the messages


def _with_system(record: Fields, messages: list[Message]) -> list[Message]:
    """Return messages that begin with the text of the record's system column, if it has one."""
    found = {key: text for key in SYSTEM_KEYS if (text := record.text(key))}
    if not found:
        return messages
    key, text = next(iter(found.items()))
    own = [message.fields for message in messages if message.fields["role"] in SYSTEM_ROLES]
    if any(other != text for other in found.values()) or (own and own[0].get("content") != text):
        rivals = '"system_prompt"' if len(found) == 2 else "a system message"
        raise ValueError(f'"{key}" and {rivals} hold different texts; keep one of them')
    return messages if own else [Message({"role": "system", "content": text}), *messages]


def _tools(record: Fields, messages: list[Message]) -> list | None:
    """Return the tool definitions of a record: of `tools`, `functions`, or a system message."""
    functions = record.decoded("functions")
    if isinstance(functions, list):
        functions = [{"type": "function", "function": function} for function in functions]
        if functions:
            record.reading.note("functions are rendered as tools")
    found = {"tools": record.decoded("tools"), "functions": functions}
    found |= {f"tools of {message.place}": message.tools for message in messages}
    found = {name: tools for name, tools in found.items() if tools not in (None, [])}
    if len(found) > 1:
        raise ValueError(f"tools stand under {' and '.join(found)}; keep one of them")
    if not found:
        return None
    name, tools = next(iter(found.items()))
    if not isinstance(tools, list):
        raise ValueError(f'"{name}" is {kind_of(tools)}, expected a list')
    tools = [parse_json(tool) if isinstance(tool, str) else tool for tool in tools]
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise ValueError(f'"{name}"[{i}] is {kind_of(tool)}, expected an object')
    kept = drop_nulls(tools)
    if kept != tools:
        record.reading.note("null keys of tools are left out")
    for i, tool in enumerate(kept, 1):
        record.reading.expected += _schema_texts(tool, f"of tool {i}")
    return kept


def _schema_texts(value: Any, tool: str, key: str = "") -> list[tuple[str, str]]:
    """Return (name, text) of the texts in a tool that the chat template does not account for.

    It accounts for names and descriptions. A type and the names of required parameters are known
    from the rest of the schema.
    """
    if isinstance(value, Mapping):
        items = value.items()
        return [found for name, item in items for found in _schema_texts(item, tool, name)]
    if isinstance(value, list):
        return [found for item in value for found in _schema_texts(item, tool, key)]
    is_text = isinstance(value, str) and key not in SCHEMA_KEYS
    return [(f"the {key} {tool}", value)] if is_text else []


def _template_kwargs(record: Fields) -> dict[str, Any]:
    """Return the variables that a record gives to the chat template."""
    values = record.decoded("chat_template_kwargs")
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ValueError(f'"chat_template_kwargs" is {kind_of(values)}, expected an object')
    kept = {name: value for name, value in values.items() if value is not None}
    for name in kept:
        if name in RESERVED:
            raise ValueError(f'"chat_template_kwargs" cannot set "{name}"; remove it there')
        if name not in variable_names(record.reading.template):
            record.reading.unread.append(f'"{name}" of "chat_template_kwargs"')
    return kept
