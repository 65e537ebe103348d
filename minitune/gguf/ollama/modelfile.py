"""A Modelfile, from which `ollama create` makes a model of a GGUF file.

    FROM ./model.gguf
    ADAPTER ./adapter.gguf        for an adapter, behind its base
    TEMPLATE \"\"\"...\"\"\"           the chat template for Go's text/template (ollama_template.py)
    SYSTEM \"\"\"...\"\"\"             the system text that the chat template adds by itself
    PARAMETER stop "<|im_end|>"   the texts at which an answer ends

Without TEMPLATE, Ollama guesses: it takes a template of its own if the chat template resembles a
known one, and otherwise sends the question without any markup. The context length is left to
Ollama, because it costs memory that only the machine of the user can tell.

A text between triple quotes has no escapes, and Ollama drops characters that are not printable.

Ollama 0.34.1 and later make no models with ADAPTER. They run those that an earlier version made.
Before, Ollama ran the models of OWN_ENGINE without llama.cpp in some versions, and such a version
answers "loras are not yet implemented".
"""

from collections.abc import Sequence
from pathlib import Path

from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.ollama.ollama_template import OllamaTemplate, ollama_template
from minitune.progress import warn

OWN_ENGINE = ("gemma3", "mistral3", "qwen3")  # in llama.cpp's names, of the supported families


def modelfiles(targets: Sequence[Path], tokenizer: Tokenizer, adds_bos: bool) -> dict[Path, str]:
    """Return path -> content of the Modelfile of each GGUF file.

    A single file has a `Modelfile` beside it. Of several in one folder, each has its own name:
    NAME-Q4_K_M.Modelfile.

    adds_bos: True if llama.cpp adds the BOS to a prompt.

    Raises: ValueError if a Modelfile exists or cannot express the chat template.
    """
    template = _template(tokenizer, adds_bos)
    contents = {}
    for target in targets:
        single = len(targets) == 1
        path = target.with_name("Modelfile") if single else target.with_suffix(".Modelfile")
        if path.exists():
            raise ValueError(f"{path}: exists; remove it or choose another folder")
        contents[path] = modelfile(f"./{target.name}", template)
    return contents


def adapter_modelfile(
    adapter: Path, base: Path, architecture: str, tokenizer: Tokenizer, adds_bos: bool
) -> dict[Path, str]:
    """Return path -> content of the Modelfile of an adapter: NAME.Modelfile for NAME.gguf.

    adapter, base: GGUF files. A base in another folder has its absolute path in the Modelfile.
    architecture: general.architecture of both.
    adds_bos: as in `modelfiles`.

    Raises: ValueError if a Modelfile cannot express the chat template.
    """
    warn(
        "Ollama makes models with ADAPTER up to version 0.34.0; with a later one, export the "
        "merged model, or serve base and adapter with llama-server",
        stacklevel=4,
    )
    if architecture in OWN_ENGINE:
        warn(
            f"some versions of Ollama run {architecture} without llama.cpp and answer 'loras are "
            "not yet implemented'; export the merged model for them",
            stacklevel=4,
        )
    beside = base.parent.resolve() == adapter.parent.resolve()
    start = f"./{base.name}" if beside else str(base.absolute())
    template = _template(tokenizer, adds_bos)
    return {adapter.with_suffix(".Modelfile"): modelfile(start, template, f"./{adapter.name}")}


def _template(tokenizer: Tokenizer, adds_bos: bool) -> OllamaTemplate:
    """Return Ollama's template, and warn of the facts that the user should know."""
    template = ollama_template(tokenizer, adds_bos)
    for note in template.notes:
        warn(note, stacklevel=4)
    return template


def modelfile(base: str, template: OllamaTemplate, adapter: str | None = None) -> str:
    """Return the content of a Modelfile.

    base: path of the GGUF file.
    adapter: path of the GGUF file of an adapter.

    Raises: ValueError if a Modelfile cannot hold a text.
    """
    lines = [f"FROM {base}"]
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    lines.append(f"TEMPLATE {_quoted('TEMPLATE', template.text)}")
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
