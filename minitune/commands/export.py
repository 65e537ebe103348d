"""Write a trained model as GGUF for llama.cpp, or as a folder of safetensors for other libraries.

    minitune export --model runs/1 --output model.gguf             a run: its adapter and its base
    minitune export --model DIR --adapter runs/1 --merged merged/
    minitune export --model merged/ --output gguf/ --quantization-method q4_k_m q8_0
    minitune export --model DIR --output x.gguf --quantization-method iq4_xs --imatrix-from FILE
    minitune export --model DIR --output gguf/ --ollama            a Modelfile for Ollama too
    minitune export --model DIR --save-4bit DIR-nf4     the base in NF4, which loads at disk speed
    minitune export --model runs/1 --gguf-adapter adapter.gguf     the adapter alone, for --lora
    minitune export --model runs/1 --audit FILE --quantization-method q4_k_m q8_0

--audit prints a table of the ways to ship the adapter: how much of the fine-tune each keeps.
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
from minitune.checkpoints.adapter import NF4_BASE, read_base_form
from minitune.checkpoints.find_model import ModelSource, find_model
from minitune.checkpoints.merge import merge_text, merge_to_folder, merged_specs
from minitune.checkpoints.model_folder import check_new_folder
from minitune.checkpoints.resolve_model import is_gguf
from minitune.checkpoints.safetensors_writer import total_bytes
from minitune.checkpoints.save_4bit import save_4bit
from minitune.commands.export_flags import (
    check_adapter_flags,
    check_flags,
    export_parser,
    methods_of,
)
from minitune.commands.next_commands import after_audit, after_export
from minitune.config.cli import in_flags, print_notes, run_command
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.device import choose_device
from minitune.gguf.audit.audit_table import MergeAudit
from minitune.gguf.audit.merge_audit import DEFAULT_TOKENS as AUDIT_TOKENS
from minitune.gguf.audit.merge_audit import audit_merges
from minitune.gguf.base.load import open_base
from minitune.gguf.export import GGUFExport, plan_conversion, plan_export
from minitune.gguf.importance.imatrix_files import read_imatrix
from minitune.gguf.importance.importance import ImportanceMatrix
from minitune.gguf.importance.importance_collection import DEFAULT_TOKENS, importance_from_data
from minitune.gguf.lora_adapter import AdapterExport, plan_gguf_adapter
from minitune.language_model import LanguageModel
from minitune.progress import labelled, print_line


def main(argv: Sequence[str] | None = None, program: str = "minitune export") -> int:
    """Run the command and return its exit code."""
    return run_command(program, _run, argv, program)


def _run(argv: Sequence[str] | None, program: str) -> None:
    arguments = export_parser(program).parse_args(argv)
    exported = export(arguments)
    for path in exported.paths:
        print(path, flush=True)
    if exported.paths:
        text = after_export(program, exported.paths, exported.adapter)
    else:
        text = after_audit(program, arguments, exported.audit, exported.base)
    if text:
        print_line(text)


class Exported(NamedTuple):
    """The result of the command.

    paths: the files and folders that were written.
    base: folder or GGUF file of the base model.
    adapter: the adapter among the files, if there is one.
    audit: the audit that was printed, if there is one.
    """

    paths: list[Path]
    base: Path
    adapter: AdapterExport | None = None
    audit: MergeAudit | None = None


def export(arguments: argparse.Namespace) -> Exported:
    """Print the audit and write the files that the command line asks for.

    Raises: ValueError if the command line asks for nothing, or the model cannot be written.
    """
    check_flags(arguments)
    methods = methods_of(arguments)
    merge_base = arguments.merge_base
    output, merged, quantized = arguments.output, arguments.merged, arguments.save_4bit
    collects = arguments.imatrix_from is not None
    source = find_model(arguments.model, arguments.adapter)
    check_adapter_flags(arguments, source)
    config, stored = open_base(source.base)
    print_notes(config.notes)
    # Weights of few bits have no folder of 16-bit weights to read tensor by tensor.
    prequantized = is_gguf(source.base) or stored.prequantized
    use_nf4 = merge_base == "nf4" or quantized is not None
    if arguments.audit is not None and not is_gguf(source.base):
        use_nf4 |= _trained_on_nf4(source, merge_base)
    importance = None if arguments.imatrix is None else read_imatrix(arguments.imatrix)
    needs_model = source.adapter is not None or collects or prequantized or use_nf4
    if merged is None and not needs_model:
        # Tensor by tensor, without a model in memory.
        planned = plan_conversion(source.base, output, methods, importance)
        planned = planned.with_modelfiles() if arguments.ollama else planned
        return Exported(_write(planned, arguments), source.base)
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
    adapter = _plan_adapter(arguments, model, tokenizer, planned)
    if collects:
        importance = _collect(arguments, model, tokenizer)
        planned = None if output is None else plan(importance)
    audit = None if arguments.audit is None else _audit(arguments, model, tokenizer, importance)
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
    return Exported(paths, source.base, adapter, audit)


def _plan_adapter(
    arguments: argparse.Namespace,
    model: LanguageModel,
    tokenizer: Tokenizer,
    planned: GGUFExport | None,
) -> AdapterExport | None:
    """Return the export of --gguf-adapter, or None without the flag.

    planned: the merged GGUF files of the same command.

    Raises: ValueError if llama.cpp cannot use the adapter, or a file exists.
    """
    if arguments.gguf_adapter is None:
        return None
    adapter = plan_gguf_adapter(model, arguments.gguf_adapter, tokenizer, ollama=arguments.ollama)
    if planned is not None and adapter.target in planned.targets:
        raise ValueError(f"{adapter.target}: --output and --gguf-adapter name the same file")
    return adapter


def _collect(
    arguments: argparse.Namespace, model: LanguageModel, tokenizer: Tokenizer
) -> ImportanceMatrix:
    """Return the importance matrix on the samples of --imatrix-from, and print a line on it."""
    data, limit = arguments.imatrix_from, arguments.imatrix_tokens or DEFAULT_TOKENS
    importance = importance_from_data(model, tokenizer, data, limit, progress=True)
    print_line(labelled("imatrix", importance))
    return importance


def _audit(
    arguments: argparse.Namespace,
    model: LanguageModel,
    tokenizer: Tokenizer,
    importance: ImportanceMatrix | None,
) -> MergeAudit:
    """Print the audit on the samples of --audit, and return it."""
    methods = methods_of(arguments)
    data, limit = arguments.audit, arguments.audit_tokens or AUDIT_TOKENS
    audit = audit_merges(model, tokenizer, data, methods, limit, importance, progress=True)
    print(audit, flush=True)
    return audit


def _trained_on_nf4(source: ModelSource, merge_base: str) -> bool:
    """Return True if the adapter was trained on NF4 weights.

    If its file does not say, it was so if the merge base is NF4; a note says what is assumed.

    Raises: ValueError if the merge base contradicts the adapter's file.
    """
    form, wants_nf4 = read_base_form(source.adapter), merge_base == "nf4"
    if form is None:
        assumed = "NF4" if wants_nf4 else "16-bit"
        note = f"{source.adapter} does not say on which weights it was trained: taken is {assumed}"
        print_notes([note if wants_nf4 else f"{note}; for NF4 give --merge-base nf4"])
        return wants_nf4
    if wants_nf4 and form != NF4_BASE:
        raise ValueError(
            f"--merge-base nf4: {source.adapter} was not trained on NF4 weights, and --audit "
            "compares with the model as trained; leave --merge-base out"
        )
    return form == NF4_BASE


def _write(planned: GGUFExport, arguments: argparse.Namespace) -> list[Path]:
    """Write GGUF files and Modelfiles, and return their paths."""
    paths = planned.write(progress=True, verify=not arguments.no_verify)
    return [*paths, *planned.modelfiles]


def _load(
    arguments: argparse.Namespace, use_nf4: bool, prequantized: bool
) -> tuple[LanguageModel, Tokenizer]:
    """Return the model with its adapter, and the tokenizer with the adapter's chat template."""
    # 16-bit weights stay in their files until they are merged one at a time, so the CPU suffices.
    # A GPU is faster at quantising to NF4 first, and at dequantising weights of few bits. FP8
    # weights would take twice the memory in float32, and a merge reads them again. An importance
    # matrix and an audit take forward passes.
    computes = arguments.imatrix_from is not None or arguments.audit is not None
    return FastLanguageModel.from_pretrained(
        arguments.model,
        max_seq_length=None,
        dtype=None if use_nf4 or prequantized or computes else torch.bfloat16,
        load_in_4bit=use_nf4,
        device=None if use_nf4 or prequantized or computes else "cpu",
        adapter=arguments.adapter,
    )
