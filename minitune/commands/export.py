"""Write a trained model as GGUF for llama.cpp, or as a folder of safetensors for other libraries.

    minitune export --model runs/1 --output model.gguf             a run: its adapter and its base
    minitune export --model DIR --adapter runs/1 --merged merged/
    minitune export --model merged/ --output gguf/ --quantization-method q4_k_m q8_0
    minitune export --model DIR --output x.gguf --quantization-method iq4_xs --imatrix-from FILE
    minitune export --model DIR --output gguf/ --ollama            a Modelfile for Ollama too
    minitune export --model DIR --save-4bit DIR-nf4     the base in NF4, which loads at disk speed
    minitune export --model runs/1 --gguf-adapter adapter.gguf     the adapter alone, for --lora

Without an adapter the model itself is written. --save-4bit takes no adapter, because an adapter
does not change its base. To have both in 4 bit, write --merged first and give that folder as
--model.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from minitune.api import FastLanguageModel
from minitune.checkpoints.find_model import ModelSource, find_model
from minitune.checkpoints.merge import merge_text, merge_to_folder, merged_specs
from minitune.checkpoints.model_folder import check_new_folder
from minitune.checkpoints.resolve_model import is_gguf
from minitune.checkpoints.safetensors_writer import total_bytes
from minitune.checkpoints.save_4bit import save_4bit
from minitune.commands.next_commands import after_export
from minitune.config.cli import CommandParser, in_flags, print_notes, run_command, split_items
from minitune.config.training_config import GGUF_WORDS, MERGE_BASES
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.device import choose_device
from minitune.gguf.export import GGUFExport, plan_conversion, plan_export
from minitune.gguf.imatrix_files import read_imatrix
from minitune.gguf.importance import ImportanceMatrix
from minitune.gguf.importance_collection import DEFAULT_TOKENS, importance_from_data
from minitune.gguf.load import open_base
from minitune.gguf.lora_adapter import AdapterExport, plan_gguf_adapter
from minitune.language_model import LanguageModel
from minitune.progress import labelled, print_line

RESULTS = ("output", "merged", "gguf_adapter", "save_4bit")  # the flags that name a file or folder


def main(argv: Sequence[str] | None = None, program: str = "minitune export") -> int:
    """Run the command and return its exit code."""
    return run_command(program, _run, argv, program)


def _run(argv: Sequence[str] | None, program: str) -> None:
    exported = export(_parser(program).parse_args(argv))
    for path in exported.paths:
        print(path, flush=True)
    if text := after_export(program, exported.paths, exported.adapter):
        print_line(text)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=program,
        description="Write a model, with its adapter merged in, as GGUF or safetensors.",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="model folder, or org/name in the local Hugging Face cache; or the folder of a run or "
        "an adapter, with its base",
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
        default=["q8_0"],
        metavar="TYPE",
        help=f"types of the GGUF files: {', '.join(GGUF_WORDS)} (default: q8_0)",
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
        type=int,
        metavar="N",
        help=f"tokens of --imatrix-from to use (default: {DEFAULT_TOKENS})",
    )


class Exported(NamedTuple):
    """The result of the command.

    paths: the files and folders that were written.
    adapter: the adapter among them, if there is one.
    """

    paths: list[Path]
    adapter: AdapterExport | None = None


def export(arguments: argparse.Namespace) -> Exported:
    """Write the files that the command line asks for.

    Raises: ValueError if the command line asks for none, or the model cannot be written.
    """
    _check(arguments)
    methods, merge_base = split_items(arguments.quantization_method), arguments.merge_base
    output, merged, quantized = arguments.output, arguments.merged, arguments.save_4bit
    collects = arguments.imatrix_from is not None
    source = find_model(arguments.model, arguments.adapter)
    _check_adapter(arguments, source)
    config, stored = open_base(source.base)
    print_notes(config.notes)
    # Weights of few bits have no folder of 16-bit weights to read tensor by tensor.
    prequantized = is_gguf(source.base) or stored.prequantized
    use_nf4 = merge_base == "nf4" or quantized is not None
    importance = None if arguments.imatrix is None else read_imatrix(arguments.imatrix)
    needs_model = source.adapter is not None or collects or prequantized or use_nf4
    if merged is None and not needs_model:
        # Tensor by tensor, without a model in memory.
        planned = plan_conversion(source.base, output, methods, importance)
        planned = planned.with_modelfiles() if arguments.ollama else planned
        return Exported(_write(planned, arguments))

    model, tokenizer = _load(arguments, use_nf4, prequantized)

    def plan(importance: ImportanceMatrix | None) -> GGUFExport:
        device = choose_device()
        planned = plan_export(
            model, output, tokenizer, methods, merge_base, importance=importance, device=device
        )
        return planned.with_modelfiles() if arguments.ollama else planned

    # Refusals come before anything is collected or written.
    for new_folder in filter(None, (merged, quantized)):
        check_new_folder(model, new_folder)
    planned = None if output is None else plan(importance)
    adapter = None
    if arguments.gguf_adapter is not None:
        adapter = plan_gguf_adapter(model, arguments.gguf_adapter)
    if collects:
        data, limit = arguments.imatrix_from, arguments.imatrix_tokens or DEFAULT_TOKENS
        importance = importance_from_data(model, tokenizer, data, limit, progress=True)
        print_line(labelled("imatrix", importance))
        planned = plan(importance)
    if merged is not None and planned is not None:
        planned.check_space({merged: total_bytes(merged_specs(model))})
    paths = []
    if merged is not None or planned is not None:
        print_line(labelled("merging", in_flags(merge_text(model, merge_base))))
    if merged is not None:
        paths.append(merge_to_folder(model, merged, tokenizer, merge_base, progress=True))
    if planned is not None:
        paths += _write(planned, arguments)
    if adapter is not None:
        paths += adapter.write(progress=True, verify=not arguments.no_verify)
    if quantized is not None:
        paths.append(save_4bit(model, quantized, tokenizer, progress=True))
    return Exported(paths, adapter)


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError if the flags ask for nothing, or do not belong together."""
    if all(getattr(arguments, name) is None for name in RESULTS):
        raise ValueError(
            "nothing to write: give --output for a GGUF file, --merged for a 16-bit folder, "
            "--save-4bit for one in NF4, or --gguf-adapter for the adapter as a GGUF file"
        )
    if arguments.output is None and (
        arguments.imatrix is not None or arguments.imatrix_from is not None or arguments.ollama
    ):
        raise ValueError(
            "--imatrix, --imatrix-from and --ollama need --output: GGUF files use them"
        )
    tokens = arguments.imatrix_tokens
    if tokens is not None and (arguments.imatrix_from is None or tokens < 1):
        raise ValueError(
            f"--imatrix-tokens {tokens}: expected at least 1, together with --imatrix-from"
        )


def _check_adapter(arguments: argparse.Namespace, source: ModelSource) -> None:
    """Raise ValueError if a result needs an adapter and has none, or would lose it."""
    if arguments.gguf_adapter is not None and source.adapter is None:
        raise ValueError(
            f"--gguf-adapter writes an adapter, and {arguments.model} has none; give the folder of "
            "a run or an adapter as --model or --adapter"
        )
    if arguments.save_4bit is not None and source.adapter is not None:
        raise ValueError(
            "--save-4bit writes the model without an adapter; write --merged first, and then "
            "--save-4bit with the merged folder as --model"
        )


def _write(planned: GGUFExport, arguments: argparse.Namespace) -> list[Path]:
    """Write GGUF files and Modelfiles, and return their paths."""
    paths = planned.write(progress=True, verify=not arguments.no_verify)
    return [*paths, *planned.modelfiles]


def _load(
    arguments: argparse.Namespace, use_nf4: bool, prequantized: bool
) -> tuple[LanguageModel, Tokenizer]:
    """Return the model with its adapter, and the tokenizer with the adapter's chat template."""
    # 16-bit weights stay in their files until they are merged one at a time, so the CPU suffices.
    # NF4 weights are quantised first, which a GPU does faster. FP8 weights would take twice the
    # memory in float32, and a merge reads them again. An importance matrix takes forward passes.
    collects = arguments.imatrix_from is not None
    return FastLanguageModel.from_pretrained(
        arguments.model,
        max_seq_length=None,
        dtype=None if use_nf4 or prequantized or collects else torch.bfloat16,
        load_in_4bit=use_nf4,
        device=None if use_nf4 or collects else "cpu",
        adapter=arguments.adapter,
    )
