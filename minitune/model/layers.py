"""What a decoder layer stands on: where packed tokens stand, RoPE's tables, the embedding and the norm."""

import torch
from torch import Tensor, nn

from minitune.device import pin
from minitune.kernels.embedding import embed
from minitune.kernels.rms_norm import add_rms_norm_, rms_norm, rms_norm_backward


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

    def from_residual(self, s: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `forward`, of rows of the residual stream, which is wider than dtype, that of the norm."""
        return self(s, out=torch.empty_like(s, dtype=dtype))

    def of_sum(
        self, x: Tensor, addend: Tensor, stream: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, of x + addend; addend is added to `stream` as well."""
        return add_rms_norm_(x, addend, self.weight, self.eps, stream, out)

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
