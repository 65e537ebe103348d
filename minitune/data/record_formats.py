"""One record of a dataset becomes a text with the spans that are trained on.

    {"messages": [{"role", "content"}, ...]}     a conversation: trains on the assistant's turns
    {"conversations": [{"from", "value"}, ...]}  the same in ShareGPT's words
    {"prompt", "completion"}                     two texts, or two lists of messages: trains on the
                                                 completion
    {"instruction", "input", "output"}           Alpaca: a conversation of two turns, or plain text
                                                 with headings if there is no chat template
    {"text"}                                     trains on everything
    {"input_ids", "labels"}                      tokens; without labels, trains on everything except
                                                 the zeros of completion_mask and assistant_masks

Every error is a ValueError; the caller adds the file and the line number.
"""

from collections.abc import Mapping
from typing import Any

from minitune.data.jsonl import KNOWN_SHAPES, kind_of, parse_json
from minitune.data.messages import normal_message
from minitune.data.samples import Conversation, LabelOptions, RenderedRecord, RenderedText, Sample
from minitune.data.tokenizer import Tokenizer
from minitune.kernels.cross_entropy import IGNORE_INDEX

SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


def render_record(record: Mapping, tokenizer: Tokenizer, options: LabelOptions) -> RenderedRecord:
    """Return a record as texts with spans, or as a Sample if it already holds tokens.

    Raises: ValueError if the record has an unknown shape or a wrong value, or lacks the data that
        an option needs.
    """
    if "input_ids" in record:
        return RenderedRecord("input_ids", [_token_sample(record, tokenizer, options)])
    if "messages" in record:
        messages = _messages(record["messages"], "messages")
        part = _conversation(messages, _tools(record), tokenizer, options)
        return RenderedRecord("messages", [part])
    if "conversations" in record:
        messages = _messages(_from_sharegpt(record["conversations"]), "conversations")
        part = _conversation(messages, _tools(record), tokenizer, options)
        return RenderedRecord("conversations", [part])
    if "prompt" in record and "completion" in record:
        return RenderedRecord("prompt/completion", [_prompt_completion(record, tokenizer, options)])
    if (options.dataset_text_field or "text") in record:
        return RenderedRecord("text", [_plain_text(record, tokenizer, options)])
    if "instruction" in record and "output" in record:
        return RenderedRecord("instruction", [_instruction(record, tokenizer, options)])
    fields = ", ".join(map(str, record)) or "(none)"
    raise ValueError(f"unknown shape with the fields {fields}; known are {KNOWN_SHAPES}")


def _prompt_completion(
    record: Mapping, tokenizer: Tokenizer, options: LabelOptions
) -> RenderedText:
    """Return prompt and completion as text: two texts, or two lists of messages."""
    if not isinstance(record["prompt"], str):
        return _conversational_completion(record, tokenizer, options)
    prompt, completion = _text(record, "prompt"), _text(record, "completion")
    return _completion(prompt, completion, tokenizer, options)


def _conversation(
    messages: list[dict], tools: list | None, tokenizer: Tokenizer, options: LabelOptions
) -> RenderedText:
    """Return a conversation as text, trained on the assistant's turns by default."""
    _refuse(options.completion_only_loss, "completion_only_loss", "prompt and completion")
    if options.assistant_only_loss is False:
        text, spans = tokenizer.template.render(messages, tools=tools), None
    else:
        rendered = tokenizer.template.render_with_answers(_with_answers(messages, tools))
        text, spans = rendered.text, rendered.spans
    return RenderedText(text, spans, add_special_tokens=False)


def _with_answers(messages: list[dict], tools: list | None) -> Conversation:
    """Return messages as a conversation whose assistant turns are trained on."""
    trained = tuple(message["role"] == "assistant" for message in messages)
    normal = [normal_message(message, i) for i, message in enumerate(messages, 1)]
    return Conversation(normal, tools, {}, trained)


def _conversational_completion(
    record: Mapping, tokenizer: Tokenizer, options: LabelOptions
) -> RenderedText:
    prompt = _messages(record["prompt"], "prompt")
    completion = _messages(record["completion"], "completion")
    conversation = _with_answers([*prompt, *completion], _tools(record))
    rendered = tokenizer.template.render_with_completion(conversation, len(prompt))
    text, span = rendered.text, rendered.spans[0]
    if options.completion_only_loss is False:
        span = (0, len(text))
    spans = [span]
    if options.assistant_only_loss:
        answers = tokenizer.template.render_with_answers(conversation).spans
        spans = [(max(begin, span[0]), min(end, span[1])) for begin, end in answers]
    return RenderedText(text, spans, add_special_tokens=False)


def _completion(
    prompt: str, completion: str, tokenizer: Tokenizer, options: LabelOptions
) -> RenderedText:
    """Return prompt and completion as one text, trained on the completion by default."""
    _refuse(options.assistant_only_loss, "assistant_only_loss", "conversations")
    text = prompt + _with_eos(completion, tokenizer)
    spans = None if options.completion_only_loss is False else [(len(prompt), len(text))]
    return RenderedText(text, spans, add_special_tokens=True)


def _plain_text(record: Mapping, tokenizer: Tokenizer, options: LabelOptions) -> RenderedText:
    _refuse(options.assistant_only_loss, "assistant_only_loss", "conversations")
    _refuse(options.completion_only_loss, "completion_only_loss", "prompt and completion")
    text = _with_eos(_text(record, options.dataset_text_field or "text"), tokenizer)
    return RenderedText(text, None, add_special_tokens=True)


def _instruction(record: Mapping, tokenizer: Tokenizer, options: LabelOptions) -> RenderedText:
    instruction, output = _text(record, "instruction"), _text(record, "output")
    extra = _text(record, "input") if record.get("input") is not None else ""
    if tokenizer.chat_template is None:
        middle = f"### Input:\n{extra}\n\n" if extra else ""
        prompt = f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"
        return _completion(prompt, output, tokenizer, options)
    question = f"{instruction}\n\n{extra}" if extra else instruction
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    return _conversation(messages, None, tokenizer, options)


# ---- records that hold tokens


def _token_sample(record: Mapping, tokenizer: Tokenizer, options: LabelOptions) -> Sample:
    ids = _integers(record["input_ids"], "input_ids")
    has_labels = record.get("labels") is not None
    labels = _integers(record["labels"], "labels") if has_labels else list(ids)
    if len(ids) != len(labels):
        raise ValueError(
            f"{len(ids)} input_ids but {len(labels)} labels; "
            "each token has one label, -100 if it is not trained on"
        )
    _check_ids(ids, "input_ids", tokenizer)
    _check_ids([label for label in labels if label != IGNORE_INDEX], "labels", tokenizer)
    if 0 in (_mask(record, "attention_mask", len(ids)) or []):
        raise ValueError(
            '"attention_mask" holds a 0; samples are packed without padding, '
            "so leave padded tokens out"
        )
    for name, flag, option in (
        ("completion_mask", options.completion_only_loss, "completion_only_loss"),
        ("assistant_masks", options.assistant_only_loss, "assistant_only_loss"),
    ):
        mask = _mask(record, name, len(ids))
        if mask is None:
            _refuse(flag and not has_labels, option, f"{name} or labels")
        elif flag is not False:
            pairs = zip(labels, mask, strict=True)
            labels = [label if trained else IGNORE_INDEX for label, trained in pairs]
    return Sample(ids, labels)


def _check_ids(ids: list[int], name: str, tokenizer: Tokenizer) -> None:
    for index in ids:
        if not 0 <= index < tokenizer.vocab_size:
            raise ValueError(
                f"{name} hold {index}, but the tokenizer's ids are 0 to {tokenizer.vocab_size - 1}"
            )


def _mask(record: Mapping, name: str, size: int) -> list[int] | None:
    """Return a mask of a record of `size` tokens, or None if the record has no such mask."""
    if record.get(name) is None:
        return None
    mask = _integers(record[name], name)
    if len(mask) != size or not set(mask) <= {0, 1}:
        raise ValueError(
            f'"{name}" is not a list of {size} zeros and ones, one for each of the input_ids'
        )
    return mask


def _integers(values: Any, name: str) -> list[int]:
    """Return a list, tuple, array or tensor of whole numbers as a list."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple) or not all(type(value) is int for value in values):
        raise ValueError(f'"{name}" is not a list of whole numbers')
    return list(values)


# ---- fields of a record


def _tools(record: Mapping) -> list | None:
    """Return the tools for the template: a list, or a text that holds the list as JSON."""
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = parse_json(tools)
    if not isinstance(tools, list | None):
        raise ValueError(f'"tools" is {kind_of(tools)}, expected a list')
    return tools


def _messages(value: Any, key: str) -> list[dict]:
    """Check and return the messages under `key`: {"role": text, "content": text, parts or null}."""
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(
            f'"{key}" is {kind_of(value)}, expected a list of at least one {{"role", "content"}}'
        )
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f'"{key}"[{i}] is not a message; each is {{"role": "user", "content": "..."}}'
            )
        if not isinstance(message.get("content"), str | list | None):
            raise ValueError(
                f'the content of "{key}"[{i}] is {kind_of(message["content"])}, expected a text'
            )
        if message.get("content") is None and "tool_calls" not in message:
            raise ValueError(f'"{key}"[{i}] has no content')
    return [dict(message) for message in value]


def _from_sharegpt(turns: Any) -> Any:
    """Turn {"from": "human", "value": ...} into {"role": "user", "content": ...}.

    Everything else stays as it is; `_messages` checks it.
    """
    if not isinstance(turns, list | tuple):
        return turns
    messages = []
    for turn in turns:
        if isinstance(turn, Mapping) and "from" in turn:
            if turn["from"] not in SHAREGPT_ROLES:
                raise ValueError(
                    f"a turn is from {turn['from']!r}; known are {', '.join(SHAREGPT_ROLES)}"
                )
            turn = {"role": SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")}
        messages.append(turn)
    return messages


def _with_eos(text: str, tokenizer: Tokenizer) -> str:
    """Return `text` ending with the EOS token, from which the model learns to stop."""
    eos = tokenizer.eos_token
    return text if eos is None or text.endswith(eos) else text + eos


def _text(record: Mapping, key: str) -> str:
    if not isinstance(record[key], str):
        raise ValueError(f'"{key}" is {kind_of(record[key])}, expected a text')
    return record[key]


def _refuse(flag: bool | None, name: str, needed: str) -> None:
    """Raise ValueError if an option is set that the record has no data for."""
    if flag:
        raise ValueError(
            f"{name}=True needs records with {needed}; leave it out to use the record's default"
        )
