"""A training run: the loop over optimizer steps, logging, evaluation and saving."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minitune.checkpoints.adapter import load_adapter
from minitune.config.cli import as_dict
from minitune.data.templates.adapter_template import save_template
from minitune.data.token_cache import FOLDER, remove_other_entries
from minitune.device import memory_use
from minitune.progress import labelled, print_line, print_message
from minitune.threads import kept_threads, use_free_cores
from minitune.training.banner import RunSummary, banner
from minitune.training.checkpoint import Progress, read_state
from minitune.training.log import TrainingLog
from minitune.training.metrics import RunClock, run_metrics, status_text, training_record
from minitune.training.optimizer import FlatAdamW
from minitune.training.optimizer_steps import OptimizerSteps
from minitune.training.out_of_memory import oom_as_value_error, planned_vs_measured
from minitune.training.plan_inputs import current_plan_inputs, fix_plan_inputs_
from minitune.training.resume import (
    checkpoint_state,
    recorded_threads,
    resume_run,
    run_identity,
)
from minitune.training.run_control import RunControl
from minitune.training.run_end import RunResult, deferred_sigint, interruption, summary
from minitune.training.run_folder import CONFIG, METRICS, RunFolder, checkpoints, open_run_folder
from minitune.training.sample_answers import SamplePrompts
from minitune.training.tensorboard import TensorBoardCallback
from minitune.training.trained_parameters import TrainedParameters


class TrainOutput(NamedTuple):
    """The result of a run; training_loss is the mean over all optimizer steps."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class Trainer(OptimizerSteps):
    """A training run of a model's adapter, in a run folder."""

    program = "minitune train"  # as the user types it

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
        self._run: RunFolder | None = None
        self.run_control = RunControl(self.args, callbacks, self._callback_objects)

    def _callback_objects(self) -> dict[str, Any]:
        """Return the keyword arguments of every event."""
        return {
            "model": self.model,
            "processing_class": self.processing_class,
            "tokenizer": self.processing_class,
            "optimizer": self.optimizer,
        }

    @torch.inference_mode(False)  # buffers of the run outlive the caller's inference mode
    @kept_threads()
    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainOutput:
        """Train to the last step. After any failure the last complete checkpoint remains.

        resume_from_checkpoint: True for output_dir's newest checkpoint, or a checkpoint's path.

        Raises: ValueError if the output folder holds another run, the checkpoint does not fit data
            or settings, a loss is not finite, the GPU is out of memory, or the disk is full;
            KeyboardInterrupt after Ctrl-C, once the current step is done and saved.
        """
        source = self._begin(resume_from_checkpoint)
        self.model.max_trained_seqlen = self.data.max_seqlen
        self.model.lora_base = None  # the loaded adapter's; this base counts from now on
        p, total_steps = self.progress, self.size.total_steps
        show_bar = not self.args.disable_tqdm
        with (
            TrainingLog(self.output / METRICS, total_steps, p.step, show_bar) as log,
            deferred_sigint() as caught,
            self._report_interruption(log),
            oom_as_value_error(self.planner, self.model.device, self._oom_advice),
            self._resident_weights(),
            contextlib.closing(self.micro_step),
        ):
            log.print_line(banner(self.model, self.data.by_label, self._summary(source)))
            if source is not None:
                self.run_control.read_history(self.output / METRICS)
            self.run_control.event("on_train_begin")
            clock = RunClock(p.seconds, p.tokens)
            self._loop(log, clock, caught)
            speed = clock.mean_tokens_per_second(p)
            if (
                caught
                and p.step < total_steps
                and not self.run_control.control.should_training_stop
            ):
                raise KeyboardInterrupt
            if p.step < total_steps:
                log.print_line(labelled("note", f"a callback ended the run after step {p.step}"))
            if self.args.load_best_model_at_end:
                self._load_best_checkpoint(log)
            metrics = run_metrics(p, self.size)
            self.run_control.log({"step": p.step, **metrics})
            self.run_control.event("on_train_end")
            adapter = self._run.finish(self.model, p.step)
            save_template(self.processing_class, adapter)
            log.print_last(self._end(log, speed, adapter))
        return TrainOutput(p.step, metrics["train_loss"], metrics)

    def _end(self, log: TrainingLog, speed: float | None, adapter: Path) -> str:
        """Return the summary of the finished run."""
        memory, saved = memory_use(self.model.device), checkpoints(self.output)
        best = self.run_control.best
        return summary(RunResult(self.progress, speed, log.last_loss, best, memory, adapter, saved))

    def _loop(self, log: TrainingLog, clock: RunClock, caught: list[int]) -> None:
        """Run optimizer steps to the last one, or until Ctrl-C fills `caught`."""
        p, args, run = self.progress, self.args, self.run_control
        first = p.step + 1
        is_finished = first > self.size.total_steps and args.eval_strategy != "no"
        if is_finished or (first == 1 and args.eval_on_start):
            with clock.paused():
                self._log_evaluation(log)  # a finished run is only evaluated
        if p.step == 0:
            with clock.paused():
                self._log_samples(log)
        while p.step < self.size.total_steps and not (caught or run.control.should_training_stop):
            run.begin_step()
            self._optimizer_step()
            clock.step_done(p)
            run.event("on_optimizer_step")
            if p.step == first:
                memory = planned_vs_measured(self.planner, self.model.device)
                if memory is not None:
                    log.print_line(labelled("memory", memory))
            log.advance(lambda: self._status(clock))
            run.end_step(p)
            self._do_due_tasks(log, clock)
            if run.ends_epoch():
                self._do_due_tasks(log, clock)
            if caught:
                p.seconds = clock.seconds()
                self._save()
        if p.step == self.size.total_steps or run.control.should_training_stop:
            with clock.paused():
                self._log_samples(log)
        self._fetch_losses()
        p.seconds = clock.seconds()

    def _do_due_tasks(self, log: TrainingLog, clock: RunClock) -> None:
        """Write a metrics line, evaluate and save, as far as `control` asks for them."""
        p, run = self.progress, self.run_control
        if run.control.should_log and not run.is_logged:
            self._fetch_losses()
            p.seconds = clock.seconds()
            speed = clock.tokens_per_second(p.tokens)
            rate = self.learning_rate(p.step - 1)
            record = training_record(p, self.size.steps_per_epoch, rate, speed, self.model.device)
            left = clock.seconds_left(p, self.size.total_steps)
            self._write(log, record, seconds_left=left)
        with clock.paused():
            if run.control.should_evaluate:
                self._log_evaluation(log)
                self._log_samples(log)
            if run.control.should_save:
                p.seconds = clock.seconds()
                self._save()
                run.saved()

    def _resident_weights(self) -> contextlib.AbstractContextManager:
        """Keep weights dequantised if the model runs on a CPU and they fit.

        On a CPU, dequantising a weight costs as much as multiplying 30 rows by the weight.
        """
        if self.model.device.type == "cpu":
            return self.model.resident_weights_if_they_fit()
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _report_interruption(self, log: TrainingLog) -> Iterator[None]:
        """On Ctrl-C, print the last checkpoint and how to resume, then re-raise."""
        try:
            yield
        except KeyboardInterrupt:
            config = self.output / CONFIG if self.data.is_in_files else None
            step, total_steps = self.progress.step, self.size.total_steps
            saved = self._run.last_checkpoint()
            log.print_last(
                interruption(step, total_steps, self.output, saved, config, self.program)
            )
            raise

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
        return str(self._run.last_checkpoint() or "none was saved")

    # ---- results

    def _load_best_checkpoint(self, log: TrainingLog) -> None:
        """Load the adapter of the best checkpoint.

        Raises: ValueError if the checkpoint cannot be read.
        """
        best = self.run_control.best
        if best.saved_step is None:
            text = "no evaluated step has a checkpoint: the last step is the result"
            log.print_line(labelled("note", text))
            return
        load_adapter(self.model, self.output / f"checkpoint-{best.saved_step}")
        text = (
            f"step {best.saved_step}, eval_loss {best.saved_loss:.4f}: the result is the adapter "
            f"of checkpoint-{best.saved_step}"
        )
        log.print_line(labelled("result", text))

    # ---- metrics

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

    def _log_evaluation(self, log: TrainingLog) -> None:
        """Evaluate, log the numbers, and tell the callbacks."""
        metrics = {**self._evaluation(), "epoch": self.run_control.state.epoch}
        is_best = self.run_control.is_best(metrics["eval_loss"])
        self._write(log, {"step": self.progress.step, **metrics}, is_best=is_best)
        self.run_control.evaluated(metrics)

    def _log_samples(self, log: TrainingLog) -> None:
        """Log the answers to sample_prompts, unless this step has some already."""
        step, show_bar = self.progress.step, not self.args.disable_tqdm
        if self.samples.texts and step not in log.sampled_steps:
            record = self.samples.record(self.micro_step, step, show_bar)
            if record is not None:
                self._write(log, record)

    def _status(self, clock: RunClock) -> str:
        """Return the text behind the progress bar; wait for the loss of the last step."""
        self._fetch_losses()
        p, memory = self.progress, memory_use(self.model.device)
        left = clock.seconds_left(p, self.size.total_steps)
        return status_text(p, left, clock.mean_tokens_per_second(p), memory)

    def _write(self, log: TrainingLog, record: dict[str, Any], **shown: Any) -> None:
        """Log a record; if it cannot be written, save a checkpoint and stop.

        shown: further arguments of `TrainingLog.record`.
        """
        try:
            log.record(record, **shown)
        except ValueError as error:
            with contextlib.suppress(ValueError):  # a full disk may have no room for it
                self._save()
            raise ValueError(
                f"{error}; training stopped, last checkpoint: {self._last_checkpoint()}"
            ) from error
        if "samples" not in record:
            self.run_control.log(record)

    # ---- the run folder

    def _begin(self, resume: bool | str | Path) -> Path | None:
        """Open the run folder, at step 0 or at a checkpoint; return that checkpoint."""
        args, model = self.args, self.model
        self._trained = TrainedParameters(model)
        self.samples = SamplePrompts(
            args.sample_prompts, self.processing_class, model.max_seq_length, args.template_date
        )
        if model.device.type == "cuda":
            print_line(labelled("preparing", "compiling kernels and measuring the GPU"))
        self.micro_step.prepare()
        protected_paths = [model.gguf or model.folder, *self.data.files]
        self.output, source = open_run_folder(args, resume, protected_paths, self.size.total_steps)
        self.optimizer = self._new_optimizer()
        use_free_cores(model.device, recorded_threads(source))
        self._identity = run_identity(model, args, self.size, self.data)
        self._losses.clear()
        self.progress, recorded, warnings = Progress(), None, []
        if source is not None:
            self.progress, recorded, warnings = resume_run(
                source, model, self.optimizer, self._identity, args
            )
        longest = self.data.max_seqlen
        inputs, shortages = fix_plan_inputs_(self.planner, model, args, longest, recorded)
        self.micro_step_tokens = inputs.micro_step_tokens
        warnings += self.processing_class.notes
        for text in (*warnings, *(f"{source} was {shortage}" for shortage in shortages)):
            print_message("warning", text)
        for note in args.precision_notes(model.dtype):
            print_message("note", note)
        remove_other_entries(self.output / FOLDER, self.data.cache_keys)
        self._run = RunFolder(self.output, self.progress.step, args.save_total_limit)
        resolved = replace(args, output_dir=str(self.output), max_length=self.data.max_length)
        self._run.write_config(as_dict(self.run_config, model.lora, resolved))
        saved = {} if source is None else read_state(source)
        self.run_control.begin(resolved, self.size, self.progress, saved)
        return source

    def _summary(self, source: Path | None) -> RunSummary:
        size, limit, done = self.size, self.micro_step_tokens, self.progress.step
        return RunSummary(self.args, size, self.data.max_length, limit, self.output, done, source)

    def _save(self) -> None:
        """Write a checkpoint of the current step."""
        self._fetch_losses()
        inputs = current_plan_inputs(self.planner, self.micro_step_tokens)
        self.run_control.saving()
        state = checkpoint_state(self.progress, self.size, self._identity, inputs)
        state |= self.run_control.to_json()
        kept_step = self.run_control.kept_step
        self._run.save(self.model, self.optimizer, self.progress.step, state, kept_step)
