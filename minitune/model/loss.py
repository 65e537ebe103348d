"""The loss over the labelled rows: final norm, head and cross entropy, one tile of rows at a time.

Unlabelled rows are dropped before the norm, so tensors here have one row per label. The letters are
those of decoder_layer.py; M is the number of labelled rows.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minitune.device import to_device_async
from minitune.kernels.backend import matmul
from minitune.kernels.cross_entropy import (
    IGNORE_INDEX,
    linear_cross_entropy,
    logits_columns,
    logits_tile_rows,
)
from minitune.model.norms import RMSNorm


@dataclass(frozen=True)
class LossRows:
    """The rows that enter the loss.

    rows: (M,), the rows that predict a label.
    targets: (M,), the labels that they predict.
    ignored: (N - M,), all other rows.
    """

    rows: Tensor
    targets: Tensor
    ignored: Tensor

    @classmethod
    def from_labels(cls, labels: Tensor, positions: Tensor, vocab: int, size: int) -> "LossRows":
        """Return the rows that predict a label, computed on the host.

        A row predicts the label of the next token, if both belong to the same sample.

        labels, positions: (N,), on the host; a label of -100 does not count.
        size: number of rows including padding, at least N.

        Raises: ValueError if a label is neither -100 nor in the vocabulary.
        """
        ends_sample = positions[1:] == 0
        next_labels = torch.where(ends_sample, IGNORE_INDEX, labels[1:])
        next_labels = torch.cat([next_labels, labels.new_tensor([IGNORE_INDEX])])  # (N,)
        rows = (next_labels != IGNORE_INDEX).nonzero()[:, 0]
        targets = next_labels[rows]
        for label in targets.aminmax() if len(rows) else ():
            if not 0 <= label < vocab:
                raise ValueError(
                    f"label {int(label)} is neither {IGNORE_INDEX} nor within the vocabulary "
                    f"of {vocab}"
                )
        ignored = torch.ones(size, dtype=torch.bool).index_fill_(0, rows, False).nonzero()[:, 0]
        return cls(rows, targets, ignored)

    def to(self, device: torch.device) -> "LossRows":
        """Return a copy on the device, without making the host wait."""
        tensors = (self.rows, self.targets, self.ignored)
        return LossRows(*(to_device_async(t, device) for t in tensors))

    def __len__(self) -> int:
        return len(self.rows)


def new_logits_buffer(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an empty tile of logits (n, V or more), with `rows` rows or as many as a tile has."""
    tile_rows = min(rows, logits_tile_rows(vocab, dtype.itemsize))
    return torch.empty((tile_rows, logits_columns(vocab)), dtype=dtype, device=device)


@dataclass(frozen=True)
class Head:
    """The end of a model: logits = multiplier * norm(s) W^T, from the residual stream s (N, D).

    weight: W (V, D).
    softcap: bound c of the logits, which become c tanh(logits / c); 0 for none.
    """

    norm: RMSNorm
    weight: Tensor
    multiplier: float = 1.0
    softcap: float = 0.0

    def logits(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (N, V) of s (N, D), and rstd of the norm (N,)."""
        h, rstd = self.norm.from_residual(s, self.weight.dtype)
        logits = matmul(h, self.weight.t(), None, self.multiplier)
        return (self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits), rstd

    def logits_backward(self, dlogits: Tensor, logits: Tensor, s: Tensor, rstd: Tensor) -> Tensor:
        """Return the gradient (N, D) of s, from that of the logits (N, V)."""
        if self.softcap:
            ratio = logits / self.softcap
            dlogits = dlogits * (1 - ratio) * (1 + ratio)
        return self.norm.backward(matmul(dlogits, self.weight, None, self.multiplier), s, rstd)


class LossBuffers(NamedTuple):
    """The memory of a loss. No layer runs meanwhile, so layers and losses can share memory.

    logits: a tile of the logits (n, V or more).
    head: room for the head (V, D) in the compute dtype; None if the head is stored in that dtype.
    """

    logits: Tensor
    head: Tensor | None = None


def rows_loss(
    s: Tensor,
    loss_rows: LossRows,
    head: Head,
    denominator: float | Tensor,
    dresidual: Tensor | None,
    logits_buffer: Tensor | None = None,
) -> Tensor:
    """Return the sum of the rows' losses over `denominator`, 0-dim.

    s: the residual stream (N, D).
    dresidual: (N, D), receives the gradient of s in its own dtype; None computes no gradient.
    logits_buffer: from `new_logits_buffer`; None allocates one.
    """
    if logits_buffer is None:
        tile_rows = logits_tile_rows(len(head.weight), head.weight.element_size())
    else:
        tile_rows = len(logits_buffer)
    losses = []
    for first in range(0, len(loss_rows), tile_rows):
        rows = loss_rows.rows[first : first + tile_rows]  # (n,)
        targets = loss_rows.targets[first : first + tile_rows]
        x = s[rows]  # (n, D)
        h, rstd = head.norm.from_residual(x, head.weight.dtype)
        loss, dh = linear_cross_entropy(
            h,
            head.weight,
            targets,
            denominator,
            need_grad=dresidual is not None,
            logits_buffer=logits_buffer,
            multiplier=head.multiplier,
            softcap=head.softcap,
        )
        losses.append(loss)
        if dresidual is not None:
            dresidual.index_copy_(0, rows, head.norm.backward(dh, x, rstd))
    if dresidual is not None:
        dresidual.index_fill_(0, loss_rows.ignored, 0)
    return torch.stack(losses).sum() if losses else s.new_zeros((), dtype=torch.float32)
