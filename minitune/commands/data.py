"""Show which tokens of a dataset are trained on, and the numbers to check before training.

    minitune data show --model DIR --data FILE [--n 5]    samples, then the summary
    minitune data show --config run.toml --html FILE      the same as one offline page
    minitune data --model DIR --data FILE                 the summary alone

A model folder needs config.json and the tokenizer only; a GGUF file holds both. In a terminal,
trained-on tokens are green (NO_COLOR turns colours off); elsewhere they stand between [[ and ]].
Bad lines are listed, and the exit code is then 2. The flags on records are those of `minitune
train`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TextIO

from minitune.atomic_files import atomic_write_text
from minitune.checkpoints.find_model import find_model
from minitune.config.cli import (
    Settings,
    bounded,
    in_flags,
    parse_flags,
    run_command,
    settings_from_flags,
    settings_parser,
)
from minitune.config.model_config import ModelConfig
from minitune.config.numbers import whole
from minitune.data.inspector.dataset_summary import summarize
from minitune.data.inspector.html_page import html_page
from minitune.data.inspector.summary_text import summary_text
from minitune.data.inspector.token_display import ShownSample, first_samples, sample_text
from minitune.data.samples import LabelOptions
from minitune.data.templates.adapter_template import load_template
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.base.model_files import model_files
from minitune.progress import print_line
from minitune.streams import is_terminal, printable
from minitune.training.run_data import read_datasets

DESCRIPTION = "Show which tokens of a dataset are trained on, and the numbers to check."
SHOWN_SAMPLES = 5
# The settings of a run that decide about its samples.
DATA_SETTINGS = (
    "model",
    "data",
    "max_seq_length",
    "max_length",
    "skip_bad",
    "data_weights",
    "seed",
    *(item.name for item in fields(LabelOptions)),
)


def main(argv: Sequence[str] | None = None, program: str = "minitune data") -> int:
    """Run the command and return its exit code."""
    return run_command(program, _run, sys.argv[1:] if argv is None else argv, program)


def _run(argv: Sequence[str], program: str) -> None:
    words = list(argv)
    quiet = [words.pop(0)] if words[:1] == ["--quiet"] else []  # it may stand before `show`
    shows_samples = words[:1] == ["show"]
    if "--show" in argv:
        raise ValueError(f"unknown argument --show; `{program} show --n 3` shows three samples")
    flags = parse_flags(_parser(program), quiet + words[shows_samples:])
    count = flags.pop("n", SHOWN_SAMPLES if shows_samples else 0)
    borders, page = flags.pop("tokens", False), flags.pop("html", None)
    if page is not None and Path(page).suffix not in (".html", ".htm"):
        raise ValueError(f"--html is {page}; expected a file name that ends in .html")
    settings = settings_from_flags(flags)
    for name in ("model", "data"):
        if not getattr(settings.run, name):
            raise ValueError(f"--{name} is missing: {program} show --model DIR --data FILE")
    _show(settings, count, borders, page)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = settings_parser(f"{program} [show]", DESCRIPTION, names=DATA_SETTINGS)
    parser.add_argument(
        "--n",
        type=bounded(whole()),
        metavar="N",
        help=f"show the first N samples (default: {SHOWN_SAMPLES}, without `show` 0)",
    )
    parser.add_argument(
        "--tokens", action="store_true", help="without colours, put a line between two tokens"
    )
    parser.add_argument("--html", metavar="FILE", help="write samples and summary as a page too")
    return parser


def _show(settings: Settings, count: int, borders: bool, page: str | None) -> None:
    run, source = settings.run, find_model(settings.run.model)
    folder = model_files(source.base)
    tokenizer = Tokenizer.from_folder(folder)
    if source.adapter is not None:
        load_template(tokenizer, source.adapter)
    limit = run.max_seq_length or ModelConfig.from_folder(folder).default_seq_length
    sft = replace(settings.sft, eval_strategy="no", output_dir=None)  # nothing is written there
    data = read_datasets(run.data, None, tokenizer, sft, max(limit, sft.max_length or 0))
    summary = summarize(data.train, tokenizer, data.max_length)
    samples = first_samples(data.train.samples, tokenizer, count)
    if page is not None:  # first: the reader of stdout may end the command
        subtitle = f"as {run.model} reads it, at most {data.max_length:,} tokens a sample"
        atomic_write_text(Path(page), html_page(", ".join(run.data), subtitle, summary, samples))
    text = summary_text(summary, wants_colour(sys.stdout))
    for line in (*sample_texts(samples, sys.stdout, borders), *map(in_flags, text.splitlines())):
        print(printable(line, sys.stdout))
    if page is not None:
        if sys.stdout is not None:
            sys.stdout.flush()
        print_line(f"saved {page}")


def sample_texts(
    samples: Sequence[ShownSample], stream: TextIO | None, borders: bool = False
) -> list[str]:
    """Return samples with their trained-on tokens, for a stream; each ends in an empty line.

    borders: put a line between two tokens if the stream has no colours.
    """
    return [sample_text(sample, wants_colour(stream), borders) + "\n" for sample in samples]


def wants_colour(stream: TextIO | None) -> bool:
    """Return True if a stream is a terminal and the user has not turned colours off."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")
