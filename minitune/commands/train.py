"""Train a LoRA adapter on records of one or several files.

    minitune train --model DIR --data FILE --output-dir DIR [--max-steps 100 ...]
    minitune train --data a.jsonl b.parquet --data-weights 2 0.5 ...    several files
    minitune train --config run.toml --r 32             a TOML file; flags win over it
    minitune train --config DIR/config.toml --resume    continue an interrupted run
    minitune train --model runs/1 --data new.jsonl      train the adapter of a run further
    minitune train --eval-only --model runs/1           the loss on its evaluation data
    minitune train --score-answer FILE.py:FUNCTION ...  score answers to the evaluation data
    minitune train --plan --model DIR --memory-budget 24GiB    the same as `minitune plan`

The run folder holds adapter/, checkpoint-N/, metrics.jsonl, config.toml, run.json and outputs.json;
--merge and --gguf add the merged model, --report a page with the curves. Expected errors print one
line on stderr and exit with code 2.
Ctrl-C, SIGTERM and SIGHUP save, print how to continue, and exit with code 130, 143 or 129.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minitune.api import FastLanguageModel
from minitune.checkpoints.find_model import find_model
from minitune.checkpoints.merge import check_merge_base, merge_text
from minitune.checkpoints.resolve_model import is_gguf, resolve_model
from minitune.checkpoints.safetensors_folder import SafetensorsFolder
from minitune.checkpoints.safetensors_writer import specs_of_dtype, total_bytes
from minitune.commands.data import sample_texts
from minitune.commands.eval_only import eval_only
from minitune.commands.next_commands import after_training, command_line
from minitune.commands.plan import plan
from minitune.config.cli import Settings, flag_of, in_flags, parse, run_command
from minitune.config.model_config import ModelConfig
from minitune.config.model_shapes import shape_name
from minitune.config.training_config import GRADIENT_CHECKPOINTING, RunConfig
from minitune.data.inspector.token_display import first_samples
from minitune.data.sources.sources import check_first_records
from minitune.device import choose_device
from minitune.gguf.base.load import open_base
from minitune.gguf.export import check_gguf, gguf_file_names
from minitune.gguf.file_weights import FileWeights
from minitune.gguf.model_metadata import check_window
from minitune.gguf.writer import Content
from minitune.language_model import LanguageModel
from minitune.progress import is_quiet, labelled, print_line
from minitune.report.write_report import check_report_path, write_report
from minitune.sft_trainer import SFTTrainer
from minitune.threads import use_free_cores
from minitune.training import run_folder
from minitune.training.check_base import check_base, checked_samples, nothing_to_check
from minitune.training.check_models import (
    bytes_of_run,
    check_base_range,
    check_new_names,
    require_room,
)
from minitune.training.own_files import MERGED, REPORT
from minitune.training.score_functions import read_score
from minitune.training.write_models import write_models


class Demonstration(NamedTuple):
    """A demonstration that a script adds to the command as --demo."""

    defaults: dict[str, Any]  # of the settings, if --demo is given
    run: Callable[[Settings, Callable[[Settings], SFTTrainer]], None]  # takes `prepare` too


def main(
    argv: Sequence[str] | None = None,
    program: str = "minitune train",
    demonstration: Demonstration | None = None,
) -> int:
    """Run the command and return its exit code."""
    return run_command(program, _run, argv, program, demonstration)


def _run(argv: Sequence[str] | None, program: str, demonstration: Demonstration | None) -> None:
    if demonstration is None:
        settings = parse(argv, program)
    else:
        switches, defaults = ("demo", "plan", "eval_only"), demonstration.defaults
        settings = parse(argv, program, switches=switches, demo_defaults=defaults)
    if settings.plan:
        print(plan(settings, f"{program} --plan"))
    elif settings.eval_only:
        print(eval_only(settings, program))
    elif settings.demo:
        demonstration.run(settings, prepare)
    else:
        usage = f"{program} --model DIR --data FILE --output-dir DIR"
        if demonstration is not None:
            usage += ", or --demo"
        if settings.sft.resume and not settings.run.model:
            example = f"{program} --config runs/1/config.toml --resume"
            raise ValueError(f"--resume needs the settings of the run: {example}")
        for name in ("model", "data"):
            if not getattr(settings.run, name):
                raise ValueError(f"--{name} is missing: {usage}")
        for name in ("show", "check_base"):
            if is_quiet() and getattr(settings.run, name):
                raise ValueError(f"--quiet hides what {flag_of(name)} shows; leave one out")
        train(settings, program)


def train(settings: Settings, program: str) -> None:
    """Train, save the adapter, write the models that the settings ask for, and say what is next.

    program: the command as the user types it.
    """
    settings = with_found_model(settings)
    trainer, run = prepare(settings), settings.run
    merges = run.merge or run.gguf
    text = in_flags(merge_text(trainer.model, run.merge_base)) if merges else ""
    trainer.program = command_line(program, "train")
    trainer.train()
    if merges:
        print_line(labelled("merging", text))
    models = write_models(
        trainer.model,
        trainer.processing_class,
        trainer.output,
        run.merge,
        run.gguf,
        run.merge_base,
        progress=True,
    )
    report = [write_report(trainer.output)] if run.report else []
    for path in (*models, *report):
        print_line(f"{'saved':<11}{path}")
    print_line(after_training(program, trainer, run, models))


def with_found_model(settings: Settings) -> Settings:
    """Return the settings with the base as `model`, and the adapter to train further, if any.

    Raises: ValueError if the model or its adapter is missing.
    """
    run = settings.run
    try:
        resolve_model(run.model)
    except ValueError as error:
        if shape_name(run.model) is None:
            raise
        hint = "a plan knows the shape of this model, but training needs the folder of its weights"
        raise ValueError(f"{error}; {hint}") from None
    source = find_model(run.model, run.adapter)
    adapter = None if source.adapter is None else str(source.adapter)
    return settings._replace(run=replace(run, model=source.name, adapter=adapter))


def prepare(settings: Settings) -> SFTTrainer:
    """Check the settings, load the model, attach an adapter if it has none, and tokenize the data.

    Prints the first samples and the check of the base if the settings ask for them.

    Raises: ValueError if settings, model or data are wrong, or if the models of the run's end
        could not be written.
    """
    contents = _check(settings)
    run, lora, sft = settings.run, settings.lora, settings.sft
    score = read_score(sft.score_answer)
    checkpointing = GRADIENT_CHECKPOINTING[run.use_gradient_checkpointing]
    use_free_cores(choose_device(run.device))
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=run.model,
        max_seq_length=run.max_seq_length,
        dtype=getattr(torch, run.dtype) if run.dtype else None,
        load_in_4bit=run.load_in_4bit,
        device=run.device,
        offload_embedding=run.offload_embedding,
        use_gradient_checkpointing=checkpointing,
        adapter=run.adapter,
        progress=True,
    )
    if model.lora is None:
        model = FastLanguageModel.get_peft_model(
            model,
            r=lora.r,
            target_modules=lora.target_modules,
            lora_alpha=lora.lora_alpha,
            use_gradient_checkpointing=checkpointing,
            random_state=sft.seed if run.random_state is None else run.random_state,
            use_rslora=lora.use_rslora,
        )
    else:
        _check_same_lora(settings, model)
    trainer = SFTTrainer(
        model,
        sft,
        run.data,
        run.eval_data or None,
        tokenizer,
        run_config=run,
        score_answer=score,
    )
    trainer.by_command = True
    _check_loaded(trainer, contents)
    shown = first_samples(trainer.data.train.samples, tokenizer, run.show)
    for text in sample_texts(shown, sys.stderr):
        print_line(text)
    if run.check_base:
        _print_check(trainer)
    return trainer


def _check_same_lora(settings: Settings, model: LanguageModel) -> None:
    """Raise ValueError if a setting that the user gives differs from the adapter's.

    An adapter that is trained further keeps its settings.
    """
    wanted, own = settings.lora, model.lora
    targets = model.config.adapted_linears(wanted.target_modules)
    for name in ("r", "lora_alpha", "use_rslora", "target_modules"):
        value = targets if name == "target_modules" else getattr(wanted, name)
        if name in settings.given and value != getattr(own, name):
            raise ValueError(
                f"{name}={_python(value)} differs from the adapter's "
                f"{name}={_python(getattr(own, name))} in {settings.run.adapter}; an adapter that "
                "is trained further keeps its settings: leave this one out"
            )


def _python(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)


def _print_check(trainer: SFTTrainer) -> None:
    """Print the difference that NF4 makes to the base, or the reason why there is none."""
    if (reason := nothing_to_check(trainer.model)) is not None:
        rows = [("check", reason)]
    else:
        check = check_base(
            trainer.model, checked_samples(trainer.data.train.samples), progress=True
        )
        rows = [("check", str(check)), ("advice", check.advice)]
    for label, text in rows:
        print_line(labelled(label, in_flags(text)))


def _check(settings: Settings) -> list[Content]:
    """Check everything that can be found wrong before the model is loaded.

    Returns: the content of each GGUF file that the run writes at its end.

    Raises: ValueError that names the setting, the file or the record at fault.
    """
    run, sft = settings.run, settings.sft
    _check_score_settings(settings)
    base = resolve_model(run.model)
    data = [*run.data, *run.eval_data]
    names = gguf_file_names(run.model, base, run.gguf) if run.gguf else []
    if sft.output_dir is not None:
        new_names = [*names, *([MERGED] if run.merge else [])]
        needed = [base, *data, *([run.adapter] if run.adapter else [])]
        run_folder.check_output(sft.output_dir, sft.overwrite, sft.resume, needed, new_names)
    if run.report and sft.output_dir is not None:
        check_report_path(Path(sft.output_dir) / REPORT)
    check_new_names(sft.output_dir or run_folder.RUNS, names)
    for path in data:
        check_first_records(path)
    contents = check_gguf(run.model, base, run.gguf) if run.gguf else []
    if run.merge or run.gguf:
        config, stored = open_base(base)
        _check_merge_base(run, base, stored)
        require_room(sft, _bytes_of_models(run, config, contents))
    return contents


def _check_score_settings(settings: Settings) -> None:
    """Raise ValueError if answers would be scored at no evaluation, or by no function."""
    sft = settings.sft
    if sft.score_answer is not None and sft.eval_strategy == "no":
        raise ValueError("--score-answer scores answers at evaluations; give --eval-data")
    if sft.score_answer is None:
        for name in sorted(settings.flags & {"eval_answers", "eval_max_new_tokens"}):
            raise ValueError(f"{flag_of(name)} belongs to --score-answer; give that too")


def _check_merge_base(run: RunConfig, base: Path, stored: SafetensorsFolder | FileWeights) -> None:
    """Raise ValueError if the model will lack the weights that --merge-base names."""
    folder = None if is_gguf(base) else stored
    is_nf4 = folder is not None and (run.load_in_4bit or folder.prequantized)
    check_merge_base(run.merge_base, base, folder, is_nf4)


def _bytes_of_models(
    run: RunConfig, config: ModelConfig, contents: Sequence[Content]
) -> dict[str, int]:
    """Return words -> bytes of the models that a run writes at its end."""
    sizes = {"GGUF files": sum(content.nbytes for content in contents)}
    if run.merge:
        sizes["the merged model"] = total_bytes(
            specs_of_dtype(config.tensor_shapes(), torch.bfloat16)
        )
    return sizes


def _check_loaded(trainer: SFTTrainer, contents: Sequence[Content]) -> None:
    """Check what the first steps would show too late: lengths, range of the weights, disk.

    contents: of the GGUF files, from `_check`.

    Raises: ValueError if the models of the run's end cannot be written.
    """
    model, run, args = trainer.model, trainer.run_config, trainer.args
    if run.gguf:
        check_window(model.config, trainer.data.max_seqlen)
    if run.merge or run.gguf:
        check_base_range(model, run.merge_base, contents)
    needed = bytes_of_run(model, args, trainer.size) | _bytes_of_models(run, model.config, contents)
    require_room(args, needed)
