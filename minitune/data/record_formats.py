"""One line of a dataset: its shape is recognised, and it becomes a text with the spans that are trained on.

    {"messages": [{"role", "content"}, ...]}     a conversation: the assistant's turns are trained on
    {"conversations": [{"from", "value"}, ...]}  the same in ShareGPT's words
    {"prompt", "completion"}                     two texts, or two lists of messages: the completion is trained on
    {"instruction", "input", "output"}           Alpaca: a conversation of two turns, or written out without a template
    {"text"}                                     everything is trained on
    {"input_ids", "labels"}                      already tokens; without labels everything is trained on, less what
                                                 completion_mask or assistant_masks hold a 0 for

Whatever is wrong with a line is a ValueError that begins with its file and line number.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minitune.data.chat_template import Span
from minitune.data.tokenizer import Tokenizer
from minitune.kernels.cross_entropy import IGNORE_INDEX

SHAPES = (
    '{"messages": [...]}, {"prompt": ..., "completion": ...}, {"instruction": ..., "input": ..., "output": ...}, '
    '{"conversations": [...]}, {"text": ...} or {"input_ids": [...], "labels": [...]}'
)
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
} | {role: role for role in ("system", "user", "assistant", "tool")}


@dataclass(frozen=True)
class Sample:
    """Token ids, and beside each its label: the id itself, or -100 where it is not trained on."""

    input_ids: list[int]
    labels: list[int]

    @property
    def targets(self) -> int:
        """Tokens that are trained on; nothing predicts the first."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


@dataclass(frozen=True)
class RenderedText:
    """A text to be encoded. `spans` are the characters trained on, None for all of them; `plain` texts get the
    special tokens that the tokenizer puts around a text, a rendered conversation brings its own."""

    text: str
    spans: list[Span] | None
    plain: bool


@dataclass(frozen=True)
class LabelOptions:
    """How records are read; the names and meanings are SFTConfig's. None stands for the default of each shape."""

    assistant_only_loss: bool | None = None
    completion_only_loss: bool | None = None
    dataset_text_field: str = "text"


def load_dataset(source: str | Path | Sequence[Mapping]) -> list[tuple[str, Mapping]]:
    """(origin, record) of every line of a JSONL file, or of every element of a sequence of dicts.

    Raises ValueError for a file that is missing, empty or not UTF-8, and for a line that is not a JSON object.
    """
    if not isinstance(source, str | Path):
        records = [(f"dataset[{i}]", record) for i, record in enumerate(source)]
    else:
        records = _read_lines(Path(source))
    for origin, record in records:
        if not isinstance(record, Mapping):
            raise ValueError(f"{origin}: holds {_kind(record)}, not an object; known are {SHAPES}")
    if not records:
        raise ValueError(
            f"{source if isinstance(source, str | Path) else 'dataset'}: holds no record"
        )
    return records


def _read_lines(path: Path) -> list[tuple[str, object]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a dataset is a JSONL file, one JSON object a line")
    records = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    records.append((f"{path}:{number}", _json(text)))
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not UTF-8: {error.reason} at byte {error.start}"
                ) from None
            except ValueError as error:
                raise ValueError(
                    f"{path}:{number}: {error}; known are, one a line, {SHAPES}"
                ) from None
    return records


def _json(text: str):
    """The value that a JSON text stands for. ValueError where it is none, or one that Python does not take in."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deeply to be read") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"JSON that cannot be read: {str(error).partition(';')[0]}") from None


def render_record(
    record: Mapping, tokenizer: Tokenizer, options: LabelOptions
) -> RenderedText | Sample:
    """The record as a text with spans, or as a Sample where it already holds tokens. ValueError says what is wrong."""
    if "input_ids" in record:
        return _tokens(record, tokenizer, options)
    if "messages" in record:
        return _conversation(
            _messages(record["messages"], "messages"), _tools(record), tokenizer, options
        )
    if "conversations" in record:
        turns = _messages(_from_sharegpt(record["conversations"]), "conversations")
        return _conversation(turns, _tools(record), tokenizer, options)
    if "prompt" in record and "completion" in record:
        if isinstance(record["prompt"], str):
            return _completion(
                _text(record, "prompt"), _text(record, "completion"), tokenizer, options
            )
        return _conversational_completion(record, tokenizer, options)
    if options.dataset_text_field in record:
        _refuse(options.assistant_only_loss, "assistant_only_loss", "conversations")
        _refuse(options.completion_only_loss, "completion_only_loss", "prompt and completion")
        text = _with_eos(_text(record, options.dataset_text_field), tokenizer)
        return RenderedText(text, None, plain=True)
    if "instruction" in record and "output" in record:
        return _instruction(record, tokenizer, options)
    raise ValueError(
        f"unknown shape with the fields {', '.join(map(str, record)) or '(none)'}; known are {SHAPES}"
    )


def _conversation(
    messages: list[dict], tools, tokenizer: Tokenizer, options: LabelOptions
) -> RenderedText:
    _refuse(options.completion_only_loss, "completion_only_loss", "prompt and completion")
    if options.assistant_only_loss is False:
        return RenderedText(tokenizer.template.render(messages, tools=tools), None, plain=False)
    text, spans = tokenizer.template.render_with_answers(messages, tools)
    return RenderedText(text, spans, plain=False)


def _conversational_completion(
    record: Mapping, tokenizer: Tokenizer, options: LabelOptions
) -> RenderedText:
    prompt, completion = (_messages(record[key], key) for key in ("prompt", "completion"))
    text, span = tokenizer.template.render_with_completion(prompt, completion, _tools(record))
    spans = [(0, len(text))] if options.completion_only_loss is False else [span]
    if options.assistant_only_loss:
        answers = tokenizer.template.render_with_answers([*prompt, *completion], _tools(record))[1]
        spans = [(max(begin, spans[0][0]), min(end, spans[0][1])) for begin, end in answers]
    return RenderedText(text, spans, plain=False)


def _completion(
    prompt: str, completion: str, tokenizer: Tokenizer, options: LabelOptions
) -> RenderedText:
    _refuse(options.assistant_only_loss, "assistant_only_loss", "conversations")
    text = prompt + _with_eos(completion, tokenizer)
    return RenderedText(
        text,
        None if options.completion_only_loss is False else [(len(prompt), len(text))],
        plain=True,
    )


def _instruction(record: Mapping, tokenizer: Tokenizer, options: LabelOptions) -> RenderedText:
    instruction, output = _text(record, "instruction"), _text(record, "output")
    extra = _text(record, "input") if record.get("input") is not None else ""
    if tokenizer.chat_template is None:
        middle = f"### Input:\n{extra}\n\n" if extra else ""
        return _completion(
            f"### Instruction:\n{instruction}\n\n{middle}### Response:\n",
            output,
            tokenizer,
            options,
        )
    question = f"{instruction}\n\n{extra}" if extra else instruction
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    return _conversation(messages, None, tokenizer, options)


def _tokens(record: Mapping, tokenizer: Tokenizer, options: LabelOptions) -> Sample:
    ids = _integers(record["input_ids"], "input_ids")
    loss_rows = record.get("labels") is not None
    labels = _integers(record["labels"], "labels") if loss_rows else list(ids)
    if len(ids) != len(labels):
        raise ValueError(
            f"{len(ids)} input_ids but {len(labels)} labels; each token has one, -100 where not trained on"
        )
    known = range(tokenizer.vocab_size)
    for name, values in (
        ("input_ids", ids),
        ("labels", [label for label in labels if label != IGNORE_INDEX]),
    ):
        if wrong := [value for value in values if value not in known]:
            raise ValueError(
                f"{name} hold {wrong[0]}, but the tokenizer's ids are 0 to {tokenizer.vocab_size - 1}"
            )
    if 0 in (_mask(record, "attention_mask", len(ids)) or []):
        raise ValueError(
            '"attention_mask" holds a 0; samples are packed without padding, so leave padded tokens out'
        )
    for name, flag, option in (
        ("completion_mask", options.completion_only_loss, "completion_only_loss"),
        ("assistant_masks", options.assistant_only_loss, "assistant_only_loss"),
    ):
        mask = _mask(record, name, len(ids))
        if mask is None:
            _refuse(flag and not loss_rows, option, f"{name} or labels")
        elif flag is not False:
            labels = [
                label if trained else IGNORE_INDEX
                for label, trained in zip(labels, mask, strict=True)
            ]
    return Sample(ids, labels)


def _mask(record: Mapping, name: str, size: int) -> list[int] | None:
    """The mask of a record of `size` tokens, None where it has none."""
    if record.get(name) is None:
        return None
    mask = _integers(record[name], name)
    if len(mask) != size or not set(mask) <= {0, 1}:
        raise ValueError(
            f'"{name}" is not a list of {size} zeros and ones, one for each of the input_ids'
        )
    return mask


def _integers(values, name: str) -> list[int]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple) or not all(type(value) is int for value in values):
        raise ValueError(f'"{name}" is not a list of whole numbers')
    return list(values)


def _tools(record: Mapping) -> list | None:
    """The tools that the template is to describe: a list, or a text that holds it as JSON."""
    tools = record.get("tools")
    tools = _json(tools) if isinstance(tools, str) else tools
    if not isinstance(tools, list | None):
        raise ValueError(f'"tools" is {_kind(tools)}, expected a list')
    return tools


def _messages(value, key: str) -> list[dict]:
    """The messages under `key`, checked: a list of {"role": text, "content": text, or parts, or null}."""
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(
            f'"{key}" is {_kind(value)}, expected a list of at least one {{"role", "content"}}'
        )
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f'"{key}"[{i}] is not a message; each is {{"role": "user", "content": "..."}}'
            )
        if not isinstance(message.get("content"), str | list | None):
            raise ValueError(
                f'the content of "{key}"[{i}] is {_kind(message["content"])}, expected a text'
            )
        if message.get("content") is None and "tool_calls" not in message:
            raise ValueError(f'"{key}"[{i}] has no content')
    return [dict(message) for message in value]


def _from_sharegpt(turns) -> list:
    """ShareGPT's {"from": "human", "value": ...} as {"role": "user", "content": ...}; other turns as they are."""
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
    """`text` ending in the EOS token, so that the model learns to stop."""
    eos = tokenizer.eos_token
    return text if eos is None or text.endswith(eos) else text + eos


def _text(record: Mapping, key: str) -> str:
    if not isinstance(record[key], str):
        raise ValueError(f'"{key}" is {_kind(record[key])}, expected a text')
    return record[key]


def _refuse(flag: bool | None, name: str, needed: str) -> None:
    if flag:
        raise ValueError(
            f"{name}=True needs records with {needed}; leave it out to train on what is there"
        )


def _kind(value) -> str:
    names = {
        type(None): "null",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(
        type(value), "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"
    )
