"""Text generation, under transformers' names.

    model.generate([[1, 5, 9]])                      lists in: the new tokens of each prompt
    model.generate(**tokenizer(texts, padding=True, return_tensors="pt"))
                                                     a tensor in: prompts and new tokens, padded
    model.generate(prompts, return_logprobs=True)    GenerateOutput: sequences, logprobs, ...
    model.generate(2 * prompts, adapter=[None, False])
                                                     the answers of the adapter and of the base

generation_arguments.py, adapter_choice.py and stop_strings.py read the arguments, sampling.py
chooses tokens, decoding/ runs the model, and generation_output.py gives the result its form.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from minitune.config.foreign_arguments import foreign_arguments
from minitune.device import check_torch_defaults
from minitune.model.adapter_choice import read_adapter_choice
from minitune.model.answer_seeds import answer_seeds
from minitune.model.decoding.decode_call import OnToken
from minitune.model.decoding.engine import decode
from minitune.model.decoding.requests import Request
from minitune.model.decoding.step_weights import MAX_FEW_ROWS
from minitune.model.generation_arguments import (
    FOREIGN,
    Prompts,
    cache_nbytes,
    check_least,
    check_prompts,
    end_token_ids,
    new_token_limits,
    read_prompts,
    sampling_config,
    whole_number,
)
from minitune.model.generation_output import GenerateOutput, generation_output
from minitune.model.stop_strings import StopStrings, read_stop_strings


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
    min_new_tokens: int | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    num_return_sequences: int = 1,
    eos_token_ids: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    seed: int | Sequence[int] | None = None,
    adapter: Any = None,
    return_logprobs: bool = False,
    return_dict_in_generate: bool | None = None,
    streamer: Streamer | None = None,
    on_token: OnToken | None = None,
    cache_memory: int | str | None = None,
    max_num_seqs: int = MAX_FEW_ROWS,
) -> list[list[int]] | Tensor | GenerateOutput:
    """Return the answers to prompts.

    Lists of token ids give lists of new tokens, without the end token. A tensor (B, T) gives a
    tensor of prompts and new tokens, padded behind the end token, as in transformers. An answer
    ends at an end token, at a stop string, after `max_new_tokens`, or at the model's
    max_seq_length.

    prompts, attention_mask: as in `read_prompts`; also named input_ids or inputs.
    max_new_tokens: 128 by default. max_length counts the prompt too.
    do_sample, temperature, top_k, top_p, min_p, repetition_penalty, min_new_tokens: as in
        `sampling_config`.
    num_return_sequences: answers to each prompt, one behind the other.
    eos_token_ids, pad_token_id: None takes the model's. The first is also named eos_token_id.
    stop_strings, tokenizer: texts that end an answer, and stay in it, as in `StopStrings`.
    seed: the seed of the draws, or a list with one for each answer, as in `answer_seeds`.
    adapter: the adapter of all prompts or a list of adapters, as in `read_adapter_choice`.
    return_logprobs, return_dict_in_generate: return a GenerateOutput; the first with
        log-probabilities.
    streamer: receives the only prompt and its new tokens, and an end token that the result has.
    on_token: called as on_token(i, token) for each new token of answer i, except its end token.
        The answer ends if it returns True.
    cache_memory: limit of the cache of keys and values, in bytes or as "2GiB"; None takes half of
        the free memory at most.
    max_num_seqs: number of answers that are generated at a time; the others wait. More than 64
        dequantise the weights.

    Raises: ValueError if a prompt is missing, empty or too long, if a setting is out of range, or
        if PyTorch's default dtype or device was changed.
    """
    check_torch_defaults()
    defaults = model.generation_defaults
    ends = end_token_ids(eos_token_ids, model.eos_token_ids)
    pad = defaults.get("pad_token_id") if pad_token_id is None else pad_token_id
    if return_logprobs and return_dict_in_generate is False:
        raise ValueError(
            "return_logprobs=True returns a GenerateOutput; leave return_dict_in_generate out"
        )
    single = read_prompts(prompts, attention_mask, pad, ends)
    given = single.repeated(num_return_sequences)
    check_prompts(model, given.ids)
    named = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "min_new_tokens": min_new_tokens,
    }
    rule = sampling_config(do_sample, named, defaults)
    limits = new_token_limits(given, model.max_seq_length, max_new_tokens, max_length)
    check_least(rule.min_new_tokens, limits)
    adapters, indices = read_adapter_choice(model, adapter, len(single.ids))
    indices = [index for index in indices for _ in range(len(given.ids) // len(single.ids))]
    seeds = [0] * len(given.ids)
    if rule.temperature or seed is not None:
        seeds = answer_seeds(seed, given.ids, indices)
    stops = read_stop_strings(stop_strings, tokenizer, len(given.ids))
    answers = decode(
        model,
        list(map(Request, given.ids, limits, seeds, indices)),
        rule,
        end_tokens=ends,
        on_token=_listener(streamer, on_token, stops, given, ends),
        logprobs=return_logprobs,
        adapters=adapters,
        cache_memory=cache_nbytes(cache_memory),
        max_rows=min(whole_number("max_num_seqs", max_num_seqs), len(given.ids)),
    )
    if streamer:
        streamer.end()
    output = generation_output(given.grid, answers, ends, pad, stops and stops.found)
    return output if return_logprobs or return_dict_in_generate else output.sequences


def _listener(
    streamer: Streamer | None,
    on_token: OnToken | None,
    stops: StopStrings | None,
    given: Prompts,
    ends: Sequence[int],
) -> OnToken:
    """Hand the prompt to the streamer, and return the function that hands each new token on.

    Raises: ValueError if a streamer would get several prompts.
    """
    if streamer:
        if len(given.ids) != 1:
            raise ValueError("a streamer shows one answer to one prompt; leave streamer out")
        streamer.put(torch.tensor(given.ids))

    def hand_on(index: int, token: int) -> bool:
        """Return True if the answer ends with this token."""
        is_end = token in ends
        if streamer and (not is_end or given.grid is not None):
            streamer.put(torch.tensor([token]))
        if is_end:
            return True
        stopped = on_token is not None and on_token(index, token) is True
        found = stops is not None and stops.add(index, token)
        return stopped or found

    return hand_on
