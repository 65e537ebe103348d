"""The commands to type next, in the form in which the user started this one.

    minitune train ...              ->  minitune generate ...
    python scripts/train.py ...     ->  python scripts/generate.py ...

They can be pasted: every word is quoted for a shell, and no line is wrapped.
"""

import argparse
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minitune.checkpoints.resolve_model import is_gguf
from minitune.config.training_config import RunConfig
from minitune.data.records.conversations import (
    conversation_of_alpaca,
    conversation_of_messages,
    conversation_of_pair,
)
from minitune.data.records.record_fields import Fields, Reading
from minitune.data.sources.sources import open_sources
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.audit.audit_table import MergeAudit
from minitune.gguf.lora_adapter import TEMPLATE_SUFFIX, AdapterExport
from minitune.progress import LABEL_WIDTH, labelled
from minitune.sft_trainer import SFTTrainer

READERS = {
    "messages": lambda record: conversation_of_messages(record, "messages"),
    "conversations": lambda record: conversation_of_messages(record, "conversations"),
    "prompt": conversation_of_pair,
    "instruction": conversation_of_alpaca,
}
LONGEST_TEXT = 300  # characters of a prompt or a system message on a command line
EXPORTED_TYPE = "q4_k_m"
MODELFILE = "Modelfile"
GGUF_ADAPTER = "adapter.gguf"
AUDITED_FOLDER = "gguf"  # for the files of the way that an audit recommends


def command_line(program: str, command: str, *arguments: Any) -> str:
    """Return a command as the user can type it here.

    program: this command as the user typed it: `minitune train` or `train.py`.
    """
    python = Path(sys.executable).name or "python"
    if not program.startswith("minitune "):
        start = [python, str(Path(sys.argv[0]).with_name(f"{command}.py"))]
    elif Path(sys.argv[0]).name == "__main__.py":
        start = [python, "-m", "minitune.commands", command]
    else:
        start = ["minitune", command]
    return shlex.join([*start, *map(str, arguments)])


def next_text(commands: Sequence[str], notes: Iterable[str] = ()) -> str:
    """Return the lines that show commands, one a line, and notes on them."""
    lines = [f"{'next':<{LABEL_WIDTH}}{commands[0]}"]
    lines += [" " * LABEL_WIDTH + command for command in commands[1:]]
    return "\n".join([*lines, *(labelled("note", note) for note in notes)])


def after_training(
    program: str, trainer: SFTTrainer, run: RunConfig, models: Sequence[Path] = ()
) -> str:
    """Return the lines on the next commands: generate, export or start llama.cpp, report.

    program: this command as the user typed it.
    run: its settings.
    models: the merged folder and the GGUF files that the run wrote.
    """
    model, notes = trainer.model, []
    words = ["--model", trainer.output]
    if not model.weight_formats and model.gguf is None:
        words.append("--no-load-in-4bit")
    if model.max_seq_length > model.config.default_seq_length:
        words += ["--max-seq-length", model.max_seq_length]
    if run.dtype is not None:
        words += ["--dtype", run.dtype]
    if run.device is not None:
        words += ["--device", run.device]
    files = (*run.eval_data, *run.data)
    if files:
        example, notes = _example_flags(files[0], trainer.processing_class)
        words += example
    commands = [command_line(program, "generate", *words)]
    gguf = [path for path in models if is_gguf(path)]
    if gguf:
        commands.append(_llama_server(gguf[0]))
    elif model.gguf is not None:  # the adapter on this file is the model as it was trained
        adapter = trainer.output / GGUF_ADAPTER
        more = ("--model", trainer.output, "--gguf-adapter", adapter)
        commands.append(command_line(program, "export", *more))
        # An assigned chat template is a file of that export, which shows the whole command.
        if not trainer.processing_class.template_was_assigned:
            commands.append(_llama_server(model.gguf, "--lora", adapter))
    else:
        more = ("--output", trainer.output / "gguf", "--quantization-method", EXPORTED_TYPE)
        commands.append(command_line(program, "export", "--model", trainer.output, *more))
    if not run.report:
        commands.append(command_line(program, "report", trainer.output))
    return next_text(commands, notes)


def after_export(
    program: str, paths: Sequence[Path], adapter: AdapterExport | None = None
) -> str | None:
    """Return the lines on the next commands for exported files, or None if there are none.

    program: this command as the user typed it.
    paths: GGUF files, Modelfiles and folders.
    adapter: the adapter among the files.
    """
    of_adapter = [] if adapter is None else adapter.paths
    others = [path for path in paths if path not in of_adapter]
    gguf = [path for path in others if is_gguf(path)]
    commands, notes = [_llama_server(path) for path in gguf], []
    modelfiles = [path for path in others if path.name.endswith(MODELFILE)]
    for path, file in zip(gguf, modelfiles, strict=False):
        commands.append(_ollama_create(path, file))
    if gguf and not modelfiles:
        notes.append("for Ollama, export with --ollama: it writes a Modelfile beside the file")
    if adapter is not None:
        commands += _serving(program, adapter)
    for folder in others:
        if folder.is_dir():
            commands.append(command_line(program, "generate", "--model", folder))
    return next_text(commands, notes) if commands else None


def after_audit(program: str, arguments: argparse.Namespace, audit: MergeAudit, base: Path) -> str:
    """Return the lines on the commands that write the recommended way, or "" if there is none.

    program: this command as the user typed it.
    arguments: its flags.
    base: folder or GGUF file of the base model.
    """
    row = audit.recommended
    if row is None:
        return ""
    model = ["--model", arguments.model]
    if arguments.adapter is not None:
        model += ["--adapter", arguments.adapter]
    file = ["--output", AUDITED_FOLDER, "--quantization-method", row.method]
    if arguments.imatrix is not None:
        file += ["--imatrix", arguments.imatrix]
    if arguments.imatrix_from is not None:
        file += ["--imatrix-from", *arguments.imatrix_from]
    if arguments.imatrix_tokens is not None:
        file += ["--imatrix-tokens", arguments.imatrix_tokens]
    if row.merge_base is None:
        commands = [command_line(program, "export", *model, "--gguf-adapter", AUDITED_FOLDER)]
        if row.method is not None:
            commands.append(command_line(program, "export", "--model", base, *file))
        return next_text(commands)
    merge = ["--merge-base", row.merge_base] if row.merge_base == "nf4" else []
    written = ["--merged", "merged"] if row.method is None else file
    return next_text([command_line(program, "export", *model, *merge, *written)])


def _serving(program: str, adapter: AdapterExport) -> list[str]:
    """Return the commands that serve a base with an adapter, and first write a missing base."""
    base, served = adapter.base, ["--lora", adapter.target]
    for path in adapter.texts:
        if path.suffix == TEMPLATE_SUFFIX:
            served += ["--jinja", "--chat-template-file", path]
    if is_gguf(base):
        commands = [_llama_server(base, *served)]
    else:
        written = adapter.target.with_name("base.gguf")
        output = ("--output", written, "--quantization-method", "not_quantized")
        commands = [
            command_line(program, "export", "--model", base, *output),
            _llama_server(written, *served),
        ]
    return commands + [
        _ollama_create(adapter.target, path)
        for path in adapter.texts
        if path.name.endswith(MODELFILE)
    ]


def _ollama_create(gguf: Path, modelfile: Path) -> str:
    return shlex.join(["ollama", "create", gguf.stem.lower(), "-f", str(modelfile)])


def _llama_server(path: Path, *arguments: Any) -> str:
    return shlex.join(["llama-server", "-m", str(path), *map(str, arguments)])


def _example_flags(path: str, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Return the flags of a generation like the first record of a file, and notes on them."""
    record = next(item for _, item in open_sources(path)[0].records() if isinstance(item, dict))
    shape = next((key for key in READERS if key in record), None)
    has_template = tokenizer.chat_template is not None
    if shape == "prompt" and isinstance(record["prompt"], str):
        return ["--raw", *_short("--prompt", record["prompt"])], []
    if shape is None or (shape == "instruction" and not has_template):
        return ["--raw"], []  # plain text, which the model continues
    try:
        messages = READERS[shape](Fields(record, Reading())).conversation.messages
    except ValueError:  # a bad record, which skip_bad left out
        return [], []
    flags, notes = [], []
    first = {message["role"]: message.get("content") for message in reversed(messages)}
    if system := first.get("system"):
        flags = _short("--system", system)
        if not flags:
            notes.append("give --system the system message of the data; it is too long for here")
    return [*flags, *_short("--prompt", first.get("user"))], notes


def _short(flag: str, text: Any) -> list[str]:
    """Return a flag and its text if the text fits on a command line, otherwise nothing."""
    fits = isinstance(text, str) and len(text) <= LONGEST_TEXT and text.isprintable()
    return [flag, text] if fits and text and not text.startswith("-") else []
