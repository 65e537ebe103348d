"""The result of `generate`: tokens as lists or a tensor, alone or with their log-probabilities."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minitune.model.decoding.requests import Answer


@dataclass
class GenerateOutput:
    """The result of `generate` if it is called with return_logprobs or return_dict_in_generate.

    sequences: the tokens, as without these arguments.
    logprobs: the log-probability of each new token in `sequences` by the model's logits, before
        the temperature, the penalty and the filters. Lists for lists; for a tensor a tensor
        (B, new tokens) in float32 with 0 behind the end token. None without return_logprobs.
    stop_reasons: of each answer, the end token or the stop string that ended it, or None if it
        reached a limit or `on_token` ended it.
    """

    sequences: list[list[int]] | Tensor
    logprobs: list[list[float]] | Tensor | None
    stop_reasons: list[int | str | None]


def generation_output(
    grid: Tensor | None,
    answers: Sequence[Answer],
    end_tokens: Collection[int],
    pad_token_id: int | None,
    stops: Sequence[str | None] | None,
) -> GenerateOutput:
    """Return the new tokens without end tokens, or behind the prompts if these are a tensor.

    grid: the prompts (B, T), or None if they were given as lists.
    stops: the stop string that ended each answer, or None; None if there are none.

    Raises: ValueError if padding is needed and there is no pad token.
    """
    tokens = [answer.tokens for answer in answers]
    ends = [row[-1] if row[-1] in end_tokens else None for row in tokens]
    reasons = (
        ends
        if stops is None
        else [end if stop is None else stop for end, stop in zip(ends, stops, strict=True)]
    )
    logprobs = None
    if answers[0].logprobs is not None:
        logprobs = [answer.logprobs for answer in answers]
    if grid is not None:
        sequences = _with_prompts(grid, tokens, pad_token_id)
        padded = None if logprobs is None else _padded(logprobs, 0.0, torch.float32, grid.device)
        return GenerateOutput(sequences, padded, reasons)
    lengths = [len(row) - (end is not None) for row, end in zip(tokens, ends, strict=True)]
    if logprobs is not None:
        logprobs = [row[:n] for row, n in zip(logprobs, lengths, strict=True)]
    sequences = [row[:n] for row, n in zip(tokens, lengths, strict=True)]
    return GenerateOutput(sequences, logprobs, reasons)


def _with_prompts(grid: Tensor, answers: Sequence[Sequence[int]], pad: int | None) -> Tensor:
    """Return the prompts (B, T) and the answers behind them as one tensor, padded on the right.

    Raises: ValueError if padding is needed and there is no pad token.
    """
    if pad is None and len(set(map(len, answers))) > 1:
        raise ValueError("the answers differ in length; name a pad_token_id to fill them up")
    return torch.cat([grid, _padded(answers, pad, grid.dtype, grid.device)], 1)


def _padded(
    rows: Sequence[Sequence], value: float | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return rows as one tensor, filled up on the right."""
    width = max(map(len, rows))
    filled = [[*row, *[value] * (width - len(row))] for row in rows]
    return torch.tensor(filled, dtype=dtype, device=device)
