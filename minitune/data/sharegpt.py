"""ShareGPT's words for a conversation become OpenAI's: from/value -> role/content.

    {"conversations": [{"from": "human", "value": "Hi"}]}
    {"conversations": [{"role": "user", "content": "Hi"}]}

The trainer reads both forms. The second one is for code of the user's own, such as a
formatting_func that calls apply_chat_template.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from minitune.config.foreign_arguments import ANYTHING, Foreign, foreign_arguments
from minitune.data.records.message_reader import ASSISTANT, CALL, SHAREGPT_ROLES

COLUMNS = ("conversations", "messages")
ROLES = SHAREGPT_ROLES | {"input": "user", "output": ASSISTANT}
ROLES_ARE_FIXED = f"the known roles are {', '.join(ROLES)}"


def standard_message(message: Any) -> Any:
    """Return a message in OpenAI's words; one that has no "from" stays as it is.

    Raises: ValueError if the role is unknown, or the message is a call or lacks its value.
    """
    if not isinstance(message, Mapping) or message.get("from") is None:
        return message
    speaker = message["from"]
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(f"a message is from {speaker!r:.60}; {ROLES_ARE_FIXED}")
    if role == CALL:
        raise ValueError(
            f"a message is from {speaker!r}; the trainer reads such a call as it is, so pass the "
            "records to it without this conversion"
        )
    if "value" not in message:
        raise ValueError(f"a message from {speaker!r} has no value, but {', '.join(message)}")
    rest = {key: item for key, item in message.items() if key not in ("from", "value")}
    if twice := [key for key in ("role", "content") if rest.get(key) is not None]:
        raise ValueError(f"a message has from/value and {' and '.join(twice)}; keep one of them")
    return {**rest, "role": role, "content": message["value"]}


@foreign_arguments(
    tokenizer=Foreign("the chat template changes nothing here", ANYTHING),
    batch_size=Foreign("the records are converted one by one", ANYTHING),
    num_proc=Foreign("one process converts the records", ANYTHING),
    aliases_for_system=Foreign(ROLES_ARE_FIXED, ANYTHING),
    aliases_for_user=Foreign(ROLES_ARE_FIXED, ANYTHING),
    aliases_for_assistant=Foreign(ROLES_ARE_FIXED, ANYTHING),
)
def standardize_sharegpt(dataset: Any) -> Any:
    """Return a dataset whose conversations have messages of role and content.

    dataset: a Dataset or DatasetDict of `datasets`, a DataFrame, or records, which become a list.

    Raises: ValueError if a record has no conversation, or a message an unknown role.
    """
    if isinstance(dataset, str | Mapping) and not hasattr(dataset, "map"):
        raise ValueError(
            f"standardize_sharegpt takes records, not a {type(dataset).__name__}; a file needs "
            "none of it: pass its name to SFTTrainer, which reads both forms"
        )
    if hasattr(dataset, "iterrows"):  # pandas
        column = _column(dataset.columns)
        return dataset.assign(**{column: [*map(_standard_messages, dataset[column])]})
    if hasattr(dataset, "map"):  # datasets
        return dataset.map(_standard_columns)
    if not isinstance(dataset, Iterable):
        raise ValueError(f"standardize_sharegpt takes records, not a {type(dataset).__name__}")
    return [{**record, **_standard_columns(record)} for record in dataset]


standardize_data_formats = standardize_sharegpt  # the name in newer notebooks


def _column(names: Iterable[str]) -> str:
    """Return the name of the conversation.

    Raises: ValueError if there is none.
    """
    names = list(map(str, names))
    for column in COLUMNS:
        if column in names:
            return column
    raise ValueError(
        f"a record has {', '.join(names) or 'no key'}, and no conversation under conversations or "
        "messages; rename its key"
    )


def _standard_columns(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the conversation of a record under its key."""
    column = _column(record)
    return {column: _standard_messages(record[column])}


def _standard_messages(messages: Any) -> list:
    """Return a conversation in OpenAI's words.

    Raises: ValueError if it is no list.
    """
    if isinstance(messages, str) or not isinstance(messages, Iterable):
        raise ValueError(f"a conversation is {messages!r:.60}, expected a list of messages")
    return [standard_message(message) for message in messages]
