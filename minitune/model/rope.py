"""Rotary position embeddings: the tables of cos and sin that the RoPE kernel reads.

Pair i of a head (columns i and i + K/2) at position t is rotated by the angle

    t * theta^(-2i / K) / divisor_i                 0 <= i < K/2

Without scaling every divisor is 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minitune.config.model_config import ModelConfig


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
        return cls(angles.cos().to(device), angles.sin().to(device))


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
    """
    scaling, half = config.rope_scaling, config.head_dim // 2
    if scaling is None:
        return torch.ones(half)
    if scaling["rope_type"] == "linear":
        return torch.full((half,), scaling["factor"])
    wavelengths = 2 * torch.pi * _rope_periods(config)
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = ((original / wavelengths - low) / (high - low)).clamp(0, 1)  # 0: stretched, 1: kept
    return 1 / ((1 - blend) / scaling["factor"] + blend)
