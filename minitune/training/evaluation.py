"""The loss of a model on a dataset, and the scores of its answers, without a run.

loss = mean over the trained-on tokens of -log P[token]        perplexity = exp(loss)
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from minitune.config.sft_config import SFTConfig
from minitune.data.sources.sources import Dataset
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.model.causal_lm import CausalLM
from minitune.training.metrics import evaluation_loss
from minitune.training.out_of_memory import DEFAULT_MICRO_STEP_TOKENS
from minitune.training.run_data import tokenize, with_template_date
from minitune.training.score_functions import read_score, scores_in
from minitune.training.scored_answers import ScoredAnswers


@dataclass(frozen=True)
class ModelLoss:
    """The loss of a model on a dataset.

    loss: mean over the trained-on tokens, in nats.
    samples, tokens: the samples and their trained-on tokens.
    answers: the scores of the model's answers, and numbers on them (scored_answers.py), or {}.
    """

    loss: float
    samples: int
    tokens: int
    answers: dict[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """Return exp(loss), or infinity if that is too large for a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def __str__(self) -> str:
        text = (
            f"eval_loss {self.loss:.4f}, perplexity {self.perplexity:.4g}, on "
            f"{self.samples:,} samples with {self.tokens:,} trained-on tokens"
        )
        if not self.answers:
            return text
        scores = ", ".join(f"{name} {value:.4g}" for name, value in scores_in(self.answers).items())
        cut = f"{self.answers['eval_answers_cut']:,} of them cut"
        return f"{text}; {scores}, on {self.answers['eval_answers']:,} answers, {cut}"


def evaluate(
    model: CausalLM,
    dataset: Dataset,
    tokenizer: Tokenizer,
    args: SFTConfig | None = None,
    score_answer: str | Callable[..., Any] | None = None,
) -> ModelLoss:
    """Return the loss of a model, with or without an adapter. Nothing is written.

    dataset: paths, or records in memory, as SFTTrainer takes them.
    args: the settings of a run; those on samples, answers and micro_step_tokens count.
    score_answer: scores the answers of the model, as in SFTTrainer; default: that of the settings.

    Raises: ValueError if a record cannot be read, if a sample is longer than the model takes, if
        the loss is not finite, or if an answer cannot be scored.
    """
    args = with_template_date(args or SFTConfig())
    max_length = args.max_length or model.max_seq_length
    if max_length > model.max_seq_length:
        raise ValueError(
            f"max_length {max_length} is more than the max_seq_length {model.max_seq_length} that "
            "the model was loaded for; load it with a larger max_seq_length"
        )
    score = read_score(score_answer or args.score_answer)
    if score is not None and isinstance(dataset, Iterator):
        dataset = list(dataset)  # it is read twice
    samples = tokenize(dataset, tokenizer, args, max_length).samples
    scored = None
    if score is not None:
        scored = ScoredAnswers(dataset, score, tokenizer, args, model.max_seq_length)
    tokens = args.micro_step_tokens or DEFAULT_MICRO_STEP_TOKENS[model.device.type]
    on_cpu = model.device.type == "cpu"
    with model.resident_weights_if_they_fit() if on_cpu else contextlib.nullcontext():
        loss = evaluation_loss(model, samples, tokens, show_bar=not args.disable_tqdm)
    answers = {} if scored is None else scored.metrics(model, show_bar=not args.disable_tqdm)
    return ModelLoss(loss, len(samples), int(samples.targets.sum()), answers)
