"""The part of `minitune train` that evaluates a model, with --eval-only.

minitune train --eval-only --model DIR --eval-data FILE    a base
minitune train --eval-only --model runs/1                  a run, on its own evaluation data
    minitune train --eval-only --config runs/1/config.toml     the same
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from minitune.api import FastLanguageModel
from minitune.checkpoints.find_model import ADAPTER, find_model
from minitune.config.cli import Settings, flag_of, print_notes, read_settings
from minitune.config.training_config import RunConfig
from minitune.data.samples import LabelOptions
from minitune.data.sources.sources import check_first_records
from minitune.device import choose_device
from minitune.threads import use_free_cores
from minitune.training.evaluation import evaluate
from minitune.training.own_files import CONFIG
from minitune.training.score_functions import read_score

# Settings that an evaluation takes from a run's config.toml unless the user gives them.
OF_THE_RUN = (
    "eval_data",
    "max_seq_length",
    "max_length",
    "load_in_4bit",
    "dtype",
    "offload_embedding",
    "skip_bad",
    *(item.name for item in fields(LabelOptions)),
)
# An evaluation alone has no folder and no best checkpoint.
OF_NO_RUN = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "greater_is_better": None,
    "output_dir": None,
}
OF_ANSWERS = ("eval_answers", "eval_max_new_tokens")
OF_THE_USER = (
    *("model", "adapter", "device", "micro_step_tokens", "disable_tqdm", "score_answer"),
    *OF_ANSWERS,
)


def eval_only(settings: Settings, program: str) -> str:
    """Return a line with the loss of a base, an adapter or a run. No file is written.

    program: the command as the user types it, for error messages.

    Raises: ValueError if the model or the evaluation data is missing or wrong.
    """
    usage = f"{program} --eval-only --model DIR --eval-data FILE"
    if unused := sorted(settings.flags - {*OF_THE_RUN, *OF_THE_USER}):
        raise ValueError(
            f"{flag_of(unused[0])} changes nothing in an evaluation; leave it out: {usage}"
        )
    if settings.sft.score_answer is None and (unused := sorted(settings.flags & {*OF_ANSWERS})):
        raise ValueError(f"{flag_of(unused[0])} belongs to --score-answer; give that too")
    model, adapter = settings.run.model, settings.run.adapter
    output = settings.sft.output_dir
    if output and not settings.flags & {"model", "adapter"} and (Path(output) / ADAPTER).is_dir():
        model, adapter = output, None  # --config is the config.toml of a finished run
    if model is None:
        raise ValueError(f"--model is missing: {usage}")
    source = find_model(model, adapter)
    settings = _with_settings_of_run(settings, source.adapter)
    run, sft = settings.run, replace(settings.sft, **OF_NO_RUN)
    score = read_score(sft.score_answer)
    if not run.eval_data:
        raise ValueError(f"--eval-data is missing: {usage}")
    for path in run.eval_data:
        check_first_records(path)
    use_free_cores(choose_device(run.device))
    model, tokenizer = FastLanguageModel.from_pretrained(
        source.name,
        max_seq_length=run.max_seq_length,
        dtype=getattr(torch, run.dtype) if run.dtype else None,
        load_in_4bit=run.load_in_4bit,
        device=run.device,
        offload_embedding=run.offload_embedding,
        adapter=source.adapter,
        progress=True,
    )
    print_notes((*model.config.notes, *tokenizer.notes))
    name = source.name if source.adapter is None else f"{source.name} with {source.adapter}"
    return f"{evaluate(model, run.eval_data, tokenizer, sft, score)}: {name}"


def _with_settings_of_run(settings: Settings, adapter: Path | None) -> Settings:
    """Return the settings, completed by the config.toml of the run that an adapter belongs to."""
    config = None if adapter is None else adapter.parent / CONFIG
    if config is None or not config.is_file():
        return settings
    own: dict[str, Any] = {
        name: value
        for name, value in read_settings(config).items()
        if name in OF_THE_RUN and name not in settings.given
    }
    of_run = {item.name for item in fields(RunConfig)}
    run = {name: value for name, value in own.items() if name in of_run}
    sft = {name: value for name, value in own.items() if name not in of_run}
    return settings._replace(run=replace(settings.run, **run), sft=replace(settings.sft, **sft))
