"""Which rows have a label, and the loss over them: final norm, head and cross entropy, a tile of rows at a time.

Rows without a label never get as far as the norm, and nothing here is as long as the samples are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minitune.device import to_device_async
from minitune.kernels.cross_entropy import IGNORE_INDEX, linear_cross_entropy, logits_tile_rows
from minitune.model.layers import RMSNorm


@dataclass(frozen=True)
class LossRows:
    """The rows (M,) that predict a label, these labels (M,), and all the other rows."""

    rows: Tensor
    targets: Tensor
    others: Tensor

    @classmethod
    def from_labels(cls, labels: Tensor, positions: Tensor, vocab: int, size: int) -> "LossRows":
        """A row predicts the label of the next token, if that is in the same sample; labels and positions (N,).

        Of `size` rows those from N on are padding. On the host, where a label outside the vocabulary is a ValueError.
        """
        following = torch.cat(
            [
                torch.where(positions[1:] == 0, IGNORE_INDEX, labels[1:]),
                labels.new_tensor([IGNORE_INDEX]),
            ]
        )
        rows = (following != IGNORE_INDEX).nonzero()[:, 0]
        targets = following[rows]
        if (
            wrong := [label for label in targets.aminmax() if not 0 <= label < vocab]
            if len(rows)
            else []
        ):
            raise ValueError(
                f"label {int(wrong[0])} is neither {IGNORE_INDEX} nor within the vocabulary"
            )
        others = torch.ones(size, dtype=torch.bool).index_fill_(0, rows, False).nonzero()[:, 0]
        return cls(rows, targets, others)

    def to(self, device: torch.device) -> "LossRows":
        """On the device, without the host waiting for it."""
        return LossRows(
            *(to_device_async(t, device) for t in (self.rows, self.targets, self.others))
        )

    def __len__(self) -> int:
        return len(self.rows)


def new_logits_buffer(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tile of logits (rows, V), of fewer rows where there would be too many."""
    return torch.empty(
        (min(rows, logits_tile_rows(vocab, dtype.itemsize)), vocab), dtype=dtype, device=device
    )


def rows_loss(
    s: Tensor,
    loss_rows: LossRows,
    norm: RMSNorm,
    head: Tensor,
    denominator: float | Tensor,
    dx: Tensor | None,
    tile: Tensor | None = None,
) -> Tensor:
    """The token losses of the residual stream s (N, D) over `denominator`, 0-dim; their gradient goes into dx (N, D).

    head (V, D); dx, in its dtype, or None where no gradient is wanted; tile, from `new_tile`: where the logits go.
    """
    step = logits_tile_rows(len(head), head.element_size()) if tile is None else len(tile)
    losses = []
    for first in range(0, len(loss_rows), step):
        rows, targets = (
            loss_rows.rows[first : first + step],
            loss_rows.targets[first : first + step],
        )
        part = s[rows]
        h, rstd = norm.from_residual(part, head.dtype)
        loss, dh = linear_cross_entropy(
            h, head, targets, denominator, need_grad=dx is not None, logits_buffer=tile
        )
        losses.append(loss)
        if dx is not None:
            dx.index_copy_(0, rows, norm.backward(dh, part, rstd))
    if dx is not None:
        dx.index_fill_(0, loss_rows.others, 0)
    return torch.stack(losses).sum() if losses else s.new_zeros((), dtype=torch.float32)
