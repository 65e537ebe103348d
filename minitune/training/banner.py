"""The banner of a run: model, adapter, data, steps and files, before the first step."""

from dataclasses import dataclass
from pathlib import Path

from minitune.config.sft_config import SFTConfig
from minitune.config.visible_text import on_one_line
from minitune.data.tokenize_dataset import TokenizedDataset
from minitune.model.activations import SaveLevel
from minitune.model.causal_lm import CausalLM
from minitune.progress import labelled_rows
from minitune.threads import threads_text
from minitune.training.checkpoint import RunSize

SAVED_ACTIVATIONS = {
    None: "saved as memory allows",
    SaveLevel.INPUT: "recomputed",
    SaveLevel.ALL: "saved",
}
# GPU memory of a trainable parameter: value 4, gradient 4, two moments 8 or 2.03 bytes.
BYTES_PER_PARAMETER = {"adamw_8bit": "10.03"}
DEFAULT_BYTES_PER_PARAMETER = "16"
MAX_NOTES = 5  # lines of notes on a dataset


@dataclass(frozen=True)
class RunSummary:
    """The facts of a run that the banner prints, beside those of model and data.

    size: the length of the run.
    max_length: tokens of the longest sample, or with packing of a row.
    micro_step_tokens: tokens of one forward/backward at most.
    output: the run folder, or None.
    done: optimizer steps done before.
    source: the checkpoint that the run continues from, or None.
    """

    args: SFTConfig
    size: RunSize
    max_length: int
    micro_step_tokens: int
    output: Path | None
    done: int = 0
    source: Path | None = None


def banner(model: CausalLM, datasets: dict[str, TokenizedDataset], run: RunSummary) -> str:
    """Return lines that describe model, adapter, data and run.

    datasets: each dataset of the run by its label.
    """
    return labelled_rows(banner_rows(model, datasets, run))


def banner_rows(
    model: CausalLM, datasets: dict[str, TokenizedDataset], run: RunSummary
) -> list[tuple[str, str]]:
    """Return the lines of the banner as (label, text).

    datasets: each dataset of the run by its label; {} leaves the lines on data out.
    """
    data_rows = [row for label, data in datasets.items() for row in _data_rows(label, data)]
    notes = [("note", note) for note in model.config.notes]
    rows = [*_model_rows(model), *notes, *data_rows, *_run_rows(run)]
    if dropout := model.lora_dropout:  # of an adapter that was loaded
        text = f"the adapter was trained with lora_dropout {dropout}, which is not applied here"
        rows.append(("warning", text))
    return rows


def _model_rows(model: CausalLM) -> list[tuple[str, str]]:
    """Return the lines on the model, its adapter and how it computes, as (label, text)."""
    total = model.num_parameters()
    trainable = sum(p.numel() for _, p in model.trainable_parameters())
    lora = model.lora
    saved = SAVED_ACTIVATIONS.get(model.planner.level, "saved in part")
    device = str(model.device)
    if model.device.type != "cuda":
        attention = "reference (PyTorch)"
        device += f", {threads_text()}"
    elif model.layer_context.attention == "triton":
        attention = "triton"
    else:
        attention = "triton, or cuDNN for long samples of one length"
    return [
        (
            "model",
            f"{model.name}: {total / 1e6:,.1f} M parameters, {storage_bytes(model) / 1e6:,.0f} MB, "
            f"linears {model.formats_text}",
        ),
        (
            "adapter",
            f"{trainable / 1e6:,.2f} M trainable ({100 * trainable / total:.2f}%), r {lora.r}, "
            f"lora_alpha {lora.lora_alpha:g}, on {' '.join(lora.target_modules)}",
        ),
        (
            "compute",
            f"{device}, {str(model.dtype).removeprefix('torch.')}, attention {attention}, "
            f"activations {saved}",
        ),
    ]


def storage_bytes(model: CausalLM) -> int:
    """Return the bytes of the base model's weights as stored; tied weights count once."""
    adapter = {id(p) for _, p in model.adapter_parameters()}
    base = [p for p in model.parameters() if id(p) not in adapter]
    modules = [module for module in model.modules() if getattr(module, "quantized", None)]
    quantized = {id(module.quantized): module.quantized.nbytes for module in modules}
    return sum(p.nbytes for p in base) + sum(quantized.values())


def _data_rows(label: str, data: TokenizedDataset) -> list[tuple[str, str]]:
    """Return the lines on a dataset and the notes on its records, as (label, text)."""
    tokens, targets = data.samples.lengths.sum(), data.samples.targets.sum()
    report = data.report
    text = f"{len(data.samples):,} samples"
    text += f" by data_weights, of {report.records:,} records:" if data.is_weighted else ","
    text += (
        f" {data.skipped:,} skipped (no token to train on), {data.truncated:,} truncated; "
        f"{tokens:,} tokens, {targets:,} trained on"
    )
    if data.is_cached:
        text += "; read from the cache"
    if report.bad.count:
        text += f"; {report.bad.count:,} bad records left out"
    notes = [
        f"{note} ({found.count:,} of {report.records:,} records, first {found.origins[0]})"
        for note, found in report.notes.items()
    ]
    if report.bad.count:
        notes.insert(0, f"left out: {report.bad.origins[0]}")
    if len(notes) > MAX_NOTES:
        hidden = len(notes) - MAX_NOTES + 1
        notes[MAX_NOTES - 1 :] = [f"{hidden} more notes: `minitune data show` lists them"]
    return [(label, text), *(("note", on_one_line(note)) for note in notes)]


def _run_rows(run: RunSummary) -> list[tuple[str, str]]:
    """Return the lines on steps, optimizer and output, as (label, text)."""
    args, size = run.args, run.size
    unit = f"rows of {run.max_length}" if args.packing else "samples"
    parameter_bytes = BYTES_PER_PARAMETER.get(args.optim, DEFAULT_BYTES_PER_PARAMETER)
    output = "nothing is written: the run has no folder" if run.output is None else str(run.output)
    if run.source:
        output += f", continued from {run.source.name} (step {run.done})"
    rows = [
        (
            "steps",
            f"{size.total_steps:,} optimizer steps of {size.units_per_step} {unit}, "
            f"{size.steps_per_epoch:,} an epoch; at most {run.micro_step_tokens:,} tokens "
            "a forward/backward",
        ),
        (
            "optimizer",
            f"AdamW, {args.learning_rate:g}, {args.lr_scheduler_type}; "
            f"{parameter_bytes} bytes a trainable parameter",
        ),
        ("output", output),
    ]
    if run.source and run.done == size.total_steps:
        text = f"{run.source.name} is of the last step: nothing is left to train"
        rows.append(("note", text))
    return rows
