"""Generate text with a model, with or without an adapter; the answer appears as it is decoded.

minitune generate --model DIR --prompt "What is the capital of France?"
minitune generate --model runs/1                  a trained model; reads prompts until an empty line
minitune generate --model DIR --adapter runs/1    the same, with the base model named
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

from minitune.api import FastLanguageModel
from minitune.config.cli import CommandParser, bounded, print_notes, run_command
from minitune.config.numbers import whole
from minitune.config.training_config import DTYPES, MAX_SEQ_LENGTH, SEEDS
from minitune.data.text_streamer import TextStreamer
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.device import choose_device
from minitune.model.causal_lm import CausalLM
from minitune.model.sampling import BOUNDS
from minitune.progress import is_quiet, print_line
from minitune.streams import is_open, is_terminal, printable
from minitune.threads import use_free_cores


def main(argv: Sequence[str] | None = None, program: str = "minitune generate") -> int:
    """Run the command and return its exit code."""
    return run_command(program, _run, argv, program)


def _run(argv: Sequence[str] | None, program: str) -> None:
    arguments = _parser(program).parse_args(argv)
    use_free_cores(choose_device(arguments.device))
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
    prompts = typed_lines() if arguments.prompt is None else [arguments.prompt]
    for text in prompts:
        answer(model, tokenizer, text, arguments)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=program, description="Generate text with a model, with or without an adapter."
    )
    parser.add_argument(
        "--model",
        required=True,
        help="model folder, GGUF file, or org/name in the local Hugging Face cache; or the folder "
        "of a run or an adapter, with its base",
    )
    parser.add_argument("--adapter", help="folder of a run or an adapter, if --model is its base")
    parser.add_argument("--prompt", help="the prompt; default: lines from the terminal or a pipe")
    parser.add_argument("--system", help="a system message before the prompt")
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as it is, without the chat template"
    )
    parser.add_argument(
        "--max-seq-length",
        type=bounded(whole(1, MAX_SEQ_LENGTH)),
        help="prompt and answer together, in tokens (default: 2048)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=bounded(whole(1)),
        default=256,
        help="length of an answer (default: 256)",
    )
    parser.add_argument(
        "--temperature",
        type=bounded(BOUNDS["temperature"]),
        default=0.0,
        help="0 takes the likeliest token (default)",
    )
    parser.add_argument(
        "--top-p",
        type=bounded(BOUNDS["top_p"]),
        default=1.0,
        help="draw from the fewest tokens that reach this probability (default: 1.0)",
    )
    parser.add_argument(
        "--top-k",
        type=bounded(BOUNDS["top_k"]),
        default=0,
        help="draw from the likeliest tokens only; 0: all (default)",
    )
    parser.add_argument(
        "--seed", type=bounded(SEEDS), default=0, help="seed of the draws (default: 0)"
    )
    parser.add_argument(
        "--no-load-in-4bit",
        action="store_true",
        help="hold the linears in 16 bit; a GGUF file keeps its own types",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="compute dtype (default: by device, as in a training)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    return parser


def typed_lines() -> Iterator[str]:
    """Yield a terminal's lines until an empty one, or a pipe's lines except the empty ones.

    Raises: ValueError if stdin is closed.
    """
    if not is_open(sys.stdin):
        raise ValueError("stdin is closed, and there is no prompt; pass --prompt TEXT")
    terminal = is_terminal(sys.stdin)
    while True:
        if terminal and not is_quiet():
            print_line("> ", end="")
        line = sys.stdin.readline()
        if not line or (terminal and not line.strip()):
            return
        if line.strip():
            yield line.strip()


def answer(model: CausalLM, tokenizer: Tokenizer, text: str, arguments: argparse.Namespace) -> None:
    """Print the answer to one text on stdout, token by token."""
    if arguments.raw:
        prompt = tokenizer.encode(text)
    else:
        messages = [{"role": "user", "content": text}]
        if arguments.system:
            messages.insert(0, {"role": "system", "content": arguments.system})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    model.generate(
        [prompt],
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=0.0,
        repetition_penalty=1.0,
        eos_token_ids=tokenizer.eos_token_ids,
        seed=arguments.seed,
        streamer=AnswerPrinter(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )


class AnswerPrinter(TextStreamer):
    """A streamer whose stdout holds the results, so that a fault of stdout ends the command."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a stretch of text.

        Raises: OSError if stdout cannot be written.
        """
        print(printable(text, sys.stdout), end="\n" if stream_end else "", flush=True)
