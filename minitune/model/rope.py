"""Rotary position embeddings: the tables of cos and sin that the RoPE kernel reads.

Pair i of a head (columns i and i + K/2) at position t is rotated by the angle

    t * theta^(-2i / K) / divisor_i                 0 <= i < K/2

Without scaling every divisor is 1. YaRN also scales cos and sin by a constant, which makes scores
of long contexts sharper.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minitune.config.model_config import ModelConfig

# Turns within the original context between which YaRN blends, unless config.json gives others.
YARN_BETA_FAST, YARN_BETA_SLOW = 32.0, 1.0


@dataclass(frozen=True)
class RopeTables:
    """cos and sin of the angles of every position, each float32 (positions, K/2)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def build(cls, config: ModelConfig, positions: int, device: torch.device) -> "RopeTables":
        """Return the tables of `positions` positions, computed in float32 as in training."""
        frequencies = 1.0 / _rope_periods(config) / rope_divisors(config)  # (K/2,)
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
        scale = rope_scale(config)
        return cls((angles.cos() * scale).to(device), (angles.sin() * scale).to(device))


def _rope_periods(config: ModelConfig) -> Tensor:
    """Return theta^(2i / K), float32 (K/2,): the positions per radian before scaling."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return config.rope_theta**exponents


def rope_divisors(config: ModelConfig) -> Tensor:
    """Return the divisors of RoPE's frequencies, float32 (K/2,).

    linear: all divisors are `factor`.
    llama3: depends on the wavelength 2 pi theta^(2i / K), in positions (arXiv 2407.21783, 3.2).
        Wavelengths shorter than original / high_freq_factor have divisor 1. Those longer than
        original / low_freq_factor have divisor `factor`. Between the two, 1 / divisor is blended
        from 1 / factor to 1, linearly in original / wavelength.
    yarn: depends on the index i of the pair (arXiv 2309.00071, 3.2). Pairs that turn more than
        beta_fast times within the original context have divisor 1. Pairs that turn less than
        beta_slow times have divisor `factor`. Between, 1 / divisor is blended linearly in i.
    """
    scaling, half = config.rope_scaling, config.head_dim // 2
    if scaling is None:
        return torch.ones(half)
    if scaling["rope_type"] == "linear":
        return torch.full((half,), scaling["factor"])
    if scaling["rope_type"] == "yarn":
        return _yarn_divisors(config)
    wavelengths = 2 * torch.pi * _rope_periods(config)
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = ((original / wavelengths - low) / (high - low)).clamp(0, 1)  # 0: stretched, 1: kept
    return 1 / ((1 - blend) / scaling["factor"] + blend)


def _yarn_divisors(config: ModelConfig) -> Tensor:
    scaling, K = config.rope_scaling, config.head_dim
    original = scaling["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        """Return the index, not rounded, of the pair that turns so often in the old context."""
        period = original / (2 * math.pi * times)
        return K / 2 * math.log(period) / math.log(config.rope_theta)

    first = max(math.floor(pair_that_turns(scaling["beta_fast"] or YARN_BETA_FAST)), 0)
    last = min(math.ceil(pair_that_turns(scaling["beta_slow"] or YARN_BETA_SLOW)), K - 1)
    pairs = torch.arange(K // 2, dtype=torch.float32)
    blend = 1 - ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)  # 0: stretched, 1: kept
    return 1 / ((1 - blend) / scaling["factor"] + blend)


def rope_scale(config: ModelConfig) -> float:
    """Return the factor of cos and sin: 1, except for YaRN.

    YaRN's is 0.1 ln(factor) + 1, unless config.json gives attention_factor, or gives mscale and
    mscale_all_dim, the factors of two such terms whose ratio counts.
    """
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] != "yarn":
        return 1.0
    if scaling["attention_factor"]:
        return scaling["attention_factor"]
    growth = 0.1 * math.log(max(scaling["factor"], 1.0))
    if scaling["mscale"] and scaling["mscale_all_dim"]:
        return (scaling["mscale"] * growth + 1) / (scaling["mscale_all_dim"] * growth + 1)
    return growth + 1
