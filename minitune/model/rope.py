"""TODO docstring."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minitune.config.model_config import ModelConfig


@dataclass(frozen=True)
class RopeTables:
    """cos and sin of every position's angles, fp32 (positions, K/2)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def build(cls, config: ModelConfig, positions: int, device: torch.device) -> "RopeTables":
        """In fp32 throughout, as the models were trained; linear and llama3 scaling (arXiv 2407.21783, sec. 3.2)."""
        frequencies = 1.0 / _rope_periods(config) / rope_divisors(config)
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
        return cls(angles.cos().to(device), angles.sin().to(device))


def _rope_periods(config: ModelConfig) -> Tensor:
    """theta^(2i / K), fp32 (K/2,): positions a radian, before scaling."""
    return config.rope_theta ** (
        torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    )


def rope_divisors(config: ModelConfig) -> Tensor:
    """What RoPE's frequencies are divided by, fp32 (K/2,): 1 where the model has no scaling.

    llama3: wavelengths shorter than original/high_freq_factor stay, those longer than original/low_freq_factor are
    stretched by `factor`, and between them the two are blended.
    """
    scaling, half = config.rope_scaling, config.head_dim // 2
    if scaling is None:
        return torch.ones(half)
    if scaling["rope_type"] == "linear":
        return torch.full((half,), scaling["factor"])
    wavelengths = 2 * torch.pi * _rope_periods(config)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    return 1 / ((1 - blend.clamp(0, 1)) / scaling["factor"] + blend.clamp(0, 1))
