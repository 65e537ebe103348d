"""Text generation, under transformers' names.

    model.generate([[1, 5, 9]])                      lists in: the new tokens of each prompt
    model.generate(**tokenizer(texts, padding=True, return_tensors="pt"))
                                                     a tensor in: prompts and new tokens, padded

generation_arguments.py reads the arguments, sampling.py chooses tokens, decoding/ runs the model.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from minitune.config.foreign_arguments import foreign_arguments
from minitune.device import check_torch_defaults
from minitune.model.answer_seeds import answer_seeds
from minitune.model.decoding.engine import decode
from minitune.model.decoding.requests import Request
from minitune.model.generation_arguments import (
    FOREIGN,
    Prompts,
    check_prompts,
    new_token_limits,
    read_prompts,
    sampling_config,
)


class Streamer(Protocol):
    """A receiver of tokens as they are chosen, such as minitune's and transformers' TextStreamer.

    The prompt comes first, (1, T); then each new token, (1,).
    """

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


@foreign_arguments(**FOREIGN)
def generate(
    model,
    prompts: Any,
    attention_mask: Any = None,
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    num_return_sequences: int = 1,
    eos_token_ids: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    seed: int | Sequence[int] | None = None,
    streamer: Streamer | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]] | Tensor:
    """Return the answers to prompts.

    Lists of token ids give lists of new tokens, without the end token. A tensor (B, T) gives a
    tensor of prompts and new tokens, padded behind the end token, as in transformers. An answer
    ends at an end token, after `max_new_tokens`, or at the model's max_seq_length.

    prompts, attention_mask: as in `read_prompts`; also named input_ids or inputs.
    max_new_tokens: 128 by default. max_length counts the prompt too.
    do_sample, temperature, top_k, top_p, min_p, repetition_penalty: as in `sampling_config`.
    num_return_sequences: answers to each prompt, one behind the other.
    eos_token_ids, pad_token_id: None takes the model's. The first is also named eos_token_id.
    seed: the seed of the draws, or a list with one for each answer, as in `answer_seeds`.
    streamer: receives the only prompt and its new tokens, and an end token that the result has.
    on_token: called as on_token(i, token) for each new token of answer i, except its end token.

    Raises: ValueError if a prompt is missing, empty or too long, if a setting is out of range, or
        if PyTorch's default dtype or device was changed.
    """
    check_torch_defaults()
    defaults = model.generation_defaults
    ends = model.eos_token_ids if eos_token_ids is None else eos_token_ids
    ends = (ends,) if isinstance(ends, int) else tuple(ends)
    pad = defaults.get("pad_token_id") if pad_token_id is None else pad_token_id
    given = read_prompts(prompts, attention_mask, pad, ends).repeated(num_return_sequences)
    check_prompts(model, given.ids)
    named = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    rule = sampling_config(do_sample, named, defaults)
    limits = new_token_limits(given, model.max_seq_length, max_new_tokens, max_length)
    report = _reporter(streamer, on_token, given, ends)
    own = [0] * len(given.ids)
    seeds = answer_seeds(seed, given.ids, own) if rule.temperature else own
    requests = list(map(Request, given.ids, limits, seeds))
    found = decode(model, requests, rule, end_tokens=ends, on_token=report)
    answers = [answer.tokens for answer in found]
    if streamer:
        streamer.end()
    return _result(given.grid, answers, ends, pad)


def _reporter(
    streamer: Streamer | None,
    on_token: Callable[[int, int], None] | None,
    given: Prompts,
    ends: Sequence[int],
) -> Callable[[int, int], None]:
    """Hand the prompt to the streamer, and return the function that hands each new token on.

    Raises: ValueError if a streamer would get several prompts.
    """
    if streamer:
        if len(given.ids) != 1:
            raise ValueError("a streamer shows one answer to one prompt; leave streamer out")
        streamer.put(torch.tensor(given.ids))

    def report(row: int, token: int) -> None:
        if streamer and (token not in ends or given.grid is not None):
            streamer.put(torch.tensor([token]))
        if on_token and token not in ends:
            on_token(row, token)

    return report


def _result(
    grid: Tensor | None, answers: Sequence[list[int]], ends: Sequence[int], pad: int | None
) -> list[list[int]] | Tensor:
    """Return the new tokens without end tokens, or behind the prompts if these are a tensor."""
    if grid is None:
        return [answer[:-1] if answer[-1] in ends else answer for answer in answers]
    return _with_prompts(grid, answers, pad)


def _with_prompts(grid: Tensor, answers: Sequence[Sequence[int]], pad: int | None) -> Tensor:
    """Return the prompts (B, T) and the answers behind them as one tensor, padded on the right.

    Raises: ValueError if padding is needed and there is no pad token.
    """
    width = max(map(len, answers))
    if pad is None and any(len(answer) < width for answer in answers):
        raise ValueError("the answers differ in length; name a pad_token_id to fill them up")
    padded = [[*answer, *[pad] * (width - len(answer))] for answer in answers]
    return torch.cat([grid, torch.tensor(padded, dtype=grid.dtype, device=grid.device)], 1)
