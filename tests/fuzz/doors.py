"""The doors that a mutant goes through, because faults hide behind loads that succeed.

Each function raises the error that a user would see. A command that ends with code 2 raises its
line as a ValueError.
"""

import argparse
import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import torch

from minitune import FastLanguageModel, get_chat_template
from minitune.commands.data import main as data_command
from minitune.commands.export import main as export_command
from minitune.commands.export_flags import check_flags, export_parser, methods_of
from minitune.commands.generate import main as generate_command
from minitune.commands.plan import main as plan_command
from minitune.commands.report import main as report_command
from minitune.commands.train import main as train_command
from minitune.config.cli import parse
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.data.tokenize_dataset import tokenize_dataset
from minitune.gguf.export import plan_conversion
from minitune.gguf.importance.imatrix_files import read_imatrix

TEXTS = ["a blue lamp", "", "  3.5 Grüße\n\n日本 🦙 <|im_end|> x</s>", "we'll they'RE <tool> 12345"]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one lamp to Köln"},
    {"role": "assistant", "content": "one lamp"},
]


def load(name: Path, rng: Random, adapter: Path | None = None):
    """Return model and tokenizer of a folder or file."""
    return FastLanguageModel.from_pretrained(
        name,
        max_seq_length=rng.choice((64, None)),
        dtype="float32",
        load_in_4bit=rng.random() < 0.2,
        device="cpu",
        adapter=adapter,
    )


def load_and_use(name: Path, rng: Random, adapter: Path | None = None) -> None:
    """Load a model, tokenize texts and a conversation, and compute a loss; sometimes more."""
    model, tokenizer = load(name, rng, adapter)
    ids = use_tokenizer(tokenizer)
    ids = torch.tensor([(ids or [5, 6, 7])[:60]])
    kind = rng.randrange(8)
    if kind == 0 and model.lora is None:
        FastLanguageModel.get_peft_model(model, r=2)
    loss = model(input_ids=ids, labels=ids).loss
    if kind == 0:
        loss.backward()
    if kind == 1:
        model.generate(input_ids=ids[:, :5], max_new_tokens=2, do_sample=rng.random() < 0.5)
    if kind == 2 and model.lora is not None:
        model.save_pretrained("saved")
        model.save_pretrained_merged("merged", tokenizer)


def use_tokenizer(tokenizer: Tokenizer) -> list[int]:
    """Tokenize texts and a conversation, decode them, and return the ids of the conversation."""
    for text in TEXTS:
        tokenizer.decode(tokenizer.encode(text))
    if tokenizer.chat_template is None:
        return tokenizer.encode(TEXTS[0])
    tokenizer.apply_chat_template(MESSAGES[:2], tokenize=False, add_generation_prompt=True)
    ids = tokenizer.apply_chat_template(MESSAGES)
    tokenizer.decode(ids, skip_special_tokens=True)
    return ids


def set_template(folder: Path, text: str) -> None:
    """Give a tokenizer a template as a user does, and tokenize with it."""
    tokenizer = Tokenizer.from_folder(folder)
    get_chat_template(tokenizer, (text, "<|im_end|>"))
    use_tokenizer(tokenizer)


def command(main: Callable[..., int], *arguments: object) -> None:
    """Run a command; raise its error line as ValueError, and SystemExit for another exit code."""
    with contextlib.redirect_stderr(io.StringIO()) as lines:
        code = main([str(argument) for argument in arguments])
    if code == 2:
        raise ValueError(lines.getvalue().strip())
    if code:
        raise SystemExit(f"exit code {code}: {lines.getvalue()}")


def show_data(model: Path, data: Path, rng: Random) -> None:
    """Tokenize a data file and show its samples, sometimes as a page."""
    page = "page.html"
    choices = [], ["--skip-bad"], ["--dropped-text", "warn"], ["--no-split-turns"], ["--html", page]
    flags = rng.choice(choices)
    count = rng.choice((1, 2))
    arguments = ["show", "--model", model, "--data", data, "--n", count, *flags]
    command(data_command, *arguments, "--max-seq-length", 64)


def generate(model: Path) -> None:
    """Answer a prompt from the command line."""
    arguments = ["--model", model, "--prompt", "a lamp", "--max-new-tokens", 2, "--device", "cpu"]
    command(generate_command, *arguments, "--no-load-in-4bit")


def resume(run: Path, data: Path) -> None:
    """Continue a run for one more step."""
    arguments = ["--config", run / "config.toml", "--resume", "--output-dir", run]
    command(train_command, *arguments, "--data", data, "--max-steps", 3, "--device", "cpu")


def overwrite(run: Path, model: Path, data: Path) -> None:
    """Replace a run by one of one step."""
    arguments = ["--model", model, "--data", data, "--output-dir", run, "--overwrite", "--r", 2]
    command(train_command, *arguments, "--max-steps", 1, "--device", "cpu", "--no-load-in-4bit")


def report(run: Path, output: Path) -> None:
    """Write the page of a run."""
    command(report_command, run, "--output", output)


def convert(folder: Path, output: Path, method: str, imatrix: Path | None = None) -> None:
    """Write a folder as a GGUF file, without the check of the file."""
    importance = None if imatrix is None else read_imatrix(imatrix)
    planned = plan_conversion(folder, output, [method], importance)
    planned.write(progress=False, verify=False)


def export(model: Path, output: Path) -> None:
    """Write a model or an adapter from the command line."""
    command(export_command, "--model", model, "--output", output, "--no-verify")


def parse_command(words: Sequence[str], name: str) -> None:
    """Parse a command line; a plan is computed too."""
    if name == "plan":
        command(plan_command, *words)
    elif name == "export":
        arguments: argparse.Namespace = export_parser("minitune export").parse_args(words)
        check_flags(arguments)
        methods_of(arguments)
    elif name == "data":
        command(data_command, "show", *words)
    elif name == "generate":
        command(generate_command, *words)
    else:
        parse(words)


def read_tokens(cache: Path, model: Path, data: Path) -> None:
    """Read a data set through a cache, and compare it with the records' tokens.

    Raises: AssertionError if the cache gives other tokens.
    """
    tokenizer = Tokenizer.from_folder(model)
    found = tokenize_dataset(data, tokenizer, 60, cache=cache)
    expected = tokenize_dataset(data, tokenizer, 60)
    assert list(found.samples) == list(expected.samples), "other tokens"
    assert found.report == expected.report, f"{found.report} instead of {expected.report}"
