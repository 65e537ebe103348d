"""One record of a dataset becomes a text with the spans that are trained on.

    {"messages": [{"role", "content"}, ...]}     a conversation: trains on the assistant's turns
    {"conversations": [{"from", "value"}, ...]}  the same in ShareGPT's words
    {"prompt", "completion"}                     two texts, or two lists of messages: trains on the
                                                 completion
    {"instruction", "input", "output"}           Alpaca: a conversation of two turns, or plain text
                                                 with headings if there is no chat template
    {"text"}                                     trains on everything
    {"input_ids", "labels"}                      tokens (token_records.py)

The reader of a shape takes the keys that it knows; any other key is harmless, ignored by the user,
or an error (record_fields.py). A text that the chat template leaves out is an error, or a note if
the user says so. Every error is a ValueError; the caller adds the file and the line number.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from minitune.data.records.conversations import (
    SYSTEM_KEYS,
    ReadConversation,
    conversation_of_alpaca,
    conversation_of_messages,
    conversation_of_pair,
)
from minitune.data.records.plain_texts import (
    NEED_TEMPLATE,
    TEXT_FIELD,
    plain_text,
    text_pair,
    text_with_headings,
)
from minitune.data.records.record_fields import HARMLESS, MEDIA, PREFERENCE, Fields, Reading
from minitune.data.records.token_records import refuse_option, token_sample
from minitune.data.samples import (
    Conversation,
    LabelOptions,
    RenderedConversation,
    RenderedRecord,
    RenderedText,
    Span,
)
from minitune.data.sources.jsonl import KNOWN_SHAPES
from minitune.data.templates.chat_template import (
    ChatTemplate,
    dropped_text_notes,
    without_reasoning,
)
from minitune.data.tokenization.tokenizer import Tokenizer

SHAPES = {  # name -> the keys that every record of the shape has
    "input_ids": ("input_ids",),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt/completion": ("prompt", "completion"),
    "text": (TEXT_FIELD,),
    "instruction": ("instruction", "output"),
}
MAIN_KEYS = tuple(dict.fromkeys(key for keys in SHAPES.values() for key in keys))
COMPANIONS = (*SYSTEM_KEYS, *NEED_TEMPLATE, "input")  # of the other shapes, never of a text


def render_record(record: Mapping, tokenizer: Tokenizer, options: LabelOptions) -> RenderedRecord:
    """Return a record as texts with spans, or as a Sample if it already holds tokens.

    Raises: ValueError if the record has an unknown shape, a wrong value or a key that nothing
        reads, or lacks the data that an option needs.
    """
    reading = Reading(options.ignore_fields, template_text(tokenizer))
    fields = Fields(record, reading)
    shape = _shape_of(fields, options)
    if shape == "input_ids":
        parts = [token_sample(fields, tokenizer, options)]
    elif shape == "text":
        parts = [plain_text(fields, tokenizer, options)]
    elif shape == "prompt/completion" and not is_list(record["prompt"]):
        parts = [text_pair(fields, tokenizer, options)]
    elif shape == "instruction" and tokenizer.chat_template is None:
        parts = [text_with_headings(fields, tokenizer, options)]
    else:
        read = _read_conversation(fields, shape)
        fields.leave_out_repeats([m.get("content") for m in read.conversation.messages])
        fields.done(MAIN_KEYS)
        template = tokenizer.template.on(options.template_date)
        if shape == "prompt/completion":
            parts = _pair_parts(read, reading, template, options)
        else:
            parts = _conversation_parts(read, reading, template, options)
    fields.done(MAIN_KEYS)
    return RenderedRecord(shape, parts, tuple(reading.notes))


def template_text(tokenizer: Tokenizer) -> str:
    """Return the Jinja text of the tokenizer's chat templates, "" if there is none."""
    source = tokenizer.chat_template or ""
    return source if isinstance(source, str) else "\n".join(source.values())


def _shape_of(record: Fields, options: LabelOptions) -> str:
    """Return the one shape that a record has.

    The user's dataset_text_field decides if the record holds that key; the keys of other shapes
    are then left out with a note.

    Raises: ValueError if the record has no shape, or two.
    """
    chosen = options.dataset_text_field
    if chosen is not None and record.holds(chosen):
        read_elsewhere = {*MAIN_KEYS, *COMPANIONS} - {chosen}
        others = [
            key
            for key in record.left()
            if key in read_elsewhere or (key not in HARMLESS and key != chosen)
        ]
        record.leave_out(others, f'dataset_text_field is "{chosen}"')
        return "text"
    shapes = SHAPES if chosen is None else {**SHAPES, "text": (chosen,)}
    held = set(record.left())
    present = [name for name, keys in shapes.items() if held.issuperset(keys)]
    if len(present) == 1:
        return present[0]
    filled = [name for name in present if any(map(record.holds, shapes[name]))]
    if len(filled) > 1:
        names = " and ".join(f'"{"/".join(shapes[name])}"' for name in filled)
        raise ValueError(
            f"the record has {names}, each of which can be trained on; leave one out with "
            f'ignore_fields, or choose a text with dataset_text_field="{chosen or TEXT_FIELD}"'
        )
    if present:
        return (filled or present)[0]
    raise ValueError(_unknown_shape(record, chosen))


def _unknown_shape(record: Fields, text_field: str | None) -> str:
    """Return the error for a record without a shape.

    text_field: the user's dataset_text_field, or None.
    """
    keys = list(map(str, record.left()))
    message = f"unknown shape with the fields {', '.join(keys) or '(none)'}; known are "
    message += KNOWN_SHAPES
    if found := PREFERENCE.intersection(keys):
        message += f"; {' and '.join(sorted(found))} make a preference record: keep one answer"
    if found := MEDIA.intersection(keys):
        message += f"; {' and '.join(sorted(found))} hold no text"
    if text_field is not None and text_field not in keys:
        message += f'; dataset_text_field is "{text_field}", which the record lacks'
    meant = {}
    for key in keys:
        if key not in MAIN_KEYS and (close := difflib.get_close_matches(key, MAIN_KEYS, 1, 0.75)):
            meant[key] = close[0]
    if meant:
        pairs = ", ".join(f'"{name}" by "{key}"' for key, name in meant.items())
        return f"{message}; did you mean {pairs}?"
    for needed in SHAPES.values():
        missing = [key for key in needed if key not in keys]
        if 0 < len(missing) < len(needed):
            message += f'; "{missing[0]}" is missing'
    return message


def is_written(text: str, rendered: str) -> bool:
    """Return True if a rendering holds a text, also with the escapes of JSON or of Python."""
    forms = (text.strip(), json.dumps(text, ensure_ascii=False)[1:-1], repr(text)[1:-1])
    return any(form in rendered for form in forms)


def is_list(value: Any) -> bool:
    """Return True for a list, and for an array of a table."""
    is_array = hasattr(value, "tolist") and not isinstance(value, str)
    return is_array or isinstance(value, list | tuple)


def _read_conversation(record: Fields, shape: str) -> ReadConversation:
    if shape == "prompt/completion":
        return conversation_of_pair(record)
    if shape == "instruction":
        return conversation_of_alpaca(record)
    return conversation_of_messages(record, shape)


# ---- conversations


def _conversation_parts(
    read: ReadConversation, reading: Reading, template: ChatTemplate, options: LabelOptions
) -> list[RenderedText]:
    """Return a conversation as text, trained on the assistant's turns by default.

    Several texts come from a conversation that is split by turns.
    """
    refuse_option(options.completion_only_loss, "completion_only_loss", "prompt and completion")
    conversation = read.conversation
    everything = options.assistant_only_loss is False
    if everything:
        _refuse_marks(read, "assistant_only_loss")
        if options.split_turns:
            raise ValueError(
                "split_turns=True makes a sample of each answer, but assistant_only_loss=False "
                "trains on everything; leave one of them out"
            )
    if not everything and _splits(conversation, reading, template, options):
        rendered = template.split_turns(conversation)
        if not conversation.trained[-1]:
            reading.note("messages after the last answer are left out")
    else:
        whole = template.render_with_answers(conversation)
        if options.split_turns is False and template.drops_history(conversation):
            whole = without_reasoning(whole, before=len(conversation.messages) - 1)
        rendered = [whole]
    _check_dropped(rendered, reading, options)
    return [
        RenderedText(part.text, None if everything else part.spans, add_special_tokens=False)
        for part in rendered
    ]


def _splits(
    conversation: Conversation, reading: Reading, template: ChatTemplate, options: LabelOptions
) -> bool:
    """Return True if each answer becomes a sample of its own."""
    if options.split_turns is not None or not any(conversation.trained):
        return bool(options.split_turns) and any(conversation.trained)
    if not template.drops_history(conversation):
        return False
    reading.note("the chat template rewrites earlier turns, so each answer is a sample")
    return True


def _pair_parts(
    read: ReadConversation, reading: Reading, template: ChatTemplate, options: LabelOptions
) -> list[RenderedText]:
    """Return prompt and completion as text, trained on the completion by default."""
    conversation, first = read.conversation, read.first_completion
    rendered = template.render_with_completion(conversation, first)
    spans = rendered.spans
    if options.completion_only_loss is False:
        _refuse_marks(read, "completion_only_loss")
        spans = [(0, len(rendered.text))]
    if options.assistant_only_loss:
        answers = replace(conversation, trained=_answers(read, options))
        found = template.render_with_answers(answers).spans
        spans = [(max(begin, spans[0][0]), min(end, spans[0][1])) for begin, end in found]
    elif any(read.unlabelled[first:]):
        excluded = replace(conversation, trained=read.unlabelled)
        spans = _without(spans[0], template.render_with_answers(excluded).spans)
    _check_dropped([rendered], reading, options)
    return [RenderedText(rendered.text, spans, add_special_tokens=False)]


def _answers(read: ReadConversation, options: LabelOptions) -> tuple[bool, ...]:
    """Return for each message of a pair, True if assistant_only_loss trains on it."""
    if options.completion_only_loss is not False:
        return read.conversation.trained
    return tuple(message["role"] == "assistant" for message in read.conversation.messages)


def _without(span: Span, excluded: list[Span]) -> list[Span]:
    """Return the pieces of a span outside of other spans, which are in the order of the text."""
    pieces, begin = [], span[0]
    for start, end in excluded:
        pieces.append((begin, max(begin, min(start, span[1]))))
        begin = max(begin, end)
    return [piece for piece in [*pieces, (begin, span[1])] if piece[0] < piece[1]]


def _refuse_marks(read: ReadConversation, option: str) -> None:
    """Raise ValueError if the record excludes a message, but an option trains on everything."""
    if any(read.unlabelled):
        number = read.unlabelled.index(True) + 1
        raise ValueError(
            f"message {number} is excluded from the loss by its weight or train, but {option}="
            "False trains on everything; leave one of them out"
        )


def _check_dropped(
    rendered: list[RenderedConversation], reading: Reading, options: LabelOptions
) -> None:
    """Note or refuse the texts that the chat template leaves out."""
    dropped = dict.fromkeys([name for part in rendered for name in part.dropped])
    for name, text in reading.expected:
        if not any(is_written(text, part.text) for part in rendered):
            dropped[name] = None
    dropped |= dict.fromkeys(reading.unread)
    for note in dropped_text_notes(tuple(dropped), options.dropped_text):
        reading.note(note)
    for part in rendered:
        for note in part.notes:
            reading.note(note)
