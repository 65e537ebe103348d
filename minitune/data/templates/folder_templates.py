"""The chat templates of a model folder, by name: reading, checking and writing them.

The places, in the order of transformers 5:

- chat_template.jinja, named "default", and additional_chat_templates/NAME.jinja;
- chat_template in tokenizer_config.json: a text, or a list of {"name", "template"}; read only if
  the folder has no file of the first kind.

ChatTemplate renders a conversation with tools by "tool_use", and any other by "default".
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitune.data.templates.chat_template import DEFAULT
from minitune.read_files import BYTE_ORDER_MARK, file_exists, read_text

TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"

Templates = str | dict[str, str] | None  # a template, or several by name


def read_templates(folder: Path, config: Mapping[str, Any]) -> Templates:
    """Return the chat templates of a folder.

    config: the content of tokenizer_config.json.

    Raises: ValueError that names the file and the entry that is not a template.
    """
    named_templates = folder / TEMPLATE_FOLDER
    if os.path.lexists(named_templates) and not named_templates.is_dir():
        raise ValueError(
            f"{named_templates}: is not a folder; copy the folder itself, or remove it"
        )
    files = {path.stem: path for path in sorted(named_templates.glob("*.jinja"))}
    if file_exists(folder / TEMPLATE_FILE):
        files[DEFAULT] = folder / TEMPLATE_FILE
    if files:
        named = {name: _read_template(path) for name, path in files.items()}
        return checked_templates(_single(named), str(folder / TEMPLATE_FOLDER))
    template = config.get("chat_template")
    if isinstance(template, list):
        for entry in template:
            if not isinstance(entry, dict) or not {"name", "template"} <= entry.keys():
                raise ValueError(
                    f"{folder / 'tokenizer_config.json'}: an entry of chat_template is "
                    f'{entry!r:.60}, expected {{"name": ..., "template": ...}}'
                )
        template = {entry["name"]: entry["template"] for entry in template} or None
    return checked_templates(_single(template), f"{folder / 'tokenizer_config.json'}")


def checked_templates(templates: Any, origin: str) -> Templates:
    """Return chat templates that have the right form.

    origin: the file or attribute that holds them, for errors.

    Raises: ValueError if they are no text, no texts by name, or if none is named "default".
    """
    if not isinstance(templates, dict):
        if not isinstance(templates, str | None):
            raise ValueError(
                f"{origin}: chat_template is a {type(templates).__name__}, not a text; give the "
                'Jinja text, or texts by name such as {"default": ..., "tool_use": ...}'
            )
        return templates
    if DEFAULT not in templates:
        raise ValueError(
            f"{origin}: no chat template is named 'default' among {list(templates)}; name the one "
            f"for conversations without tools so, or write it to {TEMPLATE_FILE}"
        )
    for name, template in templates.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name):
            raise ValueError(
                f"{origin}: a chat template has the name {name!r:.60}; use letters, digits and _"
            )
        if not isinstance(template, str):
            kind = type(template).__name__
            raise ValueError(f"{origin}: the chat template {name!r} is a {kind}, not a text")
    return templates


def write_templates(folder: Path, templates: Templates) -> None:
    """Write chat templates as the files that `read_templates` and transformers read."""
    named = {DEFAULT: templates} if isinstance(templates, str) else templates or {}
    for name, template in named.items():
        path = folder / TEMPLATE_FILE
        if name != DEFAULT:
            path = folder / TEMPLATE_FOLDER / f"{name}.jinja"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(template.encode())


def _single(templates: Any) -> Any:
    """Return the template itself if "default" is the only one."""
    if isinstance(templates, dict) and list(templates) == [DEFAULT]:
        return templates[DEFAULT]
    return templates


def _read_template(path: Path) -> str:
    text = read_text(path, keep_mark=True)
    if text.startswith(BYTE_ORDER_MARK):
        raise ValueError(
            f"{path}: begins with a byte order mark, which transformers would write into each "
            "prompt; save it without one"
        )
    return text
