"""The prefix rule as a referee of answer spans, and random conversations with hostile texts.

An answer is what render(messages[:i + 1]) adds to render(messages[:i], add_generation_prompt=True).
The rule answers only if the whole rendering begins with both.
"""

import random

from minitune.data.samples import Conversation, RenderedConversation
from minitune.data.templates.chat_template import ChatTemplate

WORDS = ("seven", "chairs", "é", "漢字", "😀", "None", "0", "\u2028", "\ufdd0", "\x00")
SPACES = ("", " ", "\n", "\n\n", "\t", "\u00a0")
TRAPS = (
    "<think>",
    "</think>",
    "<|im_start|>assistant\n",
    "<|assistant|>\n",
    "<|start|>assistant<|channel|>final<|message|>",
    "[INST]",
    "[/INST]",
    "<tool_response>",
    "</tool_response>",
    "{{ 7 * 7 }}",
    "{% endfor %}",
    "{% generation %}",
    "~^~",
    "~^~2~",
    "~^^~3~",
)


def random_text(rng: random.Random, stops: tuple[str, ...]) -> str:
    """Return a short text of words, white space, stop tokens and traps, often the same one."""
    pieces = [*WORDS, *SPACES, *TRAPS, *stops, "seven", "seven"]
    return "".join(rng.choice(pieces) for _ in range(rng.choice((0, 1, 1, 2, 3, 5))))


def random_conversation(rng: random.Random, stops: tuple[str, ...]) -> Conversation:
    """Return a conversation of one to four turns whose answers are trained on."""
    messages = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": random_text(rng, stops)})
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": random_text(rng, stops)})
        messages.append({"role": "assistant", "content": random_text(rng, stops)})
    trained = tuple(message["role"] == "assistant" for message in messages)
    return Conversation(messages, None, {}, trained)


def prefix_spans(
    template: ChatTemplate, conversation: Conversation, stops: tuple[str, ...]
) -> dict[int, tuple[int, int | None]]:
    """Return begin and end of each answer to which the prefix rule applies.

    An end is None if the template writes no stop token behind an answer.
    """
    messages, spans = conversation.messages, {}
    pair = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    writes_stop = template.render(pair).rstrip().endswith(stops)
    whole = template.render(messages)
    for i, is_trained in enumerate(conversation.trained):
        if not is_trained:
            continue
        try:
            before = template.render(messages[:i], add_generation_prompt=True)
            after = template.render(messages[: i + 1])
        except ValueError:
            continue
        if whole.startswith(after) and after.startswith(before):
            trimmed = after.rstrip()
            spans[i] = (len(before), len(trimmed) if writes_stop else None)
    return spans


def differing_spans(
    template: ChatTemplate,
    conversation: Conversation,
    rendered: RenderedConversation,
    stops: tuple[str, ...],
) -> tuple[int, list[str]]:
    """Return the number of spans that the prefix rule gives, too, and those that differ."""
    expected = prefix_spans(template, conversation, stops)
    trained = [i for i, is_trained in enumerate(conversation.trained) if is_trained]
    differing = []
    for i, span in zip(trained, rendered.spans, strict=True):
        if i not in expected or span[0] == span[1]:
            continue
        begin, end = expected[i]
        if begin != span[0] or (end is not None and end != span[1]):
            differing.append(f"message {i + 1}: {span}, by the prefix rule {expected[i]}")
    return len(expected), differing
