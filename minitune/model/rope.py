"""Rotary position embeddings: the tables of cos and sin that the RoPE kernel reads.

Pair i of a head (columns i and i + R/2) at position t is rotated by the angle

    t * theta^(-2i / R) / divisor_i                 0 <= i < R/2

R is the rotated width: the width of a head, or less if only its first columns are rotated. Without
scaling every divisor is 1. YaRN and longrope also scale cos and sin by a constant, which makes
scores of long contexts sharper.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minitune.config.rope_config import RopeConfig

# Turns within the original context between which YaRN blends, unless config.json gives others.
YARN_BETA_FAST, YARN_BETA_SLOW = 32.0, 1.0


@dataclass(frozen=True)
class RopeTables:
    """cos and sin of the angles of every position, each float32 (positions, R/2).

    query_scale: the factor of the queries at every position, float32 (positions,); None if it is 1.
    """

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None = None

    @property
    def rotary_dim(self) -> int:
        """Return R, the rotated columns of a head."""
        return 2 * self.cos.shape[1]

    @classmethod
    def build(cls, rope: RopeConfig, positions: int, device: torch.device) -> "RopeTables":
        """Return the tables of `positions` positions, computed in float32 as in training."""
        frequencies = 1.0 / _rope_periods(rope) / rope_divisors(rope, positions)  # (R/2,)
        index = torch.arange(positions, dtype=torch.float32)
        angles = torch.outer(index, frequencies)
        scale = rope_scale(rope)
        cos, sin = (angles.cos() * scale).to(device), (angles.sin() * scale).to(device)
        query_scale = _query_scale(rope, index)
        return cls(cos, sin, None if query_scale is None else query_scale.to(device))


def _query_scale(rope: RopeConfig, positions: Tensor) -> Tensor | None:
    """Return the factor of the queries at float32 positions (P,), or None if all factors are 1."""
    if not rope.query_growth:
        return None
    contexts = torch.floor(positions / rope.scaling["original_max_position_embeddings"])
    return 1 + rope.query_growth * torch.log(1 + contexts) if contexts.any() else None


def _rope_periods(rope: RopeConfig) -> Tensor:
    """Return theta^(2i / R), float32 (R/2,): the positions per radian before scaling."""
    return rope.theta ** (
        torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    )


def rope_divisors(rope: RopeConfig, positions: int) -> Tensor:
    """Return the divisors of RoPE's frequencies for a context of `positions`, float32 (R/2,).

    linear: all divisors are `factor`.
    llama3: depends on the wavelength 2 pi theta^(2i / R), in positions (arXiv 2407.21783, 3.2).
        Wavelengths shorter than original / high_freq_factor have divisor 1. Those longer than
        original / low_freq_factor have divisor `factor`. Between the two, 1 / divisor is blended
        from 1 / factor to 1, linearly in original / wavelength.
    yarn: depends on the index i of the pair (arXiv 2309.00071, 3.2). Pairs that turn more than
        beta_fast times within the original context have divisor 1. Pairs that turn less than
        beta_slow times have divisor `factor`. Between, 1 / divisor is blended linearly in i.
    longrope: config.json lists the divisors (arXiv 2402.13753), one list for contexts up to the
        original one and another for longer contexts. The context is max_seq_length, not the length
        of a sample, so that a sample has one rotation in every batch and in generation.
    """
    scaling, half = rope.scaling, rope.rotary_dim // 2
    if scaling is None:
        return torch.ones(half)
    if rope.kind == "linear":
        return torch.full((half,), scaling["factor"])
    if rope.kind == "yarn":
        return _yarn_divisors(rope)
    if rope.kind == "longrope":
        is_long = positions > scaling["original_max_position_embeddings"]
        return torch.tensor(scaling["long_factor" if is_long else "short_factor"])
    wavelengths = 2 * torch.pi * _rope_periods(rope)
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = ((original / wavelengths - low) / (high - low)).clamp(0, 1)  # 0: stretched, 1: kept
    return 1 / ((1 - blend) / scaling["factor"] + blend)


def _yarn_divisors(rope: RopeConfig) -> Tensor:
    scaling, R = rope.scaling, rope.rotary_dim
    original = scaling["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        """Return the index, not rounded, of the pair that turns so often in the old context."""
        period = original / (2 * math.pi * times)
        return R / 2 * math.log(period) / math.log(rope.theta)

    first = max(math.floor(pair_that_turns(scaling["beta_fast"] or YARN_BETA_FAST)), 0)
    last = min(math.ceil(pair_that_turns(scaling["beta_slow"] or YARN_BETA_SLOW)), R - 1)
    pairs = torch.arange(R // 2, dtype=torch.float32)
    blend = 1 - ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)  # 0: stretched, 1: kept
    return 1 / ((1 - blend) / scaling["factor"] + blend)


def rope_scale(rope: RopeConfig) -> float:
    """Return the factor of cos and sin: 1, except for YaRN and longrope.

    attention_factor of config.json comes first. YaRN's factor is 0.1 ln(factor) + 1, or the ratio
    of two such terms that mscale and mscale_all_dim weigh. longrope's is
    sqrt(1 + ln(factor) / ln(original)).
    """
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    scaling = rope.scaling
    if scaling["attention_factor"]:
        return scaling["attention_factor"]
    log_factor = math.log(max(scaling["factor"], 1.0))
    if rope.kind == "longrope":
        return math.sqrt(1 + log_factor / math.log(scaling["original_max_position_embeddings"]))
    growth = 0.1 * log_factor
    if scaling["mscale"] and scaling["mscale_all_dim"]:
        return (scaling["mscale"] * growth + 1) / (scaling["mscale_all_dim"] * growth + 1)
    return growth + 1
