"""Records without a chat template: a text, a prompt with its completion, an instruction."""

import json

from minitune.data.records.conversations import SYSTEM_KEYS
from minitune.data.records.record_fields import Fields
from minitune.data.records.token_records import refuse_option
from minitune.data.response_marks import response_spans
from minitune.data.samples import EMPTY_ANSWER, LabelOptions, RenderedText
from minitune.data.tokenization.tokenizer import Tokenizer

TEXT_FIELD = "text"
# Keys beside a conversation that mean nothing without a chat template.
NEED_TEMPLATE = ("history", "tools", "functions", "chat_template_kwargs")


def plain_text(record: Fields, tokenizer: Tokenizer, options: LabelOptions) -> RenderedText:
    """Return a plain text, trained on as a whole, or after the marks of answers.

    Raises: ValueError if there is no text, or an option needs another shape.
    """
    refuse_option(options.assistant_only_loss, "assistant_only_loss", "conversations")
    refuse_option(options.completion_only_loss, "completion_only_loss", "prompt and completion")
    text = record.required_text(options.dataset_text_field or TEXT_FIELD)
    if not text.strip():
        record.reading.note("a text is empty")
    text, spans = _with_eos(text, tokenizer), None
    if options.response_part is not None:
        spans = response_spans(text, options.instruction_part, options.response_part)
        if not spans:
            record.reading.note("response_part does not occur in a text")
    return RenderedText(text, spans, add_special_tokens=True)


def text_pair(record: Fields, tokenizer: Tokenizer, options: LabelOptions) -> RenderedText:
    """Return a prompt and a completion that are texts as one text.

    Raises: ValueError if one of them is no text.
    """
    if tokenizer.chat_template is not None:
        record.reading.note(
            "prompt and completion are texts, which get no chat template: generate from the prompt "
            "as plain text, or write the records as messages"
        )
    prompt, completion = record.required_text("prompt"), record.required_text("completion")
    return _completion(prompt, completion, record, tokenizer, options)


def text_with_headings(record: Fields, tokenizer: Tokenizer, options: LabelOptions) -> RenderedText:
    """Return an Alpaca record as plain text with headings.

    Raises: ValueError if it needs a chat template.
    """
    for key in NEED_TEMPLATE:
        if record.holds(key):
            raise ValueError(
                f'"{key}" needs a chat template, and this tokenizer has none; give it one, or use '
                f"ignore_fields={json.dumps([key])}"
            )
    prompt = ""
    for key in SYSTEM_KEYS:
        if text := record.text(key):
            prompt += f"{text}\n\n"
    prompt += f"### Instruction:\n{record.required_text('instruction')}\n\n"
    if extra := record.text("input"):
        prompt += f"### Input:\n{extra}\n\n"
    prompt += "### Response:\n"
    return _completion(prompt, record.required_text("output"), record, tokenizer, options)


def _completion(
    prompt: str, completion: str, record: Fields, tokenizer: Tokenizer, options: LabelOptions
) -> RenderedText:
    """Return prompt and completion as one text, trained on the completion by default."""
    refuse_option(options.assistant_only_loss, "assistant_only_loss", "conversations")
    if not completion.strip():
        record.reading.note(EMPTY_ANSWER)
    text = prompt + _with_eos(completion, tokenizer)
    spans = None if options.completion_only_loss is False else [(len(prompt), len(text))]
    return RenderedText(text, spans, add_special_tokens=True)


def _with_eos(text: str, tokenizer: Tokenizer) -> str:
    """Return `text` ending with the EOS token, from which the model learns to stop.

    White space may follow a stop token that is there: chat templates write a newline.
    """
    eos = tokenizer.eos_token
    stops = [tokenizer.id_to_token(index) for index in tokenizer.eos_token_ids]
    has_stop = text.rstrip().endswith(tuple(stop for stop in (eos, *stops) if stop))
    return text if eos is None or has_stop else text + eos
