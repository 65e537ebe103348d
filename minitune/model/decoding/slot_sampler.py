"""The choice of the next token for each slot."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minitune.model.sampling import SamplingConfig


class Chosen(NamedTuple):
    """The tokens (rows,), and their log-probabilities (rows,) or None."""

    tokens: Tensor
    logprobs: Tensor | None


class SlotSampler:
    """The choice of one token after the other for the sequences of all slots."""

    def __init__(
        self,
        config: SamplingConfig,
        slots: int,
        vocab_size: int,
        device: torch.device,
        logprobs: bool = False,
    ):
        self.config, self.logprobs = config, logprobs
        self._generators = [torch.Generator(device) for _ in range(slots)]
        self._seen = None
        if config.repetition_penalty != 1:
            self._seen = torch.zeros(slots, vocab_size, dtype=torch.bool, device=device)

    def admit(self, slot: int, prompt: Sequence[int], seed: int) -> None:
        """Begin a sequence in a slot."""
        self._generators[slot].manual_seed(seed)
        if self._seen is not None:
            self._seen[slot] = False
            self._seen[slot, list(prompt)] = True

    def move(self, source: int, target: int) -> None:
        """Move the state of a slot."""
        generators = self._generators
        generators[source], generators[target] = generators[target], generators[source]
        if self._seen is not None:
            self._seen[target] = self._seen[source]

    def choose(self, logits: Tensor) -> Chosen:
        """Return one token for each row of the logits (rows, V)."""
        rows = len(logits)
        if self._seen is not None:
            penalty = self.config.repetition_penalty
            lowered = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self._seen[:rows], lowered, logits)
        if self.config.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            shares = self.config.probabilities(logits).nan_to_num(1.0)
            drawn = zip(shares, self._generators, strict=False)
            tokens = torch.cat([row.multinomial(1, generator=g) for row, g in drawn])
        if self._seen is not None:
            self._seen[torch.arange(rows, device=tokens.device), tokens] = True
        logprobs = None
        if self.logprobs:
            logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        return Chosen(tokens, logprobs)
