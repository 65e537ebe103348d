"""Timed generation, with the same calls and keys for minitune and for its peers.

Every prompt has the same number of random tokens, the adapter's B is random, tokens are the
likeliest, and no end token ends an answer. A record of a run has the figures of each number of
sequences under "decode":

    first_call_s, first_call_tokens      seconds of the first call, and its new tokens a sequence
    first_token_s                        seconds of a later call that makes one token a sequence
    call_s, tok_s                        a later call: median seconds, new tokens a second
    step_ms                              a step, from the last two figures
    peak_gb, reserved_gb                 peaks in GiB: allocated, reserved; the model included

This file does not import minitune, because a peer's process runs without the checkout.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmark.records import FIRST_TOKEN, memory_figures, synchronize

ONE_TOKEN_CALLS = 3
B_STD = 0.01  # of a random adapter

Generate = Callable[[list[list[int]], int], object]  # prompts, new tokens -> answers


def random_prompts(sequences: int, tokens: int, vocab: int) -> list[list[int]]:
    """Return prompts of random tokens, the same at each call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(FIRST_TOKEN, vocab, (sequences, tokens), generator=generator).tolist()


def randomize_b_(parameters: Sequence[torch.Tensor]) -> None:
    """Fill the B matrices of an adapter with random values; a new adapter's are zeros."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(B_STD * torch.randn(parameter.shape, generator=generator))


def time_generation(
    generate: Generate, a: argparse.Namespace, sequences: int, vocab: int, first_tokens: int
) -> dict[str, Any]:
    """Return the figures of one number of sequences.

    a: flags of bench.py or peers.py: prompt_tokens, new_tokens and calls.
    first_tokens: new tokens of the first call.
    """
    prompts, new = random_prompts(sequences, a.prompt_tokens, vocab), a.new_tokens
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    first = seconds_of(generate, prompts, first_tokens)
    calls = [seconds_of(generate, prompts, new) for _ in range(a.calls)]
    one = statistics.median(seconds_of(generate, prompts, 1) for _ in range(ONE_TOKEN_CALLS))
    call = statistics.median(calls)
    memory = memory_figures()
    return {
        "first_call_s": round(first, 3),
        "first_call_tokens": first_tokens,
        "first_token_s": round(one, 4),
        "call_s": round(call, 4),
        "tok_s": round(sequences * new / call, 1),
        "step_ms": round(1e3 * (call - one) / (new - 1), 3),
        "peak_gb": memory["peak_gb"],
        "reserved_gb": memory["reserved_gb"],
    }


def seconds_of(generate: Generate, prompts: list[list[int]], new_tokens: int) -> float:
    """Return the wall clock seconds of a call between two waits for the device."""
    synchronize()
    start = time.perf_counter()
    generate(prompts, new_tokens)
    synchronize()
    return time.perf_counter() - start
