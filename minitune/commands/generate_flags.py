"""The flags of `minitune generate`, and their checks before a model is loaded."""

import argparse
from typing import Any

from minitune.config.cli import CommandParser, bounded
from minitune.config.numbers import whole
from minitune.config.training_config import DTYPES, MAX_SEQ_LENGTH, SEEDS
from minitune.model.generation_arguments import sampling_config
from minitune.model.sampling import BOUNDS

DESCRIPTION = (
    "Generate text with a model, with or without an adapter: a chat in a terminal, the answer to "
    "one prompt, to each line of a pipe, or to each record of a file."
)
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
OF_FILES = ("answer_field", "chunk_size", "logprobs", "overwrite", "resume", "output")
CHUNK_SIZE = 256  # prompts


def parse_arguments(argv: Any, program: str) -> argparse.Namespace:
    """Return the values of the flags.

    Raises: ValueError if a flag is wrong, or does not fit the others.
    """
    parser = CommandParser(prog=program, description=DESCRIPTION)
    _add_model_flags(parser)
    _add_prompt_flags(parser)
    _add_sampling_flags(parser)
    _add_file_flags(parser)
    arguments = parser.parse_args(argv)
    _check(arguments, parser, program)
    return arguments


def sampling_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `model.generate` that the flags set."""
    names = (*SAMPLING, "max_new_tokens", "num_return_sequences", "seed")
    return {name: getattr(arguments, name) for name in names}


def _check(arguments: argparse.Namespace, parser: argparse.ArgumentParser, program: str) -> None:
    """Raise ValueError if flags do not fit together."""
    sampling_config(None, {name: getattr(arguments, name) for name in SAMPLING}, {})
    if arguments.num_return_sequences > 1 and not arguments.temperature:
        raise ValueError(
            "at temperature 0 all answers to a prompt are the same one; pass "
            f"{program} --num-return-sequences N --temperature 1"
        )
    if arguments.raw and arguments.system is not None:
        raise ValueError(
            f"{program} --raw continues a text without the chat template, so nothing holds the "
            "system message of --system; leave one of them out"
        )
    if arguments.input is None:
        given = [name for name in OF_FILES if getattr(arguments, name) != parser.get_default(name)]
        if given:
            flag = f"--{given[0].replace('_', '-')}"
            example = f"{program} --input FILE --output FILE"
            if flag != "--output":
                example = f"{example} {flag}"
            raise ValueError(f"{flag} belongs to a file of prompts: {example}")
    elif arguments.output is None:
        raise ValueError(f"--output is missing: {program} --input FILE --output ANSWERS.jsonl")
    elif arguments.prompt is not None:
        raise ValueError("--prompt and --input exclude each other")
    elif arguments.stats:
        raise ValueError("--stats is for answers on a terminal; a file has a progress bar")


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        help="model folder, GGUF file, or org/name in the local Hugging Face cache; or the folder "
        "of a run or an adapter, with its base",
    )
    parser.add_argument("--adapter", help="folder of a run or an adapter, if --model is its base")
    parser.add_argument(
        "--max-seq-length",
        type=bounded(whole(1, MAX_SEQ_LENGTH)),
        help="prompt and answer together, in tokens (default: 2048)",
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


def _add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", help="the prompt; default: a chat in a terminal, or the lines of a pipe"
    )
    parser.add_argument("--system", help="a system message before the prompt")
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as it is, without the chat template"
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="answer with the adapter and without it, from one call; in a chat also /adapter both",
    )
    parser.add_argument(
        "--show-special-tokens",
        action="store_true",
        help="show special tokens in the answers; in a chat also the prompt as the model sees it",
    )
    parser.add_argument(
        "--stats", action="store_true", help="print tokens, speed and used context on stderr"
    )


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    def add(name: str, default: Any, bounds: Any, text: str) -> None:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(
            flag, type=bounded(bounds), default=default, help=f"{text} (default: {default})"
        )

    add("max_new_tokens", 256, whole(1), "length of an answer")
    add("temperature", 0.0, BOUNDS["temperature"], "0 takes the likeliest token")
    top_p = "draw from the fewest tokens that reach this probability"
    add("top_p", 1.0, BOUNDS["top_p"], top_p)
    add("top_k", 0, BOUNDS["top_k"], "draw from this many of the likeliest tokens; 0: all")
    min_p = "draw from tokens with this share of the likeliest one's probability; 0: all"
    add("min_p", 0.0, BOUNDS["min_p"], min_p)
    penalty = "above 1, tokens of the prompt and the answer become less likely"
    add("repetition_penalty", 1.0, BOUNDS["repetition_penalty"], penalty)
    add("num_return_sequences", 1, whole(1), "answers to each prompt, except in a chat")
    add("seed", 0, SEEDS, "seed of the draws")
    parser.add_argument(
        "--stop-strings",
        nargs="+",
        metavar="TEXT",
        help="end an answer at one of these texts too, which stays in the answer",
    )


def _add_file_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        metavar="FILE",
        help="a file of prompts: .txt with one a line, or records with prompt, messages, "
        "conversations or instruction, as .jsonl, .json, .csv or .parquet; needs --output",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="JSONL: each record of the input with its answer"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --output")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the answers of a run that was stopped"
    )
    parser.add_argument(
        "--answer-field", default="answer", help="key of an answer in --output (default: answer)"
    )
    parser.add_argument(
        "--logprobs",
        action="store_true",
        help="write the token ids of an answer and their log-probabilities too",
    )
    parser.add_argument(
        "--chunk-size",
        type=bounded(whole(1)),
        default=CHUNK_SIZE,
        help="prompts of one call; a run that is killed repeats at most so many "
        f"(default: {CHUNK_SIZE})",
    )
