"""Evaluation by generation: the model answers records of the evaluation, and a function scores it.

    record -> tokens as in training | ... prompt ... | last answer |
                                      greedy answer    reference

The prompt is everything before the last answer that is trained on, in the tokens of the training.
The means of the scores are metrics of the evaluation, and change no number of the training.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from minitune.config.sft_checks import LOSS_METRICS
from minitune.config.sft_config import SFTConfig
from minitune.config.training_config import MAX_SEQ_LENGTH
from minitune.data.records.plain_texts import TEXT_FIELD
from minitune.data.samples import LabelOptions, Sample
from minitune.data.sources.sources import Dataset, open_sources
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.data.tokenize_dataset import tokenize_dataset
from minitune.kernels.cross_entropy import IGNORE_INDEX
from minitune.model.causal_lm import CausalLM
from minitune.model.decoding.kv_cache import NoCacheRoom
from minitune.model.sampling import LogitsNotFinite
from minitune.progress import print_message
from minitune.training.greedy_answers import answer_texts, greedy_answers
from minitune.training.micro_step import MicroStep
from minitune.training.score_functions import ScoredRecord, ScoreError, ScoreFunction


class AnsweredRecord(NamedTuple):
    """A record that the model answers.

    prompt: its token ids.
    limit: new tokens of the answer at most.
    """

    prompt: list[int]
    limit: int
    scored: ScoredRecord


class ScoredAnswers:
    """The records that the model answers at each evaluation, and the function that scores them.

    last: {"origin", "answer", "reference", and the scores} of each record, of the last evaluation.
    """

    def __init__(
        self,
        dataset: Dataset,
        score: ScoreFunction,
        tokenizer: Tokenizer,
        args: SFTConfig,
        max_seq_length: int,
    ):
        """Read the first `eval_answers` records, and score the first reference as a trial.

        dataset: paths, or records in memory, as SFTTrainer takes them.

        Raises: ValueError if a record has no prompt, no record has room for an answer, or the score
            of the first reference fails.
        """
        self._score, self._tokenizer, self._args = score, tokenizer, args
        self._ends = tokenizer.eos_token_ids
        self.last: list[dict[str, Any]] = []
        found = list(_answered_records(dataset, tokenizer, args, max_seq_length))
        self.records = [record for record in found if record.limit > 0]
        if not self.records:
            raise ValueError(
                f"score_answer: none of the first {args.eval_answers} evaluation records has a "
                f"last answer, and room for it within max_seq_length, which is {max_seq_length:,}"
            )
        if hidden := len(found) - len(self.records):
            print_message(
                "warning",
                f"score_answer leaves out {hidden} of {len(found)} evaluation records, whose "
                f"prompts fill max_seq_length {max_seq_length:,}",
            )
        first = self.records[0].scored
        self.names = tuple(score(first.reference, first))

    def check_best_metric(self, metric: str | None) -> None:
        """Check the metric of the best checkpoint.

        Raises: ValueError if it is neither the loss nor a score.
        """
        if metric in (None, *LOSS_METRICS, *self.names) or f"eval_{metric}" in self.names:
            return
        known = ", ".join(name.removeprefix("eval_") for name in self.names)
        raise ValueError(
            f"metric_for_best_model is {metric!r}, but score_answer {self._score.name} returns "
            f"{known}; choose one of them, or loss"
        )

    def metrics(
        self, model: CausalLM, micro_step: MicroStep | None = None, show_bar: bool = True
    ) -> dict[str, float]:
        """Return the mean of each score, and numbers on the answers.

            eval_NAME              the mean of a score
            eval_answers           records that were answered
            eval_answers_cut       answers that reached their limit without an end
            eval_answer_tokens     mean tokens of an answer
            eval_answers_runtime   seconds of answering and scoring

        micro_step, show_bar: as in `greedy_answers`.

        Raises: torch.OutOfMemoryError, MemoryError, NoCacheRoom and LogitsNotFinite, as
            `greedy_answers`; ScoreError if an answer cannot be scored.
        """
        start = time.perf_counter()
        prompts = [record.prompt for record in self.records]
        limits = [record.limit for record in self.records]
        answers = greedy_answers(model, prompts, limits, self._ends, micro_step, show_bar)
        texts = answer_texts(answers, self._ends, self._tokenizer)
        scores = [
            self._scores_of(text, record) for text, record in zip(texts, self.records, strict=True)
        ]
        self.last = [
            {"origin": r.scored.origin, "answer": text, "reference": r.scored.reference, **values}
            for r, text, values in zip(self.records, texts, scores, strict=True)
        ]
        count = len(answers)
        return {
            **{name: math.fsum(row[name] for row in scores) / count for name in self.names},
            "eval_answers": count,
            "eval_answers_cut": sum(answer[-1] not in self._ends for answer in answers),
            "eval_answer_tokens": sum(map(len, answers)) / count,
            "eval_answers_runtime": time.perf_counter() - start,
        }

    def metrics_if_possible(
        self, micro_step: MicroStep, step: int, show_bar: bool = True
    ) -> dict[str, float]:
        """Return the metrics of a model that trains; {}, with a warning, if there are none.

        That is so if memory runs out, logits are not finite, or an answer cannot be scored: a run
        goes on without these numbers.

        step: optimizer steps done, for the warning.
        """
        try:
            return self.metrics(micro_step.model, micro_step, show_bar)
        except (torch.OutOfMemoryError, MemoryError, NoCacheRoom):
            reason = "out of memory; lower eval_answers or eval_max_new_tokens"
        except (LogitsNotFinite, ScoreError) as error:
            reason = str(error)
        print_message("warning", f"no scores at step {step}, and the run goes on: {reason}")
        return {}

    def _scores_of(self, answer: str, record: AnsweredRecord) -> dict[str, float]:
        """Return the scores of an answer.

        Raises: ScoreError if they have other names than those of the first record.
        """
        scores = self._score(answer, record.scored)
        if scores.keys() != set(self.names):
            raise ScoreError(
                f"{record.scored.origin}: score_answer {self._score.name} returned "
                f"{', '.join(scores)}, but for the first record {', '.join(self.names)}"
            )
        return scores


# ---- records


def _answered_records(
    dataset: Dataset, tokenizer: Tokenizer, args: SFTConfig, max_seq_length: int
) -> Iterator[AnsweredRecord]:
    """Yield the first records of a dataset with their prompts; the limit may be 0 or less.

    Raises: ValueError if a record has no prompt.
    """
    options = LabelOptions.of(args)
    changes = {
        name: None
        for name in ("assistant_only_loss", "completion_only_loss")
        if getattr(options, name) is False  # the answers count here, whatever is trained on
    }
    options = replace(options, **changes)
    text_field = options.dataset_text_field or TEXT_FIELD
    records = list(_first_records(dataset, args.eval_answers, text_field))
    # the whole answer is the reference, so nothing is cut
    samples = tokenize_dataset(
        [record for _, record in records],
        tokenizer,
        MAX_SEQ_LENGTH,
        skip_bad=args.skip_bad,
        **vars(options),
    ).samples
    ends = tokenizer.eos_token_ids
    last = {int(number): i for i, number in enumerate(samples.numbers)}  # of several samples
    for number, i in last.items():
        origin, record = records[number]
        prompt, reference = _before_last_answer(samples[i])
        if not prompt:
            raise ValueError(
                f"{origin}: has no prompt, so score_answer cannot compare answers; expected a "
                "conversation, a prompt with a completion, or plain texts with response_part"
            )
        (text,) = answer_texts([reference], ends, tokenizer)
        limit = min(args.eval_max_new_tokens, max_seq_length - len(prompt))
        yield AnsweredRecord(prompt, limit, ScoredRecord(origin, record, text))


def _first_records(dataset: Dataset, count: int, text_field: str) -> Iterator[tuple[str, Mapping]]:
    """Yield (place, record) of the first records that can be read."""
    for source in open_sources(dataset, text_field):
        for number, record in source.records():
            if count == 0:
                return
            if not isinstance(record, ValueError):
                count -= 1
                yield source.format.origin(number), record


def _before_last_answer(sample: Sample) -> tuple[list[int], list[int]]:
    """Return the tokens before the last run of labels, and the tokens of that run."""
    labelled = np.asarray(sample.labels) != IGNORE_INDEX
    end = int(labelled.nonzero()[0][-1]) + 1
    gaps = (~labelled[:end]).nonzero()[0]
    begin = int(gaps[-1]) + 1 if len(gaps) else 0
    ids = [int(token) for token in sample.input_ids[:end]]
    return ids[:begin], ids[begin:]
