"""The run folder: what a run writes, which checkpoint it continues from, and what must not have changed meanwhile.

    OUTPUT/config.toml      every setting, resolved; a file for --config
    OUTPUT/metrics.jsonl    one JSON object a logging step or evaluation
    OUTPUT/checkpoint-N/    after N optimizer steps (checkpoint.py)
    OUTPUT/adapter/         the result, in PEFT's format
    OUTPUT/merged/          with --merge, base and adapter as one 16-bit model
    OUTPUT/NAME-TYPE.gguf   with --gguf, the same as one file

Nothing of an earlier run is replaced unless that was asked for, and files that no run wrote are never touched.
"""

import array
import hashlib
import shutil
import sys
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from minitune.atomic_files import atomic_folder, atomic_write_text, os_errors_as_value_error
from minitune.checkpoints.adapter import save_adapter
from minitune.checkpoints.merge import merge_to_folder
from minitune.checkpoints.safetensors_folder import resolve_model
from minitune.config.cli import as_dict, toml_text
from minitune.config.training_config import GGUF_METHODS, SFTConfig
from minitune.data.tokenize_dataset import Sample
from minitune.data.tokenizer import Tokenizer
from minitune.gguf.export import export_gguf, gguf_file_name
from minitune.model.causal_lm import CausalLM
from minitune.training import checkpoint
from minitune.training.optimizer import FlatAdamW

# What has to be the same for a resumed run to go on where it was, and what may differ with a warning.
SAME_ORDER = ("seed", "samples_per_step", "packing", "max_length", "data")
SAME_MATHEMATICS = (
    "model", "load_in_4bit", "dtype", "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio",
    "total_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
)  # fmt: skip


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # moved so far
    seconds: float = 0.0
    loss_sum: float = 0.0  # over all steps
    grad_norm: float = 0.0  # of the last step, before clipping
    unlogged: list[float] = field(
        default_factory=list
    )  # losses of the steps since the last metrics line

    @classmethod
    def read(cls, values: dict[str, Any], source: Path) -> "Progress":
        """From a checkpoint's state. ValueError names the file `source` where a value is missing or of another type."""
        for item in fields(cls):
            value, kind = values.get(item.name), type(getattr(cls(), item.name))
            if not isinstance(value, (int, float) if kind is float else kind):
                raise ValueError(
                    f"{source}: {item.name} is {value!r}; resume from another checkpoint"
                )
        return cls(**{item.name: values[item.name] for item in fields(cls)})


def fingerprint(samples: Sequence[Sample]) -> str:
    """A hash of every token and label, to recognise the data of a resumed run."""
    digest = hashlib.sha256()
    for sample in samples:
        for values in ([len(sample.input_ids)], sample.input_ids, sample.labels):
            digest.update(array.array("q", values).tobytes())
    return digest.hexdigest()[:16]


def checkpoints(output: str | Path) -> list[Path]:
    """The checkpoint-N folders of a run, oldest first."""
    found = [
        p
        for p in Path(output).glob("checkpoint-*")
        if p.name.split("-")[-1].isdigit() and p.is_dir()
    ]
    return sorted(found, key=lambda p: int(p.name.split("-")[-1]))


def existing_outputs(output: str | Path) -> list[str]:
    """Names of what a run wrote into a folder; empty where there is none."""
    names = [p.name for p in checkpoints(output)]
    others = ("adapter", "merged", "metrics.jsonl", *_gguf_names(output), "config.toml")
    return names + [name for name in others if (Path(output) / name).exists()]


def _gguf_names(output: str | Path) -> list[str]:
    """File names of the GGUF files that a run's config.toml asked for; none where there is no such file."""
    try:
        settings = tomllib.loads((Path(output) / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    model, methods = settings.get("model"), settings.get("gguf")
    if not (isinstance(model, str) and isinstance(methods, list)):
        return []

    try:
        folder = resolve_model(model)
    except ValueError:  # the model has gone; its file was named after the last part all the same
        folder = Path(model).expanduser()
    return [gguf_file_name(model, folder, method) for method in methods if method in GGUF_METHODS]


def check_output(
    output: str | Path,
    overwrite: bool,
    resume: bool,
    needed: Iterable[str | Path] = (),
    files: Iterable[str] = (),
) -> None:
    """ValueError where a run cannot go to `output`, or would replace something there that it was not told to.

    needed: model and data, which must not lie within what a run replaces. files: names of GGUF files to be written.
    """
    folder = Path(output)
    if wrong := [path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()]:
        raise ValueError(
            f"output folder {output}: {wrong[0]} is a file; choose another --output-dir"
        )
    if (found := existing_outputs(output)) and not (overwrite or resume):
        raise ValueError(
            f"{output} already holds a run ({', '.join(found[:3])}); pass --resume to continue it, --overwrite to "
            "replace it, or another --output-dir"
        )
    if existing := [
        name for name in files if (folder / name).exists() and not (overwrite or resume)
    ]:
        raise ValueError(
            f"{folder / existing[0]} exists; pass --overwrite to replace it, or another --output-dir"
        )
    for name in found:
        own = (folder / name).resolve()
        if inside := [path for path in needed if Path(path).resolve().is_relative_to(own)]:
            raise ValueError(
                f"{inside[0]} is needed, but lies in {folder / name}, which this run would replace; choose another "
                "--output-dir, or move it first"
            )


def clear_run(output: str | Path) -> None:
    """Remove what a run wrote into a folder, and nothing else."""
    for name in existing_outputs(output):
        path = Path(output) / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def delete_checkpoints(output: str | Path, after: int, but: int | None = None) -> None:
    """Remove the checkpoints of later steps than `after`, but for one: a run that went back makes its own."""
    for folder in checkpoints(output):
        if (step := int(folder.name.split("-")[-1])) > after and step != but:
            shutil.rmtree(folder)


def next_run_folder(parent: str | Path = "runs") -> Path:
    """A new numbered folder, made: runs/1, runs/2, ..."""
    parent = Path(parent)
    parent.mkdir(parents=True, exist_ok=True)
    number = max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0) + 1
    while True:
        try:
            (parent / str(number)).mkdir()
            return parent / str(number)
        except FileExistsError:  # another run took it meanwhile
            number += 1


def open_run(
    args: SFTConfig, resume: bool | str | Path, needed: Iterable[str | Path] = ()
) -> tuple[Path, Path | None]:
    """The run folder, and the checkpoint in it to continue from, or None to start from the beginning.

    resume: True for the newest checkpoint, a path for that one. needed: see `check_output`. Raises ValueError where the
    folder holds a run and the settings don't say what becomes of it. Changes nothing but that a numbered folder is made
    where output_dir is None.
    """
    wanted = bool(resume) or args.resume
    if args.output_dir is None:
        if wanted:
            raise ValueError("resume needs output_dir: the folder of the run to continue")
        return next_run_folder(), None
    output = Path(args.output_dir)
    check_output(output, args.overwrite, wanted, needed)
    if isinstance(resume, (str, Path)):
        return output, Path(resume)
    saved = checkpoints(output) if wanted else []
    if wanted and not saved and (output / "adapter").exists():
        raise ValueError(
            f"{output} holds an adapter but no checkpoint to resume from; pass --overwrite to replace it"
        )
    return output, saved[-1] if saved else None


def changed_settings(source: Path, before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between a checkpoint's settings and today's, in words, where the run can go on with it; else "".

    Raises ValueError where the difference would change which samples come next.
    """
    changed = [name for name in SAME_ORDER + SAME_MATHEMATICS if before.get(name) != now[name]]
    words = ", ".join(f"{name} {before.get(name)} -> {now[name]}" for name in changed)
    if wrong := [name for name in changed if name in SAME_ORDER]:
        raise ValueError(
            f"{source} cannot be continued: {words}; another {wrong[0]} changes which samples are left. Use the same, "
            "or start anew with --overwrite"
        )
    return words


class RunFolder:
    """The folder of one run that trains.

    output: the folder. source: the checkpoint in it to continue from, or None. saved: the step that was saved last.
    """

    def __init__(self, args: SFTConfig, resume: bool | str | Path, needed: Iterable[str | Path]):
        """Open it (see `open_run`), without what an earlier run left there if this one starts from the beginning."""
        self.args, self.saved = args, 0
        with os_errors_as_value_error(args.output_dir or "runs"):
            self.output, self.source = open_run(args, resume, needed)
            if self.source is None:
                clear_run(self.output)

    def resume(self, model: CausalLM, optimizer: FlatAdamW, identity: dict[str, Any]) -> Progress:
        """Load the adapter and the optimizer's moments from `source`; returns where that run stood.

        Raises ValueError where the run of today's `identity` cannot go on from there, or would end before it.
        """
        a, source = self.args, self.source
        state = checkpoint.read_state(source, progress=dict, identity=dict)
        words = changed_settings(source, state["identity"], identity)
        progress = Progress.read(state["progress"], source / checkpoint.STATE)
        if progress.step > identity["total_steps"]:
            limit = f"max_steps {a.max_steps}"
            if a.max_steps < 0:
                limit = f"the {identity['total_steps']} steps of num_train_epochs {a.num_train_epochs:g}"
            raise ValueError(
                f"{source} is already past {limit}; give more to go on, or resume an earlier one"
            )
        checkpoint.load_checkpoint(model, optimizer, source)
        if words:
            print(f"warning: {source} is continued with other settings: {words}", file=sys.stderr)
        self.saved = progress.step
        return progress

    def write_config(self, settings: dict[str, Any], max_length: int) -> None:
        """Write config.toml: `settings`, then those of the run as they were resolved."""
        resolved = replace(self.args, output_dir=str(self.output), max_length=max_length)
        atomic_write_text(self.output / "config.toml", toml_text({**settings, **as_dict(resolved)}))

    def save(
        self,
        model: CausalLM,
        optimizer: FlatAdamW,
        progress: Progress,
        steps_per_epoch: int,
        identity: dict[str, Any],
    ) -> None:
        """Write checkpoint-N for the step just done.

        Then drop what another run left after the step from which this one was resumed, and the oldest beyond
        save_total_limit.
        """
        epoch, position = divmod(progress.step, steps_per_epoch)
        place = {"epoch": epoch, "steps_into_epoch": position}
        state = {"progress": asdict(progress), **place, "identity": identity}
        checkpoint.save_checkpoint(
            model, optimizer, state, self.output / f"checkpoint-{progress.step}"
        )
        with os_errors_as_value_error(self.output):
            delete_checkpoints(self.output, after=self.saved, but=progress.step)
            if limit := self.args.save_total_limit:
                for old in checkpoints(self.output)[:-limit]:
                    shutil.rmtree(old)
        self.saved = progress.step

    def last_checkpoint(self) -> Path | None:
        """The checkpoint that was saved last, if it is there."""
        folder = self.output / f"checkpoint-{self.saved}"
        return folder if folder.is_dir() else None

    def finish(self, model: CausalLM, step: int) -> Path:
        """Write the adapter as it is after the last `step`; returns its path. Another run's later checkpoints go."""
        if step > self.saved:
            with os_errors_as_value_error(self.output):
                delete_checkpoints(self.output, after=self.saved)
        save_adapter(model, self.output / "adapter")
        return self.output / "adapter"


def write_models(
    model: CausalLM,
    tokenizer: Tokenizer,
    output: Path,
    merge: bool = False,
    methods: Sequence[str] = (),
    merge_base: str = "auto",
) -> list[Path]:
    """Write OUTPUT/merged and GGUF files, and return their paths.

    One of the same name is replaced when the new one is whole. Raises ValueError where that fails.
    """
    staging, written = output / ".export.partial", []
    if merge:
        with atomic_folder(output / "merged", keep_others=False) as partial:
            merge_to_folder(model, partial, tokenizer, merge_base=merge_base)
        written.append(output / "merged")
    try:
        with os_errors_as_value_error(output):
            shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
            staging.mkdir()
            for method in methods:
                path = export_gguf(
                    model, staging, tokenizer, quantization_method=method, merge_base=merge_base
                )
                written.append(path.replace(output / path.name))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return written
