"""Count the tokens of a dataset and show which of them are trained on.

    minitune data --model DIR --data FILE [--max-length 2048] [--show 3]

The model folder needs config.json and the tokenizer only. Prints the numbers of samples, skipped
and truncated records, tokens and trained-on tokens. `--show N` prints the text of the first N
samples with [[ and ]] around the trained-on tokens.
"""

import argparse
from collections.abc import Sequence
from itertools import groupby

from minitune.checkpoints.safetensors_folder import resolve_model
from minitune.config.cli import CommandParser, run_command
from minitune.config.model_config import ModelConfig
from minitune.data.samples import Sample
from minitune.data.tokenize_dataset import TokenizedDataset, tokenize_dataset
from minitune.data.tokenizer import Tokenizer
from minitune.kernels.cross_entropy import IGNORE_INDEX

BEGIN_TRAINED, END_TRAINED = "[[", "]]"


def main(argv: Sequence[str] | None = None, program: str = "minitune data") -> int:
    """Run the command and return its exit code."""
    return run_command(program, _run, argv, program)


def _run(argv: Sequence[str] | None, program: str) -> None:
    arguments = _parser(program).parse_args(argv)
    folder = resolve_model(arguments.model)
    max_length = arguments.max_length
    if max_length is None:
        max_length = min(2048, ModelConfig.from_folder(folder).max_position_embeddings)
    tokenizer = Tokenizer.from_folder(folder)
    dataset = tokenize_dataset(arguments.data, tokenizer, max_length)
    print(counts(dataset))
    for number, sample in enumerate(dataset.samples[: arguments.show], 1):
        print(f"\n--- sample {number}\n{marked_text(sample, tokenizer)}")


def _parser(program: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=program, description="Count the tokens of a dataset and show which are trained on."
    )
    parser.add_argument(
        "--model", required=True, help="model folder, or org/name in the local Hugging Face cache"
    )
    parser.add_argument("--data", required=True, help="a JSONL file")
    parser.add_argument(
        "--max-length",
        type=int,
        help="longer samples are cut to this many tokens; "
        "default: 2048, or the model's limit if less",
    )
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="show the first N samples (default: 0)"
    )
    return parser


def counts(dataset: TokenizedDataset) -> str:
    """Return the numbers of a dataset, one labelled line each."""
    rows = (
        ("samples", len(dataset.samples)),
        ("skipped", dataset.skipped),
        ("truncated", dataset.truncated),
        ("tokens", dataset.samples.lengths.sum()),
        ("trained on", dataset.samples.targets.sum()),
    )
    return "\n".join(f"{label:<11}{number:>12,}" for label, number in rows)


def marked_text(sample: Sample, tokenizer: Tokenizer) -> str:
    """Return the text of a sample with marks around the tokens that are trained on."""
    trained = [label != IGNORE_INDEX for label in sample.labels]
    trained[0] = False  # no token precedes the first one, so nothing predicts it
    text, end, shown = "", 0, 0
    for is_trained, run in groupby(trained):
        end += len(list(run))
        # The beginning is decoded again: a tokenizer may drop the space in front of a lone piece.
        decoded = tokenizer.decode(sample.input_ids[:end], skip_special_tokens=False)
        part = decoded[shown:]
        text += f"{BEGIN_TRAINED}{part}{END_TRAINED}" if is_trained else part
        shown = len(decoded)
    return text
