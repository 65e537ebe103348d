"""A Modelfile, from which `ollama create` makes a model of a GGUF file.

    FROM ./model.gguf
    TEMPLATE \"\"\"...\"\"\"           the chat template for Go's text/template (ollama_template.py)
    SYSTEM \"\"\"...\"\"\"             the system text that the chat template adds by itself
    PARAMETER stop "<|im_end|>"   the texts at which an answer ends

Without TEMPLATE, Ollama guesses: it takes a template of its own if the chat template resembles a
known one, and otherwise sends the question without any markup. The context length is left to
Ollama, because it costs memory that only the machine of the user can tell.

A text between triple quotes has no escapes, and Ollama drops characters that are not printable.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.ollama_template import OllamaTemplate, ollama_template


def modelfiles(targets: Sequence[Path], tokenizer: Tokenizer, adds_bos: bool) -> dict[Path, str]:
    """Return path -> content of the Modelfile of each GGUF file.

    A single file has a `Modelfile` beside it. Of several in one folder, each has its own name:
    NAME-Q4_K_M.Modelfile.

    adds_bos: True if llama.cpp adds the BOS to a prompt.

    Raises: ValueError if a Modelfile exists or cannot express the chat template.
    """
    template = ollama_template(tokenizer, adds_bos)
    for note in template.notes:
        warnings.warn(note, stacklevel=3)
    contents = {}
    for target in targets:
        single = len(targets) == 1
        path = target.with_name("Modelfile") if single else target.with_suffix(".Modelfile")
        if path.exists():
            raise ValueError(f"{path}: exists; remove it or choose another folder")
        contents[path] = modelfile(target.name, template)
    return contents


def modelfile(gguf_name: str, template: OllamaTemplate) -> str:
    """Return the content of a Modelfile for a GGUF file in the same folder.

    Raises: ValueError if a Modelfile cannot hold a text.
    """
    lines = [f"FROM ./{gguf_name}", f"TEMPLATE {_quoted('TEMPLATE', template.text)}"]
    if template.system:
        lines.append(f"SYSTEM {_quoted('SYSTEM', template.system)}")
    lines += [f'PARAMETER stop "{stop}"' for stop in template.stops]
    return "\n".join(lines) + "\n"


def _quoted(command: str, text: str) -> str:
    """Return a text in triple quotes.

    Raises: ValueError if the text holds triple quotes or a character that is not printable.
    """
    if '"""' in text:
        raise ValueError(f"Ollama: {command} in a Modelfile cannot hold triple quotes: {text!r}")
    for character in text:
        if not (character.isprintable() or character in "\n\t"):
            raise ValueError(
                f"Ollama: a Modelfile cannot hold the character {character!r} of {command}"
            )
    return f'"""{text}"""'
