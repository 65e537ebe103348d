"""One record becomes a prompt: the part of a conversation that a model answers.

    {"prompt": "..."}                            a question of the user
    {"prompt": [{"role", "content"}, ...]}       messages
    {"messages": [...]}, {"conversations": [...]}    messages; answers at their end are left out
    {"instruction", "input", "history"}          Alpaca's columns

Beside them may stand system, tools and chat_template_kwargs, as in training. Other keys are not
read: the caller keeps them beside the answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from minitune.data.records.conversations import (
    ReadConversation,
    conversation_of_messages,
    conversation_of_question,
    conversation_of_text,
)
from minitune.data.records.message_reader import ASSISTANT, SYSTEM_ROLES
from minitune.data.records.record_fields import MEDIA, Fields, Reading
from minitune.data.records.record_formats import is_list, is_written, template_text
from minitune.data.samples import Conversation
from minitune.data.tokenization.tokenizer import Tokenizer

SHAPES = ("prompt", "messages", "conversations", "instruction")
KNOWN_PROMPTS = (
    '{"prompt": "..."}, {"prompt": [...]}, {"messages": [...]}, {"conversations": [...]} '
    'or {"instruction": ..., "input": ...}'
)
ANSWERS_LEFT_OUT = "answers at the end of a conversation are left out of its prompt"
TEXT_PAIR = (
    'a "prompt" with a "completion" is asked as a question of the user; a training on such texts '
    "takes them as they are, and so does `minitune generate --raw`"
)


class Prompt(NamedTuple):
    """A prompt as token ids, and facts that the user should know."""

    ids: list[int]
    notes: tuple[str, ...] = ()


def read_prompt(
    record: Mapping, tokenizer: Tokenizer, system: str | None = None, raw: bool = False
) -> Prompt:
    """Return the prompt of a record.

    system: the system message of a record that has none.
    raw: continue the text under "prompt" as it is, without the chat template.

    Raises: ValueError if the record has no prompt or two, or the chat template refuses it or
        leaves a text out.
    """
    reading = Reading(template=template_text(tokenizer))
    fields = Fields(record, reading)
    shape = _shape_of(fields)
    if raw:
        if shape != "prompt" or is_list(record["prompt"]):
            raise ValueError('without the chat template a prompt is a text under "prompt"')
        return Prompt(_checked(tokenizer.encode(fields.required_text("prompt"))))
    read, notes = _read(fields, record, shape), []
    messages = list(read.conversation.messages)
    while messages and messages[-1]["role"] == ASSISTANT:
        messages.pop()
        notes = [ANSWERS_LEFT_OUT]
    if not messages:
        raise ValueError("the conversation holds answers only, and no question")
    if shape == "prompt" and not is_list(record["prompt"]) and "completion" in record:
        notes.append(TEXT_PAIR)
    if system and not any(message["role"] in SYSTEM_ROLES for message in messages):
        messages.insert(0, {"role": "system", "content": system})
    _refuse_lost(reading.unread)
    text = render_prompt(replace(read.conversation, messages=messages, trained=()), tokenizer)
    _refuse_lost([name for name, expected in reading.expected if not is_written(expected, text)])
    return Prompt(_checked(tokenizer.encode(text, add_special_tokens=False)), tuple(notes))


def _refuse_lost(names: Sequence[str]) -> None:
    """Raise ValueError if the chat template leaves texts out."""
    if names:
        raise ValueError(f"the chat template leaves out {', '.join(names)}; remove it")


def render_prompt(conversation: Conversation, tokenizer: Tokenizer) -> str:
    """Return a conversation as the model sees it, with the beginning of an answer.

    Raises: ValueError if the chat template refuses the conversation, or leaves out a text of the
        system or the user.
    """
    text = tokenizer.template.render_prompt(conversation)
    for number, message in enumerate(conversation.messages, 1):
        content = message.get("content")
        is_told = message["role"] in ("user", *SYSTEM_ROLES)
        if is_told and isinstance(content, str) and content.strip() not in text:
            raise ValueError(
                f"the chat template leaves out message {number}, which is the {message['role']}'s; "
                "leave it out yourself, or set another template"
            )
    return text


def _shape_of(fields: Fields) -> str:
    """Return the key under which a record has its prompt.

    Raises: ValueError if there is none, or two, or the record holds more than text.
    """
    if media := [key for key in sorted(MEDIA) if fields.holds(key)]:
        raise ValueError(f'"{media[0]}": models of this package read text only; remove the record')
    found = [key for key in SHAPES if fields.holds(key)]
    if len(found) == 1:
        return found[0]
    if found:
        names = " and ".join(f'"{key}"' for key in found)
        raise ValueError(f"the record has {names}, each of which is a prompt; keep one of them")
    if empty := [key for key in SHAPES if key in fields.left()]:
        raise ValueError(f'"{empty[0]}" is empty, so there is no prompt')
    keys = ", ".join(map(str, fields.left())) or "(none)"
    raise ValueError(f"no prompt in the fields {keys}; known are {KNOWN_PROMPTS}")


def _read(fields: Fields, record: Mapping, shape: str) -> ReadConversation:
    """Return the conversation under the key `shape`."""
    if shape == "instruction":
        return conversation_of_question(fields)
    if shape == "prompt" and not is_list(record["prompt"]):
        return conversation_of_text(fields, "prompt")
    return conversation_of_messages(fields, shape)


def _checked(ids: list[int]) -> list[int]:
    """Return token ids.

    Raises: ValueError if there is none.
    """
    if not ids:
        raise ValueError("the prompt is empty")
    return ids
