"""The training loop: micro-steps, learning rate, logging, evaluation and saving.

One optimizer step takes the next per_device_train_batch_size * gradient_accumulation_steps samples
S of the epoch's order (run_data.py) and minimises

    loss = sum over S of the token losses / number of trained-on tokens in S

The samples are packed without padding into as few forward/backward passes (micro-steps) as
micro_step_tokens allows. Each micro-step's loss is divided by the token count of the whole step, so
the gradients add up to the same sum however S is split.
"""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitune.config.cli import as_dict
from minitune.config.sft_config import SFTConfig
from minitune.config.training_config import RunConfig
from minitune.data.batching import collate, micro_steps
from minitune.data.samples import Sample
from minitune.data.sources.sources import Dataset
from minitune.data.templates.adapter_template import save_template
from minitune.data.token_cache import FOLDER, remove_other_entries
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.model.causal_lm import CausalLM
from minitune.training.checkpoint import Progress
from minitune.training.log import RunSummary, TrainingLog, banner, deferred_sigint, interruption
from minitune.training.metrics import PendingLosses, RunClock, evaluation_loss, training_record
from minitune.training.micro_step import MicroStep
from minitune.training.optimizer import FlatAdamW, learning_rate_factor, warmup_count
from minitune.training.out_of_memory import (
    DEFAULT_MICRO_STEP_TOKENS,
    oom_as_value_error,
    planned_vs_measured,
    retry_on_oom,
    run_planner,
)
from minitune.training.resume import (
    checkpoint_state,
    current_plan_inputs,
    fix_plan_inputs_,
    resolve_run_config,
    resume_run,
    run_identity,
)
from minitune.training.run_data import SampleOrder, read_datasets, with_template_date
from minitune.training.run_folder import CONFIG, METRICS, RunFolder, open_run_folder


class TrainOutput(NamedTuple):
    """The result of a run; training_loss is the mean over all optimizer steps."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class SFTTrainer:
    """A training run of a model's adapter. The arguments have TRL's names and meanings."""

    def __init__(
        self,
        model: CausalLM,
        args: SFTConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: Tokenizer | None = None,
        *,
        run_config: RunConfig | None = None,
    ):
        """Check the arguments and tokenize the datasets. Only output_dir/tokenized is written.

        model: a model with an adapter.
        args: the settings of the run; default: SFTConfig().
        train_dataset, eval_dataset: a path, several paths, or records in memory
            (data/sources/sources.py, data/records/record_formats.py).
        processing_class: the tokenizer; default: that of the model's folder.
        run_config: settings to write to config.toml; default: the model's settings.

        Raises: ValueError if model, settings and data do not fit together.
        """
        self.model, self.args = model, with_template_date(args or SFTConfig())
        if model.lora is None:
            raise ValueError(
                "the model has no adapter to train; call FastLanguageModel.get_peft_model first"
            )
        self.processing_class = processing_class or Tokenizer.from_folder(model.folder)
        model.eos_token_ids = self.processing_class.eos_token_ids  # of the template trained on
        self.data = read_datasets(
            train_dataset, eval_dataset, self.processing_class, self.args, model.max_seq_length
        )
        self.order = SampleOrder(self.data.train.samples, self.args, self.data.max_length)
        self.size = self.order.size
        self.run_config = resolve_run_config(
            model, self.data.train_files, self.data.eval_files, run_config
        )
        self.planner = run_planner(model, self.args, self.run_config.use_gradient_checkpointing)
        self.micro_step = MicroStep(model, self.planner, self.args.cuda_graphs)
        self.micro_step_tokens = (
            self.args.micro_step_tokens or DEFAULT_MICRO_STEP_TOKENS[model.device.type]
        )
        self.progress = Progress()
        self._losses = PendingLosses()

    # ---- one step

    def accumulate(self, samples: Sequence[Sample]) -> Tensor:
        """Add the gradients of an optimizer step's samples to `.grad`.

        Returns their loss, 0-dim, on the device.
        """
        batches = [collate(pack) for pack in micro_steps(samples, self.micro_step_tokens)]
        targets = sum(batch.targets for batch in batches)
        loss = torch.zeros((), device=self.model.device)
        for batch in batches:
            loss += self.micro_step(batch, targets)
        self.progress.tokens += sum(len(batch.input_ids) for batch in batches)
        return loss

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, counted from 0."""
        args, total_steps = self.args, self.size.total_steps
        warmup = warmup_count(args.warmup_steps, args.warmup_ratio, total_steps)
        kind = args.lr_scheduler_type
        return args.learning_rate * learning_rate_factor(kind, step, warmup, total_steps)

    def _optimizer_step(self) -> None:
        """Train on the samples of the next step, and update the adapter."""
        step = self.progress.step
        samples = self.order.samples_of_step(step)
        loss = retry_on_oom(
            self.micro_step, self.optimizer.zero_grad, step + 1, lambda: self.accumulate(samples)
        )
        norm = self.optimizer.step(self.learning_rate(step))
        self._losses.add(loss, norm)
        self.progress.step += 1

    def evaluate(self) -> dict[str, float]:
        """Return the loss of the evaluation data, a mean over its trained-on tokens.

        Raises: ValueError if there is no eval_dataset.
        """
        if self.data.evaluation is None:
            raise ValueError("there is no eval_dataset to evaluate on; pass one to SFTTrainer")
        start = time.perf_counter()
        samples = self.data.evaluation.samples
        loss = evaluation_loss(self.micro_step, samples, self.micro_step_tokens)
        return {"eval_loss": loss, "eval_seconds": time.perf_counter() - start}

    # ---- the run

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
            self._loop(log, caught)
            if caught and p.step < total_steps:
                raise KeyboardInterrupt
            adapter = self._run.finish(self.model, p.step)
            save_template(self.processing_class, adapter)
            log.print_line(f"{'saved':<11}{adapter}")
        mean = p.loss_sum / max(1, p.step)
        metrics = {
            "train_loss": mean,
            "train_runtime": p.seconds,
            "epoch": self._epoch(),
            "tokens": p.tokens,
        }
        return TrainOutput(p.step, mean, metrics)

    def _loop(self, log: TrainingLog, caught: list[int]) -> None:
        """Run optimizer steps to the last one, or until Ctrl-C fills `caught`."""
        p, args = self.progress, self.args
        clock, first = RunClock(p.seconds, p.tokens), p.step + 1
        if first > self.size.total_steps and args.eval_strategy != "no":
            self._log_evaluation(log)  # a finished run is only evaluated
        while p.step < self.size.total_steps and not caught:
            self._optimizer_step()
            if p.step == first:
                memory = planned_vs_measured(self.planner, self.model.device)
                if memory is not None:
                    log.print_line(memory)
            log.advance()
            if self._is_due(args.logging_steps) or (p.step == 1 and args.logging_first_step):
                self._fetch_losses()
                p.seconds = clock.seconds()
                speed = clock.tokens_per_second(p.tokens)
                rate = self.learning_rate(p.step - 1)
                self._write(log, training_record(p, self.size.steps_per_epoch, rate, speed))
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

    def _write(self, log: TrainingLog, record: dict[str, Any]) -> None:
        """Log a record; if it cannot be written, save a checkpoint and stop."""
        try:
            log.record(record)
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
            print(f"warning: {text}", file=sys.stderr)
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
