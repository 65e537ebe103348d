"""The comparison of next-token distributions P and Q over some rows.

    KL(P || Q) = mean of sum over v of P[v] (log P[v] - log Q[v])       nats a token
    top-1      = share of the rows for which P and Q have the same likeliest token
    loss       = mean of -log P[target]; the perplexity is exp(loss)

Logits are in float32: rounded to bfloat16, they alone would make a KL of about 0.001 nats. The
softmax is in float64, because the terms of a small KL nearly cancel.
"""

import torch
from torch import Tensor

from minitune.kernels.cross_entropy import logits_tile_rows
from minitune.model.loss import Head


def compared_rows(V: int) -> int:
    """Return the rows of a tile of log probabilities over a vocabulary of V.

    A row takes both log probabilities and two temporaries, all in float64.
    """
    return logits_tile_rows(V, 4 * torch.float64.itemsize)


def log_probabilities(head: Head, s: Tensor) -> Tensor:
    """Return the log probabilities of the residual stream s (n, D), float64 (n, V)."""
    return head.logits(s)[0].double().log_softmax(-1)


def comparison_sums(log_p: Tensor, log_q: Tensor, targets: Tensor) -> Tensor:
    """Return the sums over the rows of KL, same top-1 token, loss of P and loss of Q.

    log_p, log_q: float64 (n, V).
    targets: (n,).

    Returns: float64 (4,).
    """
    target = targets[:, None]
    rows = (
        (log_p.exp() * (log_p - log_q)).sum(-1),
        log_p.argmax(-1) == log_q.argmax(-1),
        -log_p.gather(1, target)[:, 0],
        -log_q.gather(1, target)[:, 0],
    )
    return torch.stack([row.double().sum() for row in rows])
