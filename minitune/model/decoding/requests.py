"""Requests to the decode engine and its answers, in token ids."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    prompt: token ids, at least one.
    limit: the largest number of new tokens, at least 1.
    seed: the seed of the draws.
    adapter: index into the adapters of the call.
    """

    prompt: Sequence[int]
    limit: int
    seed: int = 0
    adapter: int = 0

    @property
    def tokens(self) -> int:
        """Return the tokens of the prompt and of the longest answer."""
        return len(self.prompt) + self.limit


@dataclass
class Answer:
    """The new tokens of a request, with the end token if there is one.

    logprobs: the log-probability of each token; None unless the call asks for them.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
