"""The flags of the export command, and the checks of flags that do not belong together."""

import argparse
from pathlib import Path

from minitune.checkpoints.find_model import ModelSource
from minitune.config.cli import CommandParser, bounded, flag_of, split_items
from minitune.config.numbers import whole
from minitune.config.training_config import GGUF_WORDS, MERGE_BASES
from minitune.gguf.audit.merge_audit import DEFAULT_TOKENS as AUDIT_TOKENS
from minitune.gguf.importance.importance_collection import DEFAULT_TOKENS

DEFAULT_METHOD = "q8_0"
# The flags that name a result
RESULTS = ("output", "merged", "gguf_adapter", "save_4bit", "audit")


def export_parser(program: str) -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    parser = CommandParser(
        prog=program,
        description="Write a model, with its adapter merged in, as GGUF or safetensors.",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="model folder, GGUF file, or org/name in the local Hugging Face cache; or the folder "
        "of a run or an adapter, with its base",
    )
    parser.add_argument(
        "--adapter", type=Path, help="folder of the run or the adapter to merge into --model"
    )
    parser.add_argument(
        "--output", type=Path, help="GGUF file (ending in .gguf), or a folder for one or several"
    )
    parser.add_argument(
        "--quantization-method",
        nargs="+",
        metavar="TYPE",
        help=f"types of the GGUF files: {', '.join(GGUF_WORDS)} (default: {DEFAULT_METHOD})",
    )
    _add_imatrix_flags(parser)
    parser.add_argument(
        "--ollama", action="store_true", help="write a Modelfile beside each GGUF file"
    )
    parser.add_argument("--merged", type=Path, help="folder for merged 16-bit safetensors")
    parser.add_argument(
        "--gguf-adapter",
        type=Path,
        metavar="FILE",
        help="GGUF file (or folder) for the adapter alone, which llama.cpp adds to a base with "
        "--lora",
    )
    parser.add_argument(
        "--save-4bit", type=Path, help="folder for the model in NF4, in bitsandbytes' layout"
    )
    parser.add_argument(
        "--merge-base",
        choices=MERGE_BASES,
        default="auto",
        help="weights to merge into; auto: the original ones if the model folder holds them",
    )
    _add_audit_flags(parser)
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="give GGUF files their names without reading them back",
    )
    return parser


def _add_imatrix_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the importance matrix."""
    imatrix = parser.add_mutually_exclusive_group()
    imatrix.add_argument(
        "--imatrix",
        type=Path,
        metavar="FILE",
        help="importance matrix of llama-imatrix, which the quantised types use",
    )
    imatrix.add_argument(
        "--imatrix-from",
        nargs="+",
        metavar="DATA",
        help="collect the importance matrix on the samples of these data files",
    )
    parser.add_argument(
        "--imatrix-tokens",
        type=bounded(whole()),
        metavar="N",
        help=f"tokens of --imatrix-from to use (default: {DEFAULT_TOKENS})",
    )


def _add_audit_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the merge audit."""
    parser.add_argument(
        "--audit",
        nargs="+",
        metavar="DATA",
        help="print how much of the fine-tune each way to ship it keeps, on the samples of these "
        "held-out data files; without --output nothing is written",
    )
    parser.add_argument(
        "--audit-tokens",
        type=bounded(whole()),
        metavar="N",
        help=f"tokens of --audit to use (default: {AUDIT_TOKENS})",
    )


def methods_of(arguments: argparse.Namespace) -> list[str]:
    """Return the types of the GGUF files to write or to audit."""
    return split_items(arguments.quantization_method or [DEFAULT_METHOD])


def check_flags(arguments: argparse.Namespace) -> None:
    """Raise ValueError if the flags ask for nothing, or do not belong together."""
    if all(getattr(arguments, name) is None for name in RESULTS):
        raise ValueError(
            "nothing to write: give --output for a GGUF file, --merged for a 16-bit folder, "
            "--save-4bit for one in NF4, --gguf-adapter for the adapter as a GGUF file, or "
            "--audit to compare them without writing"
        )
    if arguments.output is arguments.audit is None:
        for name in ("imatrix", "imatrix_from", "quantization_method"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"{flag_of(name)} needs --output or --audit: GGUF types use it")
        if arguments.merge_base != "auto" and arguments.merged is None:
            raise ValueError(
                f"--merge-base {arguments.merge_base} needs --output, --merged or --audit: nothing "
                "else is merged"
            )
    if arguments.ollama and arguments.output is arguments.gguf_adapter is None:
        raise ValueError(
            "--ollama needs --output or --gguf-adapter: it writes a Modelfile beside each GGUF file"
        )
    for flag, data in (("imatrix_tokens", "imatrix_from"), ("audit_tokens", "audit")):
        tokens = getattr(arguments, flag)
        if tokens is not None and (getattr(arguments, data) is None or tokens < 1):
            raise ValueError(
                f"{flag_of(flag)} {tokens}: expected at least 1, together with {flag_of(data)}"
            )


def check_adapter_flags(arguments: argparse.Namespace, source: ModelSource) -> None:
    """Raise ValueError if a result needs an adapter and has none, or would lose it."""
    if arguments.gguf_adapter is not None and source.adapter is None:
        raise ValueError(
            f"--gguf-adapter writes an adapter, and {arguments.model} has none; give the folder of "
            "a run or an adapter as --model or --adapter"
        )
    if arguments.audit is not None and source.adapter is None:
        raise ValueError(
            f"--audit measures a fine-tune, and {arguments.model} has no adapter; give the folder "
            "of a run or an adapter as --model or --adapter"
        )
    if arguments.save_4bit is not None and source.adapter is not None:
        raise ValueError(
            "--save-4bit writes the model without an adapter; write --merged first, and then "
            "--save-4bit with the merged folder as --model"
        )
