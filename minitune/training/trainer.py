"""A training run: the loop over optimizer steps, logging, evaluation and saving."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minitune.device import memory_use
from minitune.progress import labelled, labelled_rows, print_from_handler
from minitune.stop_signals import Stopped, deferred_stops, stop
from minitune.threads import kept_threads
from minitune.training.banner import RunSummary, banner
from minitune.training.log import TrainingLog
from minitune.training.metrics import RunClock, run_metrics, status_text, training_record
from minitune.training.one_run import only_run
from minitune.training.out_of_memory import oom_as_value_error, planned_vs_measured
from minitune.training.own_files import CONFIG, FACTS, checkpoints
from minitune.training.run_end import (
    RunResult,
    interruption,
    interruption_without_folder,
    summary_rows,
)
from minitune.training.run_facts import end_rows, facts_at_begin, plan_rows, times_in
from minitune.training.saved_run import SavedRun


class TrainOutput(NamedTuple):
    """The result of a run; training_loss is the mean over all optimizer steps."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class Trainer(SavedRun):
    """A training run of a model's adapter, in a run folder or without one (run_folder.py)."""

    program = "minitune train"  # as the user types it

    @torch.inference_mode(False)  # buffers of the run outlive the caller's inference mode
    @kept_threads()
    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainOutput:
        """Train to the last step. After any failure the last complete checkpoint remains.

        Signals reach the main thread only: a callback ends a run in another thread.

        resume_from_checkpoint: True for output_dir's newest checkpoint, or a checkpoint's path.

        Raises: ValueError if the output folder holds another run, the checkpoint does not fit data
            or settings, a loss is not finite, the GPU is out of memory, the disk is full, or a
            second run would disturb this one (one_run.py); KeyboardInterrupt after Ctrl-C, and
            Stopped (a SystemExit) after SIGTERM or SIGHUP, once the current step is done and saved.
        """
        with only_run(self.model), self._opened(resume_from_checkpoint) as source:
            return self._train(source)

    def _train(self, source: Path | None) -> TrainOutput:
        """Train to the last step in the opened run folder.

        source: the checkpoint that the run continues from, or None.
        """
        self.model.max_trained_seqlen = self.data.max_seqlen
        self.model.lora_base = None  # the loaded adapter's; this base counts from now on
        p, total_steps = self.progress, self.size.total_steps
        show_bar = not self.args.disable_tqdm
        with (
            TrainingLog(self._run.metrics, total_steps, p.step, show_bar) as log,
            deferred_stops(print_from_handler) as caught,
            self._report_interruption(log),
            oom_as_value_error(self.planner, self.model.device, self._oom_advice),
            self._resident_weights(),
            contextlib.closing(self.micro_step),
        ):
            run = self._summary(source)
            log.print_line(banner(self.model, self.data.by_label, run))
            self._begin_facts(run)
            if source is not None:
                self.run_control.read_history(self._run.metrics)
            self.run_control.event("on_train_begin")
            clock = RunClock(p.seconds, p.tokens)
            self._loop(log, clock, caught)
            speed = clock.mean_tokens_per_second(p)
            has_ended = p.step == total_steps or self.run_control.control.should_training_stop
            if caught and not has_ended:
                raise stop(caught[0])
            if p.step < total_steps:
                log.print_line(labelled("note", f"a callback ended the run after step {p.step}"))
            if self.args.load_best_model_at_end:
                log.print_line(self._load_best_checkpoint())
            metrics = run_metrics(p, self.size)
            self.run_control.log({"step": p.step, **metrics})
            self.run_control.event("on_train_end")
            adapter = self._run.finish(self.model, self.processing_class, p.step)
            rows = self._summary_rows(log, speed, adapter)
            self._update_facts(end=end_rows(rows, metrics["train_loss"]))
            log.print_last(labelled_rows(rows))
        if caught:  # the run is whole, and nothing follows it
            raise stop(caught[0])
        return TrainOutput(p.step, metrics["train_loss"], metrics)

    def _summary_rows(
        self, log: TrainingLog, speed: float | None, adapter: Path | None
    ) -> list[tuple[str, str]]:
        """Return the summary of the finished run, as (label, text)."""
        memory, best = memory_use(self.model.device), self.run_control.best
        saved = [] if self.output is None else checkpoints(self.output)
        result = RunResult(self.progress, speed, log.last_loss, best, memory, adapter, saved)
        return summary_rows(result)

    def _begin_facts(self, run: RunSummary) -> None:
        """Write run.json before the first step, with the facts that the banner shows."""
        if self.output is not None:
            before = [] if run.source is None else times_in(self.output / FACTS)
            self._facts = facts_at_begin(self.model, self.processing_class, self.data, run, before)
            self._run.write_facts(self._facts)

    def _update_facts(self, **facts: Any) -> None:
        """Write run.json with the present plan and further facts."""
        if self.output is None:
            return
        p, plan = self.progress, plan_rows(self.planner, self.model.device)
        changes = {"plan": plan, "steps_done": p.step, "seconds": p.seconds, **facts}
        self._facts = replace(self._facts, **changes)
        self._run.write_facts(self._facts)

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
                with clock.paused():
                    self._update_facts()
            log.advance(lambda: self._status(clock))
            run.end_step(p)
            self._do_due_tasks(log, clock)
            if run.ends_epoch():
                self._do_due_tasks(log, clock)
            if caught and self.output is not None:
                p.seconds = clock.seconds()
                self._save()
                self._update_facts()
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
                self._update_facts()
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
        """After a signal, print the last checkpoint and how to resume, then re-raise."""
        try:
            yield
        except (KeyboardInterrupt, Stopped) as error:
            step, total_steps = self.progress.step, self.size.total_steps
            if self.output is None:
                text = interruption_without_folder(step, total_steps)
            else:
                config = self.output / CONFIG if self.is_in_files else None
                saved = self._run.last_checkpoint()
                text = interruption(step, total_steps, self.output, saved, config, self.program)
            log.print_last(text)
            error.add_note(text)
            raise

    # ---- metrics

    def _log_evaluation(self, log: TrainingLog) -> None:
        """Evaluate, log the numbers, and tell the callbacks.

        Raises: ValueError if the loss of the evaluation, or of a step before, is not finite.
        """
        self._fetch_losses()
        with self._named_step(self.progress.step):
            metrics = {**self._evaluation(), "epoch": self.run_control.state.epoch}
        is_best = self.run_control.is_best(metrics)
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
            self._run.check_there()
            log.record(record, **shown)
        except ValueError as error:
            with contextlib.suppress(ValueError):  # a full disk may have no room for it
                self._save()
            raise ValueError(
                f"{error}; training stopped, last checkpoint: {self._last_checkpoint()}"
            ) from error
        self.run_control.log(record)

    def _summary(self, source: Path | None) -> RunSummary:
        size, limit, done = self.size, self.micro_step_tokens, self.progress.step
        return RunSummary(self.args, size, self.data.max_length, limit, self.output, done, source)
