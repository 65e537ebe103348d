"""The choice of the next token: repetition penalty, temperature, top-k, top-p, min-p, a draw.

The filters are applied in the order of transformers' logits processors, each to the result of the
one before it, so that the probabilities are the same. A draw is the largest of score + Gumbel noise
(kernels/sample_tokens.py). The noise is a function of the row's seed, of the number of the draw and
of the token. A token therefore depends on the logits, the seed and the history of its own row, and
not on the other rows.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minitune.config.numbers import SMALLEST_FACTOR, check_number, number, whole
from minitune.kernels.sample_tokens import Chosen, sample_tokens
from minitune.model.precision import wider_dtypes
from minitune.model.sampling_filters import keep_min_p, keep_top_k, keep_top_p

BOUNDS = {
    "temperature": number(0),
    "top_k": whole(),
    "top_p": number(SMALLEST_FACTOR, 1),
    "min_p": number(0, 1),
    "repetition_penalty": number(),
    "min_new_tokens": whole(),
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
    min_new_tokens: no end token is chosen before an answer has this many tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0

    def __post_init__(self):
        for name, bounds in BOUNDS.items():
            check_number(name, getattr(self, name), bounds)
        if self.temperature:  # a smaller divisor would make the logits infinite
            check_number("temperature", self.temperature, number())

    @property
    def keeps_all(self) -> bool:
        """Return True if no filter drops a token."""
        return not self.top_k and self.top_p == 1 and not self.min_p

    def filtered(self, logits: Tensor) -> Tensor:
        """Return logits / temperature, (rows, V), with -inf for the tokens that are not drawn.

        The temperature is above 0.
        """
        scores = logits / self.temperature
        if self.top_k:
            scores = keep_top_k(scores, self.top_k)
        if self.top_p < 1:
            scores = keep_top_p(scores, self.top_p)
        if self.min_p:
            scores = keep_min_p(scores, self.min_p)
        return scores


class LogitsNotFinite(ValueError):
    """Logits of the next token that are NaN or infinite."""

    @classmethod
    def on(cls, device: torch.device) -> "LogitsNotFinite":
        """Return the error with its causes and the remedy on a device."""
        return cls(
            "the logits of the next token are not finite; the weights or the adapter are damaged, "
            f"or float16 is too narrow for this model: load it with {wider_dtypes(device)}"
        )


class Sampler:
    """The choice of one token after the other for the sequences of `slots` slots.

    All state is on the device in tensors that stay, and nothing waits for the host, so that CUDA
    graphs can hold a choice.

    logprobs: compute the log-probabilities of the chosen tokens.
    end_tokens: the tokens that config.min_new_tokens forbids.
    """

    def __init__(
        self,
        config: SamplingConfig,
        slots: int,
        vocab_size: int,
        device: torch.device,
        logprobs: bool = False,
        end_tokens: Collection[int] = (),
    ):
        self.config, self.logprobs = config, logprobs
        self.seeds = torch.zeros(slots, dtype=torch.int64, device=device)
        self.draws = torch.zeros(slots, dtype=torch.int64, device=device)  # tokens chosen so far
        # filtered scores are divided already
        divisor = config.temperature if config.keeps_all else float(config.temperature > 0)
        self._temperatures = torch.full((slots,), divisor, dtype=torch.float32, device=device)
        self._seen: Tensor | None = None  # (slots, V), True for the tokens of prompt and answer
        if config.repetition_penalty != 1:
            self._seen = torch.zeros(slots, vocab_size, dtype=torch.bool, device=device)
        self._ends: Tensor | None = None  # (V,), True for the end tokens
        if config.min_new_tokens and end_tokens:
            inside = [token for token in end_tokens if 0 <= token < vocab_size]
            self._ends = torch.zeros(vocab_size, dtype=torch.bool)
            self._ends[inside] = True
            self._ends = self._ends.to(device)

    def admit(self, slot: int, prompt: Sequence[int], seed: int) -> None:
        """Start a sequence in a slot.

        seed: from 0 to 2^63 - 1.
        """
        self.seeds[slot] = seed
        self.draws[slot] = 0
        if self._seen is not None:
            self._seen[slot] = False
            ids = torch.tensor(list(prompt), device=self._seen.device)
            self._seen[slot].index_fill_(0, ids, True)

    def move(self, source: int, target: int) -> None:
        """Continue the sequence of one slot in another."""
        for state in (self.seeds, self.draws, self._seen):
            if state is not None:
                state[target] = state[source]

    def choose(self, logits: Tensor) -> Chosen:
        """Return the next tokens of the first slots, one for each row of the logits.

        logits: (rows, V) in float32, not changed. The log-probabilities are those of these logits,
            before the penalty, the temperature and the filters.
        """
        rows, config = len(logits), self.config
        seeds, draws, temperatures = self.seeds[:rows], self.draws[:rows], self._temperatures[:rows]
        scores = self.allowed(logits)
        is_filtered = config.temperature and not config.keeps_all
        if is_filtered:
            scores = config.filtered(scores)
        raw = logits if self.logprobs else None
        chosen = sample_tokens(scores, seeds, draws, temperatures, logits=raw)
        if is_filtered:  # a filter may drop what is not finite
            chosen = chosen._replace(finite=logits.amax(-1).isfinite())
        draws += 1
        if self._seen is not None:
            self._seen[:rows].scatter_(1, chosen.tokens[:, None], True)
        return chosen

    def allowed(self, logits: Tensor) -> Tensor:
        """Return logits (rows, V) with the penalty, and -inf for end tokens that come too early."""
        rows, penalty = len(logits), self.config.repetition_penalty
        if self._seen is not None:
            lowered = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self._seen[:rows], lowered, logits)
        if self._ends is not None:
            early = self.draws[:rows] < self.config.min_new_tokens
            logits = logits.masked_fill(early[:, None] & self._ends, -torch.inf)
        return logits
