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

from minitune.gguf.ollama_template import OllamaTemplate


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

    Raises: ValueError if the text holds triple quotes or ends in a quote, or if a character is not
        printable.
    """
    if '"""' in text or text.endswith('"'):
        raise ValueError(f"Ollama: {command} in a Modelfile cannot hold the quotes of {text!r}")
    for character in text:
        if not (character.isprintable() or character in "\n\t"):
            raise ValueError(
                f"Ollama: a Modelfile cannot hold the character {character!r} of {command}"
            )
    return f'"""{text}"""'
