"""A training run: the loop over optimizer steps, logging, evaluation and saving."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from minitune.config.cli import as_dict
from minitune.data.templates.adapter_template import save_template
from minitune.data.token_cache import FOLDER, remove_other_entries
from minitune.device import memory_use
from minitune.progress import labelled, print_line, wrapped
from minitune.training.banner import RunSummary, banner
from minitune.training.checkpoint import Progress
from minitune.training.log import TrainingLog
from minitune.training.metrics import RunClock, status_text, training_record
from minitune.training.optimizer import FlatAdamW
from minitune.training.optimizer_steps import OptimizerSteps
from minitune.training.out_of_memory import oom_as_value_error, planned_vs_measured
from minitune.training.resume import (
    checkpoint_state,
    current_plan_inputs,
    fix_plan_inputs_,
    resume_run,
    run_identity,
)
from minitune.training.run_end import RunResult, deferred_sigint, interruption, summary
from minitune.training.run_folder import CONFIG, METRICS, RunFolder, checkpoints, open_run_folder


class TrainOutput(NamedTuple):
    """The result of a run; training_loss is the mean over all optimizer steps."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class Trainer(OptimizerSteps):
    """A training run of a model's adapter, in a run folder."""

    def train(self, resume_from_checkpoint: bool | str | Path = False) -> TrainOutput:
        """Train to the last step. After any failure the last complete checkpoint remains.

        resume_from_checkpoint: True for output_dir's newest checkpoint, or a checkpoint's path.

        Raises: ValueError if the output folder holds another run, the checkpoint does not fit data
            or settings, a loss is not finite, the GPU is out of memory, or the disk is full;
            KeyboardInterrupt after Ctrl-C, once the current step is done and saved.
        """
        source = self._begin(resume_from_checkpoint)
        self.model.max_trained_seqlen = self.data.max_seqlen
        p, total_steps = self.progress, self.size.total_steps
        with (
            TrainingLog(self.output / METRICS, total_steps, p.step) as log,
            deferred_sigint() as caught,
            self._report_interruption(log),
            oom_as_value_error(self.planner, self.model.device, self._oom_advice),
            self._resident_weights(),
            contextlib.closing(self.micro_step),
        ):
            log.print_line(banner(self.model, self.data.by_label, self._summary(source)))
            clock = RunClock(p.seconds, p.tokens)
            self._loop(log, clock, caught)
            speed = clock.mean_tokens_per_second(p)
            if caught and p.step < total_steps:
                raise KeyboardInterrupt
            adapter = self._run.finish(self.model, p.step)
            save_template(self.processing_class, adapter)
            log.print_line(self._end(log, speed, adapter))
        mean = p.loss_sum / max(1, p.step)
        metrics = {
            "train_loss": mean,
            "train_runtime": p.seconds,
            "epoch": self._epoch(),
            "tokens": p.tokens,
        }
        return TrainOutput(p.step, mean, metrics)

    def _end(self, log: TrainingLog, speed: float | None, adapter: Path) -> str:
        """Return the summary of the finished run."""
        memory, saved = memory_use(self.model.device), checkpoints(self.output)
        return summary(
            RunResult(
                self.progress,
                speed,
                log.last_loss,
                log.best,
                memory,
                adapter,
                saved,
                (METRICS, CONFIG),
            )
        )

    def _loop(self, log: TrainingLog, clock: RunClock, caught: list[int]) -> None:
        """Run optimizer steps to the last one, or until Ctrl-C fills `caught`."""
        p, args = self.progress, self.args
        first = p.step + 1
        if first > self.size.total_steps and args.eval_strategy != "no":
            self._log_evaluation(log)  # a finished run is only evaluated
        while p.step < self.size.total_steps and not caught:
            self._optimizer_step()
            clock.step_done(p)
            if p.step == first:
                memory = planned_vs_measured(self.planner, self.model.device)
                if memory is not None:
                    log.print_line(labelled("memory", memory))
            log.advance(lambda: self._status(clock))
            if self._is_due(args.logging_steps) or (p.step == 1 and args.logging_first_step):
                self._fetch_losses()
                p.seconds = clock.seconds()
                speed = clock.tokens_per_second(p.tokens)
                rate = self.learning_rate(p.step - 1)
                record = training_record(
                    p, self.size.steps_per_epoch, rate, speed, self.model.device
                )
                self._write(log, record, clock.seconds_left(p, self.size.total_steps))
            with clock.paused():
                if self._is_time_to(args.eval_strategy, args.eval_steps or args.logging_steps):
                    self._log_evaluation(log)
                if self._is_time_to(args.save_strategy, args.save_steps) or caught:
                    p.seconds = clock.seconds()
                    self._save()
        self._fetch_losses()
        p.seconds = clock.seconds()

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
            saved = self._run.last_checkpoint()
            step, total_steps = self.progress.step, self.size.total_steps
            log.print_line(interruption(step, total_steps, self.output, saved, config))
            raise

    def _oom_advice(self) -> str:
        """Return a text with the failed step, the settings to change and the last checkpoint."""
        config = self.run_config
        return (
            f"step {self.progress.step + 1}; lower micro_step_tokens ({self.micro_step_tokens}) "
            f"or max_length ({self.data.max_length}), or set use_gradient_checkpointing to true "
            f"(it is {config.use_gradient_checkpointing}) or load_in_4bit to true (it is "
            f"{config.load_in_4bit}); last checkpoint: {self._last_checkpoint()}"
        )

    def _last_checkpoint(self) -> str:
        return str(self._run.last_checkpoint() or "none was saved")

    def _is_due(self, interval: int) -> bool:
        """Return True after every `interval` steps and after the last step."""
        return self.progress.step % interval == 0 or self.progress.step == self.size.total_steps

    def _is_time_to(self, strategy: str, steps: int) -> bool:
        """Return True if a task of this strategy is due: no, epoch, or every `steps` steps."""
        interval = self.size.steps_per_epoch if strategy == "epoch" else steps
        return strategy != "no" and self._is_due(interval)

    def _epoch(self) -> float:
        return self.progress.step / self.size.steps_per_epoch

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
        self._write(log, {"step": self.progress.step, "epoch": self._epoch(), **self.evaluate()})

    def _status(self, clock: RunClock) -> str:
        """Return the text behind the progress bar; wait for the loss of the last step."""
        self._fetch_losses()
        p, memory = self.progress, memory_use(self.model.device)
        left = clock.seconds_left(p, self.size.total_steps)
        return status_text(p, left, clock.mean_tokens_per_second(p), memory)

    def _write(
        self, log: TrainingLog, record: dict[str, Any], seconds_left: float | None = None
    ) -> None:
        """Log a record; if it cannot be written, save a checkpoint and stop."""
        try:
            log.record(record, seconds_left)
        except ValueError as error:
            with contextlib.suppress(ValueError):  # a full disk may have no room for it
                self._save()
            raise ValueError(
                f"{error}; training stopped, last checkpoint: {self._last_checkpoint()}"
            ) from error

    # ---- the run folder

    def _begin(self, resume: bool | str | Path) -> Path | None:
        """Open the run folder, at step 0 or at a checkpoint; return that checkpoint."""
        args, model = self.args, self.model
        self.micro_step.prepare()
        protected_paths = [model.folder, *self.data.files]
        self.output, source = open_run_folder(args, resume, protected_paths, self.size.total_steps)
        self.optimizer = FlatAdamW(
            [p for _, p in model.trainable_parameters()],
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            max_grad_norm=args.max_grad_norm,
            eight_bit=args.optim == "adamw_8bit",
        )
        self._identity = run_identity(model, args, self.size, self.data)
        self._losses.clear()
        self.progress, recorded, warnings = Progress(), None, []
        if source is not None:
            self.progress, recorded, warnings = resume_run(
                source, model, self.optimizer, self._identity, args
            )
        inputs, shortages = fix_plan_inputs_(
            self.planner, model, args, self.data.max_seqlen, recorded
        )
        self.micro_step_tokens = inputs.micro_step_tokens
        warnings += self.processing_class.notes
        for text in (*warnings, *(f"{source} was {shortage}" for shortage in shortages)):
            print_line(wrapped(f"warning: {text}", indent=9))
        remove_other_entries(self.output / FOLDER, self.data.cache_keys)
        self._run = RunFolder(self.output, self.progress.step, args.save_total_limit)
        resolved = replace(args, output_dir=str(self.output), max_length=self.data.max_length)
        self._run.write_config(as_dict(self.run_config, model.lora, resolved))
        return source

    def _summary(self, source: Path | None) -> RunSummary:
        return RunSummary(
            self.args,
            self.size,
            self.data.max_length,
            self.micro_step_tokens,
            self.output,
            self.progress.step,
            source,
        )

    def _save(self) -> None:
        """Write a checkpoint of the current step."""
        self._fetch_losses()
        inputs = current_plan_inputs(self.planner, self.micro_step_tokens)
        state = checkpoint_state(self.progress, self.size, self._identity, inputs)
        self._run.save(self.model, self.optimizer, self.progress.step, state)
