"""The choice of the next token: repetition penalty, temperature, top-k, top-p, min-p, a draw.

The filters are applied in the order of transformers' logits processors, each to the result of the
one before it, so that the probabilities are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minitune.config.numbers import SMALLEST_FACTOR, check_number, number, whole
from minitune.model.precision import wider_dtypes

BOUNDS = {
    "temperature": number(0),
    "top_k": whole(),
    "top_p": number(SMALLEST_FACTOR, 1),
    "min_p": number(0, 1),
    "repetition_penalty": number(),
}


@dataclass(frozen=True)
class SamplingConfig:
    """The rule that chooses the next token.

    temperature: divisor of the logits; 0 takes the likeliest token.
    top_k: keep this many of the likeliest tokens; 0 keeps all.
    top_p: keep the fewest tokens that hold this share of the probability; 1 keeps all.
    min_p: keep the tokens with this share of the likeliest token's probability; 0 keeps all.
    repetition_penalty: a token of the prompt or the answer has its positive logit divided by this,
        and its negative logit multiplied; 1 changes nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name, bounds in BOUNDS.items():
            check_number(name, getattr(self, name), bounds)
        if self.temperature:  # a smaller divisor would make the logits infinite
            check_number("temperature", self.temperature, number())

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities (B, V) of logits (B, V) in float32, at a temperature above 0."""
        scores = logits / self.temperature
        if self.top_k:
            least = scores.topk(min(self.top_k, scores.shape[-1])).values[:, -1:]  # (B, 1)
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p < 1:
            ordered, order = scores.sort(-1, descending=True)
            shares = ordered.softmax(-1)
            likelier = shares.cumsum(-1) - shares  # the mass of all likelier tokens
            outside = torch.zeros_like(scores, dtype=torch.bool)
            outside.scatter_(-1, order, likelier >= self.top_p)
            scores = scores.masked_fill(outside, -torch.inf)
        shares = scores.softmax(-1)
        if self.min_p:
            floor = self.min_p * shares.amax(-1, keepdim=True)
            shares = scores.masked_fill(shares < floor, -torch.inf).softmax(-1)
        return shares


class LogitsNotFinite(ValueError):
    """Logits of the next token that are NaN or infinite."""


class Sampler:
    """The choice of one token after the other, for several prompts at once.

    seed: the seed of the draws; None draws from PyTorch's generator, which torch.manual_seed seeds.
    """

    def __init__(
        self,
        config: SamplingConfig,
        prompts: Sequence[Sequence[int]],
        vocab_size: int,
        seed: int | None = None,
    ):
        self.config = config
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self._seen: Tensor | None = None  # (B, V), True for the tokens of a prompt and its answer
        if config.repetition_penalty != 1:
            self._seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                self._seen[row, list(prompt)] = True

    def choose(self, logits: Tensor) -> list[int]:
        """Return one token for each row of the logits (B, V).

        Raises: LogitsNotFinite if the logits of a row are not finite.
        """
        if self._seen is not None:
            logits = self.penalised(logits.float().cpu())
        if self.config.temperature == 0:
            _check_finite(logits.amax(-1))
            tokens = logits.argmax(-1).cpu()
        else:
            shares = self.config.probabilities(logits.float().cpu())
            _check_finite(shares)
            tokens = shares.multinomial(1, generator=self.generator)[:, 0]
        if self._seen is not None:
            self._seen[torch.arange(len(tokens)), tokens] = True
        return tokens.tolist()

    def penalised(self, logits: Tensor) -> Tensor:
        """Return logits (B, V) with the penalty on the tokens that each row holds."""
        penalty = self.config.repetition_penalty
        lowered = torch.where(logits < 0, logits * penalty, logits / penalty)
        return torch.where(self._seen, lowered, logits)


def _check_finite(values: Tensor) -> None:
    """Raise LogitsNotFinite if a value is infinite or not a number."""
    if not torch.isfinite(values).all():
        raise LogitsNotFinite(
            "the logits of the next token are not finite; the weights or the adapter are damaged, "
            "or float16 is too narrow for this model: load it with "
            f"{wider_dtypes(values.device)}"
        )
