"""What a decoder layer stands on: where packed tokens stand, RoPE's tables, the embedding and the norm."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minitune.config import ModelConfig
from minitune.kernels.embedding import embed
from minitune.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from minitune.pinned import pin


def send(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@dataclass(frozen=True)
class Packed:
    """Where each of N packed tokens stands: its position in its sample, and its sample's bounds; int32 (N,)."""

    positions: Tensor
    start: Tensor
    end: Tensor
    length: int | None = None  # of every sample, where the host knows that they all have the same
    longest: int | None = None  # rows of the longest sample or a bound on them, where the host knows one

    @classmethod
    def from_positions(cls, positions: Tensor) -> "Packed":
        """From positions (N,) that restart at 0 with each sample; everything follows from them, without a sync."""
        positions = positions.to(torch.int32)
        index = torch.arange(len(positions), dtype=torch.int32, device=positions.device)
        first = torch.where(positions == 0, index, len(positions))  # a sample's first row; N elsewhere
        following = torch.cat([first[1:], first.new_full((min(1, len(first)),), len(first))])
        end = following.flip(0).cummin(0).values.flip(0)
        length = longest = None
        if positions.device.type == "cpu" and len(positions):
            longest = int(positions.max()) + 1
            count = int((positions == 0).sum())
            expected = torch.arange(len(positions) // count, dtype=torch.int32).repeat(count)
            length = len(positions) // count if torch.equal(expected, positions) else None
        return cls(positions, index - positions, end, length, longest)

    def to(self, device: torch.device) -> "Packed":
        tensors = (t.to(device, non_blocking=True) for t in (self.positions, self.start, self.end))
        return Packed(*tensors, self.length, self.longest)


@dataclass(frozen=True)
class Rotary:
    """cos and sin of every position's angles, fp32 (positions, K/2)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def build(cls, config: ModelConfig, positions: int, device: torch.device) -> "Rotary":
        """In fp32 throughout, as the models were trained; linear and llama3 scaling (arXiv 2407.21783, sec. 3.2)."""
        frequencies = 1.0 / _rope_periods(config) / rope_divisors(config)
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
        return cls(angles.cos().to(device), angles.sin().to(device))


def _rope_periods(config: ModelConfig) -> Tensor:
    """theta^(2i / K), fp32 (K/2,): positions a radian, before scaling."""
    return config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)


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


class Embedding(nn.Module):
    def __init__(self, rows: int, width: int):
        super().__init__()
        self.shape = (rows, width)
        self.register_parameter("weight", None)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, D) of ids (N,)."""
        return embed(ids, self.weight.detach(), dtype)

    def to_host(self) -> None:
        """Keep the table in pinned host memory. MemoryError where the host refuses."""
        table = torch.empty(self.shape, dtype=self.weight.dtype)
        table.copy_(self.weight.detach())
        pin(table, self)
        self.weight = nn.Parameter(table, requires_grad=False)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.shape, self.eps = (width,), eps
        self.register_parameter("weight", None)

    def forward(self, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (N, D) -> its norm (N, D) and the reciprocal root mean square of each row, fp32 (N,)."""
        return rms_norm(x, self.weight, self.eps, out)

    def of_stream(self, s: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `forward`, of rows of the residual stream, which is wider than dtype, that of the norm."""
        return self(s, out=torch.empty_like(s, dtype=dtype))

    def after_add(
        self, x: Tensor, addend: Tensor, stream: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, of x + addend; addend is added to `stream` as well."""
        return add_rms_norm(x, addend, self.weight, self.eps, stream, out)

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        rstd: Tensor,
        dresidual: Tensor | None = None,
        addend: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """dx of the norm of x, or of x + addend, plus the gradient that the residual carries."""
        return rms_norm_backward(dy, x, self.weight, rstd, dresidual, addend, out)
