"""Helpers of the AdamW tests: gradients, moments, and one update of either kind of moments."""

import torch

from minitune.kernels.adamw import adamw_, adamw_8bit_, dequantize_moment
from minitune.training.optimizer import moment_tables

SETTINGS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0}


def normal(*shape, seed=0, device="cpu"):
    """Return normal random numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def gradients(P, seed, device="cpu"):
    """Return gradients (P,) of very different size from block to block, as those of A and B."""
    block = torch.arange(P, device=device) // 256
    return normal(P, seed=seed, device=device) * 10.0 ** -(block % 5)


def new_moments(P, eight_bit, device):
    """Return moments of zero: m and v, or in 8 bits codes of m and v and scales of m and v."""
    if not eight_bit:
        return list(torch.zeros(2, P, device=device))
    codes = torch.zeros(2, P, dtype=torch.uint8, device=device)
    absmax = torch.zeros(2, -(-P // 256), device=device)
    return [*codes, *absmax]


def update_(w, g, moments, norm, **settings):
    """Update w and moments of either kind in place."""
    if len(moments) == 2:
        adamw_(w, g, *moments, norm, **settings)
    else:
        adamw_8bit_(w, g, *moments, moment_tables(w.device), norm, **settings)


def in_float32(moments):
    """Return m and v in float32, from moments of either kind."""
    if len(moments) == 2:
        return moments
    m, v, m_absmax, v_absmax = moments
    tables = moment_tables(m.device)
    return dequantize_moment(m, m_absmax, tables[0]), dequantize_moment(v, v_absmax, tables[2])
