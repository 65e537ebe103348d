"""Generate text with a model, with or without an adapter; the answer appears as it is decoded.

minitune generate --model DIR                     a chat in a terminal (chat.py)
minitune generate --model runs/1                  a trained model, and its base with --compare
minitune generate --model DIR --prompt "What is the capital of France?"
echo "What is the capital of France?" | minitune generate --model DIR    one answer a line
minitune generate --model DIR --input prompts.jsonl --output answers.jsonl    (answer_file.py)
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

from minitune.api import FastLanguageModel
from minitune.checkpoints.find_model import find_model
from minitune.commands.answer_file import AnswerFile
from minitune.commands.answering import BOTH, WITH_ADAPTER, Answerer, Side
from minitune.commands.chat import Chat
from minitune.commands.chat_history import ChatHistory
from minitune.commands.generate_flags import parse_arguments
from minitune.config.cli import print_notes, run_command
from minitune.data.records.prompt_records import read_prompt
from minitune.device import choose_device
from minitune.streams import is_open, is_terminal
from minitune.threads import use_free_cores


def main(argv: Sequence[str] | None = None, program: str = "minitune generate") -> int:
    """Run the command and return its exit code."""
    return run_command(program, _run, argv, program)


def _run(argv: Sequence[str] | None, program: str) -> None:
    arguments = parse_arguments(argv, program)
    use_free_cores(choose_device(arguments.device))
    if arguments.compare and find_model(arguments.model, arguments.adapter).adapter is None:
        raise ValueError(
            f"{arguments.model} has no adapter to compare with its base; pass {program} --compare "
            "--adapter DIR, or a run's folder as --model"
        )
    if arguments.input is not None:
        with AnswerFile(arguments, program) as file:
            if file.is_unfinished:
                file.answer(load(arguments))
        return
    is_chat = arguments.prompt is None and is_terminal(sys.stdin)
    if is_chat and arguments.num_return_sequences > 1:
        raise ValueError(
            "a chat goes on from one answer; pass --num-return-sequences with a prompt: "
            f"{program} --num-return-sequences N --prompt TEXT"
        )
    answerer = load(arguments)
    sides = BOTH if arguments.compare else (WITH_ADAPTER,)
    if is_chat:
        start_chat(answerer, sides, arguments)
        return
    for text in [arguments.prompt] if arguments.prompt is not None else piped_lines():
        answer(answerer, sides, text, arguments)


def load(arguments: argparse.Namespace) -> Answerer:
    """Load the model of a command line.

    Raises: ValueError if it cannot be loaded.
    """
    model, tokenizer = FastLanguageModel.from_pretrained(
        arguments.model,
        max_seq_length=arguments.max_seq_length,
        dtype=arguments.dtype,
        load_in_4bit=not arguments.no_load_in_4bit,
        device=arguments.device,
        adapter=arguments.adapter,
        progress=True,
    )
    print_notes(model.config.notes)
    return Answerer(model, tokenizer, arguments)


def start_chat(answerer: Answerer, sides: Sequence[Side], arguments: argparse.Namespace) -> None:
    """Chat in the terminal until the user ends it.

    Raises: ValueError if the model has no chat template, or it refuses the system message.
    """
    history = ChatHistory(
        answerer.tokenizer,
        answerer.model.max_seq_length,
        arguments.max_new_tokens,
        arguments.system,
    )
    if not arguments.raw:
        history.text_of("?")
    Chat(answerer, history, sides, arguments.raw).run()


def piped_lines() -> Iterator[str]:
    """Yield the lines of a pipe or a file at stdin, except the empty ones.

    Raises: ValueError if stdin is closed.
    """
    if not is_open(sys.stdin):
        raise ValueError("stdin is closed, and there is no prompt; pass --prompt TEXT")
    for line in sys.stdin:
        if line.strip():
            yield line.strip()


def answer(
    answerer: Answerer, sides: Sequence[Side], text: str, arguments: argparse.Namespace
) -> None:
    """Print the answers to one text on stdout, the first one token by token.

    Raises: ValueError if the text makes no prompt; KeyboardInterrupt for Ctrl-C.
    """
    record = {"prompt": text}
    prompt = read_prompt(record, answerer.tokenizer, arguments.system, arguments.raw)
    _, is_stopped = answerer.show(prompt.ids, sides)
    if is_stopped:
        raise KeyboardInterrupt
