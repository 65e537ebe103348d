"""A run in its folder, or without one: begun at step 0 or at a checkpoint, and saved."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from minitune.checkpoints.adapter import load_adapter
from minitune.config.cli import as_dict
from minitune.data.token_cache import FOLDER, remove_other_entries
from minitune.progress import labelled, print_line, print_message
from minitune.threads import use_free_cores
from minitune.training.checkpoint import Progress, read_state
from minitune.training.loss_scale import LossScale, NotFinite
from minitune.training.optimizer import FlatAdamW
from minitune.training.optimizer_steps import OptimizerSteps
from minitune.training.plan_inputs import current_plan_inputs, fix_plan_inputs_
from minitune.training.precision_notes import precision_notes
from minitune.training.resume import (
    checkpoint_state,
    recorded_threads,
    resume_run,
    run_identity,
)
from minitune.training.run_control import RunControl
from minitune.training.run_files import NoRunFiles, RunFiles
from minitune.training.run_folder import (
    check_folder_settings,
    locked_run_folder,
    open_run_folder,
    run_output,
)
from minitune.training.sample_answers import SamplePrompts
from minitune.training.tensorboard import TensorBoardCallback
from minitune.training.trained_parameters import TrainedParameters


class SavedRun(OptimizerSteps):
    """The steps of a run, its callbacks, and the folder that they are saved in."""

    by_command = False  # a command sets True: its run has a folder in any case

    def __init__(self, *arguments: Any, callbacks: Iterable[Any] = (), **options: Any):
        """Build the steps, with the arguments of OptimizerSteps, and take the callbacks.

        callbacks: objects or classes of TrainerCallback (callbacks.py).

        Raises: ValueError if model, settings, data and callbacks do not fit together.
        """
        super().__init__(*arguments, **options)
        self.optimizer: FlatAdamW | None = None  # of the run
        callbacks = list(callbacks)
        if self.args.report_to == "tensorboard":
            callbacks.append(TensorBoardCallback())
        self._run: RunFiles | NoRunFiles | None = None
        self.run_control = RunControl(self.args, callbacks, self._callback_objects)

    def _callback_objects(self) -> dict[str, Any]:
        """Return the keyword arguments of every event."""
        return {
            "model": self.model,
            "processing_class": self.processing_class,
            "tokenizer": self.processing_class,
            "optimizer": self.optimizer,
        }

    # ---- the begin

    @contextlib.contextmanager
    def _opened(self, resume: bool | str | Path) -> Iterator[Path | None]:
        """Hold the run folder during the block, and yield the checkpoint that the run continues.

        A run without a folder starts at step 0, and yields None.

        Raises: ValueError as `check_folder_settings`, `locked_run_folder` and `open_run_folder`.
        """
        args, model = self.args, self.model
        check_folder_settings(args, resume, self.by_command)
        self._trained = TrainedParameters(model)
        self.samples = SamplePrompts(
            args.sample_prompts, self.processing_class, model.max_seq_length, args.template_date
        )
        _ = self.scored_answers  # refuses what does not fit, before the run folder is made
        if model.device.type == "cuda":
            print_line(labelled("preparing", "compiling kernels and measuring the GPU"))
        self.micro_step.prepare()
        self.output = run_output(args, self.by_command)
        if self.output is None:
            self._begin(None)
            yield None
            return
        with locked_run_folder(self.output):
            needed = [model.gguf or model.folder, *self.data.files]
            source = open_run_folder(self.output, args, resume, needed, self.size.total_steps)
            self._begin(source)
            yield source

    def _begin(self, source: Path | None) -> None:
        """Set the state of checkpoint `source`, or of step 0."""
        args, model = self.args, self.model
        self.optimizer = self._new_optimizer()
        use_free_cores(model.device, recorded_threads(source))
        self._identity = {}  # only a checkpoint is compared with it
        if self.output is not None:
            self._identity = run_identity(model, args, self.size, self.data)
        self._losses.clear()
        self.progress = Progress(loss_scale=LossScale.of_dtype(model.dtype))
        recorded, warnings, notes = None, [], []
        if source is not None:
            self.progress, recorded, warnings, notes = resume_run(
                source, model, self.optimizer, self._identity, args
            )
        longest = self.data.max_seqlen
        inputs, shortages = fix_plan_inputs_(self.planner, model, args, longest, recorded)
        self.micro_step_tokens = inputs.micro_step_tokens
        warnings += self.processing_class.notes
        for text in (*warnings, *(f"{source} was {shortage}" for shortage in shortages)):
            print_message("warning", text)
        for note in (*notes, *precision_notes(args, model.dtype, model.device)):
            print_message("note", note)
        output_dir, self._run = None, NoRunFiles()
        if self.output is not None:
            remove_other_entries(self.output / FOLDER, self.data.cache_keys)
            self._run = RunFiles(self.output, self.progress.step, args.save_total_limit)
            output_dir = str(self.output)
        resolved = replace(args, output_dir=output_dir, max_length=self.data.max_length)
        self._run.write_config(as_dict(self.run_config, model.lora, resolved))
        saved = {} if source is None else read_state(source)
        self.run_control.begin(resolved, self.size, self.progress, saved)

    def _optimizer_step(self) -> None:
        """Train on the samples of the next step, and update the adapter.

        Raises: ValueError if other parameters than those at the run's beginning would be trained,
            or if float16 is too narrow.
        """
        with self._named_step(self.progress.step + 1):
            super()._optimizer_step()

    @contextlib.contextmanager
    def _named_step(self, step: int) -> Iterator[None]:
        """Add the step and the last checkpoint to the error of a loss that is not finite."""
        try:
            yield
        except NotFinite as error:
            saved = self._last_checkpoint()
            raise ValueError(f"step {step}: {error}; last checkpoint: {saved}") from None

    # ---- checkpoints

    def _save(self) -> None:
        """Write a checkpoint of the current step."""
        self._fetch_losses()
        inputs = current_plan_inputs(self.planner, self.micro_step_tokens)
        self.run_control.saving()
        state = checkpoint_state(self.progress, self.size, self._identity, inputs)
        state |= self.run_control.to_json()
        kept_step = self.run_control.kept_step
        self._run.save(self.model, self.optimizer, self.progress.step, state, kept_step)

    def _load_best_checkpoint(self) -> str:
        """Load the adapter of the best checkpoint, and return a line for a person.

        Raises: ValueError if the checkpoint cannot be read.
        """
        best = self.run_control.best
        if best.saved_step is None:
            text = "no evaluated step has a checkpoint: the last step is the result"
            return labelled("note", text)
        load_adapter(self.model, self.output / f"checkpoint-{best.saved_step}")
        text = (
            f"step {best.saved_step}, {best.text(best.saved_value)}: the result is the adapter of "
            f"checkpoint-{best.saved_step}"
        )
        return labelled("result", text)

    def _oom_advice(self) -> str:
        """Return a text with the failed step, the settings to change and the last checkpoint."""
        config, nf4 = self.run_config, ""
        if self.model.gguf is None:
            nf4 = f" or load_in_4bit to true (it is {config.load_in_4bit})"
        return (
            f"step {self.progress.step + 1}; lower micro_step_tokens ({self.micro_step_tokens}) "
            f"or max_length ({self.data.max_length}), or set use_gradient_checkpointing to true "
            f"(it is {config.use_gradient_checkpointing}){nf4}; "
            f"last checkpoint: {self._last_checkpoint()}"
        )

    def _last_checkpoint(self) -> str:
        saved, step = self._run.last_checkpoint(), self._run.saved_step
        if saved is None and step:
            return f"checkpoint-{step}, which is no longer in {self.output}"
        return str(saved or "none was saved")

    def _fetch_losses(self) -> None:
        """Copy the losses that are still on the device into `progress`.

        Raises: ValueError if a loss or a gradient norm is not finite.
        """
        try:
            self._losses.move_to_(self.progress)
        except ValueError as error:
            raise ValueError(
                f"{error} and training stopped; last checkpoint: {self._last_checkpoint()}. Lower "
                f"learning_rate ({self.args.learning_rate:g}), or look at the samples of that step"
            ) from None
