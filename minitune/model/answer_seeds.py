"""The seed of each answer of a call, from the seed that the call names.

The seed of an answer is a hash of the named seed, the prompt's ids, and the number of equal prompts
with the same adapter before it in the call. The answers to one prompt therefore differ, and an
answer does not depend on the other prompts of its batch. Under another adapter the same prompt gets
the same draws.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import torch

from minitune.config.numbers import shown
from minitune.config.training_config import SEEDS


def answer_seeds(
    seed: int | Sequence[int] | None, prompts: Sequence[Sequence[int]], adapters: Sequence[int]
) -> list[int]:
    """Return a seed from 0 to 2^63 - 1 for each answer.

    seed: a seed for the call, or a list with one for each answer. None draws a seed from PyTorch's
        generator of the CPU, which torch.manual_seed seeds.
    prompts, adapters: the prompt of each answer, and the index of its adapter.

    Raises: ValueError if a seed is no whole number, or a list has another length.
    """
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    if isinstance(seed, Sequence):
        named, ranks = list(seed), [0] * len(prompts)
    else:
        named, ranks = (
            [seed] * len(prompts),
            _ranks(zip(map(tuple, prompts), adapters, strict=True)),
        )
    if len(named) != len(prompts):
        raise ValueError(
            f"seed lists {len(named)} seeds, and the call has {len(prompts)} answers; "
            "list one for each answer, or pass a single seed"
        )
    return [_hash(*key) for key in zip(named, ranks, prompts, strict=True)]


def _ranks(keys: Iterable[Hashable]) -> list[int]:
    """Return the number of equal keys before each key."""
    earlier: Counter = Counter()
    ranks = []
    for key in keys:
        ranks.append(earlier[key])
        earlier[key] += 1
    return ranks


def _hash(seed: int, rank: int, prompt: Sequence[int]) -> int:
    """Return 63 bits that depend on everything here.

    Raises: ValueError if the seed is no whole number.
    """
    if not SEEDS.hold(seed):
        raise ValueError(f"seed is {shown(seed)}; expected {SEEDS}")
    words = hashlib.blake2b(f"{seed} {rank}".encode(), digest_size=8)
    words.update(array("q", prompt).tobytes())
    return int.from_bytes(words.digest(), "little") >> 1
