"""The training loop: batches, micro-steps, schedule, logging, evaluation, and when to save (runs.py says where).

One optimizer step takes the next per_device_train_batch_size * gradient_accumulation_steps samples S of the epoch's
order and minimises

    loss = sum over S of the token losses / number of trained-on tokens in S

The samples are packed unpadded into as few forward/backward passes (micro-steps) as `micro_step_tokens` allows. Each is
divided by the denominator of the whole step, so gradients add up to the same sum however S is split.

The order of an epoch is a function of (seed, epoch), and where a run stands is its step number: that, the adapter and
the optimizer's moments are all that a checkpoint needs for the run to go on bit for bit. Losses stay on the device
until they are logged.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minitune.config.cli import as_dict
from minitune.config.training_config import SFTConfig
from minitune.data.batching import Batch, collate, micro_steps, pack_rows
from minitune.data.record_formats import Sample
from minitune.data.tokenize_dataset import TokenizedDataset, tokenize_dataset
from minitune.data.tokenizer import Tokenizer
from minitune.model.activations import SaveLevel
from minitune.model.causal_lm import CausalLM
from minitune.training.log import (
    TrainingLog,
    banner,
    deferred_sigint,
    interruption,
    progress_bar,
    run_rows,
)
from minitune.training.micro_step import MicroStep
from minitune.training.optimizer import FlatAdamW, learning_rate_factor, warmup_count
from minitune.training.out_of_memory import (
    fit_micro_step_tokens,
    oom_as_value_error,
    planned_vs_measured,
    retry_on_oom,
    run_in_graph_pool,
    run_planner,
)
from minitune.training.run_folder import (
    SAME_MATHEMATICS,
    SAME_ORDER,
    Progress,
    RunFolder,
    fingerprint,
)

# Tokens of one forward/backward where micro_step_tokens is not given. More gives fewer, larger launches and less
# dequantisation a token; memory grows with it (8B, recomputing: about 0.5 GB of layer inputs per 2,000 tokens).
MICRO_STEP_TOKENS = {"cuda": 8192, "cpu": 4096}
EVAL_CHUNK = 256  # evaluation samples packed together


class TrainOutput(NamedTuple):
    global_step: int
    training_loss: float  # mean over all optimizer steps
    metrics: dict[str, float]


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    """The order in which an epoch goes through `count` samples: a permutation that depends on nothing else."""
    return tuple(np.random.default_rng((seed, epoch)).permutation(count).tolist())


class SFTTrainer:
    """Trains the adapter of `model` on `train_dataset`; the arguments mean what they mean in TRL."""

    def __init__(
        self,
        model: CausalLM,
        args: SFTConfig | None = None,
        train_dataset: str | Path | Sequence[dict] | None = None,
        eval_dataset: str | Path | Sequence[dict] | None = None,
        processing_class: Tokenizer | None = None,
    ):
        """train_dataset: a JSONL path or a sequence of dicts (data.py lists the shapes of a record).

        Raises ValueError where model, settings and data do not go together; nothing has been written by then.
        """
        self.model, self.args = model, args or SFTConfig()
        if model.lora is None:
            raise ValueError(
                "the model has no adapter to train; call FastLanguageModel.get_peft_model first"
            )
        if train_dataset is None:
            raise ValueError("train_dataset is missing; give a JSONL path or a sequence of dicts")
        if self.args.eval_strategy != "no" and eval_dataset is None:
            raise ValueError(
                f"eval_strategy is {self.args.eval_strategy!r}, but there is no eval_dataset"
            )
        self.max_length = self.args.max_length or model.max_seq_length
        if self.max_length > model.max_seq_length:
            raise ValueError(
                f"max_length {self.max_length} is more than the max_seq_length {model.max_seq_length} that the model "
                "was loaded for; load it with a larger max_seq_length"
            )
        self.processing_class = processing_class or Tokenizer.from_folder(model.folder)
        self.train_data = self._prepare(train_dataset)
        self.eval_data = None if eval_dataset is None else self._prepare(eval_dataset)
        samples = self.train_data.samples
        self._units = (
            pack_rows(samples, self.max_length)
            if self.args.packing
            else [[i] for i in range(len(samples))]
        )
        self.units_per_step = (
            self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        )
        self.steps_per_epoch = math.ceil(len(self._units) / self.units_per_step)
        self.total_steps = self.args.max_steps
        if self.total_steps < 0:
            self.total_steps = math.ceil(self.args.num_train_epochs * self.steps_per_epoch)
        self.micro_step_tokens = self.args.micro_step_tokens or MICRO_STEP_TOKENS[model.device.type]
        sources = {"data": train_dataset, "eval_data": eval_dataset}
        files = {
            name: str(source) for name, source in sources.items() if isinstance(source, (str, Path))
        }
        self._needed = [model.folder, *files.values()]
        # data that no config.toml can name
        self._in_memory = any(
            source is not None and name not in files for name, source in sources.items()
        )
        # What config.toml will hold besides SFTConfig; a command adds what else it was told.
        self.settings: dict[str, Any] = {
            "model": model.name,
            **files,
            "max_seq_length": model.max_seq_length,
            "load_in_4bit": any(linear.is_quantized for _, linear in model.linears()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "use_gradient_checkpointing": {SaveLevel.ALL: "false", SaveLevel.INPUT: "true"}.get(
                model.planner.level, "unsloth"
            ),
            "random_state": model.lora_seed,
            **as_dict(model.lora),
        }
        self.planner = run_planner(model, self.args, self.settings["use_gradient_checkpointing"])
        self.micro_step = MicroStep(model, self.planner, self.args.cuda_graphs)
        self.progress = Progress()
        self._pending: list[
            Tensor
        ] = []  # (loss, gradient norm) of steps whose numbers are still on the device

    def _prepare(self, source: str | Path | Sequence[dict]) -> TokenizedDataset:
        a = self.args
        with progress_bar("tokenizing") as progress:
            return tokenize_dataset(
                source,
                self.processing_class,
                self.max_length,
                assistant_only_loss=a.assistant_only_loss,
                completion_only_loss=a.completion_only_loss,
                dataset_text_field=a.dataset_text_field,
                progress=progress,
            )

    # ---- one step

    def samples_of_step(self, step: int) -> list[Sample]:
        """The samples of optimizer step `step` (from 0)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.args.seed, epoch, len(self._units))
        units = order[place * self.units_per_step : (place + 1) * self.units_per_step]
        return [self.train_data.samples[i] for unit in units for i in self._units[unit]]

    def accumulate(self, samples: Sequence[Sample]) -> Tensor:
        """Add the gradients of one optimizer step's samples; returns their loss, 0-dim, on the device."""
        batches = [collate(pack) for pack in micro_steps(samples, self.micro_step_tokens)]
        targets = sum(batch.targets for batch in batches)
        loss = torch.zeros((), device=self.model.device)
        for batch in batches:
            loss += self.micro_step(batch, targets)
        self.progress.tokens += sum(len(batch.input_ids) for batch in batches)
        return loss

    def _loss(self, batch: Batch, targets: int) -> Tensor:
        """The batch's share of a loss over `targets` tokens."""
        inputs = {
            "input_ids": batch.input_ids,
            "labels": batch.labels,
            "position_ids": batch.position_ids,
        }
        return self.model(**inputs, num_items_in_batch=targets).loss

    def learning_rate(self, step: int) -> float:
        """The rate of optimizer step `step` (from 0)."""
        a = self.args
        warmup = warmup_count(a.warmup_steps, a.warmup_ratio, self.total_steps)
        return a.learning_rate * learning_rate_factor(
            a.lr_scheduler_type, step, warmup, self.total_steps
        )

    def _optimizer_step(self) -> None:
        step = self.progress.step
        samples = self.samples_of_step(step)
        loss = retry_on_oom(
            self.micro_step, self.optimizer.zero_grad, step + 1, lambda: self.accumulate(samples)
        )
        norm = self.optimizer.step(self.learning_rate(step))
        self._pending.append(torch.stack([loss, norm]))
        self.progress.step += 1

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The loss over the whole evaluation data, a mean over its trained-on tokens."""
        if self.eval_data is None:
            raise ValueError("there is no eval_dataset to evaluate on")
        start, samples = time.perf_counter(), self.eval_data.samples
        targets = sum(sample.targets for sample in samples)
        loss = torch.zeros((), device=self.model.device)
        with progress_bar("evaluating") as progress:
            for first in range(0, len(samples), EVAL_CHUNK):
                for pack in micro_steps(
                    samples[first : first + EVAL_CHUNK], self.micro_step_tokens
                ):
                    batch = collate(pack)
                    loss += run_in_graph_pool(
                        self.micro_step, lambda batch=batch: self._loss(batch, targets)
                    )
                progress(min(first + EVAL_CHUNK, len(samples)), len(samples))
        return {"eval_loss": float(loss), "eval_seconds": time.perf_counter() - start}

    # ---- the run

    def train(self, resume_from_checkpoint: bool | str | Path = False) -> TrainOutput:
        """Train to the end. True continues from the newest checkpoint of output_dir, a path from that checkpoint.

        Raises ValueError for an output folder that holds another run, a checkpoint that does not belong to this data
        or these settings, a loss that is not finite, a GPU out of memory, or a full disk; KeyboardInterrupt after
        Ctrl-C, once the step is finished and saved. The last whole checkpoint is kept in every case.
        """
        resumed = self._begin(resume_from_checkpoint)
        p, a = self.progress, self.args
        first = p.step
        started, log_time, log_tokens = (
            time.perf_counter() - p.seconds,
            time.perf_counter(),
            p.tokens,
        )
        report = TrainingLog(self.output / "metrics.jsonl", self.total_steps, p.step)
        with (
            report,
            deferred_sigint() as caught,
            self._telling(report),
            oom_as_value_error(self.planner, self.model.device, self._oom_advice),
            self._weights(),
            contextlib.closing(self.micro_step),
        ):
            report.say(banner(self.model, self.train_data, run_rows(self, resumed)))
            while p.step < self.total_steps and not caught:
                self._optimizer_step()
                if p.step == first + 1 and (
                    memory := planned_vs_measured(self.planner, self.model.device)
                ):
                    report.say(memory)
                report.advance()
                if self._due(a.logging_steps) or (p.step == 1 and a.logging_first_step):
                    self._collect()
                    now = time.perf_counter()
                    p.seconds = now - started
                    self._report(report, self._record((p.tokens - log_tokens) / (now - log_time)))
                    log_time, log_tokens = now, p.tokens
                paused = time.perf_counter()
                if self._happens(a.eval_strategy, a.eval_steps or a.logging_steps):
                    self._report(
                        report, {"step": p.step, "epoch": self._epoch(), **self.evaluate()}
                    )
                if self._happens(a.save_strategy, a.save_steps) or caught:
                    p.seconds = time.perf_counter() - started
                    self._save()
                log_time += time.perf_counter() - paused
            self._collect()
            p.seconds = time.perf_counter() - started
            if caught and p.step < self.total_steps:
                raise KeyboardInterrupt
            report.say(f"{'saved':<11}{self._run.finish(self.model, p.step)}")
        mean = p.loss_sum / max(1, p.step)
        metrics = {
            "train_loss": mean,
            "train_runtime": p.seconds,
            "epoch": self._epoch(),
            "tokens": p.tokens,
        }
        return TrainOutput(p.step, mean, metrics)

    def _weights(self) -> contextlib.AbstractContextManager:
        """A CPU takes as long to dequantise a weight as to multiply 30 rows by it, so there weights stay dense."""
        cpu = self.model.device.type == "cpu"
        return self.model.resident_weights_if_they_fit() if cpu else contextlib.nullcontext()

    @contextlib.contextmanager
    def _telling(self, report: TrainingLog) -> Iterator[None]:
        """A run that Ctrl-C ends, the first after its step or the second at once, says what it leaves in one line."""
        try:
            yield
        except KeyboardInterrupt:
            config = None if self._in_memory else self.output / "config.toml"
            report.say(
                interruption(
                    self.progress.step, self.total_steps, self._run.last_checkpoint(), config
                )
            )
            raise

    def _report(self, report: TrainingLog, record: dict[str, Any]) -> None:
        """Log a record. Where it cannot be written the run ends, after a checkpoint if there is room for one."""
        try:
            report.record(record)
        except ValueError as error:
            with contextlib.suppress(ValueError):  # on a full disk this fails as well
                self._save()
            raise ValueError(
                f"{error}; training stopped, last checkpoint: {self.last_checkpoint()}"
            ) from error

    def _oom_advice(self) -> str:
        """Return the step that ran out of memory, the settings to lower, and the last checkpoint."""
        settings = self.settings
        return (
            f"step {self.progress.step + 1}; lower micro_step_tokens ({self.micro_step_tokens}) or "
            f"max_length ({self.max_length}), or set use_gradient_checkpointing to true (it is "
            f"{settings['use_gradient_checkpointing']}) or load_in_4bit to true (it is "
            f"{settings['load_in_4bit']}); last checkpoint: {self.last_checkpoint()}"
        )

    def last_checkpoint(self) -> str:
        return str(self._run.last_checkpoint() or "none was saved")

    def _due(self, interval: int) -> bool:
        return self.progress.step % interval == 0 or self.progress.step == self.total_steps

    def _happens(self, strategy: str, steps: int) -> bool:
        """Whether something done every `steps` steps, every epoch or never is due now; the last step counts too."""
        return strategy != "no" and self._due(
            self.steps_per_epoch if strategy == "epoch" else steps
        )

    def _epoch(self) -> float:
        return self.progress.step / self.steps_per_epoch

    def _collect(self) -> None:
        """Fetch the losses still on the device. ValueError where one is not finite."""
        rows = torch.stack(self._pending).tolist() if self._pending else []
        self._pending.clear()
        for step, (loss, norm) in enumerate(rows, start=self.progress.step - len(rows) + 1):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = (
                    f"gradient norm became {norm}" if math.isfinite(loss) else f"loss became {loss}"
                )
                raise ValueError(
                    f"{what} at step {step} and training stopped; last checkpoint: {self.last_checkpoint()}. Lower "
                    f"learning_rate ({self.args.learning_rate:g}), or look at the samples of that step"
                )
            self.progress.unlogged.append(loss)
            self.progress.loss_sum += loss
            self.progress.grad_norm = norm

    def _record(self, tokens_per_second: float) -> dict[str, Any]:
        """The metrics since the last record."""
        p = self.progress
        losses, p.unlogged = p.unlogged, []
        return {
            "step": p.step,
            "epoch": self._epoch(),
            "loss": sum(losses) / len(losses),
            "learning_rate": self.learning_rate(p.step - 1),
            "grad_norm": p.grad_norm,
            "tokens": p.tokens,
            "tokens_per_second": tokens_per_second,
            "seconds": p.seconds,
        }

    # ---- what the run folder is given

    def _begin(self, resume: bool | str | Path) -> Path | None:
        """Open the run folder at step 0 or where a checkpoint left off; returns that checkpoint."""
        a = self.args
        self.micro_step.prepare()
        self.optimizer = FlatAdamW(
            [p for _, p in self.model.trainable_parameters()],
            betas=(a.adam_beta1, a.adam_beta2),
            eps=a.adam_epsilon,
            weight_decay=a.weight_decay,
            max_grad_norm=a.max_grad_norm,
            eight_bit=a.optim == "adamw_8bit",
        )
        self._run = RunFolder(a, resume, self._needed)
        self.output = self._run.output
        self.progress = Progress()
        self._pending.clear()
        if self._run.source is not None:
            self.progress = self._run.resume(self.model, self.optimizer, self._identity())
        if a.micro_step_tokens is None:
            longest = max(len(sample.input_ids) for sample in self.train_data.samples)
            self.micro_step_tokens = fit_micro_step_tokens(
                self.planner, self.model, self.micro_step_tokens, longest
            )
        self._run.write_config(self.settings, self.max_length)
        return self._run.source

    def _identity(self) -> dict[str, Any]:
        """What a resumed run has to share, or should, with the run that was interrupted."""
        a = as_dict(self.args)
        return {
            **{name: a[name] for name in SAME_ORDER + SAME_MATHEMATICS if name in a},
            "samples_per_step": self.units_per_step,
            "max_length": self.max_length,
            "total_steps": self.total_steps,
            "model": self.model.name,
            "load_in_4bit": self.settings["load_in_4bit"],
            "dtype": self.settings["dtype"],
            "data": fingerprint(self.train_data.samples),
        }

    def _save(self) -> None:
        self._collect()
        self._run.save(
            self.model, self.optimizer, self.progress, self.steps_per_epoch, self._identity()
        )
