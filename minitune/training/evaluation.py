"""The loss of a model on a dataset, without a run.

loss = mean over the trained-on tokens of -log P[token]        perplexity = exp(loss)
"""

import contextlib
import math
from dataclasses import dataclass

from minitune.config.sft_config import SFTConfig
from minitune.data.sources.sources import Dataset
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.model.causal_lm import CausalLM
from minitune.training.metrics import evaluation_loss
from minitune.training.out_of_memory import DEFAULT_MICRO_STEP_TOKENS
from minitune.training.run_data import tokenize, with_template_date


@dataclass(frozen=True)
class ModelLoss:
    """The loss of a model on a dataset.

    loss: mean over the trained-on tokens, in nats.
    samples, tokens: the samples and their trained-on tokens.
    """

    loss: float
    samples: int
    tokens: int

    @property
    def perplexity(self) -> float:
        """Return exp(loss), or infinity if that is too large for a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def __str__(self) -> str:
        return (
            f"eval_loss {self.loss:.4f}, perplexity {self.perplexity:.4g}, on "
            f"{self.samples:,} samples with {self.tokens:,} trained-on tokens"
        )


def evaluate(
    model: CausalLM, dataset: Dataset, tokenizer: Tokenizer, args: SFTConfig | None = None
) -> ModelLoss:
    """Return the loss of a model, with or without an adapter. Nothing is written.

    dataset: paths, or records in memory, as SFTTrainer takes them.
    args: the settings of a run; those on samples and micro_step_tokens count.

    Raises: ValueError if a record cannot be read, if a sample is longer than the model takes, or if
        the loss is not finite.
    """
    args = with_template_date(args or SFTConfig())
    max_length = args.max_length or model.max_seq_length
    if max_length > model.max_seq_length:
        raise ValueError(
            f"max_length {max_length} is more than the max_seq_length {model.max_seq_length} that "
            "the model was loaded for; load it with a larger max_seq_length"
        )
    samples = tokenize(dataset, tokenizer, args, max_length).samples
    tokens = args.micro_step_tokens or DEFAULT_MICRO_STEP_TOKENS[model.device.type]
    on_cpu = model.device.type == "cpu"
    with model.resident_weights_if_they_fit() if on_cpu else contextlib.nullcontext():
        loss = evaluation_loss(model, samples, tokens, show_bar=not args.disable_tqdm)
    return ModelLoss(loss, len(samples), int(samples.targets.sum()))
