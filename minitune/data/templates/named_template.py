"""Set a chat template by its name, for base models and for folders that lack one.

    tokenizer = get_chat_template(tokenizer, chat_template="llama-3.1")

The special tokens of a template must be in the vocabulary: split into pieces, an end of turn would
not stop generation. A template of the folder that writes the same text stays, because it can write
tools too.
"""

from collections.abc import Mapping
from typing import Any

from minitune.config.foreign_arguments import ANYTHING, Foreign, foreign_arguments
from minitune.data.templates.builtin_templates import ALIASES, BUILTIN_TEMPLATES, CHATML
from minitune.data.templates.chat_template import ChatTemplate
from minitune.data.tokenization.tokenizer import Tokenizer

# Without a text here, because only a long template writes reasoning and tools as these models do:
# name -> a text that the folder's own template holds.
FOLDERS_OWN = {
    **dict.fromkeys(("qwen3", "qwen-3", "qwen3-thinking"), "<think>"),
    "qwen3-instruct": "<tool_call>",
}
ROLES = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}
SHAREGPT = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "A question?"},
    {"role": "assistant", "content": "An answer."},
    {"role": "user", "content": "And now?"},
]
DAY = "2024-07-26"  # the day that the template of Llama 3.1 writes


@foreign_arguments(
    map_eos_token=Foreign("no token is renamed: generation ends at the end of a turn", ANYTHING)
)
def get_chat_template(
    tokenizer: Tokenizer,
    chat_template: str | tuple[str, str] = "chatml",
    mapping: Mapping[str, str] | None = None,
) -> Tokenizer:
    """Set a chat template, and return the tokenizer.

    chat_template: a name, such as chatml, llama-3.1, mistral, qwen-2.5, gemma-3, phi-4, alpaca or
        zephyr; or a Jinja text and the token that ends an answer, as a tuple.
    mapping: the names of the records' fields and roles. The usual ones need none.

    Raises: ValueError if the name or a mapping is unknown, or the vocabulary lacks a token.
    """
    for own, name in (mapping or {}).items():
        if name not in (ROLES.get(own), SHAREGPT.get(own)):
            raise ValueError(
                f"mapping {own!r} -> {name!r} is not known; records are read in the words of "
                f"{ROLES} and {SHAREGPT}, so rename their fields"
            )
    if isinstance(chat_template, tuple | list):
        _set_text(tokenizer, *chat_template)
    elif chat_template in FOLDERS_OWN:
        _keep_own(tokenizer, chat_template)
    else:
        _set_named(tokenizer, chat_template)
    return tokenizer


def _set_text(tokenizer: Tokenizer, source: str, stop: Any = "eos_token") -> None:
    """Set a Jinja text whose answers end with the token `stop`.

    Raises: ValueError if it is no template, or its answers end otherwise.
    """
    before, was_assigned = tokenizer.chat_template, tokenizer.template_was_assigned
    stop = tokenizer.eos_token if stop == "eos_token" else stop
    tokenizer.chat_template = source
    if tokenizer.token_to_id(str(stop)) not in tokenizer.eos_token_ids:
        tokenizer.chat_template, tokenizer.template_was_assigned = before, was_assigned
        raise ValueError(
            f"{stop!r} is no token behind an answer of this chat template; name the token of the "
            "vocabulary that ends a turn, or 'eos_token'"
        )


def _keep_own(tokenizer: Tokenizer, name: str) -> None:
    """Raise ValueError unless the folder's template is of the family `name`."""
    source, mark = tokenizer.chat_template, FOLDERS_OWN[name]
    question = TURNS[:1]
    is_own = isinstance(source, str) and mark in source
    if not is_own or not tokenizer.template.render(question, True).startswith(
        ChatTemplate(CHATML, {}).render(question, True)
    ):
        raise ValueError(
            f"the chat template {name!r} is that of the model's own folder, and "
            f"{tokenizer.folder} has another one or none; copy chat_template.jinja of the "
            "instruction-tuned model into it, or choose 'chatml' for a base model"
        )


def _set_named(tokenizer: Tokenizer, chat_template: str) -> None:
    """Set a template of this package, unless the folder's own writes the same text."""
    template = BUILTIN_TEMPLATES.get(ALIASES.get(chat_template, chat_template))
    if template is None:
        raise ValueError(
            f"no chat template is named {chat_template!r:.60}; choose from "
            f"{', '.join((*BUILTIN_TEMPLATES, *FOLDERS_OWN))}, or assign Jinja text to "
            "tokenizer.chat_template"
        )
    lacking = [f"a {name} token" for name in template.names if name not in tokenizer.special]
    for token in template.tokens:
        if len(tokenizer.encode(token, add_special_tokens=False)) != 1:
            lacking.append(token)
    if lacking:
        raise ValueError(
            f"{tokenizer.folder}: the vocabulary lacks {', '.join(lacking)}, which the chat "
            f"template {chat_template!r} writes; choose the template of this model's family, or "
            "alpaca, which needs an EOS token only"
        )
    own = tokenizer.chat_template
    texts = None if own is None else _texts(tokenizer)
    was_assigned = tokenizer.template_was_assigned
    tokenizer.chat_template = template.source
    if texts is not None and texts == _texts(tokenizer):
        tokenizer.chat_template, tokenizer.template_was_assigned = own, was_assigned


def _texts(tokenizer: Tokenizer) -> list[str] | None:
    """Return short conversations as text on a fixed day, or None if the template refuses one."""
    template = tokenizer.template.on(DAY)
    conversations = [messages + TURNS[:end] for messages in ([], [SYSTEM]) for end in (1, 2, 3)]
    try:
        return [
            template.render(messages, prompts)
            for messages in conversations
            for prompts in (False, True)
        ]
    except ValueError:
        return None
