"""The chat template that an adapter was trained with, kept beside the adapter.

A template that was assigned to the tokenizer stands in no file of the base model. Prompts that are
rendered with another template than the trained one get worse answers, without an error.
"""

from pathlib import Path

from minitune.atomic_files import os_errors_as_value_error
from minitune.data.templates.folder_templates import (
    TEMPLATE_FILE,
    Templates,
    read_templates,
    write_templates,
)
from minitune.data.tokenization.tokenizer import CONFIG, Tokenizer
from minitune.read_files import read_json


def save_template(tokenizer: Tokenizer, adapter: Path) -> None:
    """Write an assigned chat template into an adapter's folder.

    Without one the base model's template counts, and the file of an earlier run is removed.

    Raises: ValueError if the folder cannot be written.
    """
    with os_errors_as_value_error(adapter):
        (adapter / TEMPLATE_FILE).unlink(missing_ok=True)
        if tokenizer.template_was_assigned:
            write_templates(adapter, tokenizer.chat_template)


def load_template(tokenizer: Tokenizer, adapter: str | Path) -> None:
    """Assign the chat template of an adapter's folder, if it differs from the tokenizer's.

    Raises: ValueError if the folder holds a file that is no template.
    """
    templates = read_adapter_templates(adapter)
    if templates is not None and templates != tokenizer.chat_template:
        tokenizer.chat_template = templates


def read_adapter_templates(adapter: str | Path) -> Templates:
    """Return the chat templates in an adapter's folder, or None if there are none.

    A tokenizer that was saved there, by any program, holds templates too.

    Raises: ValueError if the folder holds a file that is no template.
    """
    return read_templates(Path(adapter), read_json(Path(adapter) / CONFIG, default={}))
