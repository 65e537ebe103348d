"""The optimizer steps of a run: samples, micro-steps, learning rate, and the evaluation loss.

One optimizer step takes the next per_device_train_batch_size * gradient_accumulation_steps samples
S of the epoch's order (run_data.py) and minimises

    loss = sum over S of the token losses / number of trained-on tokens in S

The samples are packed without padding into as few forward/backward passes (micro-steps) as
micro_step_tokens allows. Each micro-step's loss is divided by the token count of the whole step, so
the gradients add up to the same sum however S is split. In float16 the token losses are scaled
instead, and divided at the end of the step (loss_scale.py).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from minitune.config.sft_checks import LOSS_METRICS
from minitune.config.sft_config import SFTConfig
from minitune.config.training_config import RunConfig
from minitune.data.batching import collate, micro_steps
from minitune.data.samples import Sample
from minitune.data.sources.sources import Dataset
from minitune.data.token_view import TokenView
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.model.causal_lm import CausalLM
from minitune.progress import print_message
from minitune.training.checkpoint import Progress
from minitune.training.loss_scale import LossScale, run_micro_steps
from minitune.training.metrics import PendingLosses, evaluation_loss
from minitune.training.micro_step import MicroStep
from minitune.training.optimizer import FlatAdamW, learning_rate_factor, warmup_count
from minitune.training.out_of_memory import (
    DEFAULT_MICRO_STEP_TOKENS,
    retry_on_oom,
    run_planner,
)
from minitune.training.resume import resolve_run_config
from minitune.training.run_data import SampleOrder, read_datasets, tokenize, with_template_date
from minitune.training.score_functions import ScoreFunction, read_score
from minitune.training.scored_answers import ScoredAnswers
from minitune.training.trained_parameters import TrainedParameters


class OptimizerSteps:
    """The steps that train a model's adapter on a dataset, and its position in the run."""

    def __init__(
        self,
        model: CausalLM,
        args: SFTConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: Tokenizer | None = None,
        *,
        run_config: RunConfig | None = None,
        score_answer: str | Callable[..., Any] | ScoreFunction | None = None,
    ):
        """Check the arguments and tokenize the datasets. Only output_dir/tokenized is written.

        model: a model with an adapter.
        args: the settings of the run; default: SFTConfig().
        train_dataset, eval_dataset: a path, several paths, or records in memory
            (data/sources/sources.py, data/records/record_formats.py).
        processing_class: the tokenizer; default: that of the model's folder.
        run_config: settings to write to config.toml; default: the model's settings.
        score_answer: scores the answers to the evaluation records (score_functions.py), in place of
            the function that the settings name.

        Raises: ValueError if model, settings and data do not fit together.
        """
        self.model, self.args = model, with_template_date(args or SFTConfig())
        if model.lora is None:
            raise ValueError(
                "the model has no adapter to train; call FastLanguageModel.get_peft_model first"
            )
        self.processing_class = processing_class or Tokenizer.from_folder(model.folder)
        model.follow_ends(self.processing_class)  # those of the template trained on
        self._set_score(score_answer, eval_dataset)
        if self._score is not None and isinstance(eval_dataset, Iterator):
            eval_dataset = list(eval_dataset)  # it is read twice
        self._sources = train_dataset, eval_dataset
        self._read_data()
        self.run_config = resolve_run_config(
            model, self.data.train_files, self.data.eval_files, run_config
        )
        self.planner = run_planner(model, self.args, self.run_config.use_gradient_checkpointing)
        self.micro_step = MicroStep(model, self.planner, self.args.cuda_graphs)
        self.micro_step_tokens = (
            self.args.micro_step_tokens or DEFAULT_MICRO_STEP_TOKENS[model.device.type]
        )
        self.progress = Progress(loss_scale=LossScale.of_dtype(model.dtype))
        self._losses = PendingLosses()
        self._trained: TrainedParameters | None = None  # of the run

    def _set_score(
        self, score_answer: str | Callable[..., Any] | ScoreFunction | None, eval_dataset: Any
    ) -> None:
        """Take the scoring function: the given one, or that of the settings.

        Raises: ValueError if there is no such function, or no evaluation that needs it.
        """
        if isinstance(score_answer, str):
            self.args = replace(self.args, score_answer=score_answer)
        elif score_answer is not None and not isinstance(score_answer, ScoreFunction):
            self.args = replace(self.args, score_answer=None)  # config.toml cannot name it
        self._score = read_score(score_answer or self.args.score_answer)
        metric = self.args.metric_for_best_model
        if self._score is None and metric not in (None, *LOSS_METRICS):
            raise ValueError(
                f"metric_for_best_model is {metric!r}, which only score_answer can compute; pass "
                "one, or choose loss"
            )
        if self._score is not None and eval_dataset is None:
            raise ValueError("score_answer needs evaluation records; pass an eval_dataset")

    # ---- the data

    def _read_data(self) -> None:
        """Tokenize the datasets, and divide them into steps.

        Raises: ValueError if settings and data do not fit together.
        """
        self._scored: ScoredAnswers | None = None  # made by `scored_answers`
        self.data = read_datasets(
            *self._sources, self.processing_class, self.args, self.model.max_seq_length
        )
        self.order = SampleOrder(self.data.train.samples, self.args, self.data.max_length)
        self.size = self.order.size

    def relabel(self, instruction_part: str, response_part: str) -> None:
        """Tokenize the datasets again, with marks before the answers of plain texts.

        Raises: ValueError if the data cannot be read again, or has nothing to train on.
        """
        for data in self._sources:
            if isinstance(data, Iterator):
                raise ValueError("the dataset is an iterator, which is read once; pass a list")
        marks = {"instruction_part": instruction_part, "response_part": response_part}
        everything = {"assistant_only_loss": None, "completion_only_loss": None}
        self.args = replace(self.args, **marks, **everything)
        self._read_data()

    @property
    def scored_answers(self) -> ScoredAnswers | None:
        """The answers to the evaluation records, read at the first use; None without a score.

        Raises: ValueError if the records or the function do not fit (scored_answers.py).
        """
        if self._scored is None and self._score is not None:
            scored = self._answers_to(self._sources[1])
            scored.check_best_metric(self.args.metric_for_best_model)
            self._scored = scored
        return self._scored

    def _answers_to(self, dataset: Dataset) -> ScoredAnswers:
        max_seq_length = self.model.max_seq_length
        return ScoredAnswers(dataset, self._score, self.processing_class, self.args, max_seq_length)

    @property
    def is_in_files(self) -> bool:
        """True if config.toml can name the data and the scoring function."""
        is_named = self._score is None or self.args.score_answer is not None
        return is_named and self.data.is_in_files

    @property
    def train_dataset(self) -> TokenView:
        """The samples that are trained on, as rows with input_ids and labels."""
        return TokenView(self.data.train.samples)

    @property
    def eval_dataset(self) -> TokenView | None:
        """The samples of the evaluation, or None."""
        if self.data.evaluation is None:
            return None
        return TokenView(self.data.evaluation.samples)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; transformers' older name of processing_class."""
        return self.processing_class

    # ---- one step

    def accumulate(self, samples: Sequence[Sample]) -> Tensor:
        """Add the gradients of an optimizer step's samples to `.grad`, which is 0 before.

        Returns their loss, 0-dim, on the device.
        """
        batches = [collate(pack) for pack in micro_steps(samples, self.micro_step_tokens)]
        return run_micro_steps(self.micro_step, batches, self.progress.loss_scale)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, counted from 0."""
        args, total_steps = self.args, self.size.total_steps
        warmup = warmup_count(args.warmup_steps, args.warmup_ratio, total_steps)
        kind = args.lr_scheduler_type
        cycles = args.lr_scheduler_cycles
        return args.learning_rate * learning_rate_factor(kind, step, warmup, total_steps, cycles)

    def _new_optimizer(self) -> FlatAdamW:
        """Return the optimizer of the parameters that the run trains, before its first step."""
        args = self.args
        return FlatAdamW(
            self._trained.parameters,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            max_grad_norm=args.max_grad_norm,
            eight_bit=args.optim == "adamw_8bit",
        )

    def _optimizer_step(self) -> None:
        """Train on the samples of the next step, and update the adapter.

        Raises: ValueError if other parameters than those at the run's beginning would be trained.
        """
        self._trained.check()
        step = self.progress.step
        samples = self.order.samples_of_step(step)
        loss, norm = self._finite_gradients(samples)
        norm = self.optimizer.step(self.learning_rate(step), norm)
        self._losses.add(loss, norm)
        self.progress.tokens += sum(len(sample.input_ids) for sample in samples)
        self.progress.step += 1

    def _finite_gradients(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor | None]:
        """Fill `.grad`, and return the loss and the gradient norm; in float16 repeat overflows.

        The norm is None in other dtypes, in which nothing waits for the device.

        Raises: BeyondFloat16 if no loss scale helps.
        """
        scale, step = self.progress.loss_scale, self.progress.step + 1
        zero_grad = self.optimizer.zero_grad
        while True:
            loss = retry_on_oom(self.micro_step, zero_grad, step, lambda: self.accumulate(samples))
            if scale is None:
                return loss, None
            norm = self.optimizer.gradient_norm()
            if scale.accept(loss, norm):
                return loss, norm
            text = f"gradients overflow in step {step}, which is repeated with a loss scale of"
            print_message("note", f"{text} {scale.scale:g}")

    def _evaluation(self, eval_dataset: Dataset | None = None) -> dict[str, float]:
        """Return the loss of the evaluation data, a mean over its trained-on tokens, and its speed.

        The scores of answers follow, if there is a scoring function and the answers could be
        scored; otherwise a warning says why.

        eval_dataset: data in place of that of the trainer.

        Raises: ValueError if there is no evaluation data; NotFinite if the loss is not finite.
        """
        data, scored = self.data.evaluation, self.scored_answers
        if eval_dataset is not None:
            if scored is not None and isinstance(eval_dataset, Iterator):
                eval_dataset = list(eval_dataset)
            data = tokenize(eval_dataset, self.processing_class, self.args, self.data.max_length)
            scored = None if scored is None else self._answers_to(eval_dataset)
        if data is None:
            raise ValueError("there is no eval_dataset to evaluate on; pass one to SFTTrainer")
        start = time.perf_counter()
        show_bar = not self.args.disable_tqdm
        loss = evaluation_loss(
            self.model, data.samples, self.micro_step_tokens, self.micro_step, show_bar
        )
        seconds = time.perf_counter() - start
        metrics = {
            "eval_loss": loss,
            "eval_runtime": seconds,
            "eval_samples_per_second": len(data.samples) / seconds,
        }
        if scored is not None:
            step = self.progress.step
            metrics |= scored.metrics_if_possible(self.micro_step, step, show_bar)
        return metrics
